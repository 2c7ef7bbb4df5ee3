"""Signals that end a run: Ctrl-C, and those that cluster schedulers send before they kill a job. Each ends the run with one sentence
and an exit status.

This module has no slow imports: a script calls `end_quietly` before its own imports, which take seconds.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn


# SIGTERM: Slurm, Kubernetes, torchrun, shutdown. The others: Slurm's `--signal`, `-notify` and limits of Grid Engine and LSF, and
# closing the terminal.
ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGHUP")
    if hasattr(signal, name)  # Windows lacks most of them
)
_RETRY = 0.05  # seconds after which a lost exception is raised again
_BURST = 1.0  # seconds in which further signals, from the terminal or torchrun, belong to the same event


class Ended(KeyboardInterrupt):
    """Raised when a signal ends the run.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @classmethod
    def of(cls, error: KeyboardInterrupt) -> "Ended":
        """Convert a KeyboardInterrupt, possibly raised by Python itself, to `Ended`."""
        return error if isinstance(error, cls) else cls(signal.SIGINT)

    @property
    def status(self) -> int:
        """Exit status that shells and schedulers expect."""
        return 128 + self.number

    def __str__(self) -> str:
        return "interrupted" if self.number == signal.SIGINT else f"ended by {signal.Signals(self.number).name}"


def end_quietly(name: str) -> None:
    """End this process immediately on Ctrl-C, with one line. For use before there is any state to save.

    Args:
        name: name of the program, for the line.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"{name}: interrupted\n".encode())
        os._exit(128 + number)

    signal.signal(signal.SIGINT, end)


class _Handler:
    """Raises `Ended` at the first signal, or stores it for `pending` in waiting mode; ends the process at a later signal."""

    def __init__(self, name: str) -> None:
        self.name, self.process = name, os.getpid()
        self.waits, self.again, self.holds = False, False, False
        self.pending: int | None = None
        self.raised: int | None = None
        self.time = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self.process:
            self._in_child(number, frame)
        elif self.holds and self.pending is None and self.raised is None:
            self.pending, self.time = number, time.monotonic()
            os.write(2, f"\n{self.name}: ending after this step; a second signal ends it at once\n".encode())
        elif self.waits and number != signal.SIGINT:
            self.pending = self.pending or number
        elif not self.holds and (self.raised is None or self.again):
            self.raise_for(number)
        elif time.monotonic() - self.time > _BURST:
            os.write(2, f"{self.name}: ended at once\n".encode())
            os._exit(128 + number)

    def raise_for(self, number: int) -> NoReturn:
        """Raise `Ended`."""
        self.pending, self.raised, self.time = None, number, time.monotonic()
        raise Ended(number)

    def hook(self, show: Callable[..., None]) -> Callable[..., None]:
        """Return `sys.excepthook` for this process and its forks, in which it hides that the parent has closed a connection.

        The thread of a worker that hands tensors over would print this when the parent is ended by a signal.
        """

        def hook(kind: type[BaseException], error: BaseException, *trace: Any) -> None:
            if os.getpid() == self.process or not issubclass(kind, EOFError | ConnectionError):
                show(kind, error, *trace)

        return hook

    def unraisable_hook(self, show: Callable[[Any], None]) -> Callable[[Any], None]:
        """Return `sys.unraisablehook`, which raises `Ended` again after Python lost it.

        Python prints and drops exceptions in `__del__`, in callbacks of weak references, and in what `os.fork` calls, e.g. while workers
        of a data loader start.
        """

        def hook(unraisable: Any) -> None:
            error = unraisable.exc_value
            if os.getpid() != self.process or not isinstance(error, Ended):
                show(unraisable)
                return
            self.raised = None
            timer = threading.Timer(_RETRY, self._send_again, [error.number])
            timer.daemon = True
            timer.start()

        return hook

    def _send_again(self, number: int) -> None:
        main = threading.main_thread().ident
        if signal.getsignal(number) is not self:
            return
        if hasattr(signal, "pthread_kill") and main is not None:  # interrupts what the main thread waits for
            signal.pthread_kill(main, number)
        else:  # on Windows
            os.kill(self.process, number)

    def _in_child(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal in a forked process: a worker, which its parent ends."""
        if number == signal.SIGINT:
            signal.default_int_handler(number, frame)
        elif number == signal.SIGTERM:  # sent by its parent
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


_active: _Handler | None = None


@contextmanager
def ending_signals(name: str = "", wait: bool = False, again: bool = False, hold: bool = False) -> Iterator[None]:
    """Context manager in which a signal of `ENDING` raises `Ended`. A second signal, more than a second later, ends the process.

    Ignored signals (`nohup`) and signals with other handlers are unchanged. No effect outside the main thread. In nested blocks, `wait`,
    `again` and `hold` of the inner block apply.

    Args:
        name: name of the program, for the message at a second signal.
        wait: instead of raising, store the first signal for `pending_signal`; Ctrl-C still raises.
        again: a later signal raises `Ended` again, for blocks that end other processes and exit themselves.
        hold: store the first signal, Ctrl-C included, until `raise_pending` or the end of the block raises it. For native libraries that
            call back into Python: an exception out of such a call can crash the process.
    """
    global _active
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    outer, handler = _active, _active
    old: dict[int, Any] = {}
    old_hooks = None
    if handler is None or handler.process != os.getpid():
        handler = _Handler(name)
        old_hooks = sys.excepthook, sys.unraisablehook
        sys.excepthook, sys.unraisablehook = handler.hook(sys.excepthook), handler.unraisable_hook(sys.unraisablehook)
        for number in ENDING:
            if number == signal.SIGINT or signal.getsignal(number) is signal.SIG_DFL:
                old[number] = signal.signal(number, handler)
    before = handler.waits, handler.again, handler.holds
    handler.waits, handler.again, handler.holds, _active = wait, again, hold, handler
    try:
        yield
        if hold:
            raise_pending()
    finally:
        (handler.waits, handler.again, handler.holds), _active = before, outer
        for number, earlier in old.items():
            signal.signal(number, earlier)
        if old_hooks is not None:
            sys.excepthook, sys.unraisablehook = old_hooks


def pending_signal() -> int | None:
    """Return the stored signal, or None."""
    return None if _active is None else _active.pending


def raise_pending() -> None:
    """Raise `Ended` if a signal is stored."""
    if _active is not None and _active.pending is not None:
        _active.raise_for(_active.pending)


def raised_signal() -> int | None:
    """Return the signal for which `Ended` was raised, or None."""
    return None if _active is None else _active.raised
