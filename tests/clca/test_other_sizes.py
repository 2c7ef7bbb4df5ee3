"""Checkpoints loaded by `from_pretrained` at another `image_size` or `patch_size`."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    DeiTConfig,
    DeiTForImageClassification,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from clca import CLCAViTConfig, CLCAViTForImageClassification, CLCAViTModel
from clca.resample_clca import resample_patch_weights, resample_position_embeddings
from tests.clca.shared import logits_of
from tests.helpers import TINY, images, tiny_model


STOCK = {k: v for k, v in TINY.items() if k not in ("reduction_layers", "image_size")}
POSITIONS, PROJECTION = "vit.embeddings.position_embeddings", "vit.embeddings.patch_embeddings.projection.weight"
PAPER: dict[str, Any] = {"reduction": "evit", "keep_rate": 0.1, "reduction_layers": [1, 2], "head": "cla"}
PAPER |= {"cross_layer_cache": True, "num_clr_tokens": 1}
SMALL_SHARDS = "5KB"


def stock_vit(folder: Path, image_size: Any = 32, **save: Any) -> dict[str, torch.Tensor]:
    """Save a stock ViT with random weights and return its state dict."""
    torch.manual_seed(3)
    model = ViTForImageClassification(ViTConfig(**STOCK, image_size=image_size))
    nn.init.normal_(model.vit.embeddings.position_embeddings)
    model.save_pretrained(folder, **save)
    return model.state_dict()


def positions_of(model: PreTrainedModel) -> torch.Tensor:
    return model.base_model.embeddings.position_embeddings.detach()


def test_the_setting_of_the_paper(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A stock ViT loads at twice its size with reduction, cache, another head and another number of classes. Only new
    parameters are random, and one log line reports what was resampled."""
    state = stock_vit(tmp_path)
    with caplog.at_level(logging.INFO, logger="clca"):
        model, info = CLCAViTForImageClassification.from_pretrained(
            tmp_path, image_size=64, num_labels=80, ignore_mismatched_sizes=True, output_loading_info=True, **PAPER
        )
    assert [record.message for record in caplog.records if record.name.startswith("clca")] == [
        f"Resampled weights of {tmp_path}: position embeddings resampled from 4 x 4 to 8 x 8 patches."
    ]
    assert torch.equal(positions_of(model), resample_position_embeddings(state[POSITIONS], 1, (4, 4), (8, 8)))
    assert torch.equal(positions_of(model)[:, 0], state[POSITIONS][:, 0])
    assert torch.equal(model.vit.embeddings.clr_tokens, state["vit.embeddings.cls_token"])
    assert not info["mismatched_keys"]
    assert all(".clr_" in name or name.startswith("classifier.") for name in info["missing_keys"])
    assert logits_of(model, images(2, 64, 64).float()).shape == (2, 80)


@pytest.mark.parametrize("old", [32, [24, 48], [16, 64]], ids=str)
@pytest.mark.parametrize("new", [{"image_size": [64, 16]}, {"image_size": 24, "patch_size": 6}], ids=str)
@pytest.mark.parametrize("loader", [CLCAViTForImageClassification, CLCAViTModel])
def test_grids(old: Any, new: dict[str, Any], loader: type[PreTrainedModel], tmp_path: Path) -> None:
    """The old grid comes from the checkpoint's configuration: 2 x 8, 4 x 4 and 8 x 2 have the same number of patches.
    `ignore_mismatched_sizes` is not needed."""
    state = stock_vit(tmp_path, old)
    model = loader.from_pretrained(tmp_path, **new)
    config = CLCAViTConfig(**TINY | {"image_size": old})
    expected = resample_position_embeddings(state[POSITIONS], 1, config.image_grid, model.config.image_grid)
    assert torch.equal(positions_of(model), expected)
    weight = model.base_model.embeddings.patch_embeddings.projection.weight
    size = new.get("patch_size", 8)
    assert torch.equal(weight, resample_patch_weights(state[PROJECTION], (size, size)))


@pytest.mark.parametrize("tokens", [{}, {"num_register_tokens": 2}, {"prefix_position_embeddings": False}], ids=str)
@pytest.mark.parametrize("loader", [CLCAViTForImageClassification, AutoModelForImageClassification, AutoModel])
def test_models_of_ours(loader: Any, tokens: dict[str, Any], tmp_path: Path) -> None:
    """CLS, registers and CLR keep their positions, and all other weights stay unchanged. Saving and loading preserves
    the model."""
    options = {"reduction": "evit", "keep_rate": 0.5, "cross_layer_cache": True, "num_clr_tokens": 2, "head": "cla"}
    model = tiny_model(**options, **tokens).float()
    model.save_pretrained(tmp_path / "small")
    large = loader.from_pretrained(tmp_path / "small", image_size=[48, 40])
    own, got = model.vit.state_dict(), large.base_model.state_dict()
    prefix = 0 if "prefix_position_embeddings" in tokens else 1 + tokens.get("num_register_tokens", 0)
    name = "embeddings.position_embeddings"
    assert torch.equal(got.pop(name), resample_position_embeddings(own.pop(name), prefix, (4, 4), (6, 5)))
    assert own.keys() == got.keys()
    assert all(torch.equal(value, got[key]) for key, value in own.items())

    large.save_pretrained(tmp_path / "large")
    again, info = loader.from_pretrained(tmp_path / "large", output_loading_info=True)
    assert not any(info.values()), info
    assert again.config.image_size == [48, 40]
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in large.state_dict().items())


