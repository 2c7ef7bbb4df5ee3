"""Resume `ufgir prepare` after it was killed or interrupted; finished work is reused and damage is detected."""

import hashlib
import multiprocessing
import os
import signal

import pytest

from tests.data.preparing import Counting, files, listed, rows_of
from tests.data.raw_layouts import leaf
from ufgir.data.prepare import parquet_folder
from ufgir.data.prepare.parquet_folder import prepare
from ufgir.data.prepare.ultra_fgvc import UnsoundData
from ufgir.utils import locks as locking


pytestmark = pytest.mark.usefixtures("own_cache")


def killed_at(what, calls, *arguments, **options):
    """Run `prepare` in another process and kill it in call number `calls` of `parquet_folder.what`."""

    def run():
        original, left = getattr(parquet_folder, what), [calls]

        def kill(*args, **kwargs):
            left[0] -= 1
            if not left[0]:
                if what == "_write_shard":  # with half a file on the disk
                    args[0].with_name(f".{args[0].name}.tmp").write_bytes(b"PAR1 half")
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(parquet_folder, what, kill)
        prepare(*arguments, **options)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


@pytest.mark.parametrize("name", ["soyglobal", "soygene"])
def test_resume_after_kill_while_writing(name, raw, tmp_path, monkeypatch):
    spec, source, _ = raw(name)
    prepare(spec, source, tmp_path / "whole", shard_size="2KB")
    killed_at("_write_shard", 4, spec, source, tmp_path / "out", shard_size="2KB", num_workers=2)
    work = tmp_path / ".out.preparing"
    assert not (tmp_path / "out").exists()
    finished = {file.name: file.stat().st_ino for file in (work / "data").glob("[!.]*")}
    assert len(finished) == 3

    counting = Counting(monkeypatch)
    prepare(spec, source, tmp_path / "out", shard_size="2KB")
    assert counting.files == []  # no image is decoded twice
    assert {name: (tmp_path / "out" / "data" / name).stat().st_ino for name in finished} == finished
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "raw", "whole"]


def test_resume_after_kill_while_checking(raw, tmp_path, monkeypatch):
    spec, source, _ = raw("cotton")
    killed_at("inspect_file", 8, spec, source, tmp_path / "out", num_workers=1)
    journal = tmp_path / ".out.preparing" / "checked.jsonl"
    text = journal.read_text()
    journal.write_text(text[:-30])  # truncate the last line
    counting = Counting(monkeypatch)
    prepare(spec, source, tmp_path / "out")
    assert len(counting.files) == 18 - 7 + 1
    assert len(rows_of(tmp_path / "out")["train"]) == 9


def interrupted(spec, source, output, monkeypatch, shards=3):
    original, left = parquet_folder._write_shard, [shards]

    def stop(*arguments):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        original(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(parquet_folder, "_write_shard", stop)
        prepare(spec, source, output, shard_size="2KB")
    assert not output.exists()


def test_shards_of_another_source_are_rewritten(raw, tmp_path, monkeypatch):
    spec, source, root = raw("soygene")
    interrupted(spec, source, tmp_path / "out", monkeypatch)
    changed = root / "images" / "GDC000-1-000_1_train.png"
    changed.write_bytes(leaf("validation", 0, 0))
    shard = tmp_path / ".out.preparing" / "data" / "train-00001-of-00005.parquet"
    assert shard.exists()
    shard.write_bytes(shard.read_bytes()[:-9])  # truncated
    (tmp_path / ".out.preparing" / "data" / "train-00000-of-00099.parquet").write_bytes(b"of another plan")
    counting = Counting(monkeypatch)
    prepare(spec, source, tmp_path / "out", shard_size="2KB")
    assert counting.files == [changed.name]
    found = rows_of(tmp_path / "out")
    assert found == listed(spec, root)
    prepare(spec, source, tmp_path / "whole", shard_size="2KB")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_damage_of_the_same_size_is_detected_after_an_interruption(raw, tmp_path, monkeypatch):
    spec, source, root = raw("soygene")
    interrupted(spec, source, tmp_path / "out", monkeypatch)
    file = root / "images" / "GDC000-1-000_1_train.png"
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UnsoundData, match="GDC000-1-000_1_train"):
        prepare(spec, source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


def test_other_options_reuse_the_check_but_not_the_shards(raw, tmp_path, monkeypatch):
    spec, source, _ = raw("soygene")
    interrupted(spec, source, tmp_path / "out", monkeypatch)
    counting = Counting(monkeypatch)
    prepare(spec, source, tmp_path / "out", validation="last", shard_size="4KB")
    assert counting.files == []
    prepare(spec, source, tmp_path / "whole", validation="last", shard_size="4KB")
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_file_that_changes_between_check_and_copy_stops_the_run(raw, tmp_path, monkeypatch):
    spec, source, root = raw("cotton")
    original = parquet_folder.plan_shards

    def change(*arguments):
        (root / "2_2_train.png").write_bytes(leaf("validation", 1, 0))
        return original(*arguments)

    monkeypatch.setattr(parquet_folder, "plan_shards", change)
    with pytest.raises(ValueError, match=r"2_2_train.png changed after it was checked"):
        prepare(spec, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.undo()
    prepare(spec, source, tmp_path / "out")
    row = next(row for row in rows_of(tmp_path / "out")["train"] if row[0] == "2_2_train.png")
    assert row[2] == hashlib.sha256(leaf("validation", 1, 0)).hexdigest()


def test_full_disk_leaves_no_output_and_the_next_run_resumes(raw, tmp_path, monkeypatch):
    spec, source, _ = raw("cotton")

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(parquet_folder.pq, "write_table", full)
        prepare(spec, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    prepare(spec, source, tmp_path / "out")
    assert len(rows_of(tmp_path / "out")["test"]) == 9


def test_finished_output_is_kept_and_other_folders_are_not_overwritten(raw, tmp_path, monkeypatch):
    spec, source, root = raw("cotton")
    (tmp_path / "out").mkdir()  # an empty folder is fine
    prepare(spec, source, tmp_path / "out")
    before = files(tmp_path / "out")
    counting = Counting(monkeypatch)
    assert "already exists" in prepare(spec, source, tmp_path / "out")
    assert counting.files == []
    for change in ({"shots": 1}, {"validation": "last"}, {"shard_size": "1MB"}):
        with pytest.raises(ValueError, match=r"`output` .*out exists and was made from another source"):
            prepare(spec, source, tmp_path / "out", **change)
    (root / "1_1_train.png").write_bytes(leaf("validation", 0, 0))
    with pytest.raises(ValueError, match="Choose another folder"):
        prepare(spec, source, tmp_path / "out")
    assert files(tmp_path / "out") == before
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("a file")
    for output in ("precious", "file"):
        with pytest.raises(ValueError, match="Choose another folder"):
            prepare(spec, source, tmp_path / output)
    assert files(tmp_path / "precious") == {"thesis.txt": b"years of work"}


def test_two_processes_at_a_time_raise(raw, tmp_path, monkeypatch):
    spec, source, _ = raw("cotton")
    monkeypatch.setattr(locking, "PATIENCE", 0.1)
    with (
        locking.exclusive_lock(tmp_path / "out", ""),
        pytest.raises(ValueError, match=r"`output` .* is being prepared by another process"),
    ):
        prepare(spec, source, tmp_path / "out")
    prepare(spec, source, tmp_path / "out")
