"""`reduction_layers="all"`: its expansion, and all methods in every layer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTConfig, ViTForImageClassification

from clca import REDUCTIONS, CLCAViTConfig, CLCAViTForImageClassification, token_schedule
from tests.helpers import build, images, tiny_config


STOCK = {"image_size": 32, "patch_size": 8, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
STOCK |= {"intermediate_size": 32, "num_labels": 3, "initializer_range": 0.2}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**STOCK)).save_pretrained(folder)
    return folder


def test_it_is_stored_as_a_list() -> None:
    config = tiny_config(reduction="tome", keep_rate=0.9, reduction_layers="all")
    assert config.reduction_layers == [0, 1, 2, 3, 4] == config.aggregation_layers
    assert json.loads(config.to_json_string())["reduction_layers"] == [0, 1, 2, 3, 4]
    assert CLCAViTConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_it_follows_the_depth_that_is_asked_for(stock: Path) -> None:
    options: dict[str, Any] = {"reduction": "tome", "keep_rate": 0.9, "reduction_layers": "all"}
    assert CLCAViTConfig.from_pretrained(stock, **options).reduction_layers == [0, 1, 2, 3]
    assert CLCAViTConfig.from_pretrained(stock, num_hidden_layers=2, **options).reduction_layers == [0, 1]
    config = CLCAViTConfig.from_pretrained(stock, reduction="tome")
    config.reduction_layers = "all"
    assert CLCAViTForImageClassification(config).config.reduction_layers == [0, 1, 2, 3]


@pytest.mark.parametrize("value", ["every", "3", "", ["all"], ["all", 1]], ids=str)
def test_other_words_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="`reduction_layers`"):
        tiny_config(reduction="tome", reduction_layers=value)


@pytest.mark.parametrize("method", sorted(REDUCTIONS))
def test_every_method_acts_in_every_layer(method: str) -> None:
    """This includes layer 0, which has no layer before it, and the last layer."""
    model = build(tiny_config(reduction=method, keep_rate=0.8, reduction_layers="all"))
    with torch.no_grad():
        output = model(images(), output_assignments=True)
    assert output.logits.isfinite().all()
    assert len(output.assignments) == 5
    bound = token_schedule(model.config).before
    assert all(ours <= most for ours, most in zip(output.token_counts, bound, strict=True))
    if REDUCTIONS[method].static_shapes:
        assert list(output.token_counts) == bound


@pytest.mark.parametrize("layers", [[1, 2], "all"], ids=str)
@pytest.mark.parametrize("method", sorted(REDUCTIONS))
def test_off_the_shelf(method: str, layers: Any, stock: Path) -> None:
    """A stock checkpoint keeps its classifier. Only the parameters of the method itself are missing."""
    model, info = CLCAViTForImageClassification.from_pretrained(
        stock, reduction=method, keep_rate=0.7, reduction_layers=layers, output_loading_info=True
    )
    assert all(".reduction." in name for name in info["missing_keys"])
    assert not info["unexpected_keys"] and not info["mismatched_keys"]
    theirs = ViTForImageClassification.from_pretrained(stock).classifier
    assert torch.equal(model.classifier.weight, theirs.weight)
