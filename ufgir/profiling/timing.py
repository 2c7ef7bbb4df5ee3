"""Time and memory of things that are to be compared.

Machines change their pace: other processes come and go, clocks fall as chips get warm. What is compared is therefore timed in
turn, A B C C A B ..., in one process, each round in another order, and told by medians and quartiles.
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


Run = Callable[[], Any]
SHORTEST = 0.02  # seconds: what takes less is called several times in a row for one timing


class Quartiles(NamedTuple):
    """Median of some timings, and the two values between which half of them lie."""

    median: float
    lower: float
    upper: float

    @property
    def spread(self) -> float:
        """Distance of the quartiles as a share of the median."""
        return (self.upper - self.lower) / self.median if self.median else 0.0


def quartiles(values: list[float]) -> Quartiles:
    """Of at least one value."""
    lower, upper = (
        statistics.quantiles(values, n=4, method="inclusive")[i] if values[1:] else values[0] for i in (0, 2)
    )
    return Quartiles(statistics.median(values), lower, upper)


@contextlib.contextmanager
def steady(threads: int | None = None) -> Iterator[int]:
    """Inside, no garbage is collected and torch computes with `threads` threads (as many as it has by default)."""
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
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_call(run: Run, device: torch.device, calls: int = 1) -> float:
    """Seconds of one call, the mean of `calls` in a row. A GPU has finished the work of a call before the next is made: else
    the host would already be at the next, and what is measured would not be how long one takes."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        run()
        synchronize(device)
    return (time.perf_counter() - start) / calls


class Race:
    """Things to be timed in turn.

    Args:
        runs: name -> what is timed.
        device: where it computes.
        seed: of the order within each round.

    Attributes:
        seconds: name -> seconds of one call, one for each round so far; of use also after an interruption.
        failures: name -> the error of a run that failed; it is out of the race, the others go on.
    """

    def __init__(self, runs: Mapping[Any, Run], device: torch.device, seed: int = 0) -> None:
        self.runs = dict(runs)
        self.device = device
        self.order = random.Random(seed)
        self.calls = dict.fromkeys(runs, 1)
        self.seconds: dict[Any, list[float]] = {name: [] for name in runs}
        self.failures: dict[Any, Exception] = {}

    def _try(self, name: Any) -> float | None:
        try:
            return time_call(self.runs[name], self.device, self.calls[name])
        except Exception as error:  # whatever it is, it must not end the others
            # Neither must what it has left in memory, which a traceback keeps alive with every frame.
            self.failures[name] = error.with_traceback(None)
            error.__context__ = error.__cause__ = None
            del self.runs[name]
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def warm_up(self, rounds: int = 2, after: Run | None = None) -> None:
        """Call each `rounds` times; what turns out to be quick is called several times for one timing from now on."""
        for name in list(self.runs):
            for _ in range(rounds):
                seconds = self._try(name) if name in self.runs else None
            if seconds is not None:
                self.calls[name] = max(1, math.ceil(SHORTEST / max(seconds, 1e-9)))
            if after:
                after()

    def go(self, rounds: int, after: Run | None = None) -> None:
        """Time each once in every round.

        Args:
            rounds: how often.
            after: called after each timing, e.g. to show progress.
        """
        for _ in range(rounds):
            names = list(self.runs)
            for name in self.order.sample(names, len(names)):
                seconds = self._try(name)
                if seconds is not None:
                    self.seconds[name].append(seconds)
                if after:
                    after()


class OtherLoad:
    """What the rest of the machine does meanwhile, where the system tells (Linux)."""

    def __init__(self) -> None:
        self.start = self._now()

    @staticmethod
    def _now() -> tuple[float, float] | None:
        """Seconds that all cores were busy, or taken away by a hypervisor, and those of this process."""
        try:
            fields = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
            user, nice, system, _, _, irq, softirq, steal = map(int, fields[:8])
            busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        except (OSError, ValueError):
            return None
        own = os.times()
        return busy, own.user + own.system + own.children_user + own.children_system

    def cores(self, seconds: float) -> float | None:
        """How many cores others kept busy, on average over the last `seconds`; None where it cannot be told.

        Args:
            seconds: since this object was made.
        """
        end = self._now()
        if end is None or self.start is None or seconds <= 0:
            return None
        busy, own = (after - before for before, after in zip(self.start, end, strict=True))
        return max(0.0, busy - own) / seconds


class TensorMemory(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside and still alive, as the allocator of a GPU does.

    What was there before is not counted; nor is what a kernel takes and gives back by itself.

    Attributes:
        now, peak: bytes, at this moment and at most.
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


def peak_growth(run: Run, device: torch.device) -> int:
    """Bytes by which the memory of tensors grows at most while `run` runs: by torch's allocator on a GPU, counted tensor by
    tensor on a CPU, whose allocator keeps no books. Compiled code on a CPU hides its tensors. On a GPU `run` runs twice, as
    libraries take workspaces at their first call."""
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
