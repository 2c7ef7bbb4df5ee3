"""Killed and resumed: the weights are those of a training that was never stopped, and a checkpoint that was cut off is never
loaded. Trainings are killed for good, by SIGKILL, in forks of this process (a fresh one would import torch for seconds)."""

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import (
    EarlyStoppingCallback,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    modeling_utils,
    set_seed,
)
from transformers.trainer_callback import ExportableState

from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.helpers import CACHES, TINY
from ufgir.data.transformed import SetEpoch, TransformedImages
from ufgir.evaluation.metrics import compute_metrics
from ufgir.training import checkpointing, ema
from ufgir.training.adapters import AdapterArguments
from ufgir.training.augmentation import AugmentingCollator
from ufgir.training.checkpointing import (
    FILE_LIST,
    INCOMPLETE,
    check_fits,
    checkpoint_folders,
    find_checkpoint,
    last_complete_checkpoint,
    remove_checkpoints,
    rotate_checkpoints,
    what_is_missing,
)
from ufgir.training.ema import EMACallback
from ufgir.training.optimization import OptimizationArguments
from ufgir.training.trainer import UFGIRTrainer
from ufgir.transforms.augmentation import Augmentation, AugmentationArguments
from ufgir.transforms.preprocessing import EvalTransform, TrainTransform, make_image_processor


STEPS = 12  # 3 epochs of 4 steps
SAVED = (3, 6, 9, 12)  # in the middle of epochs, and at the end
PROCESSOR = make_image_processor(32)
STEERED = AugmentationArguments(
    random_erasing_probability=0.5, random_erasing_fill="noise", mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.1
)


def pictures(count: int, seed: int) -> list[dict[str, Any]]:
    """Noise in three colours, and which colour."""
    rows = []
    for i in range(count):
        noise = np.random.default_rng((seed, i)).integers(0, 100, (40, 40, 3))
        noise[..., i % 3] += 120
        rows.append({"image": Image.fromarray(noise.astype(np.uint8)), "label": i % 3})
    return rows


TRAIN, VALIDATION = pictures(17, 0), pictures(9, 1)  # batches of 4: the last picture of an epoch is dropped


def make_trainer(
    folder: Path,
    callbacks: tuple[TrainerCallback, ...] = (),
    model: dict[str, Any] | None = None,
    copies: int = 1,
    optimization: OptimizationArguments | None = None,
    lora: bool = False,
    **changes: Any,
) -> UFGIRTrainer:
    """A trainer with everything random that there is: drop path, dropout, order, crops, erasing, MixUp and CutMix."""
    args = TrainingArguments(
        output_dir=str(folder),
        **{
            "num_train_epochs": 3,
            "per_device_train_batch_size": 4,
            "per_device_eval_batch_size": 4,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "logging_steps": 1,
            "eval_strategy": "epoch",
            "save_strategy": "steps",
            "save_steps": 3,
            "save_total_limit": 2,
            "dataloader_drop_last": True,
            "remove_unused_columns": False,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 3,
            **changes,
        },
    )
    set_seed(args.seed)
    options = TINY | CACHES["clca"] | {"reduction": "evit", "keep_rate": 0.5, "initializer_range": 0.02}
    config = CLCAViTConfig(**options | {"drop_path_rate": 0.3, "hidden_dropout_prob": 0.1} | (model or {}))
    config.problem_type = "single_label_classification"
    augmentation = Augmentation(STEERED, PROCESSOR, config.num_labels)
    train = TransformedImages(
        TRAIN, TrainTransform(PROCESSOR, augmentation=augmentation), seed=args.seed, copies=copies
    )
    network = CLCAViTForImageClassification(config)
    return UFGIRTrainer(
        model=AdapterArguments(lora_rank=2, lora_dropout=0.1).adapt(network) if lora else network,
        args=args,
        train_dataset=train,
        eval_dataset=TransformedImages(VALIDATION, EvalTransform(PROCESSOR)),
        data_collator=AugmentingCollator(augmentation),
        compute_metrics=compute_metrics,
        callbacks=[SetEpoch(train), *callbacks],
        optimization=optimization,
    )


def averaging() -> EMACallback:
    return EMACallback(0.8)


def train(folder: Path, **changes: Any) -> None:
    """Train to the end, from the last complete checkpoint in `folder`, if there is one, and save the model."""
    trainer = make_trainer(folder, (averaging(),), **changes)
    last = last_complete_checkpoint(folder)
    trainer.train(resume_from_checkpoint=None if last is None else str(last))
    trainer.save_model()


