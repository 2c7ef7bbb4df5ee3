"""Shared by all clients: a tiny model, images, and the line that a client prints."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from clca import CLCAImageProcessor, CLCAViTForImageClassification
from tests.helpers import TINY, images, tiny_model


REDUCED: dict[str, Any] = {
    "reduction": "evit",
    "keep_rate": 0.5,
    "cross_layer_cache": True,
    "num_clr_tokens": 1,
    "head": "cla",
}
NAMES = {0: "wild", 1: "bred", 2: "crossed"}


def model(**options: Any) -> CLCAViTForImageClassification:
    """Create a tiny classifier with EViT, the cache and the CLA head, float32, in evaluation mode."""
    return tiny_model(**(REDUCED | {"id2label": NAMES} | options)).float().eval()


def save(folder: Path, **options: Any) -> CLCAViTForImageClassification:
    """Save such a model with its image processor, and return it."""
    saved = model(**options)
    saved.save_pretrained(folder)
    size = {"height": TINY["image_size"], "width": TINY["image_size"]}
    CLCAImageProcessor(size=size, crop_pct=0.875).save_pretrained(folder)
    return saved


def pixels(count: int = 4) -> torch.Tensor:
    return images(count).float()


def logits_of(classifier: torch.nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return classifier(pixel_values).logits


def difference(found: Any, expected: torch.Tensor, most: float) -> str:
    """Describe the difference of logits from the expected ones.

    Raises:
        AssertionError: farther than `most`.
    """
    found = torch.as_tensor(found)
    assert found.shape == expected.shape, f"shape {tuple(found.shape)} instead of {tuple(expected.shape)}"
    distance = float((found - expected).abs().max())
    assert distance <= most, f"logits differ by {distance:.1e}"
    return "equal logits" if distance == 0 else f"logits within {distance:.0e}"


def same_weights(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Compare two state dicts exactly.

    Equal weights at other addresses may be multiplied by other kernels, so logits of equal models may differ by rounding.

    Raises:
        AssertionError: if names or values differ.
    """
    assert found.keys() == expected.keys()
    different = [name for name, tensor in expected.items() if not torch.equal(found[name], tensor)]
    assert not different, f"weights differ: {', '.join(different[:3])}"


class Data(torch.utils.data.Dataset):
    """Twelve random images of three classes."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"pixel_values": pixels(12)[index], "labels": index % 3}


def changed(classifier: torch.nn.Module, before: dict[str, torch.Tensor]) -> int:
    """Return how many trainable parameters changed.

    Raises:
        AssertionError: one does not.
    """
    still = [
        n for n, p in classifier.named_parameters() if p.requires_grad and torch.equal(p.detach().cpu(), before[n])
    ]
    assert not still, f"{len(still)} trainable parameters did not change: {still[:3]}"
    return sum(p.requires_grad for p in classifier.parameters())


def parameters(classifier: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in classifier.named_parameters()}


def main(check: Callable[[Path], str]) -> None:
    """Run a client: print one line at the end, and exit with status 0 if it works, otherwise 1."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            line = check(Path(folder))
        except BaseException as error:
            told = " ".join(str(error).split())
            print(f"{type(error).__name__}: {told}"[:300], flush=True)
            sys.exit(1)
    print(line, flush=True)
