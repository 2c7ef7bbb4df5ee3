"""Checkpoints of stock ViTs."""

from pathlib import Path

import pytest
import torch
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from clca import CLCAViTForImageClassification, CLCAViTModel
from tests.clca.shared import NAMES, logits_of, on_disk
from tests.helpers import METHODS, TINY, images


# Checkpoints of stock ViTs.


STOCK = {k: v for k, v in TINY.items() if k != "reduction_layers"}


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ViTForImageClassification]:
    """Return a stock ViT with random weights, and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("stock")
    torch.manual_seed(3)
    model = ViTForImageClassification(ViTConfig(**STOCK, id2label=NAMES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder, model


def test_a_stock_vit_loads_completely(stock: tuple[Path, ViTForImageClassification]) -> None:
    """A file with the old key names loads with all keys, equal logits and class names."""
    folder, model = stock
    assert "vit.encoder.layer.0.attention.attention.query.weight" in on_disk(folder)
    ours, info = CLCAViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    assert (logits_of(ours) - logits_of(model)).abs().max() <= 1e-5
    assert ours.config.id2label == NAMES


def test_a_stock_vit_in_a_clca_model(stock: tuple[Path, ViTForImageClassification]) -> None:
    """Only new parameters are missing, and only the linear classifier is unused. CLR start as a copy of the loaded
    CLS."""
    folder, model = stock
    ours, info = CLCAViTForImageClassification.from_pretrained(
        folder,
        output_loading_info=True,
        reduction="evit",
        keep_rate=0.5,
        reduction_layers=[1, 2],
        cross_layer_cache=True,
        num_clr_tokens=2,
        head="cla",
    )
    classifier = {f"classifier.{name}" for name in ours.classifier.state_dict()}
    clr = {"vit.embeddings.clr_tokens", "vit.embeddings.clr_position_embeddings"}
    missing = set(info["missing_keys"])
    assert missing >= clr
    assert missing - clr == {name for name in classifier if name in missing} != set()
    assert set(info["unexpected_keys"]) <= {"classifier.weight", "classifier.bias"}
    assert not info["mismatched_keys"]
    cls_token = model.vit.embeddings.cls_token
    assert torch.equal(ours.vit.embeddings.cls_token, cls_token)
    assert torch.equal(ours.vit.embeddings.clr_tokens, cls_token.expand(-1, 2, -1))
    assert ours.vit.embeddings.clr_position_embeddings.std() > 0
    assert torch.equal(ours.vit.layers[4].mlp.fc1.weight, model.vit.layers[4].mlp.fc1.weight)
    assert logits_of(ours).isfinite().all()


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_stock_vit_with_every_method(method: str | None, stock: tuple[Path, ViTForImageClassification]) -> None:
    """Only parameters of the method are missing, and they are initialized."""
    folder, model = stock
    ours, info = CLCAViTForImageClassification.from_pretrained(
        folder, output_loading_info=True, reduction=method, keep_rate=0.5, reduction_layers=[1, 2]
    )
    own = {name for name, _ in ours.named_parameters() if ".reduction." in name}
    assert set(info["missing_keys"]) == own
    assert not info["unexpected_keys"]
    assert all(parameter.isfinite().all() and parameter.abs().max() < 10 for parameter in ours.parameters())
    assert torch.equal(ours.classifier.weight, model.classifier.weight)


def test_a_stock_backbone_loads(tmp_path: Path) -> None:
    """A ViTModel has no classifier and an additional pooler: only the classifier is missing."""
    torch.manual_seed(3)
    model = ViTModel(ViTConfig(**STOCK)).eval()
    model.save_pretrained(tmp_path)
    ours, info = CLCAViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert not info["unexpected_keys"]
    backbone, info = CLCAViTModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        expected = model(images().float()).last_hidden_state
        assert (ours.eval().vit(images().float()).last_hidden_state - expected).abs().max() <= 1e-5
        assert (backbone.eval()(images().float()).last_hidden_state - expected).abs().max() <= 1e-5


def test_a_stock_vit_saved_as_ours_loads_without_conversion(
    stock: tuple[Path, ViTForImageClassification], tmp_path: Path
) -> None:
    """Loading converts the names permanently: saving and loading twice preserves the model."""
    model = CLCAViTForImageClassification.from_pretrained(stock[0])
    expected = logits_of(stock[1])
    for turn in ("first", "second"):
        model.save_pretrained(tmp_path / turn)
        assert on_disk(tmp_path / turn) == set(model.state_dict())
        model, info = CLCAViTForImageClassification.from_pretrained(tmp_path / turn, output_loading_info=True)
        assert not any(info.values()), info
        assert (logits_of(model) - expected).abs().max() <= 1e-5


def test_the_stock_vit_itself_still_works(stock: tuple[Path, ViTForImageClassification], tmp_path: Path) -> None:
    """Our key mapping does not affect transformers' own classes."""
    folder, model = stock
    reloaded, info = ViTForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    reloaded.save_pretrained(tmp_path)
    assert on_disk(tmp_path) == on_disk(folder)
    assert torch.equal(logits_of(reloaded), logits_of(model))


def test_another_number_of_classes(stock: tuple[Path, ViTForImageClassification]) -> None:
    """It is refused without `ignore_mismatched_sizes`; with it the classifier is new and the backbone is loaded."""
    folder, model = stock
    with pytest.raises(RuntimeError, match=r"classifier|mismatch"):
        CLCAViTForImageClassification.from_pretrained(folder, num_labels=7)
    ours, info = CLCAViTForImageClassification.from_pretrained(
        folder, num_labels=7, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert {key[0] for key in info["mismatched_keys"]} == {"classifier.weight", "classifier.bias"}
    assert logits_of(ours).shape == (3, 7)
    assert len(ours.config.id2label) == 7
    assert torch.equal(ours.vit.layernorm.weight, model.vit.layernorm.weight)
    named = CLCAViTForImageClassification.from_pretrained(
        folder, id2label={0: "a", 1: "b"}, label2id={"a": 0, "b": 1}, ignore_mismatched_sizes=True
    )
    assert named.num_labels == named.config.num_labels == 2
    assert named.classifier.out_features == 2
    assert named.config.id2label == {0: "a", 1: "b"}


def test_weights_in_half_precision(stock: tuple[Path, ViTForImageClassification]) -> None:
    model = CLCAViTForImageClassification.from_pretrained(stock[0], dtype=torch.bfloat16, num_clr_tokens=1)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.vit.embeddings.clr_tokens, model.vit.embeddings.cls_token)
    assert logits_of(model).isfinite().all()