def killed(action: Callable[[], None]) -> None:
    """Do it in a fork; fails unless that kills itself."""
    process = multiprocessing.get_context("fork").Process(target=action)
    process.start()
    process.join(300)
    assert process.exitcode == -signal.SIGKILL


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of the model in a folder and, as `average.*`, of the averaged one beside it."""
    own = load_file(folder / "model.safetensors")
    return own | {f"average.{k}": v for k, v in load_file(folder / "ema" / "model.safetensors").items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    odd = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not odd, odd


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A training that was never stopped, with all its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, save_total_limit=None)
    return folder


# Killed while it trains


def test_the_training_is_as_random_as_it_can_be(whole: Path, tmp_path: Path) -> None:
    """Or else the tests of this file would show little: another seed gives other weights, and the average is another model."""
    train(tmp_path, seed=4)
    expected, other = weights(whole), weights(tmp_path)
    assert not any(torch.equal(other[name], expected[name]) for name in expected if name.endswith("proj.weight"))
    assert not torch.equal(expected["classifier.out_proj.weight"], expected["average.classifier.out_proj.weight"])


def test_killed_at_every_step(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One training, killed in the middle of its first step, of its second, and so on to the last."""
    step = UFGIRTrainer.training_step
    for fatal in range(STEPS):

        def training_step(trainer: UFGIRTrainer, *args: Any, fatal: int = fatal, **kwargs: Any) -> torch.Tensor:
            loss = step(trainer, *args, **kwargs)
            if trainer.state.global_step == fatal:
                die()
            return loss

        monkeypatch.setattr(UFGIRTrainer, "training_step", training_step)
        killed(lambda: train(tmp_path))
        done = [n for n in SAVED if n <= fatal]
        assert [f.name for f in checkpoint_folders(tmp_path)] == [f"checkpoint-{n}" for n in done[-2:]]
    monkeypatch.setattr(UFGIRTrainer, "training_step", step)
    train(tmp_path)
    assert_same(weights(tmp_path), weights(whole))


@pytest.mark.parametrize(
    "changes",
    [
        {"dataloader_num_workers": 2},
        {"gradient_accumulation_steps": 2, "save_steps": 1},
        {"save_steps": 4},  # an epoch, at whose end there is an evaluation
        {"optim": "sgd", "lr_scheduler_type": "linear", "max_grad_norm": 0.1, "eval_strategy": "no"},
        {"model": {"reduction": "dyvit", "head": "linear"}},  # draws its decisions while training
        {"copies": 2},
        {"optimization": OptimizationArguments(freeze_epochs=1, schedule="cosine_epochs", warmup_epochs=1)},
    ],
    ids=["workers", "accumulation", "epoch", "clipping", "dyvit", "repeated", "held"],
)
def test_resumed_from_every_checkpoint(tmp_path: Path, changes: dict[str, Any]) -> None:
    whole, changes = tmp_path / "whole", {"num_train_epochs": 2} | changes
    train(whole, save_total_limit=None, **changes)
    for checkpoint in checkpoint_folders(whole)[:-1]:
        stopped = tmp_path / checkpoint.name
        shutil.copytree(checkpoint, stopped / checkpoint.name)
        train(stopped, **changes)
        assert_same(weights(stopped), weights(whole))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks for it
def test_an_adapter_is_resumed(tmp_path: Path) -> None:
    """LoRA: a checkpoint holds the adapter and what is new to the model."""
    trained = []
    for checkpoint in (None, tmp_path / "checkpoint-3"):
        trainer = make_trainer(tmp_path, lora=True, num_train_epochs=2, save_total_limit=None)
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        trained.append(trainer.model.state_dict())
    assert trainer.state.global_step == 8 and not (tmp_path / "checkpoint-3" / "model.safetensors").exists()
    assert_same(trained[1], trained[0])


def test_what_the_log_says_is_the_same(whole: Path, tmp_path: Path) -> None:
    """Every loss and every metric of a resumed training, on CPU to the bit."""
    shutil.copytree(whole / "checkpoint-6", tmp_path / "checkpoint-6")
    train(tmp_path, save_total_limit=None)
    logs = [
        json.loads((f / "checkpoint-12" / "trainer_state.json").read_text())["log_history"] for f in (whole, tmp_path)
    ]
    for expected, actual in zip(*logs, strict=True):
        for name in ("step", "loss", "learning_rate", "grad_norm", "eval_top1", "eval_loss", "eval_ema_top1"):
            assert expected.get(name) == actual.get(name)


