"""Cross-layer cache: what is stored and retrieved, for all stages and depths."""

from typing import Any

import pytest
import torch

from clca import CLCAViTForImageClassification, token_schedule
from tests.clca.helpers import TOPK_CACHE
from tests.helpers import METHODS, images, labels, tiny_model


# The cache.


def counts(**changes: Any) -> list[int]:
    """Return the token counts of a forward pass, after checking that logits and the gradients of all trainable
    parameters are finite."""
    model = tiny_model(**changes)
    output = model(images(), labels=labels())
    assert output.logits.isfinite().all()
    output.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert list(output.token_counts) == token_schedule(model.config).before
    return list(output.token_counts)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"reduction_layers": [0]}, [18, 10, 10, 10, 16, 16]),
        ({"reduction_layers": [0, 2]}, [18, 10, 10, 10, 12, 12]),
        ({"reduction_layers": [4]}, [18, 18, 18, 18, 24, 15]),
        ({"reduction_layers": [1, 4]}, [18, 18, 12, 12, 16, 11]),
        ({"reduction_layers": [3]}, [18, 18, 18, 18, 16, 16]),
        ({"reduction_layers": [0], "cache_recover_at_last": False}, [18, 10, 10, 10, 10, 10]),
        ({"reduction_layers": [4], "cache_recover_at_last": False}, [18, 18, 18, 18, 18, 18]),
    ],
    ids=str,
)
def test_cache_where_nothing_was_cached_yet(changes: dict[str, Any], expected: list[int]) -> None:
    """Nothing is retrieved after a stage in layer 0. The layers before a retrieval still write for it.

    18 tokens: CLS, 16 patches, CLR; a stage keeps 1 + ceil((tokens - 1) / 2), an entry has 2 tokens."""
    assert counts(**TOPK_CACHE | changes) == expected


@pytest.mark.parametrize("head", ["cla", "ifa"])
@pytest.mark.parametrize("layers", [[4], [1, 4], [0, 1, 2, 3, 4]], ids=str)
def test_heads_with_a_stage_in_the_last_layer(head: str, layers: list[int]) -> None:
    """CLS of the last layer is read once even if that layer holds a stage."""
    counts(**TOPK_CACHE | {"reduction_layers": layers, "head": head})
    model = tiny_model(**TOPK_CACHE | {"reduction_layers": layers, "head": head})
    output = model.vit(images(), output_hidden_states=True)
    assert model.config.aggregation_layers == layers
    expected = torch.stack([output.hidden_states[i + 1][:, 0] for i in layers], dim=1)
    assert torch.equal(output.cls_tokens, expected)


@pytest.mark.parametrize("head", ["linear", "cla", "ifa"])
@pytest.mark.parametrize("depth", [2, 3, 4, 5, 6, 12])
def test_cache_and_heads_without_reduction(depth: int, head: str) -> None:
    """At any depth, two tokens per cached layer are retrieved after the second-to-last layer, and none after
    layer 0."""
    changes = {"cross_layer_cache": True, "num_clr_tokens": 1, "reduction_layers": [0], "head": head}
    expected = [18] * (depth - 1) + [18 + 2 * (depth - 2)] * 2
    assert counts(num_hidden_layers=depth, **changes) == expected


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("head", ["linear", "cla", "ifa"])
def test_a_single_layer(method: str | None, head: str) -> None:
    model = tiny_model(
        num_hidden_layers=1,
        reduction_layers=[0],
        reduction=method,
        keep_rate=0.5,
        cross_layer_cache=True,
        num_clr_tokens=1,
        head=head,
    )
    output = model(images(), labels=labels())
    output.loss.backward()
    assert output.logits.isfinite().all()
    assert output.token_counts[0] == 18
    assert output.token_counts[1] <= 18


def cache_entry(model: CLCAViTForImageClassification, hidden_states: torch.Tensor) -> list[torch.Tensor]:
    """Compute what a layer before the first retrieval caches by definition, as single tokens (B, D)."""
    config = model.config
    gap_tokens = hidden_states if config.cache_pool_cls else hidden_states[:, 1:]
    if config.num_clr_tokens and not config.cache_pool_clr:
        gap_tokens = gap_tokens[:, : -config.num_clr_tokens]
    entry = [gap_tokens.mean(dim=1)] if config.cache_gap else []
    if config.num_clr_tokens:
        entry += list(hidden_states[:, -config.num_clr_tokens :].unbind(dim=1))
    return entry


@pytest.mark.parametrize("pool_cls", [False, True])
@pytest.mark.parametrize("pool_clr", [False, True])
@pytest.mark.parametrize(("gap", "clr"), [(True, 0), (True, 1), (True, 2), (False, 1), (False, 3)])
def test_what_is_cached_and_retrieved(gap: bool, clr: int, pool_cls: bool, pool_clr: bool) -> None:
    """The tokens retrieved after layer 2 are the GAP and CLR of layers 0 and 1, oldest first."""
    model = tiny_model(
        cross_layer_cache=True,
        cache_gap=gap,
        num_clr_tokens=clr,
        cache_pool_cls=pool_cls,
        cache_pool_clr=pool_clr,
        num_register_tokens=1,
        reduction_layers=[2],
        cache_recover_at_last=False,
    )
    entered = {}
    model.vit.layers[3].register_forward_pre_hook(lambda _, args: entered.update(hidden=args[0]))
    with torch.no_grad():
        output = model(images(), output_hidden_states=True)
    after = output.hidden_states[1:]
    retrieved = torch.stack([token for i in (0, 1) for token in cache_entry(model, after[i])], dim=1)
    assert retrieved.shape[1] == 2 * (gap + clr)
    assert (entered["hidden"] - torch.cat([after[2], retrieved], dim=1)).abs().max() <= 1e-9
    assert output.token_counts[-1] == output.token_counts[0] + retrieved.shape[1]  # no second retrieval


def test_the_second_retrieval_pools_all_but_the_newest_tokens() -> None:
    """As published: after a retrieval the GAP includes CLR and older retrieved tokens, not the newest ones, and the last
    retrieved token is cached as CLR."""
    model = tiny_model(cross_layer_cache=True, num_clr_tokens=1, reduction_layers=[1])  # and after layer 3
    entered = {}
    model.vit.layers[4].register_forward_pre_hook(lambda _, args: entered.update(hidden=args[0]))
    with torch.no_grad():
        output = model(images(), output_hidden_states=True)
    after = output.hidden_states[1:]
    first = torch.stack(cache_entry(model, after[0]), dim=1)  # retrieved after layer 1
    layer_1 = torch.cat([after[1], first], dim=1)
    expected = [layer_1[:, 1:18].mean(dim=1), layer_1[:, -1], after[2][:, 1:18].mean(dim=1), after[2][:, -1]]
    assert (entered["hidden"][:, -4:] - torch.stack(expected, dim=1)).abs().max() <= 1e-9


def test_cache_options_change_the_result() -> None:
    """Every option has an effect."""
    base = {"cross_layer_cache": True, "num_clr_tokens": 1, "reduction_layers": [2]}
    changes: list[dict[str, Any]] = [
        {},
        {"cross_layer_cache": False},
        {"cache_gap": False},
        {"cache_pool_cls": True},
        {"cache_pool_clr": True},
        {"cache_recover_at_last": False},
    ]
    logits = [tiny_model(**base | change)(images()).logits for change in changes]
    for i, one in enumerate(logits):
        for j in range(i):
            assert (one - logits[j]).abs().max() > 1e-6, (changes[i], changes[j])
