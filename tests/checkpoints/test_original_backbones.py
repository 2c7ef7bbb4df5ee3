"""Backbones that the original code supports but that are in none of its golden files, compared with timm 0.9.12: see
`make_timm_goldens.py`.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.checkpoints.original_checkpoints import ARCHITECTURE, Golden, difference, save
from tests.helpers import images, tiny_model
from ufgir.checkpoints.convert_original import convert_file
from ufgir.checkpoints.from_original import load_original, load_original_file
from ufgir.checkpoints.original_keys import original_config
from ufgir.transforms.preprocessing import read_image_processor


FOLDER = Path(__file__).parents[1] / "goldens_timm" / "original"
LINEAR = ["map_then_norm", "map", "cls_fc_norm", "gated_mlp"]
MADE = {"map_then_norm": {"pooling": "map_then_norm"}, "map": {"pooling": "map"}, "cls_fc_norm": {"pooling": "cls"}}
MADE["gated_mlp"] = {"use_swiglu_ffn": True, "intermediate_size": 8}


class Backbone:
    """Backbone as arguments of `load_original` and as contents of a checkpoint."""

    def __init__(self, name: str) -> None:
        with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
            self.dims: dict[str, Any] = json.loads(file.metadata()["config"])["dims"]
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.state = {k.removeprefix("state."): v for k, v in tensors.items() if k.startswith("state.")}
        self.pixels, self.logits = tensors["pixel_values"].double(), tensors["logits"]
        self.options = {"ifa_head": "ifa_head.0.4.weight" in self.state}

    def spec(self) -> dict[str, Any]:
        return {"method": "vit", "options": self.options, "dims": self.dims}

    def payload(self) -> dict[str, Any]:
        config = self.options | {"model": ARCHITECTURE, "num_heads": 2, "input_size": self.pixels.shape[-1]}
        return {"model": self.state, "config": config}


def logits_of(model: nn.Module, pixels: torch.Tensor, **options: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.double().eval()(pixels, **options).logits


@pytest.mark.parametrize("name", LINEAR)
def test_logits(name: str, tmp_path: Path) -> None:
    """With `load_original`, from a file (except that files do not contain the position of the norm), and after saving and loading."""
    backbone = Backbone(name)
    model = load_original(backbone.state, backbone.spec())
    made = {field: getattr(model.config, field) for field in MADE[name]}
    assert made == MADE[name]
    overrides = {"pooling": "cls"} if name == "cls_fc_norm" else {}
    from_file = load_original_file(save(tmp_path / "x.pth", backbone.payload()), **overrides)
    model.save_pretrained(tmp_path / "saved")
    again = CLCAViTForImageClassification.from_pretrained(tmp_path / "saved")
    for one in (model, from_file, again):
        assert (logits_of(one, backbone.pixels) - backbone.logits).abs().max() <= 1e-9


def test_pooling_before_the_norm_is_its_own() -> None:
    """The same weights give other logits if the norm is on the other side of the pooling."""
    model = tiny_model(pooling="map_then_norm", use_class_token=False)
    other = tiny_model(pooling="map", use_class_token=False)
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        for norm in (model.vit.layernorm, other.vit.layernorm):
            norm.weight.copy_(torch.linspace(0.5, 2, 16))
    assert not torch.allclose(logits_of(model, images()), logits_of(other, images()))


def test_an_image_that_is_not_whole_patches(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The remaining pixels are ignored as in the original, for images of the model's size and, on request, of the original's."""
    backbone = Backbone("cut_off")
    assert backbone.dims["img_size"] == 18
    path = save(tmp_path / "x.pth", backbone.payload())
    for load in (lambda: load_original(backbone.state, backbone.spec()), lambda: load_original_file(path)):
        model = load()
        assert model.config.image_size == 16
        for logits in (
            logits_of(model, backbone.pixels[..., :16, :16]),
            logits_of(model, backbone.pixels, interpolate_pos_encoding=True),
        ):
            assert (logits - backbone.logits).abs().max() <= 1e-9
        assert "`img_size` 18" in caplog.text and "16 x 16" in caplog.text
        caplog.clear()
    convert_file(path, tmp_path / "folder")
    processor = read_image_processor(tmp_path / "folder")
    assert (processor.resize_size[0], processor.size["height"]) == (int(18 / 0.875), 16)
    spec = {"method": "vit", "options": {}, "dims": {"img_size": [225, 240], "patch_size": 16}, "num_labels": 2}
    assert original_config(spec).image_size == [224, 240]


