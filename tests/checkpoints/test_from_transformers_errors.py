"""Sources that are not models of transformers, are damaged or inconsistent raise errors that name the problem."""

import json
from pathlib import Path

import pytest
import torch
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.modeling_vit import ViTModel

from tests.checkpoints.transformers_sources import FIRST, MLP, SIZES, SOURCES, make_source, save
from ufgir.checkpoints.from_transformers import load_transformers, load_transformers_processor


NARROW = SIZES | MLP | {"num_hidden_layers": 1}


class Dangerous:
    """Object whose unsafe unpickling creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


class TestErrors:
    def test_unknown_model_type(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "swin"}')
        with pytest.raises(ValueError, match=r"'swin'.*supported are clip, clip_vision_model, deit"):
            load_transformers(tmp_path)

    def test_no_model_type(self, tmp_path):
        (tmp_path / "config.json").write_text('{"architecture": "vit_base_patch16_224"}')
        with pytest.raises(ValueError, match="model_type None"):
            load_transformers(tmp_path)

    def test_a_clca_model(self):
        model = load_transformers(make_source("vit"))
        with pytest.raises(ValueError, match=r"`source` .*CLCA model"):
            load_transformers(model)

    def test_no_config(self, tmp_path):
        with pytest.raises(ValueError, match=r"folder without a config\.json"):
            load_transformers(tmp_path)

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("no-such/repository", r"has no readable config\.json"),
            ("/no/such/folder", "is not a folder"),
            (__file__, "is not a folder"),
            (3, "must be a folder or a Hub repository, got int"),
        ],
    )
    def test_no_such_source(self, name, message):
        with pytest.raises(ValueError, match=f"^`source` .*{message}"):
            load_transformers(name)

    @pytest.mark.parametrize(
        ("contents", "message"),
        [("{", "no readable config"), ('{"model_type": "vit", "hidden_size": "wide"}', "invalid config.*got str")],
    )
    def test_bad_config(self, tmp_path, contents, message):
        (tmp_path / "config.json").write_text(contents)
        with pytest.raises(ValueError, match=message):
            load_transformers(tmp_path)

    def test_width_and_heads(self):
        source = ViTModel(ViTConfig(**NARROW | {"num_attention_heads": 3, "hidden_size": 18}))
        source.config.num_attention_heads = 4
        with pytest.raises(ValueError, match="`hidden_size` must be a multiple of `num_attention_heads`"):
            load_transformers(source)

    def test_no_weights(self, tmp_path):
        ViTConfig(**NARROW).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="cannot be read as ViTModel"):
            load_transformers(tmp_path)

    def test_a_pickle_with_code_is_not_run(self, tmp_path):
        ViTConfig(**NARROW).save_pretrained(tmp_path)
        torch.save({"layernorm.weight": Dangerous(tmp_path / "ran")}, tmp_path / "pytorch_model.bin")
        with pytest.raises(ValueError, match="contains code") as caught:
            load_transformers(tmp_path)
        assert not (tmp_path / "ran").exists() and "weights_only" not in str(caught.value)

    @pytest.mark.parametrize("left", [-100, 5])
    def test_truncated_weights(self, tmp_path, left):
        file = save(ViTModel(ViTConfig(**NARROW)), tmp_path) / "model.safetensors"
        file.write_bytes(file.read_bytes()[:left])
        with pytest.raises(ValueError, match="cannot be read as ViTModel") as caught:
            load_transformers(tmp_path)
        assert "\n" not in str(caught.value)

    def test_configuration_and_weights_that_disagree(self, tmp_path):
        save(ViTModel(ViTConfig(**NARROW)), tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        for changes, message in (
            ({"num_hidden_layers": 2}, r"config\.json: layers\.1\..* is missing; .*; and 4 more\.$"),
            ({"num_hidden_layers": 0}, r"config\.json: layers\.0\..* is unexpected"),
            ({"intermediate_size": 20}, r"layers\.0\.mlp\.fc1\.weight has the shape \(24, 16\), not \(20, 16\)"),
            ({"hidden_act": "sin"}, "cannot be read as ViTModel: KeyError 'sin'"),
        ):
            (tmp_path / "config.json").write_text(json.dumps(config | changes))
            with pytest.raises(ValueError, match=message):
                load_transformers(tmp_path)

    def test_unexpected_weights_are_named(self):
        source = make_source("vit")
        source.adapter = torch.nn.Linear(2, 2)
        with pytest.raises(ValueError, match=r"`source` .*: adapter\.weight; adapter\.bias"):
            load_transformers(source)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_register_tokens": 2}, "register_tokens is missing"),
            ({"hidden_size": 32}, r"has the shape \(1, 1, 16\), not \(1, 1, 32\)"),
            ({"keep_rat": 0.5}, "Did you mean `keep_rate`"),
            ({"image_size": 30}, "`image_size` must be a multiple of `patch_size`"),
            ({"reduction": "evit", "reduction_layers": [9]}, "`reduction_layers` must lie in"),
        ],
    )
    def test_overrides_that_do_not_fit(self, changes, message):
        with pytest.raises(ValueError, match=message):
            load_transformers(make_source("vit"), **changes)


@pytest.mark.parametrize("contents", ["{", "3", '{"image_mean": "x"}', '{"image_mean": [0.5], "image_std": [0.5]}'])
def test_a_damaged_image_processor_is_no_absent_one(contents: str, tmp_path: Path) -> None:
    """It must not be replaced silently by ImageNet's mean and std."""
    folder = save(make_source("clip_vision_model" if "clip_vision_model" in SOURCES else FIRST[0]), tmp_path)
    load_transformers_processor(folder)
    (folder / "preprocessor_config.json").write_text(contents)
    with pytest.raises(ValueError, match=r"preprocessor_config\.json"):
        load_transformers_processor(folder)


@pytest.mark.parametrize("contents", ["3", "[1]", "null", '{"model_type": ["a"]}', '{"model_type": 5}'])
def test_a_config_that_is_none(contents: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(contents)
    with pytest.raises(ValueError, match=r"config\.json"):
        load_transformers(tmp_path)
