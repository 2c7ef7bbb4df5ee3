"""transformers' own Trainer with the models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    Trainer,
    TrainingArguments,
)

from clca import CLCAViTForImageClassification
from tests.clca.shared import CODE, logits_of, on_disk
from tests.helpers import CHECKPOINTING, METHODS, Case, images, labels, tiny_config


WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.h5")


# Trainer.


class Photos(torch.utils.data.Dataset):
    """24 random images in three classes that differ in their mean."""

    def __init__(self) -> None:
        self.labels = labels(24)
        self.pixels = images(24).float() + self.labels[:, None, None, None]

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": self.pixels[index], "labels": int(self.labels[index])}


def trainer(folder: Path, model: CLCAViTForImageClassification | None = None, **options: Any) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "seed": 5,
        "dataloader_pin_memory": False,
    }
    if model is None:
        torch.manual_seed(0)
        model = CLCAViTForImageClassification(
            tiny_config(
                reduction="evit",
                keep_rate=0.5,
                cross_layer_cache=True,
                num_clr_tokens=1,
                head="cla",
                hidden_dropout_prob=0.1,
                drop_path_rate=0.1,
                output_hidden_states=True,  # of other lengths than in other batches: Trainer must leave them
            )
        )
    return Trainer(
        model=model,
        args=TrainingArguments(**(arguments | options)),
        train_dataset=Photos(),
        eval_dataset=Photos(),
        compute_metrics=falling_score,
    )


evaluations: list[int] = []


def falling_score(prediction: Any) -> dict[str, float]:
    """Return a score that decreases with each evaluation, so that the first model is the best."""
    assert prediction.predictions.shape == (24, 3)  # logits alone: ragged outputs are not gathered
    evaluations.append(1)
    return {"score": -float(len(evaluations))}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """Train four steps without interruption, with checkpoints after two and four."""
    folder = tmp_path_factory.mktemp("trained")
    run = trainer(folder)
    run.train()
    return folder, run


def test_training_changes_every_trainable_parameter(trained: tuple[Path, Trainer]) -> None:
    """The frozen norm does not change, and the loss that Trainer logs is finite."""
    torch.manual_seed(0)
    start = CLCAViTForImageClassification(trained[1].model.config).state_dict()
    for name, parameter in trained[1].model.named_parameters():
        assert torch.equal(parameter, start[name]) != parameter.requires_grad, name
    assert all(torch.isfinite(torch.tensor(entry.get("train_loss", 0.0))) for entry in trained[1].state.log_history)


def test_a_checkpoint_holds_everything(trained: tuple[Path, Trainer]) -> None:
    """It contains weights as safetensors under the names in memory, code and configuration."""
    folder, run = trained
    checkpoint = folder / "checkpoint-4"
    assert on_disk(checkpoint) == set(run.model.state_dict())
    assert {p.name for p in checkpoint.iterdir()} >= CODE | {"config.json"}
    loaded, info = CLCAViTForImageClassification.from_pretrained(checkpoint, output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(logits_of(loaded), logits_of(run.model))


def test_resumed_is_uninterrupted(trained: tuple[Path, Trainer], tmp_path: Path) -> None:
    """Results are bit-for-bit equal, including statistics of BatchNorm, with dropout and drop path."""
    folder, run = trained
    torch.manual_seed(99)
    fresh = CLCAViTForImageClassification(run.model.config)  # other weights, all to be replaced
    resumed = trainer(tmp_path, fresh)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert resumed.state.global_step == 4
    expected = run.model.state_dict()
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """All weights of the first checkpoint are loaded after three more were trained."""
    evaluations.clear()
    run = trainer(
        tmp_path,
        max_steps=3,
        eval_strategy="steps",
        eval_steps=1,
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    run.train()
    assert run.state.best_model_checkpoint.endswith("checkpoint-1")
    best = load_file(tmp_path / "checkpoint-1" / "model.safetensors")
    last = load_file(tmp_path / "checkpoint-3" / "model.safetensors")
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, best[name]), name
    assert not torch.equal(best["classifier.out_proj.weight"], last["classifier.out_proj.weight"])


def test_no_pickled_weights(trained: tuple[Path, Trainer], tmp_path: Path) -> None:
    """`save_model` of Trainer writes safetensors that can be loaded."""
    trained[1].save_model(str(tmp_path))
    # training_args.bin is Trainer's own record of its arguments and holds no weights
    assert not {p.name for pattern in WEIGHTS for p in tmp_path.glob(pattern)} - {"training_args.bin"}
    assert torch.equal(logits_of(CLCAViTForImageClassification.from_pretrained(tmp_path)), logits_of(trained[1].model))


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_trainer_with_every_method(method: str | None, tmp_path: Path) -> None:
    """Two steps with activation checkpointing, and a prediction that returns only logits."""
    evaluations.clear()
    torch.manual_seed(0)
    model = CLCAViTForImageClassification(Case(method, "clca", "cls").config())
    run = trainer(tmp_path, model, max_steps=2, save_strategy="no", **{CHECKPOINTING: True})
    result = run.train()
    assert 0 < result.training_loss < 20
    assert run.predict(Photos()).predictions.shape == (24, 3)
