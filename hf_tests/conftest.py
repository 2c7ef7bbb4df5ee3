"""Print tables of passed and skipped tests after the run, with the reasons."""

from collections import Counter, defaultdict

import pytest

from .skips import explain


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "is_pipeline_test: set by transformers")
    config.addinivalue_line("markers", "torch_compile_test: set by transformers")


class Results:
    """Outcome of each test; for a test with subtests the worst one, where skipped is worse than passed."""

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self.outcomes: dict[tuple[str, str], str] = {}
        self.reasons: dict[tuple[str, str], str] = {}
        reports = [r for category in reporter.stats.values() for r in category if isinstance(r, pytest.TestReport)]
        severity = ["passed", "skipped", "failed"]
        for report in sorted(reports, key=lambda report: severity.index(report.outcome)):
            key = tuple(report.nodeid.split("::")[1:3])
            self.outcomes[key] = report.outcome
            if report.outcome == "skipped":
                self.reasons[key] = _reason(report)

    def counts(self) -> dict[str, Counter[str]]:
        """Return configuration -> outcome -> number of tests."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for (configuration, _), outcome in self.outcomes.items():
            counts[configuration][outcome] += 1
        return counts

    def skips(self) -> dict[str | None, dict[str, set[str]]]:
        """Return explanation -> test -> configurations in which it was skipped."""
        skips: dict[str | None, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for (configuration, test), outcome in self.outcomes.items():
            if outcome == "skipped":
                why = explain(test, self.reasons[configuration, test])
                line = test if why else f"{test}: {self.reasons[configuration, test]}"
                skips[why][line].add(configuration)
        return skips


def _reason(report: pytest.TestReport) -> str:
    return report.longrepr[2].removeprefix("Skipped: ") if isinstance(report.longrepr, tuple) else ""


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    results = Results(terminalreporter)
    counts = results.counts()
    terminalreporter.section("configurations")
    for configuration, outcomes in sorted(counts.items()):
        listed = ", ".join(f"{outcomes[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        terminalreporter.write_line(f"{configuration}: {listed}")
    terminalreporter.section("skipped, and why")
    for why, tests in sorted(results.skips().items(), key=lambda item: item[0] or ""):
        terminalreporter.write_line(f"{why or 'NOT EXPECTED'} ({len(tests)})")
        for test, configurations in sorted(tests.items()):
            some = "" if len(configurations) == len(counts) else f" ({', '.join(sorted(configurations))})"
            terminalreporter.write_line(f"    {test}{some}")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if a skip has no explanation."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is not None and session.exitstatus == pytest.ExitCode.OK and None in Results(reporter).skips():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
