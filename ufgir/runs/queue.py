"""The runs of a grid, worked off one by one or several at once, and taken up again after an interruption."""

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..training.checkpointing import last_complete_checkpoint
from ..utils.files import is_leftover, remove_leftovers, whole_file, write_text_atomically
from ..utils.provenance import now
from ..utils.signals import ending_signals
from ..utils.text import differences
from .records import MANIFEST, is_finished, read_manifest
from .sweep import Grid, Run


logger = logging.getLogger(__name__)

LOCK = "sweep.lock"
LOGS = "logs"
POLL = 0.2  # seconds between two looks at the running processes
GRACE = 20.0  # seconds that an interrupted run has to end by itself


class Slot(NamedTuple):
    """A place where one run at a time can be: its name, and what of the environment it changes."""

    device: str
    environment: dict[str, str]


def make_slots(devices: Sequence[str] = (), jobs: int = 1) -> list[Slot]:
    """`jobs` places on each device.

    Args:
        devices: `cuda:0`, ..., `cpu`, or `all` for every GPU that is visible. By default the first GPU, or the CPU.
        jobs: runs at once on each; several on the CPU share its cores among them.

    Raises:
        ValueError: there is no such device, or `jobs` is below 1.
    """
    if jobs < 1:
        raise ValueError(f"`--jobs` must be 1 or more, got {jobs}")
    count = torch.cuda.device_count()
    known = {f"cuda:{i}": i for i in range(count)}
    ids = [i for i in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if i] or [str(i) for i in range(count)]
    if list(devices) == ["all"]:
        devices = list(known)
        if not devices:
            raise ValueError("`--devices` all: there is no GPU here; use cpu, with --jobs for several runs at once")
    devices = list(devices) or ["cuda:0" if count else "cpu"]
    for device in devices:
        if device not in known and device != "cpu":
            raise ValueError(f"`--devices` must be of {', '.join([*known, 'cpu'])}, got {device!r}")
    if len(set(devices)) < len(devices):
        raise ValueError(
            f"`--devices` names a device twice: {', '.join(devices)}; use --jobs for several runs on each"
        )
    slots = []
    for device in devices:
        environment = {"CUDA_VISIBLE_DEVICES": "" if device == "cpu" else ids[known[device]]}
        if device == "cpu" and jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
        slots += [Slot(device, environment)] * jobs
    return slots


