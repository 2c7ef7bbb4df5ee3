"""Only complete checkpoints count, also if others are damaged, interrupted or removed."""

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import (
    TrainerState,
    TrainingArguments,
    modeling_utils,
)

from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.helpers import TINY
from tests.training.resuming import (
    assert_same,
    averaging,
    die,
    killed,
    make_trainer,
    train,
    weights,
)
from ufgir.checkpoints.loading import load_pretrained
from ufgir.training import checkpointing, ema
from ufgir.training.checkpointing import (
    INCOMPLETE,
    CheckpointError,
    check_fits,
    checkpoint_folders,
    checkpoint_problem,
    find_checkpoint,
    last_complete_checkpoint,
    remove_checkpoints,
    rotate_checkpoints,
)
from ufgir.training.trainer import UFGIRTrainer
from ufgir.utils.checksums import FILE_LIST
from ufgir.utils.files import DiskFull
from ufgir.utils.signals import Ended


# Killed while a checkpoint is written


def half(write: Callable) -> Callable:
    """Write a file, truncate it and kill this process."""

    def wrapped(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        path = next(a for a in args if isinstance(a, str | os.PathLike))
        os.truncate(path, Path(path).stat().st_size // 2)
        die()

    return wrapped


def instead(function: Callable) -> Callable:
    return die


def after(function: Callable) -> Callable:
    """Call the function and kill this process."""

    def wrapped(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        die()

    return wrapped


def half_deleted(rotate: Callable) -> Callable:
    """Kill this process while the old checkpoint is being deleted."""

    def wrapped(folder: Path, limit: int, best: str | None) -> None:
        assert limit == 1
        for file in sorted((folder / "checkpoint-3").iterdir())[::2]:
            file.unlink()
        die()

    return wrapped


def files_of_checkpoint(whole: Path) -> int:
    """Return the number of files in a checkpoint, including the model's code."""
    return sum(file.is_file() for file in checkpoint_folders(whole)[-1].rglob("*"))


# Where a training is killed, in which call of a function, and what that has done. There are four checkpoints; the second, of
# step 6, is cut off, if it is not said otherwise.
CUTS: dict[str, tuple[Any, str, int | Callable[[Path], int], Callable, str]] = {
    "weights": (modeling_utils, "safe_save_file", 2, half, "checkpoint-3"),
    "weights of the first": (modeling_utils, "safe_save_file", 1, half, ""),
    "average": (ema, "save_file", 2, half, "checkpoint-3"),
    "optimizer": (torch, "save", 6, half, "checkpoint-3"),
    "random state": (torch, "save", 8, half, "checkpoint-3"),
    "trainer's state": (TrainerState, "save_to_json", 3, half, "checkpoint-3"),
    "list of files": (
        checkpointing,
        "to_disk",
        lambda whole: files_of_checkpoint(whole) * 3 // 2,
        instead,
        "checkpoint-3",
    ),
    "before it has its name": (os, "replace", 2, instead, "checkpoint-3"),
    "when it has its name": (os, "replace", 2, after, "checkpoint-6"),
    "before the old one goes": (checkpointing, "rotate_checkpoints", 2, instead, "checkpoint-6"),
    "while the old one goes": (checkpointing, "rotate_checkpoints", 2, half_deleted, "checkpoint-6"),
    "the model at the end": (modeling_utils, "safe_save_file", 6, half, "checkpoint-12"),  # after the average's
}


@pytest.mark.parametrize("cut", CUTS)
def test_killed_while_a_checkpoint_is_written(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, cut: str
) -> None:
    """Folders with the name of a checkpoint are complete, the training resumes from them, and other leftovers are deleted."""
    owner, name, number, fatal, last = CUTS[cut]
    function, calls = getattr(owner, name), iter(range(1, 10**6))
    number = number(whole) if callable(number) else number

    def fatal_in_time(*args: Any, **kwargs: Any) -> Any:
        return (fatal(function) if next(calls) == number else function)(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fatal_in_time)
        killed(lambda: train(tmp_path, save_total_limit=1))
    found = last_complete_checkpoint(tmp_path)
    assert (found.name if found else "") == last
    if cut not in ("while the old one goes", "when it has its name"):
        assert not any(map(checkpoint_problem, checkpoint_folders(tmp_path)))
    train(tmp_path, save_total_limit=1)
    assert_same(weights(tmp_path), weights(whole))
    assert [f.name for f in checkpoint_folders(tmp_path)] == ["checkpoint-12"]
    assert not (tmp_path / INCOMPLETE).exists()


def test_a_disk_that_is_full_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UFGIRTrainer, "_save_rng_state", full)
    with pytest.raises(DiskFull, match=r"checkpoint-3/\S+ could not be written, .* are needed, .* are free"):
        train(tmp_path)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    train(tmp_path, num_train_epochs=1)
    assert not (tmp_path / INCOMPLETE).exists()


# Which checkpoints count


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Write two checkpoints with a plain Trainer."""
    for step in (1, 2):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        safetensors.torch.save_file({"a": torch.zeros(100)}, folder / "model.safetensors")
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            torch.save({"a": torch.zeros(100)}, folder / name)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    return tmp_path


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 10)


def listed(folder: Path, damage: Callable[[Path], None]) -> Path:
    """Write a checkpoint with a list of its files, and damage one of them."""
    target = folder / "checkpoint-3"
    shutil.copytree(folder / "checkpoint-2", folder / INCOMPLETE / target.name)
    checkpointing.complete_checkpoint(folder / INCOMPLETE / target.name, target)
    assert checkpoint_problem(target) is None
    damage(target)
    return target


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda f: cut(f / "model.safetensors"), "model.safetensors"),
        (lambda f: cut(f / "optimizer.pt"), "optimizer.pt"),
        (lambda f: (f / "rng_state.pth").write_bytes(b""), "rng_state.pth"),
        (lambda f: (f / "optimizer.pt").unlink(), "optimizer"),
        (lambda f: (f / "model.safetensors").unlink(), "model.safetensors|weights"),
        (lambda f: (f / "trainer_state.json").unlink(), "trainer_state.json is missing"),
        (lambda f: (f / "trainer_state.json").write_text('{"global'), "trainer_state.json"),
        (lambda f: shutil.rmtree(f) or f.mkdir(), "trainer_state.json is missing"),
    ],
)
@pytest.mark.parametrize("with_list", [False, True])
def test_damaged_checkpoints_are_passed_over(
    plain: Path, caplog: pytest.LogCaptureFixture, damage: Callable, words: str, with_list: bool
) -> None:
    if with_list:
        damaged, expected = listed(plain, damage), plain / "checkpoint-2"
    else:
        damaged, expected = plain / "checkpoint-2", plain / "checkpoint-1"
        damage(damaged)
    problem = checkpoint_problem(damaged)
    assert problem is not None and any(word in problem for word in words.split("|")), problem
    assert last_complete_checkpoint(plain) == expected
    assert str(damaged) in caplog.text and problem in caplog.text
    assert Path(find_checkpoint(arguments(plain, "true"))) == expected
    with pytest.raises(ValueError, match=r"incomplete|no checkpoint"):
        find_checkpoint(arguments(plain, str(damaged)))


@pytest.mark.parametrize("damage", ["flipped byte", "shard", "marked"])
def test_damage_that_only_reading_shows(plain: Path, damage: str) -> None:
    folder = plain / "checkpoint-2"
    if damage == "flipped byte":
        content = bytearray((folder / "optimizer.pt").read_bytes())
        start = content.index(bytes(400))  # the numbers
        content[start + 7] = 1
        (folder / "optimizer.pt").write_bytes(content)
    elif damage == "shard":
        (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
        shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    else:
        (folder / "checkpoint-is-incomplete.txt").touch()
    assert checkpoint_problem(folder) is not None


def arguments(folder: Path, resume: str | None, overwrite: bool = False) -> TrainingArguments:
    args = TrainingArguments(output_dir=str(folder), resume_from_checkpoint=resume, use_cpu=True)
    args.overwrite_output_dir = overwrite
    return args


def test_where_a_training_begins(plain: Path, tmp_path_factory) -> None:
    empty = tmp_path_factory.mktemp("empty")
    one, two = map(str, checkpoint_folders(plain))
    assert find_checkpoint(arguments(empty, None)) is None
    assert find_checkpoint(arguments(plain, "false", overwrite=True)) is None
    assert find_checkpoint(arguments(plain, "true")) == find_checkpoint(arguments(plain, two)) == two
    assert find_checkpoint(arguments(plain, "auto")) == two and find_checkpoint(arguments(empty, "auto")) is None
    assert find_checkpoint(arguments(empty, one)) == find_checkpoint(arguments(plain, one, overwrite=True)) == one
    for folder, resume, words in (
        (plain, None, "--resume_from_checkpoint true"),
        (plain, one, "which is later"),
        (empty, "true", "no checkpoint"),
        (empty, str(empty), "no checkpoint"),
    ):
        with pytest.raises(ValueError, match=words):
            find_checkpoint(arguments(folder, resume))
    for folder in checkpoint_folders(plain):
        cut(folder / "optimizer.pt")
    with pytest.raises(ValueError, match="no complete checkpoint"):
        find_checkpoint(arguments(plain, "true"))
    assert find_checkpoint(arguments(plain, "auto")) is None


def test_old_checkpoints_go_when_the_new_one_is_complete(plain: Path) -> None:
    for step in (5, 10, 20):
        shutil.copytree(plain / "checkpoint-2", plain / f"checkpoint-{step}")
    shutil.copytree(plain / "checkpoint-2", plain / "checkpoint-2-mine")
    cut(plain / "checkpoint-20" / "model.safetensors")

    def left() -> list[str]:
        return sorted(f.name for f in plain.iterdir())

    rotate_checkpoints(plain, None, None)
    assert left() == ["checkpoint-1", "checkpoint-10", "checkpoint-2", "checkpoint-2-mine", "checkpoint-5"]
    rotate_checkpoints(plain, 3, plain / "checkpoint-1")
    assert left() == ["checkpoint-1", "checkpoint-10", "checkpoint-2-mine", "checkpoint-5"]
    rotate_checkpoints(plain, 1, plain / "checkpoint-1")
    assert left() == ["checkpoint-1", "checkpoint-10", "checkpoint-2-mine"]
    for name in (
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
    ):  # `save_only_model`: nothing to go on from, but whole
        (plain / "checkpoint-10" / name).unlink()
    rotate_checkpoints(plain, 1, None)
    assert left() == ["checkpoint-10", "checkpoint-2-mine"]


def test_remove_checkpoints(plain: Path) -> None:
    (plain / INCOMPLETE / "checkpoint-9").mkdir(parents=True)
    (plain / "checkpoint-x").mkdir()
    remove_checkpoints(plain, after=plain / "checkpoint-1")
    assert sorted(f.name for f in plain.iterdir()) == ["checkpoint-1", "checkpoint-x"]
    remove_checkpoints(plain)
    assert [f.name for f in plain.iterdir()] == ["checkpoint-x"]


def test_a_list_names_every_file(whole: Path) -> None:
    for folder in checkpoint_folders(whole):
        sizes = json.loads((folder / FILE_LIST).read_text())["files"]
        assert sizes == {f.name: f.stat().st_size for f in folder.iterdir() if f.name != FILE_LIST}
        assert {"model.safetensors", "ema.safetensors", "optimizer.pt", "trainer_state.json"} <= set(sizes)


@pytest.mark.parametrize("position", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_found_in_every_file(whole: Path, tmp_path: Path, position: float) -> None:
    """At the beginning, middle and end of a file, where the size is unchanged and the checksum is not."""
    folder = shutil.copytree(whole / "checkpoint-3", tmp_path / "checkpoint-3")
    assert checkpoint_problem(folder, read=True) is None
    for file in sorted(f for f in folder.iterdir() if f.name != FILE_LIST):
        content = file.read_bytes()
        at = int(position * (len(content) - 1))
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        assert file.name in (checkpoint_problem(folder, read=True) or "")
        file.write_bytes(content)
    assert last_complete_checkpoint(tmp_path) == folder


def test_damage_is_reported_before_anything_is_loaded(
    whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """When resuming, when the best checkpoint is loaded, and when a checkpoint is evaluated. A list of an earlier version has no checksums,
    and the checkpoint can be resumed."""
    for step in (3, 6):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    damaged = tmp_path / "checkpoint-6" / "model.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-3" and "checksum" in caplog.text
    with pytest.raises(ValueError, match=r"model\.safetensors .* checksum"):
        find_checkpoint(arguments(tmp_path, str(damaged.parent)))
    with pytest.raises(ValueError, match=r"model\.safetensors .* checksum"):
        load_pretrained(str(damaged.parent), CLCAViTConfig.from_pretrained(damaged.parent))
    trainer = make_trainer(tmp_path)
    trainer.state.best_model_checkpoint = str(damaged.parent)
    with pytest.raises(CheckpointError, match=r"best .*model\.safetensors .* checksum"):
        trainer._load_best_model()

    listed = damaged.parent / FILE_LIST
    listed.write_text(json.dumps({"files": json.loads(listed.read_text())["files"]}))
    assert last_complete_checkpoint(tmp_path) == damaged.parent


@pytest.mark.parametrize("name", [".", "ema"])
def test_damage_of_a_saved_model_is_reported(whole: Path, tmp_path: Path, name: str) -> None:
    """Saving the model again updates the list; without a list, nothing is compared."""
    folder = shutil.copytree(whole / name, tmp_path / "model", ignore=shutil.ignore_patterns("checkpoint-*"))
    model = load_pretrained(str(folder), CLCAViTConfig.from_pretrained(folder))
    weights = folder / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=rf"model\.safetensors .* checksum.*{FILE_LIST}"):
        load_pretrained(str(folder), model.config)
    trainer = make_trainer(folder)
    trainer.save_model()
    load_pretrained(str(folder), model.config)
    weights.write_bytes(content)
    (folder / FILE_LIST).unlink()
    load_pretrained(str(folder), model.config)


@pytest.mark.parametrize("changes", [{"newer_key": 1}, {"global_step": "three"}, {"log_history": 5}, {"epoch": "two"}])
def test_states_that_trainer_would_stumble_over(plain: Path, changes: dict[str, Any]) -> None:
    (plain / "checkpoint-2" / "trainer_state.json").write_text(json.dumps({"global_step": 2} | changes))
    assert next(iter(changes)) in checkpoint_problem(plain / "checkpoint-2")
    assert last_complete_checkpoint(plain) == plain / "checkpoint-1"


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "rng_state.pth"])
def test_folders_where_files_belong(plain: Path, name: str) -> None:
    (plain / "checkpoint-2" / name).unlink()
    (plain / "checkpoint-2" / name).mkdir()
    assert name in checkpoint_problem(plain / "checkpoint-2")


def test_a_best_evaluation_without_a_checkpoint(tmp_path: Path) -> None:
    """If evaluations are more frequent than checkpoints, the best metric after resuming is that at the checkpoint, not a later one."""
    plan: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 2,
        "metric_for_best_model": "score",
    }
    scores = [0.1, 0.2, 0.9, 0.3, 0.5, 0.4]
    ends = []
    for checkpoint in (None, tmp_path / "checkpoint-4"):
        trainer = make_trainer(tmp_path, max_steps=6, load_best_model_at_end=True, save_total_limit=None, **plan)
        values = iter(scores[4:] if checkpoint else scores)
        trainer.compute_metrics = lambda prediction, values=values: {"score": next(values)}
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        ends.append((trainer.state.best_metric, trainer.state.best_global_step, trainer.state.best_model_checkpoint))
    assert ends[0] == ends[1] and ends[0][:2] == (0.9, 3)


@pytest.mark.parametrize("step", [1, 3, 7])
def test_a_checkpoint_because_of_a_signal_changes_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """The best evaluation so far is that of step 1, the best of all that of step 5; neither has a checkpoint otherwise."""
    plan = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 3,
        "metric_for_best_model": "score",
        "max_steps": 8,
    }
    scores = [0.5, 0.1, 0.1, 0.1, 0.9, 0.2, 0.2, 0.2]

    def end(folder: Path, checkpoint: str | None = None, signal_after: int | None = None) -> tuple:
        trainer = make_trainer(
            folder, load_best_model_at_end=True, save_total_limit=2, enable_jit_checkpoint=True, **plan
        )
        values = iter(scores[int(checkpoint.rpartition("-")[2]) if checkpoint else 0 :])
        trainer.compute_metrics = lambda prediction: {"score": next(values)}
        pending = lambda: signal.SIGTERM if trainer.state.global_step == signal_after else None  # noqa: E731
        monkeypatch.setattr(checkpointing, "pending_signal", pending)
        trainer.train(resume_from_checkpoint=checkpoint)
        best = trainer.state.best_model_checkpoint and Path(trainer.state.best_model_checkpoint).name
        names = [f.name for f in checkpoint_folders(folder)]
        return trainer.model.state_dict(), names, best, trainer.state.best_global_step

    expected = end(tmp_path / "whole")
    with pytest.raises(Ended):
        end(tmp_path / "out", signal_after=step)
    last = str(last_complete_checkpoint(tmp_path / "out"))
    assert last.endswith(f"checkpoint-{step}")
    found = end(tmp_path / "out", last)
    assert found[1:] == expected[1:] and expected[1] == ["checkpoint-6", "checkpoint-8"]
    assert_same(found[0], expected[0])


def test_checkpoints_in_excess_go_at_resume(whole: Path, tmp_path: Path) -> None:
    """The run was killed before it deleted them, and no later checkpoint follows."""
    for step in (3, 6, 9, 12):
        shutil.copytree(whole / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    train(tmp_path, save_total_limit=1)
    assert [f.name for f in checkpoint_folders(tmp_path)] == ["checkpoint-12"]


def test_another_batch_size_is_logged(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The position in the epoch, in steps, now corresponds to other images."""
    trainer = make_trainer(tmp_path, (averaging(),), per_device_train_batch_size=2, max_steps=7)
    trainer.train(resume_from_checkpoint=str(whole / "checkpoint-6"))
    assert "images_per_step 4, now 2" in caplog.text and "processes" not in caplog.text


def test_another_models_checkpoint_is_refused(whole: Path, tmp_path: Path) -> None:
    """Trainer would only warn, and train a random head."""
    other = make_trainer(tmp_path, model={"head": "linear"})
    with pytest.raises(ValueError, match=r"\d+ weights differ, e.g. classifier"):
        other.train(resume_from_checkpoint=str(whole / "checkpoint-3"))
    with pytest.raises(ValueError, match=r"has shape .* in the checkpoint and .* in the model"):
        check_fits(whole / "checkpoint-3", CLCAViTForImageClassification(CLCAViTConfig(**TINY | {"hidden_size": 8})))
    assert not list(tmp_path.iterdir())


def test_uploads_see_complete_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = []
    monkeypatch.setattr("transformers.Trainer._push_from_checkpoint", lambda trainer, folder: pushed.append(folder))
    trainer = make_trainer(tmp_path, num_train_epochs=2, save_total_limit=None)
    monkeypatch.setattr(trainer.args, "push_to_hub", True)
    monkeypatch.setattr(trainer, "push_to_hub", lambda *args, **kwargs: None)
    trainer.train()
    assert pushed == [str(tmp_path / f"checkpoint-{step}") for step in (3, 6, 8)]
    assert not any(map(checkpoint_problem, pushed))
