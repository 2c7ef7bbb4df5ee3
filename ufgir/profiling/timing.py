"""Interleaved timing and memory measurement.

The speed of a machine changes: other processes come and go, and clock rates fall as chips get warm. Functions that are to be compared are
therefore timed in turn in one process, in a new order each round, and summarized by medians and quartiles.
"""

import contextlib
import gc
import math
import os
import random
import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..utils.signals import raise_pending


Run = Callable[[], Any]
IDLE = 0.3  # largest load of the whole machine at which times are measured
SHORTEST = 0.02  # seconds; shorter calls are timed several at a time
SLOW = 2.0  # seconds; longer calls are warm after the first
QUICK = 0.2  # seconds; calls that other threads disturb noticeably
PAUSE = 0.05  # seconds after which the threads of a runtime sleep


class Quartiles(NamedTuple):
    """Median of some timings, and the lower and upper quartile."""

    median: float
    lower: float
    upper: float

    @property
    def spread(self) -> float:
        """Return the distance between the quartiles, divided by the median."""
        return (self.upper - self.lower) / self.median if self.median else 0.0


def quartiles(values: list[float]) -> Quartiles:
    """Return the quartiles of a non-empty list."""
    lower, upper = (
        statistics.quantiles(values, n=4, method="inclusive")[i] if values[1:] else values[0] for i in (0, 2)
    )
    return Quartiles(statistics.median(values), lower, upper)


@contextlib.contextmanager
def steady(threads: int | None = None) -> Iterator[int]:
    """Turn off garbage collection and set the number of torch's threads (default: unchanged) inside this context."""
    before, collected = torch.get_num_threads(), gc.isenabled()
    torch.set_num_threads(threads or before)
    gc.collect()
    gc.disable()
    try:
        yield threads or before
    finally:
        torch.set_num_threads(before)
        if collected:
            gc.enable()


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(run: Run, device: torch.device, calls: int = 1) -> float:
    """Return the seconds of one call, averaged over `calls` calls in a row. On a GPU, every call has finished before the next begins;
    otherwise launches would overlap."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
        synchronize(device)
    return (time.perf_counter() - start) / calls


class InterleavedTiming:
    """Time several functions in turn.

    Args:
        runs: name -> function to time.
        device: device on which the functions compute.
        seed: seed of the order within each round.
        pause: wait before each timing until the threads of the function before sleep. Needed if the functions use several runtimes:
            each has its own threads, which wait actively for more work and would compete with those of the next function.

    Attributes:
        seconds: name -> seconds of one call, one value per round; also valid after an interruption.
        failures: name -> error of a function that failed; it is not called again.
    """

    def __init__(self, runs: Mapping[Any, Run], device: torch.device, seed: int = 0, pause: bool = False) -> None:
        self.runs = dict(runs)
        self.pause = pause
        self.quick: set[Any] = set()  # names of functions that take less than `QUICK`
        self.device = device
        self.order = random.Random(seed)
        self.calls = dict.fromkeys(runs, 1)
        self.seconds: dict[Any, list[float]] = {name: [] for name in runs}
        self.failures: dict[Any, Exception] = {}

    def _try(self, name: Any) -> float | None:
        raise_pending()
        try:
            return time_call(self.runs[name], self.device, self.calls[name])
        except Exception as error:  # one failure must not stop the other functions
            # Drop the traceback: its frames would keep the memory of the failed call alive.
            self.failures[name] = error.with_traceback(None)
            error.__context__ = error.__cause__ = None
            del self.runs[name]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def warm_up(self, rounds: int = 2, after: Run | None = None) -> None:
        """Call each function `rounds` times, or once if a call takes longer than `SLOW`, and choose how often quick functions are called for
        one timing."""
        for name in list(self.runs):
            seconds: float | None = None
            for call in range(rounds):
                if call and (seconds is None or seconds >= SLOW):
                    break
                seconds = self._try(name)
            if seconds is not None:
                self.calls[name] = max(1, math.ceil(SHORTEST / max(seconds, 1e-9)))
                if seconds < QUICK:
                    self.quick.add(name)
            if after:
                after()

    def run(self, rounds: int, after: Run | None = None) -> None:
        """Time each function once per round.

        Args:
            rounds: number of rounds.
            after: called after each timing, for example to show progress.
        """
        for _ in range(rounds):
            names = list(self.runs)
            for name in self.order.sample(names, len(names)):
                if self.pause:
                    time.sleep(PAUSE)
                    if name in self.quick:
                        self._try(name)  # not timed: wakes its threads
                seconds = self._try(name) if name in self.runs else None
                if seconds is not None:
                    self.seconds[name].append(seconds)
                if after:
                    after()


def machine_load() -> float | None:
    """Return the load of the whole machine, the average of the last minute; None if unknown."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):  # not on Windows
        return None


def check_idle(force: bool = False) -> float | None:
    """Check that the machine is idle, and return its load.

    Args:
        force: accept any load.

    Raises:
        ValueError: if the load is above `IDLE`.
    """
    load = machine_load()
    if load is not None and load > IDLE and not force:
        raise ValueError(
            f"the machine is busy: its load is {load:.2f} (average of the last minute), and times are right only up to {IDLE}. Wait for "
            "other processes to end, or measure anyway with `--force`."
        )
    return load


class OtherLoad:
    """Measure the load of other processes (Linux only)."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """Return the seconds that all cores were busy, or used by other virtual machines, and the seconds of this process."""
        try:
            fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return None
        own = os.times()
        return busy, own.user + own.system + own.children_user + own.children_system

    def cores(self, seconds: float) -> float | None:
        """Return how many cores other processes used on average over the last `seconds`; None if unknown.

        Args:
            seconds: seconds since this object was created.
        """
        end = self._now()
        if end is None or self.start is None or seconds <= 0:
            return None
        busy, own = (after - before for before, after in zip(self.start, end, strict=True))
        return max(0.0, busy - own) / seconds


class TensorMemory(TorchDispatchMode):
    """Count the bytes of all tensors that are created inside this context and still alive, as the allocator of a GPU does.

    Existing tensors and memory that a kernel allocates and frees internally are not counted.

    Attributes:
        now, peak: current and largest number of bytes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Callable, types: Sequence[type], args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if not isinstance(made, torch.Tensor):
                continue
            storage = made.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._sizes:
                self._sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._forget, storage._cdata)
        return result

    def _forget(self, storage: int) -> None:
        self.now -= self._sizes.pop(storage)


def peak_memory_increase(run: Run, device: torch.device) -> int:
    """Return by how many bytes the memory of tensors grows at most while `run` runs.

    On a GPU, torch's allocator counts, and `run` runs twice because libraries allocate workspaces in their first call. On a CPU, tensors are
    counted one by one; tensors inside compiled code are not seen.
    """
    if device.type != "cuda":
        with TensorMemory() as memory:
            run()
        return memory.peak
    run()
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
