"""accelerate: models loaded in lower precision, without memory for two copies, or with a part on the disk."""

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import (
    dispatch_model,
    infer_auto_device_map,
    init_empty_weights,
    load_checkpoint_and_dispatch,
    load_checkpoint_in_model,
)
from accelerate.utils import compute_module_sizes
from torch import nn

from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.helpers import CACHES, VARIANTS, images, tiny_model, variant_model


CLCA = CACHES["clca"]


def logits_of(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images().float()).logits


def device_map(model: CLCAViTForImageClassification, *on_disk: str) -> dict[str, str]:
    """Return a device map with the named modules below `vit` on the disk and the others on the CPU."""
    modules = [f"vit.{name}" for name, _ in model.vit.named_children() if name != "layers"]
    modules += [f"vit.layers.{i}" for i in range(len(model.vit.layers))] + ["classifier"]
    assert set(on_disk) <= set(modules)
    return {name: "disk" if name in on_disk else "cpu" for name in modules}


def stays_on_disk(model: nn.Module) -> set[str]:
    """Return the names of the parameters that hold no data between forward passes."""
    return {name for name, parameter in model.named_parameters() if parameter.device.type == "meta"}


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_on_the_disk(variant: str, tmp_path: Path) -> None:
    """`from_pretrained(device_map=...)` with three layers on the disk, including stages: logits are equal, twice, and
    no weights of those layers stay in memory."""
    model = variant_model(variant)
    model.save_pretrained(tmp_path / "model")
    placed = device_map(model, "vit.layers.0", "vit.layers.1", "vit.layers.2")
    offloaded = CLCAViTForImageClassification.from_pretrained(
        tmp_path / "model", device_map=placed, offload_folder=tmp_path / "disk"
    )
    assert offloaded.hf_device_map == placed
    on_disk = {
        name for name, _ in model.named_parameters() if name.startswith(tuple(f"vit.layers.{i}." for i in (0, 1, 2)))
    }
    for _ in range(2):
        assert torch.equal(logits_of(offloaded), logits_of(model))
        assert stays_on_disk(offloaded) >= on_disk


@pytest.mark.parametrize("variant", ["evit", "tome", "dpcknn", "sinkhorn", "vqt", "map"])
def test_everything_on_the_disk(variant: str, tmp_path: Path) -> None:
    """The same with embeddings, final norm, pooling and head on the disk. The model can be saved again."""
    model = variant_model(variant)
    model.save_pretrained(tmp_path / "model")
    placed = dict.fromkeys(device_map(model), "disk")
    offloaded = CLCAViTForImageClassification.from_pretrained(
        tmp_path / "model", device_map=placed, offload_folder=tmp_path / "disk"
    )
    assert torch.equal(logits_of(offloaded), logits_of(model))
    assert stays_on_disk(offloaded) == set(dict(model.named_parameters()))
    offloaded.save_pretrained(tmp_path / "again")
    again = CLCAViTForImageClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again), logits_of(model))


def test_assignments_of_an_offloaded_model(tmp_path: Path) -> None:
    """Reports other than logits are the same."""
    model = variant_model("dpcknn")
    model.save_pretrained(tmp_path / "model")
    offloaded = CLCAViTForImageClassification.from_pretrained(
        tmp_path / "model", device_map=device_map(model, "vit.layers.1"), offload_folder=tmp_path / "disk"
    )
    outputs = []
    for one in (model, offloaded.eval()):
        with torch.no_grad():
            outputs.append(one(images().float(), output_assignments=True, output_hidden_states=True))
    assert outputs[0].token_counts == outputs[1].token_counts
    for name in ("assignments", "hidden_states"):
        assert all(map(torch.equal, *(output[name] for output in outputs)))


@pytest.mark.parametrize("variant", ["evit", "tome", "dpcknn", "dyvit", "vqt"])
def test_no_layer_is_split(variant: str) -> None:
    """An automatic device map cuts between layers, never within a layer or the embeddings."""
    model = variant_model(variant)
    sizes = compute_module_sizes(model)
    layer = max(size for name, size in sizes.items() if name.count(".") == 2 and name.startswith("vit.layers."))
    budget = {0: int(2.5 * layer) + sizes["vit.embeddings"], "cpu": int(1.5 * layer), "disk": 10**9}
    placed = infer_auto_device_map(model, max_memory=budget, no_split_module_classes=model._no_split_modules)
    assert len(set(placed.values())) > 1
    whole = {"vit.embeddings", *(f"vit.layers.{i}" for i in range(len(model.vit.layers)))}
    for name in placed:
        assert name in {*whole, "vit", "vit.layers"} or not name.startswith(("vit.embeddings", "vit.layers")), name


def test_modules_that_must_not_be_split_cover_every_layer() -> None:
    """Subclasses of the layer are listed, too, because accelerate compares class names."""
    for variant in VARIANTS:
        model = variant_model(variant)
        assert all(type(layer).__name__ in model._no_split_modules for layer in model.vit.layers), variant
        assert type(model.vit.embeddings).__name__ in model._no_split_modules


