"""Run the combinations of a grid, one or several at a time, and resume after interruptions."""

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
POLL = 0.2  # seconds between two checks of the running processes
GRACE = 20.0  # seconds that an interrupted run has to end


class Slot(NamedTuple):
    """A slot that one run at a time can use: its device and its environment variables."""

    device: str
    environment: dict[str, str]


def make_slots(devices: Sequence[str] = (), jobs: int = 1) -> list[Slot]:
    """Return `jobs` slots on each device.

    Args:
        devices: `cuda:0`, ..., `cpu`, or `all` for every visible GPU. By default the first GPU, or the CPU.
        jobs: number of parallel runs per device; several runs on the CPU share its cores.

    Raises:
        ValueError: if a device does not exist or is repeated, or `jobs` is below 1.
    """
    if jobs < 1:
        raise ValueError(f"`--jobs` must be 1 or more, got {jobs}")
    count = torch.cuda.device_count()
    known = {f"cuda:{i}": i for i in range(count)}
    ids = [i for i in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if i] or [str(i) for i in range(count)]
    if list(devices) == ["all"]:
        devices = list(known)
        if not devices:
            raise ValueError("`--devices` all: no GPU found. Use cpu, with --jobs for several runs at once")
    devices = list(devices) or ["cuda:0" if count else "cpu"]
    for device in devices:
        if device not in known and device != "cpu":
            raise ValueError(f"`--devices` must be one of {', '.join([*known, 'cpu'])}, got {device!r}")
    if len(set(devices)) < len(devices):
        raise ValueError(
            f"`--devices` lists a device twice: {', '.join(devices)}. Use --jobs for several runs per device"
        )
    slots = []
    for device in devices:
        environment = {"CUDA_VISIBLE_DEVICES": "" if device == "cpu" else ids[known[device]]}
        if device == "cpu" and jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
            environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // jobs))
        slots += [Slot(device, environment)] * jobs
    return slots


