"""`load_original` beyond the golden files: configurations and errors."""

from pathlib import Path
from typing import Any

import pytest
import torch

from clca import CLCAViTForImageClassification, token_schedule
from tests.golden_files import Golden
from ufgir.checkpoints.from_original import load_original
from ufgir.checkpoints.original_keys import convert_original_state, original_config


def spec(method: str, dims: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    return {
        "method": method,
        "options": {"reduction_loc": [3, 6, 9], "keep_rate": [0.5]} | options,
        "dims": dims or {},
        "num_labels": 7,
    }


@pytest.mark.parametrize(
    "shares",
    [[0.6, 0.45, 0.05], [0.17, 0.09, 0.09], [0.7, 0.49, 0.343], [0.9, 0.3, 0.1], [0.5, 0.5, 0.5], [0.53, 0.29, 0.1]],
)
@pytest.mark.parametrize("registers", [0, 4])
def test_cumulative_shares_of_dynamic_vit(shares: list[float], registers: int) -> None:
    """The original's list contains cumulative shares of all tokens except CLS; the rounded token counts are equal."""
    config = original_config(spec("dyvit", {"reg_tokens": registers}, keep_rate=shares))
    after = token_schedule(config).after
    tokens = 196 + registers
    assert [after[layer] for layer in (3, 6, 9)] == [1 + int(tokens * share) for share in shares]
    assert config.reduction_kwargs["ratio_targets"] == shares


def test_dynamic_vit_with_a_cache_counts_by_the_first_share() -> None:
    """The original uses the first entry for every stage, but all entries as targets of the loss."""
    config = original_config(spec("dyvit", clc=True, num_clr=1, keep_rate=[0.6, 0.3, 0.1]))
    assert config.keep_rate == [0.6] * 3
    assert config.reduction_kwargs["ratio_targets"] == [0.6, 0.3, 0.1]


@pytest.mark.parametrize("method", ["ats", "dpcknn", "tome", "sit", "patchmerger", "sinkhorn_old", "kmedoids_old"])
def test_lists_of_counts(method: str) -> None:
    config = original_config(spec(method, keep_rate=[100.0, 40.0, 11.0]))
    assert config.keep_tokens == [100, 40, 11]
    assert config.keep_rate == [1.0]


def test_pooling() -> None:
    def pooling(**dims: Any) -> str:
        return original_config(spec("topk", dims)).pooling

    assert pooling() == "cls"
    assert pooling(global_pool="avg") == "mean"
    assert pooling(global_pool="avg", fc_norm=False) == "normed_mean"
    assert pooling(global_pool="map", class_token=False) == "map"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dims": {"act_layer": "quick_gelu"}}, "`dims`.*act_layer"),
        ({"dims": {"global_pool": ""}}, "`global_pool`"),
        ({"options": {"keep_rate": [0.5]}}, "reduction_loc"),
        ({"options": {"reduction_loc": [3]}}, "keep_rate"),
        ({"options": {"reduction_loc": [3], "keep_rate": [0.5], "lasso_inner_dim": 1}}, "`lasso_inner_dim`"),
        ({"options": {"reduction_loc": [3], "keep_rates": [0.5]}}, "did you mean 'keep_rate'"),
        ({"method": "amaws"}, "`reduction` 'amaws'"),
    ],
)
def test_what_cannot_be_represented_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        original_config(spec("topk") | changed)


def test_keys_that_do_not_fit_are_named() -> None:
    """Keys that are missing, unexpected, of another shape, or of a stage that does not exist."""
    golden = Golden(Path(__file__).parents[1] / "goldens" / "dyvit_base.safetensors")
    state, expected = golden.state, golden.spec
    load_original(state, expected)
    for changed, message in (
        ({"norm.weight": None}, "vit.layernorm.weight is missing"),
        ({"gate.weight": torch.zeros(1)}, "gate.weight"),
        ({"score_predictor.7.in_conv.0.weight": torch.zeros(16)}, "score_predictor.7"),
        ({"cls_token": torch.zeros(1, 1, 8)}, "cls_token has the shape"),
    ):
        broken = {key: tensor for key, tensor in (state | changed).items() if tensor is not None}
        with pytest.raises(ValueError, match=message):
            load_original(broken, expected)


def test_number_of_classes_is_read_off_the_head(golden_file: Any) -> None:
    golden = Golden(golden_file)
    without = {key: value for key, value in golden.spec.items() if key != "num_labels"}
    model = load_original(golden.state, without)
    assert isinstance(model, CLCAViTForImageClassification)
    assert model.num_labels == 7
    assert convert_original_state(golden.state, model.config).keys() <= model.state_dict().keys()


@pytest.mark.parametrize("method", ["h2t", "vqt"])
def test_probing_forks_ignore_cache_and_aggregation(method: str, caplog: pytest.LogCaptureFixture) -> None:
    """As in the original, with a warning."""
    options = {"clc": True, "ifa_head": True, "reduction_loc": [1, 2]}
    with caplog.at_level("WARNING"):
        config = original_config({"method": method, "options": options, "dims": {"depth": 4}, "num_labels": 3})
    assert config.head == method and not config.cross_layer_cache
    assert "clc and ifa_head of" in caplog.text
