"""Signals that end a run: an exception for the first, an exit status for queues, and no traceback for the second."""

import contextlib
import os
import signal
import subprocess
import sys
import time
import weakref
from multiprocessing import Pipe, current_process
from multiprocessing.connection import Client
from multiprocessing.reduction import DupFd
from pathlib import Path

import pytest

from ufgir.utils import signals
from ufgir.utils.signals import ENDING, Ended, ending_signals, pending_signal, raise_pending, raised_signal


ROOT = Path(__file__).parents[2]


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # handlers run between two instructions


@pytest.mark.parametrize("number", ENDING)
def test_each_ends_with_its_status(number: int) -> None:
    before = signal.getsignal(number)
    with pytest.raises(Ended) as ended, ending_signals("x"):
        send(number)
    assert ended.value.status == 128 + number
    name = "interrupted" if number == signal.SIGINT else signal.Signals(number).name
    assert name in str(ended.value)
    assert signal.getsignal(number) is before and raised_signal() is None


def test_handlers_of_others_stay() -> None:
    caught = []
    old = [
        signal.signal(signal.SIGUSR1, lambda *_: caught.append(1)),
        signal.signal(signal.SIGHUP, signal.SIG_IGN),
    ]
    try:
        with ending_signals():
            send(signal.SIGUSR1)
            send(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGUSR1, old[0])
        signal.signal(signal.SIGHUP, old[1])
    assert caught == [1]


def test_one_that_waits() -> None:
    """All signals except Ctrl-C wait within a block that requests it."""
    with pytest.raises(Ended), ending_signals():
        with ending_signals(wait=True):
            send(signal.SIGTERM)
            send(signal.SIGUSR1)
            assert pending_signal() == signal.SIGTERM and raised_signal() is None
            with pytest.raises(Ended):
                send(signal.SIGINT)
        assert raised_signal() == signal.SIGINT
        with ending_signals(again=True):
            send(signal.SIGTERM)


@pytest.mark.parametrize("lacks", [[], ["pthread_kill"]], ids=["posix", "windows"])
@pytest.mark.parametrize("place", ["destructor", "weak reference"])
def test_raised_where_python_drops_exceptions(
    place: str, lacks: list[str], capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exception is raised again, without a traceback, and the signal counts once."""
    for name in lacks:
        monkeypatch.delattr(signal, name)

    class Thing:
        def __del__(self) -> None:
            if place == "destructor":
                send(signal.SIGTERM)

    hook = sys.unraisablehook
    with pytest.raises(Ended) as ended, ending_signals():
        thing = Thing()
        reference = weakref.ref(thing, lambda _: place == "destructor" or send(signal.SIGTERM))
        del thing
        time.sleep(5)
        pytest.fail("the signal was lost")
    assert reference() is None and ended.value.status == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "" and sys.unraisablehook is hook


def test_other_dropped_exceptions_are_shown() -> None:
    shown = []
    old, sys.unraisablehook = sys.unraisablehook, lambda unraisable: shown.append(unraisable.exc_type)

    class Thing:
        def __del__(self) -> None:
            raise LookupError

    try:
        with ending_signals():
            Thing()
    finally:
        sys.unraisablehook = old
    assert shown == [LookupError]


def test_one_that_is_held(capfd: pytest.CaptureFixture) -> None:
    """All signals are raised between two steps, or at the end of the block."""
    for number in (signal.SIGINT, signal.SIGTERM):
        done = []
        with pytest.raises(Ended) as ended, ending_signals(), ending_signals(hold=True):
            raise_pending()
            send(number)
            send(signal.SIGINT)  # within a second: the same event
            done.append(pending_signal())
            raise_pending()
            done.append(None)
        assert done == [number] and ended.value.number == number
        with pytest.raises(Ended), ending_signals("x"):
            with ending_signals(hold=True):
                send(number)
            done.append(None)
        assert done == [number]
        assert capfd.readouterr().err.count("second signal") == 2


def test_a_second_one(capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second signal within a second belongs to the same event; a later one ends the process immediately."""
    status = os.fork()
    if status == 0:
        with ending_signals("x"):
            with contextlib.suppress(Ended):
                send(signal.SIGINT)
            send(signal.SIGINT)
            monkeypatch.setattr(signals, "_BURST", -1.0)
            send(signal.SIGTERM)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(status, 0)[1]) == 128 + signal.SIGTERM
    assert capfd.readouterr().err == "x: ended at once\n"


def test_workers() -> None:
    """The parent of a forked process ends it with SIGTERM."""
    with ending_signals():
        process = os.fork()
        if process == 0:
            send(signal.SIGUSR1)
            send(signal.SIGTERM)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGTERM


@pytest.mark.parametrize("program", ["run_ufgir.py", "ufgir"])
def test_interrupted_while_it_imports(tmp_path: Path, program: str) -> None:
    """Ctrl-C in the first seconds gives one line and no traceback. A module that both import sends the signal."""
    (tmp_path / "torch").mkdir()
    lines = ["import os, signal", "os.kill(os.getpid(), signal.SIGINT)", "import time", "time.sleep(60)"]
    (tmp_path / "torch" / "__init__.py").write_text("\n".join(lines))
    command = [str(ROOT / "run_ufgir.py")] if program == "run_ufgir.py" else ["-m", "ufgir.cli.entry", "pretrained"]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr and "interrupted" in done.stderr + done.stdout


@pytest.mark.parametrize("closes", [False, True])
def test_a_worker_does_not_report_that_its_parent_is_gone(capfd: pytest.CaptureFixture, closes: bool) -> None:
    """A thread of the worker hands tensors over to the parent, which may be ended in the middle of that. Other errors are shown."""
    ours, theirs = Pipe()
    with ending_signals():
        process = os.fork()
        if process == 0:
            handle = os.open(os.devnull, os.O_RDONLY)
            theirs.send(DupFd(handle)._id)
            theirs.recv()
            os._exit(0)
        address, _ = ours.recv()
        with Client(address, authkey=current_process().authkey) as connection:
            if not closes:
                connection.send("no key and process")
                connection.poll(10)  # until the other end is closed
        time.sleep(0.2)
        ours.send("end")
        os.waitpid(process, 0)
    assert ("Traceback" in capfd.readouterr().err) != closes
