"""Every trainable parameter gets a gradient in each step, regardless of how the model was loaded, because distributed training waits for
all gradients.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    Dinov2Config,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from clca import CLCAViTConfig, CLCAViTForImageClassification
from clca.heads_clca import HEADS
from tests.checkpoints.original_checkpoints import Golden
from tests.checkpoints.test_from_timm import load
from tests.helpers import METHODS, TINY, images, labels, slow_unless, tiny_config, tiny_model
from ufgir.checkpoints import load_model, load_original, load_pretrained, load_transformers
from ufgir.training.adapters import adapt


pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft's

STOCK = {k: v for k, v in TINY.items() if k != "reduction_layers"}
ADAPTED = ("q_proj", "v_proj")


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stock")
    ViTForImageClassification(ViTConfig(**STOCK)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dinov2")
    sizes = {k: v for k, v in STOCK.items() if k not in ("intermediate_size", "num_labels")}
    Dinov2Model(Dinov2Config(**sizes, mlp_ratio=2)).save_pretrained(folder)
    return folder


def without_gradient(model: nn.Module) -> list[str]:
    """Return the names of trainable parameters without a gradient after one training step."""
    model.train()
    side = model.config.image_size
    pixels = images(4, side, side).to(next(model.parameters()).dtype)
    model(pixels, labels=labels(4)).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    return [name for name, parameter in trained.items() if parameter.grad is None]


class Sources(NamedTuple):
    """Sources of weights."""

    stock: Path
    dinov2: Path
    folder: Path

    def ours(self, options: dict[str, Any]) -> Path:
        tiny_model(**options).float().save_pretrained(self.folder)
        return self.folder


def unfrozen(model: CLCAViTForImageClassification) -> CLCAViTForImageClassification:
    return model.requires_grad_(False).requires_grad_(True)


def with_info(path: Path, **options: Any) -> PreTrainedModel:
    return CLCAViTForImageClassification.from_pretrained(path, output_loading_info=True, **options)[0]


LOADERS: dict[str, Callable[[Sources, dict[str, Any]], nn.Module]] = {
    "from_pretrained": lambda s, o: CLCAViTForImageClassification.from_pretrained(s.ours(o)),
    "stock": lambda s, o: CLCAViTForImageClassification.from_pretrained(
        s.stock, reduction_layers=[1, 2], ignore_mismatched_sizes=True, **o
    ),
    "loading info": lambda s, o: with_info(s.ours(o)),
    "auto": lambda s, o: AutoModelForImageClassification.from_pretrained(s.ours(o)),
    "from_config": lambda s, o: AutoModelForImageClassification.from_config(tiny_config(**o)),
    "another size": lambda s, o: CLCAViTForImageClassification.from_pretrained(s.ours(o), patch_size=4, image_size=16),
    "bfloat16": lambda s, o: CLCAViTForImageClassification.from_pretrained(s.ours(o), dtype=torch.bfloat16),
    "device_map": lambda s, o: CLCAViTForImageClassification.from_pretrained(s.ours(o), device_map={"": "cpu"}),
    "unfrozen": lambda s, o: unfrozen(CLCAViTForImageClassification.from_pretrained(s.ours(o))),
    "load_pretrained": lambda s, o: load_pretrained(
        str(s.stock), CLCAViTConfig(**TINY | o), ignore_mismatched_sizes=True
    ),
    "load_model": lambda s, o: load_model(str(s.ours(o)), CLCAViTConfig(**TINY | o)).model,
    "dinov2": lambda s, o: load_transformers(s.dinov2, num_labels=3, reduction_layers=[1, 2], **o),
    "peft": lambda s, o: adapt(
        CLCAViTForImageClassification.from_pretrained(s.ours(o)), LoraConfig(r=2, target_modules=list(ADAPTED))
    ),
}
ROWS = [(loader, head, method) for loader in LOADERS for head in HEADS for method in METHODS]


def is_quick(row: tuple[str, str, str | None]) -> bool:
    """Select the fast tests: a stock ViT with all heads and methods, and each other loader with every head and some method."""
    loader, head, method = row
    return loader == "stock" or METHODS.index(method) == (
        3 * list(LOADERS).index(loader) + list(HEADS).index(head)
    ) % len(METHODS)


@pytest.mark.parametrize("row", slow_unless(is_quick, ROWS), ids=lambda row: "-".join(map(str, row)))
def test_loaded_models(row: tuple[str, str, str | None], stock: Path, dinov2: Path, tmp_path: Path) -> None:
    loader, head, method = row
    options: dict[str, Any] = {"head": head, "cross_layer_cache": True, "num_clr_tokens": 1}
    if method is not None:
        options |= {"reduction": method, "keep_rate": 0.5}
    torch.manual_seed(0)
    model = LOADERS[loader](Sources(stock, dinov2, tmp_path), options)
    assert without_gradient(model) == []


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loader", [AutoModel, AutoModelForImageClassification])
def test_attention_pooling(head: str, loader: Any, tmp_path: Path) -> None:
    """A pooling that the head does not use remains in the checkpoint, frozen."""
    options: dict[str, Any] = {"head": head, "pooling": "map" if HEADS[head].reads != "probes" else "cls"}
    tiny_model(**options).float().save_pretrained(tmp_path)
    model = loader.from_pretrained(tmp_path)
    frozen = {name.removeprefix("vit.") for name, p in model.named_parameters() if not p.requires_grad}
    expected = {
        name.removeprefix("vit.") for name, p in tiny_model(**options).named_parameters() if not p.requires_grad
    }
    assert frozen == expected
    assert bool(frozen) == (head not in ("linear", "h2t"))
    if loader is AutoModelForImageClassification:
        assert without_gradient(model) == []


@pytest.mark.parametrize(
    "name", ["evit_clca", "tome_ifa", "dyvit_clca", "vit_clca", "vqt_loc13", "h2t_loc13", "evit_bb_reg4_clca"]
)
def test_weights_of_the_original(name: str) -> None:
    golden = Golden(name)
    assert without_gradient(load_original(golden.state, golden.spec)) == []


@pytest.mark.parametrize("head", HEADS)
def test_weights_of_timm(head: str) -> None:
    options = {"head": head, "num_labels": 3, "reduction": "evit", "reduction_layers": [1], "keep_rate": 0.5}
    if head in ("h2t", "vqt"):
        options["pooling"] = "cls"
    assert without_gradient(load("deit3", **options)) == []
