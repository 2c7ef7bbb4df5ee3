"""Heads that probe the tokens of every method, and the features they extract."""

from pathlib import Path

import pytest
import torch

from clca import (
    REDUCTIONS,
    CLCAViTForImageClassification,
)
from tests.helpers import CACHES, images, labels, tiny_config, tiny_model


CLCA = CACHES["clca"]


@pytest.mark.parametrize(
    "options", [{"num_labels": 0, "head": "cla"}, {"num_labels": 0, "group_lasso_weight": 0.1}, {"num_labels": -1}]
)
def test_no_classes(options: dict) -> None:
    with pytest.raises(ValueError, match="`num_labels`"):
        tiny_config(**options)
    assert tiny_model(num_labels=0)(images()).logits.shape == (3, 16)


@pytest.mark.parametrize("method", ["ats", "heuristic", "tome", "mctf"])
def test_flex_attention_gives_way_to_a_mask(method: str) -> None:
    """Its kernel needs another mask format, so layers with a mask use sdpa."""
    model = tiny_model(reduction=method, keep_rate=0.5, **CLCA)
    expected = model(images()).logits
    attention = model.vit.layers[-1].attention
    model.config._attn_implementation = "flex_attention"
    masked = attention.attention_function(torch.ones(1, 1, 1, 1), output_attentions=False)
    model.config._attn_implementation = "sdpa"
    assert masked is attention.attention_function(None, output_attentions=False)
    assert expected.isfinite().all()


@pytest.mark.parametrize("head", ["h2t", "vqt"])
@pytest.mark.parametrize("method", [None, *sorted(REDUCTIONS)])
@pytest.mark.parametrize("cache", [{}, {"cross_layer_cache": True, "num_clr_tokens": 1}], ids=["plain", "cache"])
def test_probing_heads_with_every_method(head: str, method: str | None, cache: dict) -> None:
    """They do not change the tokens, do not depend on the batch, and train."""
    model = tiny_model(head=head, reduction=method, keep_rate=0.5 if method else 1.0, **cache)
    pixels = images()
    output = model(pixels)
    linear = tiny_model(reduction=method, keep_rate=0.5 if method else 1.0, **cache)
    linear.vit.load_state_dict(model.vit.state_dict(), strict=False)
    assert output.token_counts == linear(pixels).token_counts
    assert torch.allclose(output.logits[:1], model(pixels[:1]).logits, atol=1e-9)
    model.train()(pixels, labels=labels()).loss.backward()
    assert model.classifier.weight.grad.abs().sum() > 0
    if head == "vqt":
        assert all(model.vit.layers[i].probe.queries.grad.abs().sum() > 0 for i in model.config.probe_layers)


def test_vqt_queries_do_not_disturb_the_tokens() -> None:
    """As in its paper, the tokens of the backbone are the same with and without queries."""
    model = tiny_model(head="vqt")
    plain = tiny_model()
    plain.vit.load_state_dict(model.vit.state_dict(), strict=False)
    pixels = images()
    assert torch.equal(model.vit(pixels).last_hidden_state, plain.vit(pixels).last_hidden_state)


@pytest.mark.parametrize("head", ["h2t", "vqt"])
def test_select_features(head: str, tmp_path: Path) -> None:
    """The features with the largest weights are kept and a new head is trained on them. It can be saved, and features
    can be selected again."""
    model = tiny_model(head=head)
    weight = model.classifier.weight.detach().clone()
    kept = model.select_features(0.25)
    assert len(kept) == round(0.25 * weight.shape[1])
    norms = weight.norm(dim=0)
    assert norms[kept].min() >= norms[[i for i in range(len(norms)) if i not in set(kept.tolist())]].max()
    model.train()(images(), labels=labels()).loss.backward()
    assert model.classifier.linear.weight.grad.abs().sum() > 0
    again = model.select_features(0.5)
    assert torch.equal(model.classifier.selected, kept[again])
    model.eval().save_pretrained(tmp_path)
    loaded = CLCAViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(loaded(images()).logits, model(images()).logits)
    with pytest.raises(ValueError, match="`fraction`"):
        model.select_features(0.0)
    with pytest.raises(ValueError, match="`head`"):
        tiny_model().select_features(0.5)