# Killed while a checkpoint is written


def half(write: Callable) -> Callable:
    """Write a file, cut it in half and die."""

    def wrapped(*args: Any, **kwargs: Any) -> None:
        write(*args, **kwargs)
        path = next(a for a in args if isinstance(a, str | os.PathLike))
        os.truncate(path, Path(path).stat().st_size // 2)
        die()

    return wrapped


def instead(function: Callable) -> Callable:
    return die


def after(function: Callable) -> Callable:
    """Do it and die."""

    def wrapped(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        die()

    return wrapped


def half_deleted(rotate: Callable) -> Callable:
    """Die while the old checkpoint is being deleted."""

    def wrapped(folder: Path, limit: int, best: str | None) -> None:
        assert limit == 1
        for file in sorted((folder / "checkpoint-3").iterdir())[::2]:
            file.unlink()
        die()

    return wrapped


# Where a training is killed, in which call of a function, and what that has done. There are four checkpoints; the second, of
# step 6, is cut off, if it is not said otherwise.
CUTS: dict[str, tuple[Any, str, int, Callable, str]] = {
    "weights": (modeling_utils, "safe_save_file", 2, half, "checkpoint-3"),
    "weights of the first": (modeling_utils, "safe_save_file", 1, half, ""),
    "average": (ema, "save_file", 2, half, "checkpoint-3"),
    "optimizer": (torch, "save", 6, half, "checkpoint-3"),
    "random state": (torch, "save", 8, half, "checkpoint-3"),
    "trainer's state": (TrainerState, "save_to_json", 3, half, "checkpoint-3"),
    "list of files": (checkpointing, "_to_disk", 40, instead, "checkpoint-3"),
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
    """What is left under the name of a checkpoint is whole, the training goes on from it, and what is left besides is cleared
    away."""
    owner, name, number, fatal, last = CUTS[cut]
    function, calls = getattr(owner, name), iter(range(1, 10**6))

    def fatal_in_time(*args: Any, **kwargs: Any) -> Any:
        return (fatal(function) if next(calls) == number else function)(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fatal_in_time)
        killed(lambda: train(tmp_path, save_total_limit=1))
    found = last_complete_checkpoint(tmp_path)
    assert (found.name if found else "") == last
    if cut not in ("while the old one goes", "when it has its name"):
        assert not any(map(what_is_missing, checkpoint_folders(tmp_path)))
    train(tmp_path, save_total_limit=1)
    assert_same(weights(tmp_path), weights(whole))
    assert [f.name for f in checkpoint_folders(tmp_path)] == ["checkpoint-12"]
    assert not (tmp_path / INCOMPLETE).exists()


def test_a_disk_that_is_full_leaves_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(UFGIRTrainer, "_save_rng_state", full)
    with pytest.raises(OSError, match="No space"):
        train(tmp_path)
    assert checkpoint_folders(tmp_path) == []
    monkeypatch.undo()
    train(tmp_path, num_train_epochs=1)
    assert not (tmp_path / INCOMPLETE).exists()


# At the end, and beyond


def test_a_training_that_has_ended_takes_no_further_step(tmp_path: Path) -> None:
    """By its number of steps, in the middle of an epoch; resumed, it comes to the same end. With more steps it goes on."""
    train(tmp_path, max_steps=6)
    expected = weights(tmp_path)
    train(tmp_path, max_steps=6)
    assert_same(weights(tmp_path), expected)
    train(tmp_path, max_steps=7)
    assert checkpoint_folders(tmp_path)[-1].name == "checkpoint-7"


def test_early_stopping_remembers_what_it_has_counted(tmp_path: Path) -> None:
    """Two evaluations without a better metric end the training, also with an interruption between them or after them."""

    def run(folder: Path, checkpoint: Path | None, patience: int = 2) -> int:
        plan = {"save_strategy": "epoch", "metric_for_best_model": "score", "num_train_epochs": 6}
        trainer = make_trainer(folder, (EarlyStoppingCallback(patience),), save_total_limit=None, **plan)
        trainer.compute_metrics = lambda prediction: {"score": 0.5}
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return trainer.state.global_step

    assert run(tmp_path / "whole", None) == 12  # the first epoch is the best, the third the last
    for step in (4, 8, 12):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        assert run(tmp_path / str(step), checkpoint) == 12
    assert run(tmp_path / "patient", checkpoint, patience=3) == 16


def test_the_state_of_callbacks_that_were_not_there_before(tmp_path: Path) -> None:
    """Trainer would fail at its next checkpoint: it looks the new callback up in the old state."""
    train(tmp_path, max_steps=3)
    plan = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 3, "metric_for_best_model": "top1"}
    trainer = make_trainer(tmp_path, (EarlyStoppingCallback(9),), **plan)
    assert any(isinstance(c, ExportableState) for c in trainer.callback_handler.callbacks)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 12


def test_the_best_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It is kept when others go, loaded at the end, found where the folder was moved to, and forgotten where it is gone."""
    plan: dict[str, Any] = {"save_strategy": "epoch", "load_best_model_at_end": True, "metric_for_best_model": "score"}

    def run(folder: Path, scores: list[float], checkpoint: Path | None = None, **changes: Any) -> UFGIRTrainer:
        trainer = make_trainer(folder, **plan | {"save_total_limit": 1, "num_train_epochs": 4} | changes)
        values = iter(scores)
        trainer.compute_metrics = lambda prediction: {"score": next(values)}
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        return trainer

    first = run(tmp_path / "a", [0.2, 0.6, 0.4, 0.5], save_total_limit=2)
    assert [f.name for f in checkpoint_folders(tmp_path / "a")] == ["checkpoint-8", "checkpoint-16"]
    assert first.state.best_model_checkpoint == str(tmp_path / "a" / "checkpoint-8")
    saved = load_file(tmp_path / "a" / "checkpoint-8" / "model.safetensors")
    assert_same(first.model.state_dict(), saved)

    moved = tmp_path / "b"
    shutil.move(tmp_path / "a", moved)
    again = run(moved, [0.1], moved / "checkpoint-16", num_train_epochs=5, save_total_limit=2)
    assert again.state.best_model_checkpoint == str(moved / "checkpoint-8")
    assert_same(again.model.state_dict(), saved)

    shutil.rmtree(moved / "checkpoint-8")
    worse = run(moved, [0.4, 0.3], moved / "checkpoint-20", num_train_epochs=7)
    assert "checkpoint-8, is gone" in caplog.text and worse.state.best_metric == 0.4
    assert worse.state.best_model_checkpoint == str(moved / "checkpoint-24")


# Which checkpoints count


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """Two checkpoints as a plain Trainer writes them."""
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
    """A checkpoint with a list of its files, of which one is then damaged."""
    target = folder / "checkpoint-3"
    shutil.copytree(folder / "checkpoint-2", folder / INCOMPLETE / target.name)
    checkpointing.complete_checkpoint(folder / INCOMPLETE / target.name, target)
    assert what_is_missing(target) is None
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
    problem = what_is_missing(damaged)
    assert problem is not None and any(word in problem for word in words.split("|")), problem
    assert last_complete_checkpoint(plain) == expected
    assert str(damaged) in caplog.text and problem in caplog.text
    assert Path(find_checkpoint(arguments(plain, "true"))) == expected
    with pytest.raises(ValueError, match=r"not complete|no checkpoint"):
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
    assert what_is_missing(folder) is not None


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
        (empty, "true", "there is no checkpoint"),
        (empty, str(empty), "there is no checkpoint"),
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


def test_another_batch_is_told(whole: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Where in the epoch it was, counted in steps, is now somewhere else."""
    trainer = make_trainer(tmp_path, (averaging(),), per_device_train_batch_size=2, max_steps=7)
    trainer.train(resume_from_checkpoint=str(whole / "checkpoint-6"))
    assert "written with images_per_step 4, it is 2 now" in caplog.text and "processes" not in caplog.text


def test_another_models_checkpoint_is_refused(whole: Path, tmp_path: Path) -> None:
    """Trainer would warn, and train a head that was drawn at random."""
    other = make_trainer(tmp_path, model={"head": "linear"})
    with pytest.raises(ValueError, match=r"another model, \d+ weights differ, e.g. classifier"):
        other.train(resume_from_checkpoint=str(whole / "checkpoint-3"))
    with pytest.raises(ValueError, match=r"with shape .* there and .* here"):
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
    assert not any(map(what_is_missing, pushed))
