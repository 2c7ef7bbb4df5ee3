"""Compare an exported program with the model that it was made from."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import nn

from clca import CLCAViTForImageClassification
from clca.configuration_clca import as_pair


Run = Callable[[torch.Tensor], torch.Tensor]  # pixel values (B, C, height, width) -> logits (B, K)
CHECKED_BATCHES = (1, 3)  # batch sizes of random images


class Logits(nn.Module):
    """A model that returns only its logits."""

    def __init__(self, model: CLCAViTForImageClassification) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values).logits


class Check(NamedTuple):
    """Comparison of a file with its model.

    Attributes:
        difference: largest absolute difference of logits, see `compare`.
        agreement: share of images to which both give the same class.
        images: number of images that `agreement` counts.
        given: whether these were given; otherwise they are random.
    """

    difference: float
    agreement: float
    images: int
    given: bool = False

    def __str__(self) -> str:
        same = round(self.agreement * self.images)
        kind = "" if self.given else "random "
        return f"logits within {self.difference:.1e}, the same class for {same} of {self.images} {kind}images"


def example(program: Logits, count: int) -> torch.Tensor:
    """Return random images (count, C, height, width), the same at each call."""
    config = program.model.config
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, config.num_channels, *as_pair(config.image_size), generator=generator)


@torch.no_grad()
def compare(program: Logits, run: Run, images: Iterable[torch.Tensor] | None = None, draw: bool = True) -> Check:
    """Compare a file with its model.

    Args:
        program: the model, in float32.
        run: runs the file.
        images: batches of preprocessed images (B, C, height, width). Without them, random images are compared.
        draw: compare logits of random images as well. int8 measures the ranges of activations on real ones.

    Returns:
        The check; its `difference` is NaN if a logit is.
    """
    given = list(images or ())
    drawn = [example(program, count) for count in CHECKED_BATCHES] if draw or not given else []
    largest = torch.zeros(())
    same = count = 0
    for index, pixels in enumerate((*drawn, *given)):
        ours, theirs = run(pixels).float(), program(pixels)
        largest = torch.maximum(largest, (ours - theirs).abs().max())  # unlike Python's max, keeps NaN
        if index >= len(drawn) or not given:
            same += int((ours.argmax(dim=1) == theirs.argmax(dim=1)).sum())
            count += len(pixels)
    return Check(float(largest), same / count, count, bool(given))
