"""Files and folders are complete or absent, however writing ends; leftovers are removed."""

import errno
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tests.limits import small_files
from ufgir.utils import files
from ufgir.utils.files import (
    DiskFull,
    new_folder,
    raise_disk_full,
    remove_leftovers,
    temporary_path,
    whole_file,
    whole_files,
    write_text_atomically,
)
from ufgir.visualization.sheet import save_image


def text(folder: Path) -> None:
    write_text_atomically(folder / "a.json", "x" * 200_000)


def picture(folder: Path) -> None:
    save_image(Image.effect_noise((400, 400), 50), folder / "a.png")


def weights(folder: Path) -> None:
    with new_folder(folder / "a") as inner:
        save_file({"w": torch.zeros(50_000)}, inner / "model.safetensors")


def pickled(folder: Path) -> None:
    with whole_files(folder) as inner:
        torch.save({"w": torch.zeros(50_000)}, inner / "a.pt")


WRITERS = (text, picture, weights, pickled)


def everything(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def status(action: Callable[[], None]) -> int:
    """Run a function in a fork, and return the exit status."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(60)
    return process.exitcode


@pytest.mark.parametrize("write", WRITERS)
def test_no_space(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """The system rejects further writing, in Python, Pillow, torch and safetensors: the error is one sentence, and the old file remains."""
    write(tmp_path)
    before = everything(tmp_path)
    with small_files(10_000), pytest.raises(DiskFull) as refused:
        write(tmp_path)
    said = str(refused.value)
    assert str(tmp_path / "a") in said and "MB are free" in said and "\n" not in said and ".tmp" not in said
    assert everything(tmp_path) == before and len(before) == 1


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_only_missing_space_is_told_as_such(tmp_path: Path, number: int) -> None:
    kind = PermissionError if number == errno.EACCES else DiskFull
    with pytest.raises(kind), raise_disk_full(tmp_path / "a", 10**6):
        raise OSError(number, os.strerror(number))
    with pytest.raises(RuntimeError, match="of something else"), raise_disk_full(tmp_path / "a"):
        raise RuntimeError("of something else")


@pytest.mark.parametrize("step", ["to_disk", "_for_everyone", "os.replace"])
@pytest.mark.parametrize("write", WRITERS)
def test_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[Path], None], step: str) -> None:
    """Existing files remain, and a later run that has the folder to itself removes the leftovers."""
    write(tmp_path)
    before = everything(tmp_path)

    def killed() -> None:
        monkeypatch.setattr(f"ufgir.utils.files.{step}", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        write(tmp_path)

    if (write, step) == (weights, "to_disk"):
        return  # a folder is renamed without
    assert status(killed) == -signal.SIGKILL
    assert any(path.name.startswith("_") for path in tmp_path.iterdir())  # a name that uploads leave out
    remove_leftovers(tmp_path)
    assert everything(tmp_path) == before


def test_killed_while_a_folder_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the removal of the old folder and the renaming of the new one."""
    weights(tmp_path)
    before, replace = everything(tmp_path), os.replace

    def killed() -> None:
        def once(*args: Path) -> None:
            replace(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(files.os, "replace", once)
        weights(tmp_path)

    assert status(killed) == -signal.SIGKILL and not (tmp_path / "a").exists()
    remove_leftovers(tmp_path)
    assert everything(tmp_path) == before


def test_leftovers_of_earlier_versions_go_and_files_of_others_stay(tmp_path: Path) -> None:
    for name in (".ema.x1b_2cd3.tmp", ".last.x1b_2cd3.old"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / "last").mkdir()
    for name in (".kept_patches.png.1234.tmp", ".run.json.abcd1234.tmp"):
        (tmp_path / name).write_text("half")
    others = {"_predictions.csv.partial", ".hidden", "notes.tmp", "_incomplete"}
    for name in others:
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == others | {"last"}
    remove_leftovers(tmp_path / "nowhere")


def leave(folder: Path, write: Callable[[Path], None]) -> None:
    """Kill a process before its file gets its final name."""

    def killed() -> None:
        files.os.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        write(folder)

    assert status(killed) == -signal.SIGKILL


@pytest.mark.parametrize("write", WRITERS)
def test_the_next_write_removes_what_a_killed_process_left(tmp_path: Path, write: Callable[[Path], None]) -> None:
    """Immediately, and no files of other targets."""
    write(tmp_path)
    names = everything(tmp_path).keys()
    others = {"_a.json.b.12345678.tmp", "_b.json.12345678.tmp", "_a.json.partial", "a.json.12345678.tmp"}
    leave(tmp_path, write)
    leave(tmp_path, write)
    for name in others:
        (tmp_path / name).write_text("")
    write(tmp_path)
    assert everything(tmp_path).keys() == names | others


@pytest.mark.parametrize("folder", [False, True])
def test_the_temporary_files_of_living_processes_stay(tmp_path: Path, folder: bool) -> None:
    """A lock belongs to an open file, so one process can simulate two."""
    target = tmp_path / "a"
    with temporary_path(target, folder) as first, temporary_path(target, folder) as second:
        assert first.exists() and second.exists() and first != second
        os.utime(first, (0, 0))
        with temporary_path(target, folder) as third:
            assert first.exists() and third.exists()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_being_replaced_is_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights(tmp_path)
    replace, seen = os.replace, []

    def look(*args: Path) -> None:
        replace(*args)
        if not (tmp_path / "a").exists():
            files._remove_stale(tmp_path / "a")
            seen.append((tmp_path / "a").exists())

    monkeypatch.setattr(files.os, "replace", look)
    weights(tmp_path)
    assert seen == [False] and [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_folder_whose_replacement_was_killed_is_restored_by_the_next_write(tmp_path: Path) -> None:
    (tmp_path / "_a.12345678.old").mkdir()
    (tmp_path / "_a.12345678.old" / "old.json").write_text("old")
    with pytest.raises(KeyError), new_folder(tmp_path / "a"):
        raise KeyError
    assert everything(tmp_path) == {"a/old.json": b"old"}


def test_without_locks_a_leftover_goes_after_an_hour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    for age, name in ((7200, "_a.json.12345678.tmp"), (0, "_a.json.abcdefgh.tmp"), (7200, "_b.json.12345678.tmp")):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (os.stat(tmp_path).st_mtime - age,) * 2)
    text(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"a.json", "_a.json.abcdefgh.tmp", "_b.json.12345678.tmp"}


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("write", WRITERS)
def test_who_may_read(tmp_path: Path, write: Callable[[Path], None], umask: int) -> None:
    """As for any other file; safetensors, mkstemp and mkdtemp would only let the owner read."""
    before = os.umask(umask)
    try:
        write(tmp_path)
    finally:
        os.umask(before)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o666 & ~umask}


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    text(tmp_path)
    for writing in (whole_file(tmp_path / "a.json"), whole_files(tmp_path), new_folder(tmp_path / "f")):
        with pytest.raises(KeyError), writing as place:
            (place if place.is_file() else place / "a.json").write_text("half")
            raise KeyError
    assert len((tmp_path / "a.json").read_text()) == 200_000 and len(list(tmp_path.iterdir())) == 1
