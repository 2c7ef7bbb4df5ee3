"""Token schedule, compared with counts computed by hand."""

from typing import Any

import pytest

from clca import CLCAViTConfig, token_schedule
from tests.helpers import METHODS, TINY, Case, tiny_config


# The token schedule, by hand.


def base_config(**changes: Any) -> CLCAViTConfig:
    """Return ViT-B/16 with stages in layers 3, 6, 9."""
    return CLCAViTConfig(**({"reduction_layers": [3, 6, 9], "layer_norm_eps": 1e-6} | changes))


def test_schedule_of_the_docstring() -> None:
    """EViT at 448 px and rate 0.1 with a cache of GAP and one CLR, as in the docstring of `token_schedule`."""
    config = base_config(
        image_size=448, reduction="evit", keep_rate=0.1, cross_layer_cache=True, num_clr_tokens=1, head="cla"
    )
    schedule = token_schedule(config)
    assert schedule.before == [786, 786, 786, 786, 87, 87, 87, 17, 17, 17, 10, 12, 12]
    assert schedule.after == [786, 786, 786, 81, 87, 87, 11, 17, 17, 4, 10, 12]


def test_schedule_of_the_tiny_clca_model() -> None:
    """66 tokens; layer 1: 1 + 33 + 1, and 2 retrieved; layer 3: 1 + 18 + 1, and 4; layer 4: 2 more."""
    config = tiny_config(
        image_size=64,
        num_hidden_layers=6,
        reduction_layers=[1, 3],
        reduction="evit",
        keep_rate=0.5,
        cross_layer_cache=True,
        num_clr_tokens=1,
    )
    schedule = token_schedule(config)
    assert schedule.before == [66, 66, 37, 37, 24, 26, 26]
    assert schedule.after == [66, 35, 37, 20, 24, 26]


@pytest.mark.parametrize(
    ("method", "after"),
    [
        (None, [197, 197, 197]),
        ("topk", [21, 3, 2]),  # 1 + ceil(0.1 * 196), 1 + ceil(0.1 * 20), 1 + ceil(0.1 * 2)
        ("evit", [22, 5, 3]),  # 1 + 20 + 1, 1 + ceil(2.1) + 1, 1 + ceil(0.4) + 1
        ("dyvit", [20, 2, 1]),  # 1 + int(19.6), 1 + int(1.96), 1 + int(0.196)
        ("ats", [20, 2, 1]),  # K = 20, 2, 1 and 1 + (K - 1)
        ("dpcknn", [20, 6, 2]),  # 19; 1, but at least 5 before the last stage; 0, but at least 1
        ("atc", [20, 2, 2]),  # 197 - 177, 20 - 18; 1 to go, but token 0 and one cluster stay
        ("pitome", [99, 50, 26]),  # 0.9 of 196, of 98 and of 49 to go, but half of them can
        ("mctf", [99, 50, 26]),
        ("tofu", [99, 81, 80]),
        ("tome", [99, 81, 80]),  # 177 to go but half of 196 can; 19 - 1 = 18; 1 - 0 = 1
        ("sit", [20, 2, 1]),
        ("patchmerger", [20, 2, 1]),
        ("sinkhorn", [20, 2, 1]),
        ("kmedoids", [20, 2, 1]),
        ("heuristic", [197, 197, 197]),
    ],
)
def test_schedules_of_the_methods(method: str | None, after: list[int]) -> None:
    """ViT-B/16 at 224 px and rate 0.1: 197 tokens, and the numbers that leave layers 3, 6 and 9."""
    schedule = token_schedule(base_config(reduction=method, keep_rate=0.1))
    assert [schedule.after[layer] for layer in (3, 6, 9)] == after
    assert schedule.before[1:] == schedule.after  # nothing is retrieved


@pytest.mark.parametrize(
    ("method", "after"),
    [
        ("topk", [99, 50, 26]),  # 1 + 196 / 2, 1 + 98 / 2, 1 + ceil(49 / 2)
        ("evit", [100, 52, 28]),  # 1 + 98 + 1, 1 + ceil(99 / 2) + 1, 1 + ceil(51 / 2) + 1
    ],
)
def test_rates_compound(method: str, after: list[int]) -> None:
    """One rate of one half equals a list of three halves."""
    one = token_schedule(base_config(reduction=method, keep_rate=0.5))
    listed = token_schedule(base_config(reduction=method, keep_rate=[0.5, 0.5, 0.5]))
    assert one == listed
    assert [one.after[layer] for layer in (3, 6, 9)] == after


@pytest.mark.parametrize("method", [m for m in METHODS if m])
def test_a_list_of_rates_means_a_rate_per_stage(method: str) -> None:
    """With [0.5, 1] the second stage keeps all tokens that the first one left. Equal rates equal a single rate."""
    options = {"heuristic": {"contiguous": False}}.get(method)
    shared = {"reduction": method, "reduction_kwargs": options, "reduction_layers": [1, 3]}
    assert token_schedule(tiny_config(keep_rate=[0.5, 0.5], **shared)) == token_schedule(
        tiny_config(keep_rate=0.5, **shared)
    )
    if method != "dpcknn":  # never fewer than 5 before the last stage
        first = token_schedule(tiny_config(keep_rate=[0.25, 1.0], **shared)).after[1]
        assert first == token_schedule(tiny_config(keep_rate=[0.25, 0.5], **shared)).after[1]


@pytest.mark.parametrize(
    ("method", "after"),
    [
        ("topk", [9, 5]),
        ("evit", [10, 6]),
        ("dyvit", [9, 5]),
        ("ats", [8, 4]),  # K = 8, 4 samples, CLS one of them
        ("dpcknn", [9, 5]),
        ("atc", [9, 5]),
        ("pitome", [9, 5]),
        ("mctf", [9, 5]),
        ("tofu", [9, 5]),
        ("tome", [9, 5]),
        ("sit", [9, 5]),
        ("patchmerger", [9, 5]),
        ("sinkhorn", [9, 5]),
        ("kmedoids", [9, 5]),
        ("heuristic", [17, 17]),
    ],
)
def test_absolute_counts(method: str, after: list[int]) -> None:
    """`keep_tokens` = [8, 4] of 16 patches, in addition to CLS."""
    schedule = token_schedule(tiny_config(reduction=method, keep_tokens=[8, 4]))
    assert [schedule.after[layer] for layer in (1, 2)] == after


def test_schedule_of_another_image_size() -> None:
    """Counts follow the number of patches of the image."""
    config = tiny_config(reduction="topk", keep_rate=0.5)
    assert token_schedule(config, 36).before == [37, 37, 19, 10, 10, 10]
    assert token_schedule(config).before == token_schedule(config, 16).before


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_the_schedule_needs_no_model(method: str | None) -> None:
    """One entry per layer, and never less than one token."""
    schedule = token_schedule(Case(method, "cache", "registers").config(keep_rate=0.05))
    assert len(schedule.before) == len(schedule.after) + 1 == TINY["num_hidden_layers"] + 1
    assert min(schedule.before) >= 1