class RunQueue:
    """The runs of a grid in the folder of a sweep.

    In the folder are: the recipe as it was when the sweep began, `sweep.json` (every run, its options and how it ended),
    a folder for each run, and its output in `logs/`. A run that has its `run.json`, and was uploaded if it is to be, is finished
    and is not run again; one that left a whole checkpoint goes on from there; any other starts over.

    Args:
        grid: what to run.
        output: the folder.
        script: the program and its first arguments, `run_ufgir.py` by default.

    Raises:
        ValueError: as `Grid.runs`; or the folder holds something else, or a sweep of a recipe that differs.
    """

    def __init__(self, grid: Grid, output: Path, script: Sequence[str] | None = None) -> None:
        self.grid, self.output = grid, output
        self.script = list(script or [sys.executable, str(Path(find_spec("run_ufgir").origin).resolve())])
        self.runs = {run.name: run for run in grid.runs(output)}
        self.recipe = output / f"recipe{grid.recipe.suffix}"
        self.manifest = self._read()
        self.failed: list[str] = []
        self._processes: dict[str, tuple[subprocess.Popen, Slot, float]] = {}

    def _read(self) -> dict[str, Any]:
        """The manifest: that of the folder, to which the runs of this grid are added."""
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"`--output` {self.output} is a file: choose a folder")
        old = read_manifest(self.output)
        if old is None:
            if self.output.is_dir() and {p.name for p in self.output.iterdir() if not is_leftover(p)} - {LOCK}:
                raise ValueError(f"`--output` {self.output} holds something that is no sweep: choose another folder")
            old = {"runs": {}}
        elif old["recipe"] != self.grid.settings:
            told = differences(old["recipe"], self.grid.settings, str(self.output))
            raise ValueError(f"`--output` {self.output} is a sweep of another recipe: {told}; choose another folder")
        runs = dict(old["runs"])
        for run in self.runs.values():
            before = runs.get(run.name, {"settings": run.settings})["settings"]
            if before != run.settings:
                told = differences(before, run.settings, str(self.output))
                raise ValueError(f"{run.name} was begun with other options: {told}; choose another `--output`")
            runs[run.name] = {"settings": run.settings, "options": run.options, **runs.get(run.name, {})}
        for name, run in runs.items():
            if is_finished(self.output / name):
                run["status"] = "finished"
            elif name in self.runs or "status" not in run:
                run["status"] = "waiting"
        return {"command": sys.argv[1:], "date": now(), "recipe": self.grid.settings, "runs": runs}

    def how(self, run: Run) -> str:
        """`finished`, `resume` or `start`: what would be done with a run now."""
        if is_finished(self.output / run.name):
            return "finished"
        trains = run.training.do_train
        return "resume" if trains and last_complete_checkpoint(self.output / run.name) is not None else "start"

    def command(self, run: Run) -> list[str]:
        """The command line of a run."""
        how = "--resume_from_checkpoint=true" if self.how(run) == "resume" else "--overwrite_output_dir=true"
        own = [f"--output_dir={self.output / run.name}", f"--run_name={self.output.name}/{run.name}", how]
        return [*self.script, str(self.recipe), *run.options, *own, "--disable_tqdm=true"]

    def work(self, slots: Sequence[Slot], max_failures: int | None = None) -> None:
        """Run what is not finished, one process a run, until nothing waits; failures are in `failed`.

        Args:
            slots: as many runs are under way at once.
            max_failures: start no more runs after so many have failed; None is no limit.

        Raises:
            ValueError: another sweep works on the folder.
            KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, when the running processes have ended; what they have
                saved is taken up by the next sweep.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        with _lock(self.output / LOCK) as lock, ending_signals(again=True):
            remove_leftovers(self.output)
            self.manifest = self._read()  # another sweep may have changed it until now
            self._write()  # first of all: without it, the folder would be taken for something else
            if not self.recipe.exists():
                with whole_file(self.recipe) as file:
                    shutil.copyfile(self.grid.recipe, file)
            (self.output / LOGS).mkdir(exist_ok=True)
            waiting = deque(
                run for run in self.runs.values() if self.manifest["runs"][run.name]["status"] == "waiting"
            )
            done = len(self.runs) - len(waiting)
            if done:
                logger.info("%d of %d runs are finished already", done, len(self.runs))
            free = deque(slots)
            try:
                while waiting or self._processes:
                    stop = max_failures is not None and len(self.failed) >= max_failures
                    if stop and waiting:
                        logger.info("%d failures: no more runs are started", len(self.failed))
                        waiting.clear()
                    while waiting and free:
                        self._start(waiting.popleft(), free.popleft(), lock)
                    for name, (process, slot, begun) in list(self._processes.items()):
                        if process.poll() is not None:
                            del self._processes[name]
                            free.append(slot)
                            self._ended(name, process.returncode, time.monotonic() - begun)
                    if self._processes:
                        time.sleep(POLL)
            except BaseException:
                stop_processes([process for process, _, _ in self._processes.values()])
                for name in self._processes:
                    self._note(name, status="finished" if is_finished(self.output / name) else "interrupted")
                raise

    def _start(self, run: Run, slot: Slot, lock: int) -> None:
        command = self.command(run)
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **slot.environment}
        boards = Path(os.environ.get("TENSORBOARD_LOGGING_DIR", self.output / "tensorboard"))
        environment["TENSORBOARD_LOGGING_DIR"] = str(boards / run.name)  # one name a run, not date and host
        with self._log(run.name).open("a", encoding="utf-8") as log:
            log.write(f"# {now()}, {slot.device}: {shlex.join(command)}\n")
            log.flush()
            # A session of its own: Ctrl-C reaches it through us only, with all its workers. The lock goes with it, so
            # that no other sweep starts the same run should we be killed.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
                pass_fds=[lock],
            )
        self._processes[run.name] = (process, slot, time.monotonic())
        self._note(run.name, status="running", date=now())
        resumed = " from its checkpoint" if "--resume_from_checkpoint=true" in command else ""
        logger.info("%s: started%s on %s", run.name, resumed, slot.device)

    def _ended(self, name: str, status: int, seconds: float) -> None:
        if is_finished(self.output / name):
            self._note(name, status="finished", seconds=round(seconds, 1), error=None)
            ends = "finished"
        else:
            self.failed.append(name)
            error = f"{_exit(status)}: {self._last_words(name)}"
            self._note(name, status="failed", seconds=round(seconds, 1), error=error)
            ends = f"failed, {error}"
        left = sum(self.manifest["runs"][n]["status"] in ("waiting", "running") for n in self.runs)
        logger.info("%s: %s, %.0f s; %d of %d to go", name, ends, seconds, left, len(self.runs))

    def _note(self, name: str, **values: Any) -> None:
        self.manifest["runs"][name] |= values
        self._write()

    def _write(self) -> None:
        text = json.dumps(self.manifest, indent=2, ensure_ascii=False)
        write_text_atomically(self.output / MANIFEST, text + "\n")

    def _log(self, name: str) -> Path:
        return self.output / LOGS / f"{name}.log"

    def _last_words(self, name: str) -> str:
        """The last line that a run wrote."""
        with self._log(name).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")

    def table(self) -> list[list[str]]:
        """A row for each run of the grid: name, what would be done with it, its options."""
        return [[run.name, self.how(run), shlex.join(run.options)] for run in self.runs.values()]

    def summary(self) -> str:
        """How all runs of the grid stand, and what became of those that failed."""
        runs = {name: self.manifest["runs"][name] for name in self.runs}
        counts = {status: sum(run["status"] == status for run in runs.values()) for status in _STATUSES}
        lines = [
            f"{len(runs)} run{'s' * (len(runs) > 1)} in {self.output}: "
            + ", ".join(f"{n} {s}" for s, n in counts.items() if n)
        ]
        for name, run in runs.items():
            if run["status"] == "failed":
                lines.append(f"failed: {name}: {run['error']} ({self._log(name)})")
        if counts["finished"] < len(runs):
            lines.append("The same command goes on with what is not finished, failed runs included.")
        return "\n".join(lines)


_STATUSES = ("finished", "failed", "interrupted", "running", "waiting")


def stop_processes(processes: Sequence[subprocess.Popen], grace: float = GRACE) -> None:
    """End processes, each the head of its group, as Ctrl-C would; after `grace` seconds, or at once upon another Ctrl-C,
    they are killed."""
    for process in processes:
        _signal_group(process, signal.SIGINT)
    try:
        deadline = time.monotonic() + grace
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))
    finally:
        for process in processes:
            _signal_group(process, signal.SIGKILL)
            process.wait()


def _signal_group(process: subprocess.Popen, number: signal.Signals) -> None:
    """To a process and its workers; its number is its group's, which is gone when the last of them has ended."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _exit(status: int) -> str:
    """An exit status in words."""
    if status == 0:
        return "ended without a record"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[int]:
    """The file, locked for this process and those it hands the descriptor to; ValueError if it is locked already."""
    try:
        import fcntl  # not on Windows
    except ImportError as error:
        raise ValueError(
            "`ufgir sweep` needs Linux or macOS, since its runs inherit a lock. Here, start each run with run_ufgir.py."
        ) from error

    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(handle, 32).decode(errors="replace").strip()
            raise ValueError(
                f"`--output` {path.parent}: the sweep of process {owner}, or a run that it left behind, is at work there; "
                "wait for it, or end it"
            ) from error
        os.truncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield handle
    finally:
        os.close(handle)
