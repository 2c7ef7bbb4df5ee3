"""Compare an exported program with the model that it was made from."""

from collections.abc import Callable, Iterable, Sequence
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
        accuracy: share of images for which the file gives the right class; None if the classes are unknown.
        model_accuracy: the same of the model.
    """

    difference: float
    agreement: float
    images: int
    given: bool = False
    accuracy: float | None = None
    model_accuracy: float | None = None

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
def compare(
    program: Logits,
    run: Run,
    images: Iterable[torch.Tensor] | None = None,
    drawn: Sequence[int] = CHECKED_BATCHES,
    labels: Sequence[int] | None = None,
) -> Check:
    """Compare a file with its model.

    Args:
        program: the model, in float32.
        run: runs the file.
        images: batches of preprocessed images (B, C, height, width).
        drawn: sizes of batches of random images that are compared as well; none of them only if there are `images`.
        labels: right classes of `images`, in their order; default: unknown.

    Returns:
        The check; its `difference` is NaN if a logit is.

    Raises:
        ValueError: if there are not as many labels as images, or nothing to compare.
    """
    given = list(images or ())
    if not given and not drawn:
        raise ValueError(f"`drawn` must contain a batch size if there are no `images`, got {drawn}.")
    if labels is not None and len(labels) != (found := sum(map(len, given))):
        raise ValueError(f"`labels` must have one class per image: got {len(labels)} for {found} images.")
    random = [example(program, count) for count in drawn]
    largest = torch.zeros(())
    same = right = model_right = count = 0
    for index, pixels in enumerate((*random, *given)):
        ours, theirs = run(pixels).float(), program(pixels)
        largest = torch.maximum(largest, (ours - theirs).abs().max())  # unlike Python's max, keeps NaN
        if index >= len(random) or not given:
            file_class, model_class = ours.argmax(dim=1), theirs.argmax(dim=1)
            same += int((file_class == model_class).sum())
            if labels is not None:
                truth = torch.tensor(labels[count : count + len(pixels)])
                right += int((file_class == truth).sum())
                model_right += int((model_class == truth).sum())
            count += len(pixels)
    accuracy, model_accuracy = (None, None) if labels is None else (right / count, model_right / count)
    return Check(float(largest), same / count, count, bool(given), accuracy, model_accuracy)
