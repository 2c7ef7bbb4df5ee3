"""Virtual environments for one run each, made by uv from a shared cache, and the tables in docs/compatibility.md.

Only the standard library: whatever Python starts `make compat` has nothing else.
"""

import configparser
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / ".compat"  # the environment of the moment, and uv's cache unless UV_CACHE_DIR says where
DOCUMENT = ROOT / "docs" / "compatibility.md"

_VERSIONS = """
import json, sys
from importlib import metadata
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = metadata.version(name)
    except metadata.PackageNotFoundError:
        pass
print(json.dumps(found | {"python": ".".join(map(str, sys.version_info[:3]))}))
"""


class CannotRunError(Exception):
    """This machine lacks a requirement, described in one sentence."""


class Environment:
    """Packages for one run.

    Args:
        uv: the program.
        folder: of the environment.
    """

    def __init__(self, uv: Path, folder: Path) -> None:
        self.uv, self.folder = uv, folder
        self.python = folder / "bin" / "python"

    def install(self, *arguments: str) -> None:
        """Install packages: arguments of `uv pip install`.

        Raises:
            CannotRunError: uv cannot.
        """
        run_uv(self.uv, "pip", "install", "--quiet", "--python", str(self.python), *arguments)

    def versions(self, *names: str) -> dict[str, str]:
        """Versions of the packages that are there, and of `python`."""
        command = [str(self.python), "-I", "-c", _VERSIONS, *names]
        return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    def run(self, *arguments: str, log: Path, timeout: float, **variables: str) -> int:
        """Run this Python in the root of the repository, and return its exit status; what it prints is in `log`.

        Args:
            log: a file.
            timeout: seconds; after them the status is 124.
            variables: of the environment, besides those that keep it offline and apart from the user's own files.
        """
        cache = self.folder / "home"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(cache),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
            **variables,
        }
        with log.open("w", encoding="utf-8") as file:
            try:
                return subprocess.run(
                    [str(self.python), *arguments],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    timeout=timeout,
                    start_new_session=True,  # a runner without it ended silently around DeepSpeed
                    check=False,
                ).returncode
            except subprocess.TimeoutExpired:
                return 124


def run_uv(uv: Path, *arguments: str) -> str:
    """Run uv and return its output.

    Raises:
        CannotRunError: it fails, with the first line that says why.
    """
    pythons = [str(path) for path in sorted(Path.home().glob(".pyenv/versions/*/bin"))]
    environment = {
        "UV_CACHE_DIR": str(WORK / "cache"),
        "UV_LINK_MODE": "hardlink",
        **{name: value for name, value in os.environ.items() if value},
        "UV_PYTHON_DOWNLOADS": "never",
        "PATH": os.pathsep.join([os.environ.get("PATH", ""), *pythons]),
    }
    process = subprocess.run(
        [str(uv), *arguments], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    if process.returncode:
        lines = [line.strip() for line in process.stderr.splitlines() if line.strip()]
        raise CannotRunError(" ".join(lines[:3])[:300] if lines else f"uv ended with status {process.returncode}")
    return process.stdout.strip()


@contextmanager
def environment(uv: Path, python: str) -> Iterator[Environment]:
    """Yield a new environment, which is removed at the end; the cache is kept.

    Args:
        uv: the program.
        python: version, as `3.12`.

    Raises:
        CannotRunError: there is no such Python here.
    """
    folder = WORK / f"environment-{os.getpid()}"
    try:
        interpreter = run_uv(uv, "python", "find", "--system", python)
    except CannotRunError as error:
        raise CannotRunError(f"there is no Python {python} on this machine") from error
    try:
        run_uv(uv, "venv", "--quiet", "--python", interpreter, str(folder))
        yield Environment(uv, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def requirements() -> list[str]:
    """Return the requirements of the package in setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    lines = parser["options"]["install_requires"].splitlines()
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def run_rows(
    table: str,
    option: str,
    columns: Sequence[str],
    known: Sequence[str],
    chosen: Sequence[str],
    run: Callable[[str], tuple[list[str], bool]],
    not_run: Callable[[str, str], list[str]],
) -> int | str:
    """Run rows of a table of docs/compatibility.md one after the other and write each when it is done.

    Args:
        table: name of the table.
        option: variable of `make` that chooses rows.
        columns: its column names.
        known: names of all its rows.
        chosen: names of the rows to run; all if empty.
        run: return the cells of a row, and whether it ended as expected.
        not_run: return the cells of a row that this machine cannot run, from its name and the reason.

    Returns:
        The exit status: a message if a name is unknown, 1 if a row did not end as expected, else 0.
    """
    unknown = [name for name in chosen if name not in known]
    if unknown:
        return f"{option}: unknown {', '.join(unknown)}. There are {', '.join(known)}"
    WORK.mkdir(exist_ok=True)
    unexpected = []
    for name in chosen or known:
        begun = time.monotonic()
        try:
            cells, expected = run(name)
        except CannotRunError as error:
            cells, expected = not_run(name, f"not run: {error}"), True
        print(f"{name}: {', '.join(cells)} ({minutes(begun)})", flush=True)
        unexpected += [] if expected else [name]
        update_table(table, columns, {name: cells}, list(known))
    print(f"{DOCUMENT.relative_to(ROOT)}: rows written, measured on {machine()}; logs in {WORK}")
    if unexpected:
        print(f"not as expected: {', '.join(unexpected)}")
    return int(bool(unexpected))


def machine() -> str:
    """Processor, number of cores and system, in words."""
    names = re.findall(r"model name\s*:\s*(.+)", _text(Path("/proc/cpuinfo"))) or [
        platform.processor() or "unknown CPU"
    ]
    return f"{names[0]}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def today() -> str:
    return datetime.date.today().isoformat()


def minutes(begun: float) -> str:
    return f"{(time.monotonic() - begun) / 60:.1f} min"


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def update_table(
    name: str,
    columns: Sequence[str],
    rows: Mapping[str, Sequence[str]],
    order: Sequence[str],
    document: Path = DOCUMENT,
) -> None:
    """Write rows into a table of a document, between `<!-- NAME: begin -->` and `<!-- NAME: end -->`; other rows stay.

    Args:
        name: of the table.
        columns: heads; the first one is of the names of the rows.
        rows: name -> the other cells.
        order: names of all rows that the table may have. A row of another name is removed.
        document: a Markdown file.

    Raises:
        ValueError: the document lacks the two comments.
    """
    text = document.read_text(encoding="utf-8")
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"`document` {document} must have {begin.strip()} and, after it, {end}, once each.")
    before, rest = text.split(begin)
    old, after = rest.split(end)
    cells = {}
    for line in old.splitlines()[2:]:
        first, *others = [cell.strip() for cell in line.strip().strip("|").split(" | ")]
        if len(others) == len(columns) - 1:
            cells[first.strip("` ")] = others
    cells |= {row: [_cell(value) for value in values] for row, values in rows.items()}
    lines = [" | ".join(columns), " | ".join(["---"] * len(columns))]
    lines += [" | ".join([f"`{row}`", *cells[row]]) for row in order if row in cells]
    table = "".join(f"| {line} |\n" for line in lines)
    document.write_text(f"{before}{begin}{table}{end}{after}", encoding="utf-8")


def _cell(value: str) -> str:
    return " ".join(value.replace("|", "/").split())