class RunQueue:
    """The runs of a grid, in the folder of a sweep.

    The folder holds the recipe as it was when the sweep began, `sweep.json` (every run, its options and its status), a
    folder for each run, and their output in `logs/`. A run with a `run.json`, and a completed upload if one is
    requested, is finished and skipped; a run with a complete checkpoint is resumed; all others start over.

    Args:
        grid: the runs.
        output: the folder.
        script: the program and its first arguments, `run_ufgir.py` by default.

    Raises:
        ValueError: as `Grid.runs`; or if the folder holds other files or a sweep with another recipe.
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
        """Return the folder's manifest with the runs of this grid added."""
        if self.output.exists() and not self.output.is_dir():
            raise ValueError(f"`--output` must be a folder, got the file {self.output}")
        old = read_manifest(self.output)
        if old is None:
            if self.output.is_dir() and {p.name for p in self.output.iterdir() if not is_leftover(p)} - {LOCK}:
                raise ValueError(
                    f"`--output` {self.output} contains files that do not belong to a sweep. Choose another folder"
                )
            old = {"runs": {}}
        elif old["recipe"] != self.grid.settings:
            changes = differences(old["recipe"], self.grid.settings, str(self.output))
            raise ValueError(
                f"`--output` {self.output} contains a sweep with another recipe: {changes}. Choose another folder"
            )
        runs = dict(old["runs"])
        for run in self.runs.values():
            before = runs.get(run.name, {"settings": run.settings})["settings"]
            if before != run.settings:
                changes = differences(before, run.settings, str(self.output))
                raise ValueError(f"{run.name} was started with other options: {changes}. Choose another `--output`")
            runs[run.name] = {"settings": run.settings, "options": run.options, **runs.get(run.name, {})}
        for name, run in runs.items():
            if is_finished(self.output / name):
                run["status"] = "finished"
            elif name in self.runs or "status" not in run:
                run["status"] = "waiting"
        return {"command": sys.argv[1:], "date": now(), "recipe": self.grid.settings, "runs": runs}

    def how(self, run: Run) -> str:
        """Return what `work` would do with a run: `finished`, `resume` or `start`."""
        if is_finished(self.output / run.name):
            return "finished"
        trains = run.training.do_train
        return "resume" if trains and last_complete_checkpoint(self.output / run.name) is not None else "start"

    def command(self, run: Run) -> list[str]:
        """Return the command line of a run."""
        how = "--resume_from_checkpoint=true" if self.how(run) == "resume" else "--overwrite_output_dir=true"
        own = [f"--output_dir={self.output / run.name}", f"--run_name={self.output.name}/{run.name}", how]
        return [*self.script, str(self.recipe), *run.options, *own, "--disable_tqdm=true"]

    def work(self, slots: Sequence[Slot], max_failures: int | None = None) -> None:
        """Run everything that is not finished, one process per run; names of failed runs are in `failed`.

        Args:
            slots: one run at a time in each.
            max_failures: start no more runs after this many failures; None for no limit.

        Raises:
            ValueError: if another sweep uses the folder.
            KeyboardInterrupt: after Ctrl-C, SIGTERM or SIGHUP, once the running processes have ended; the next sweep
                resumes them.
        """
        self.output.mkdir(parents=True, exist_ok=True)
        with _lock(self.output / LOCK) as lock, ending_signals(again=True):
            remove_leftovers(self.output)
            self.manifest = self._read()  # another sweep may have changed it
            self._write()  # first, since it marks the folder as that of a sweep
            if not self.recipe.exists():
                with whole_file(self.recipe) as file:
                    shutil.copyfile(self.grid.recipe, file)
            (self.output / LOGS).mkdir(exist_ok=True)
            waiting = deque(
                run for run in self.runs.values() if self.manifest["runs"][run.name]["status"] == "waiting"
            )
            done = len(self.runs) - len(waiting)
            if done:
                logger.info("%d of %d runs are already finished", done, len(self.runs))
            free = deque(slots)
            try:
                while waiting or self._processes:
                    stop = max_failures is not None and len(self.failed) >= max_failures
                    if stop and waiting:
                        logger.info("%d runs failed: starting no more runs", len(self.failed))
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
        environment["TENSORBOARD_LOGGING_DIR"] = str(boards / run.name)  # one folder per run, not date and host
        with self._log(run.name).open("a", encoding="utf-8") as log:
            log.write(f"# {now()}, {slot.device}: {shlex.join(command)}\n")
            log.flush()
            # In its own session, the run and its workers get Ctrl-C only from `stop_processes`. It inherits the lock, so
            # that no other sweep starts the same run if this process is killed.
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
        resumed = " from its last checkpoint" if "--resume_from_checkpoint=true" in command else ""
        logger.info("%s: started%s on %s", run.name, resumed, slot.device)

    def _ended(self, name: str, status: int, seconds: float) -> None:
        if is_finished(self.output / name):
            self._note(name, status="finished", seconds=round(seconds, 1), error=None)
            ends = "finished"
        else:
            self.failed.append(name)
            error = f"{_exit(status)}: {self._last_line(name)}"
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

    def _last_line(self, name: str) -> str:
        """Return the last line of a run's output."""
        with self._log(name).open("rb") as log:
            log.seek(max(0, log.seek(0, os.SEEK_END) - 4096))
            lines = log.read().decode(errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")

    def table(self) -> list[list[str]]:
        """Return a row for each run of the grid: name, what would be done with it, its options."""
        return [[run.name, self.how(run), shlex.join(run.options)] for run in self.runs.values()]

    def summary(self) -> str:
        """Return the status of all runs of the grid, and the errors of those that failed."""
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
            lines.append(
                "Run the same command again to continue with the runs that are not finished, including failed ones."
            )
        return "\n".join(lines)


_STATUSES = ("finished", "failed", "interrupted", "running", "waiting")


def stop_processes(processes: Sequence[subprocess.Popen], grace: float = GRACE) -> None:
    """Stop processes, each the leader of its group, with SIGINT; kill them after `grace` seconds or a second Ctrl-C.

    Args:
        processes: to stop.
        grace: seconds.
    """
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
    """Send a signal to a process and its workers, whose group ID is the process ID."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _exit(status: int) -> str:
    """Describe an exit status."""
    if status == 0:
        return "ended without a run.json"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"status {status}"


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[int]:
    """Lock a file for this process and those that inherit the descriptor; raise ValueError if it is locked already."""
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
                f"`--output` {path.parent} is in use by the sweep of process {owner}, or by one of its runs. Wait for "
                "it to finish, or stop it"
            ) from error
        os.truncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield handle
    finally:
        os.close(handle)
