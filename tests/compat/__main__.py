"""Run tests with old and new versions of what the package needs: `make compat`, or `python -m tests.compat UV [ROW ...]`.

Each row gets an environment of its own. Rows with `oldest` have the lower bounds of setup.cfg, all of them together, those with
`newest` the newest releases that its ranges admit.
"""

import sys
import xml.etree.ElementTree as ET
from functools import partial
from pathlib import Path
from typing import NamedTuple

from .environments import WORK, environment, requirements, run_rows, today


class Row(NamedTuple):
    """Versions to test with.

    Args:
        python: version.
        oldest: take the lower bounds of setup.cfg, else the newest releases.
        pins: requirements besides.
    """

    python: str
    oldest: bool = False
    pins: tuple[str, ...] = ()


ROWS = {
    f"python{python}-{end}": Row(python, end == "oldest")
    for python in ("3.11", "3.12", "3.13")
    for end in ("oldest", "newest")
} | {
    "python3.14-newest": Row("3.14"),
    "gpu-image": Row("3.12", pins=("torch==2.11.*", "transformers==5.17.*", "huggingface-hub==1.33.*")),
}

# Those that meet other packages most, and take a minute or two of a processor. `make test` runs all tests, with one set of versions.
TESTS = {
    "model": (
        "tests/clca/test_trainer.py",
        "tests/clca/test_stock_checkpoints.py",
        "tests/clca/test_versions.py",
        "tests/checkpoints/test_from_transformers.py::test_without_reduction_it_equals_its_source",
    ),
    "Hub": ("tests/clca/test_hub.py", "tests/clca/test_remote_code.py", "tests/clca/test_push_to_hub.py"),
    "goldens": ("tests/clca/test_goldens.py",),
    "script": ("tests/script/test_run_ufgir.py",),
}
SHOWN = ("torch", "transformers", "huggingface-hub", "datasets", "accelerate", "numpy")
COLUMNS = ("row", "Python", *SHOWN, "passed", "failed", "skipped", "date")


def counts(report: Path) -> tuple[int, int, int]:
    """Return the numbers of passed, failed (including errors) and skipped tests in pytest's XML report."""
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    total, errors, failed, skipped = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "errors", "failures", "skipped")
    )
    return total - errors - failed - skipped, errors + failed, skipped


def run_row(uv: Path, name: str) -> tuple[list[str], bool]:
    """Return the cells of a row, and whether all its tests passed."""
    row = ROWS[name]
    with environment(uv, row.python) as env:
        direct = ["--resolution", "lowest-direct"] if row.oldest else []
        env.install("--only-binary", ":all:", *direct, *requirements(), *row.pins, "pytest>=9,<10")
        versions = env.versions(*SHOWN)
        log, report = WORK / f"{name}.log", WORK / f"{name}.xml"
        report.unlink(missing_ok=True)
        files = [file for group in TESTS.values() for file in group]
        options = [
            "-q",
            "-rfE",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow",
            "-k",
            "not learned",
            f"--junitxml={report}",
        ]
        status = env.run("-m", "pytest", *options, *files, log=log, timeout=3600)
        if not report.exists():
            return [versions["python"], *(versions[n] for n in SHOWN), f"status {status}", "-", "-", today()], False
        found = counts(report)
        cells = [versions["python"], *(versions[n] for n in SHOWN), *map(str, found), today()]
        return cells, status == 0


def not_run(name: str, reason: str) -> list[str]:
    """Return the cells of a row that could not be run."""
    return ["-", *["-"] * len(SHOWN), reason, "-", "-", today()]


def main(arguments: list[str]) -> int | str:
    """Run; the exit status is 1 if a test failed."""
    uv = Path(arguments[0]).absolute()
    return run_rows("compat", "ROWS", COLUMNS, list(ROWS), arguments[1:], partial(run_row, uv), not_run)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