def test_an_aggregation_head_without_cls(tmp_path: Path) -> None:
    """The first patch replaces CLS."""
    backbone = Backbone("no_cls_cla")
    path = save(tmp_path / "x.pth", backbone.payload())
    for model in (load_original(backbone.state, backbone.spec()), load_original_file(path)):
        config = model.config
        assert config.first_patch_as_cls and not config.use_class_token and config.head == "cla"
        assert (logits_of(model, backbone.pixels) - backbone.logits).abs().max() <= 1e-9


@pytest.mark.parametrize("method", ["h2t", "vqt"])
def test_probing_heads_without_cls(method: str) -> None:
    """They do not pool, so the original supports them without CLS if the final norm precedes the pooling."""
    dims = {"depth": 4, "class_token": False, "global_pool": "avg", "fc_norm": False}
    spec = {"method": method, "options": {"reduction_loc": [1, 2]}, "dims": dims, "num_labels": 3}
    config = original_config(spec)
    assert (config.head, config.pooling, config.first_patch_as_cls) == (method, "cls", method == "vqt")
    with pytest.raises(ValueError, match="`pooling`"):
        original_config(spec | {"dims": dims | {"fc_norm": True}})


@pytest.mark.parametrize(
    "options", [{}, {"head": "linear", "use_class_token": False, "pooling": "mean"}, {"head": "h2t"}]
)
def test_the_first_patch_only_takes_the_place_of_cls(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`first_patch_as_cls`"):
        CLCAViTConfig(first_patch_as_cls=True, **options)


def test_unknown_mlp() -> None:
    spec = {"method": "vit", "options": {}, "dims": {"mlp_layer": "ConvMlp"}, "num_labels": 2}
    with pytest.raises(ValueError, match=r"`mlp_layer` must be .* 'ConvMlp'"):
        original_config(spec)


# Averaged weights.


@pytest.mark.parametrize("where", ["file", "options"])
@pytest.mark.parametrize("wrapper", ["", "module."])
def test_averaged_weights_that_were_best(
    where: str, wrapper: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, evit: Golden
) -> None:
    payload = evit.payload(**({"ema_best": True} if where == "options" else {}))
    payload |= {"ema_best": True} if where == "file" else {}
    payload["model_ema"] = {wrapper + key: tensor for key, tensor in evit.state.items()}
    payload["model"] = {key: torch.zeros_like(tensor) for key, tensor in evit.state.items()}
    path = save(tmp_path / "x.pth", payload)
    assert difference(load_original_file(path), evit) <= 1e-9
    assert "`ema_best`" in caplog.text and "`model_ema`" in caplog.text
    convert_file(path, tmp_path / "folder")
    assert "`model_ema`" in (tmp_path / "folder" / "README.md").read_text()


@pytest.mark.parametrize(("ema_best", "told"), [(True, True), (False, False)])
def test_averaged_weights_that_are_not_loaded(
    ema_best: bool, told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture, evit: Golden
) -> None:
    """Either they are missing, which is logged, or they were not the best."""
    payload = evit.payload() | {"ema_best": ema_best}
    if not ema_best:
        payload["model_ema"] = {key: torch.zeros_like(tensor) for key, tensor in evit.state.items()}
    assert difference(load_original_file(save(tmp_path / "x.pth", payload)), evit) <= 1e-9
    assert ("`ema_best`" in caplog.text) == told


def test_averaged_weights_that_are_none(tmp_path: Path, evit: Golden) -> None:
    payload = evit.payload() | {"ema_best": True, "model_ema": 0.99996}
    with pytest.raises(ValueError, match="`model_ema` in it"):
        load_original_file(save(tmp_path / "x.pth", payload))
