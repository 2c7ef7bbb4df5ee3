"""Signals that end a run: Ctrl-C, and what queues of clusters send before they kill. Each ends it with one sentence and a status.

Imports nothing heavy: a script calls `end_quietly` before its own imports, which take seconds.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


# SIGTERM: Slurm, Kubernetes, torchrun, shutdown. The others: `--signal` of Slurm, `-notify` and limits of Grid Engine and LSF, and
# a terminal that is closed.
ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP")
    if hasattr(signal, name)  # Windows has few of them
)
_BURST = 1.0  # seconds in which further signals are of the same event: a terminal's and torchrun's


class Ended(KeyboardInterrupt):
    """A signal ends the run.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @classmethod
    def of(cls, error: KeyboardInterrupt) -> "Ended":
        """The same for an exception that is perhaps Python's own."""
        return error if isinstance(error, cls) else cls(signal.SIGINT)

    @property
    def status(self) -> int:
        """The exit status that shells and queues expect."""
        return 128 + self.number

    def __str__(self) -> str:
        return "interrupted" if self.number == signal.SIGINT else f"ended by {signal.Signals(self.number).name}"


def end_quietly(name: str) -> None:
    """Let Ctrl-C end this process at once, with one line: for the time before there is anything to leave in order.

    Args:
        name: of the program, for the line.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{name}: interrupted\n".encode())
        os._exit(128 + number)

    signal.signal(signal.SIGINT, end)


class _Handler:
    """Raises `Ended` at the first signal, or notes it for `pending` while signals wait; ends the process at a later one."""

    def __init__(self, name: str) -> None:
        self.name, self.process = name, os.getpid()
        self.waits, self.again = False, False
        self.pending: int | None = None
        self.raised: int | None = None
        self.time = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            self._in_child(number, frame)
        elif self.waits and number != signal.SIGINT:
            self.pending = self.pending or number
        elif self.raised is None or self.again:
            self.raised, self.time = number, time.monotonic()
            raise Ended(number)
        elif time.monotonic() - self.time > _BURST:
            os.write(2, f"{self.name}: ended at once\n".encode())
            os._exit(128 + number)

    def _in_child(self, number: int, frame: FrameType | None) -> None:
        """In a process that was forked: a worker, which its parent ends."""
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        elif number == signal.SIGTERM:  # of its parent
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


_active: _Handler | None = None


@contextmanager
def ending_signals(name: str = "", wait: bool = False, again: bool = False) -> Iterator[None]:
    """Within, a signal of `ENDING` raises `Ended`; a second one, later than a second, ends the process at once.

    Signals that are ignored (`nohup`) or have handlers of their own stay so; outside the main thread nothing is changed. May be
    nested: then `wait` and `again` hold for the inner block.

    Args:
        name: of the program, for the line at a second signal.
        wait: raise nothing but note the first signal for `pending_signal`; Ctrl-C does not wait.
        again: a later signal raises `Ended` again, as the block has others to end, and does so at once then.
    """
    global _active
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, handler = _active, _active
    old: dict[int, Any] = {}
    if handler is None or handler.process != os.getpid():
        handler = _Handler(name)
        for number in ENDING:
            if number == signal.SIGINT or signal.getsignal(number) is signal.SIG_DFL:
                old[number] = signal.signal(number, handler)
    before = handler.waits, handler.again
    handler.waits, handler.again, _active = wait, again, handler
    try:
        yield
    finally:
        (handler.waits, handler.again), _active = before, outer
        for number, earlier in old.items():
            signal.signal(number, earlier)


def pending_signal() -> int | None:
    """The signal that waits; None if none came."""
    return None if _active is None else _active.pending


def raised_signal() -> int | None:
    """The signal for which `Ended` was raised; None if none came."""
    return None if _active is None else _active.raised