def test_dispatch_of_a_model_in_memory(tmp_path: Path) -> None:
    """accelerate's own function works on a model that was never saved."""
    model = variant_model("evit")
    expected = logits_of(model)
    dispatched = dispatch_model(
        model, device_map(model, "vit.layers.1", "classifier"), main_device="cpu", offload_dir=tmp_path / "disk"
    )
    assert torch.equal(logits_of(dispatched), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_empty_weights(variant: str, tmp_path: Path) -> None:
    """A model built on the meta device and filled from a file works: no step needs values of parameters or buffers."""
    model = variant_model(variant)
    model.save_pretrained(tmp_path)
    with init_empty_weights(include_buffers=False):
        empty = CLCAViTForImageClassification(model.config)
    assert stays_on_disk(empty) == set(dict(model.named_parameters()))
    load_checkpoint_in_model(empty, tmp_path, device_map={"": "cpu"}, strict=True)
    assert torch.equal(logits_of(empty), logits_of(model))


def test_load_and_dispatch(tmp_path: Path) -> None:
    """accelerate's own loading works: empty weights, a checkpoint, and a device map with a part on the disk."""
    model = variant_model("tome")
    model.save_pretrained(tmp_path / "model")
    with init_empty_weights(include_buffers=False):
        empty = CLCAViTForImageClassification(model.config)
    loaded = load_checkpoint_and_dispatch(
        empty,
        tmp_path / "model",
        device_map=device_map(model, "vit.layers.2", "vit.layernorm"),
        offload_folder=tmp_path / "disk",
        strict=True,
    )
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_nothing_is_built_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`from_pretrained` builds the model on the meta device and does not initialize weights that are in the file."""
    model = variant_model("dyvit")
    model.save_pretrained(tmp_path)
    devices = []
    original = CLCAViTForImageClassification.__init__

    def spy(self: CLCAViTForImageClassification, config: CLCAViTConfig) -> None:
        original(self, config)
        devices.extend(parameter.device.type for parameter in self.parameters())

    monkeypatch.setattr(CLCAViTForImageClassification, "__init__", spy)
    loaded = CLCAViTForImageClassification.from_pretrained(tmp_path)
    assert set(devices) == {"meta"}
    assert not stays_on_disk(loaded)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16(variant: str, tmp_path: Path) -> None:
    """With `dtype=torch.bfloat16` all parameters have this dtype, logits are close to those in float32, and the model
    can be saved and reloaded. float32 pixels are accepted."""
    model = variant_model(variant)
    model.save_pretrained(tmp_path / "model")
    half = CLCAViTForImageClassification.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    logits = logits_of(half)
    assert logits.dtype == torch.bfloat16 and logits.isfinite().all()
    half.save_pretrained(tmp_path / "again")
    again = CLCAViTForImageClassification.from_pretrained(tmp_path / "again", dtype="auto")
    assert {parameter.dtype for parameter in again.parameters()} == {torch.bfloat16}
    assert torch.equal(logits_of(again), logits)


def test_bfloat16_without_reduction_is_near(tmp_path: Path) -> None:
    """Without discrete choices of tokens, the error of bfloat16 is as large as its eight bits imply."""
    model = tiny_model(**CLCA, initializer_range=0.02).float()
    model.save_pretrained(tmp_path)
    half = CLCAViTForImageClassification.from_pretrained(tmp_path, dtype=torch.bfloat16)
    expected = logits_of(model)
    assert (logits_of(half).float() - expected).abs().max() <= 0.05 * max(1.0, float(expected.abs().max()))


def test_bfloat16_on_the_disk(tmp_path: Path) -> None:
    """bfloat16 and layers on the disk at the same time."""
    model = variant_model("evit")
    model.save_pretrained(tmp_path / "model")
    options: dict[str, Any] = {"dtype": torch.bfloat16}
    half = CLCAViTForImageClassification.from_pretrained(tmp_path / "model", **options)
    placed = device_map(model, "vit.layers.1", "vit.layers.2")
    offloaded = CLCAViTForImageClassification.from_pretrained(
        tmp_path / "model", device_map=placed, offload_folder=tmp_path / "disk", **options
    )
    assert torch.equal(logits_of(offloaded), logits_of(half))


def test_sharded_files(tmp_path: Path) -> None:
    """Weights in several files load, also with a part on the disk."""
    model = variant_model("dpcknn")
    model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert torch.equal(logits_of(CLCAViTForImageClassification.from_pretrained(tmp_path / "model")), logits_of(model))
    offloaded = CLCAViTForImageClassification.from_pretrained(
        tmp_path / "model", device_map=device_map(model, "vit.layers.1"), offload_folder=tmp_path / "disk"
    )
    assert torch.equal(logits_of(offloaded), logits_of(model))