@pytest.mark.parametrize("shards", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize(
    "options",
    [{"dtype": torch.bfloat16}, {"dtype": torch.float64}, {"device_map": {"": "cpu"}}, {"use_safetensors": True}],
    ids=str,
)
def test_ways_to_load(shards: bool, options: dict[str, Any], tmp_path: Path) -> None:
    state = stock_vit(tmp_path, **({"max_shard_size": SMALL_SHARDS} if shards else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == shards
    model = CLCAViTForImageClassification.from_pretrained(tmp_path, image_size=64, **options)
    dtype = options.get("dtype", torch.float32)
    expected = resample_position_embeddings(state[POSITIONS].to(dtype), 1, (4, 4), (8, 8))
    assert positions_of(model).dtype == dtype
    assert torch.equal(positions_of(model), expected)


def test_a_classifier_of_another_size_is_another_matter(tmp_path: Path) -> None:
    """Without `ignore_mismatched_sizes` it is refused, with it re-initialized, whether or not positions are
    resampled."""
    state = stock_vit(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        CLCAViTForImageClassification.from_pretrained(tmp_path, image_size=64, num_labels=7)
    model, info = CLCAViTForImageClassification.from_pretrained(
        tmp_path, image_size=64, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {name for name, *_ in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert torch.equal(positions_of(model), resample_position_embeddings(state[POSITIONS], 1, (4, 4), (8, 8)))


def test_deit(tmp_path: Path) -> None:
    """Two positions stay unchanged: those of CLS and of the distillation token, which becomes a register."""
    torch.manual_seed(0)
    deit = DeiTForImageClassification(DeiTConfig(**STOCK, image_size=32))
    table = nn.init.normal_(deit.deit.embeddings.position_embeddings)
    deit.save_pretrained(tmp_path)
    model = CLCAViTForImageClassification.from_pretrained(tmp_path, image_size=64)
    assert torch.equal(positions_of(model), resample_position_embeddings(table, 2, (4, 4), (8, 8)))


@pytest.mark.parametrize("image_size", [32, 64])
def test_more_registers(image_size: int, tmp_path: Path) -> None:
    """Registers that the checkpoint does not have get new positions. Those of CLS and patches are kept."""
    state = stock_vit(tmp_path)
    model, info = CLCAViTForImageClassification.from_pretrained(
        tmp_path, image_size=image_size, num_register_tokens=2, output_loading_info=True
    )
    assert info["missing_keys"] == {"vit.embeddings.register_tokens"}
    side = image_size // 8
    expected = resample_position_embeddings(state[POSITIONS], 1, (4, 4), (side, side))
    assert torch.equal(positions_of(model)[:, [0, *range(3, 3 + side**2)]], expected)
    assert positions_of(model)[:, 1:3].std() > 0


def test_the_same_size_leaves_all_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = stock_vit(tmp_path)
    with caplog.at_level(logging.INFO, logger="clca"):
        model = CLCAViTForImageClassification.from_pretrained(tmp_path, image_size=32)
    assert torch.equal(positions_of(model), state[POSITIONS])
    assert not [record for record in caplog.records if record.name.startswith("clca")]


def test_saved_in_the_format_of_stock_vits(tmp_path: Path) -> None:
    """`save_original_format` converts the names of the weights back and keeps their sizes."""
    stock_vit(tmp_path / "stock")
    model = CLCAViTForImageClassification.from_pretrained(tmp_path / "stock", image_size=64)
    model.save_pretrained(tmp_path / "ours", save_original_format=True)
    assert "vit.encoder.layer.0.attention.attention.query.weight" in load_file(tmp_path / "ours" / "model.safetensors")
    again, info = CLCAViTForImageClassification.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert torch.equal(positions_of(again), positions_of(model))


@pytest.mark.parametrize("ignore", [False, True])
def test_positions_are_never_random(ignore: bool, tmp_path: Path) -> None:
    """If the old grid is unknown or does not fit the weights, loading raises an error, even with
    `ignore_mismatched_sizes`."""
    stock_vit(tmp_path)
    config = CLCAViTConfig(**TINY | {"image_size": 64})
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"image_size": 40}))
    with pytest.raises(ValueError, match=r"\(1, 17, 16\).*8 x 8 patches.*config.json, which describes 26 positions"):
        CLCAViTForImageClassification.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=ignore)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match=r"no config.json .*`image_size`"):
        CLCAViTForImageClassification.from_pretrained(tmp_path, config=config, ignore_mismatched_sizes=ignore)
    fitting = CLCAViTForImageClassification.from_pretrained(tmp_path, config=CLCAViTConfig(**TINY))
    assert fitting.vit.embeddings.position_embeddings.shape[1] == 17


def test_weights_that_fit_the_model_and_not_their_config(tmp_path: Path) -> None:
    """They are loaded unchanged."""
    state = stock_vit(tmp_path)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"image_size": 64}))
    model = CLCAViTForImageClassification.from_pretrained(tmp_path, image_size=32)
    assert torch.equal(positions_of(model), state[POSITIONS])
