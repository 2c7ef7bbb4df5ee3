"""Replace the classifier of a model by a trained linear one."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from clca import CLCAViTForImageClassification
from clca.heads_clca import HEADS


def set_classifier(
    model: CLCAViTForImageClassification, weight: np.ndarray, bias: np.ndarray, class_names: Sequence[str]
) -> None:
    """Give a model with a linear head other classes, in place.

    Args:
        model: a model whose `config.head` is `linear`.
        weight: (K, F) for K classes and the F features that the head reads.
        bias: (K,).
        class_names: K names.

    Raises:
        ValueError: if the head is another one, or shapes do not fit.
    """
    if model.config.head != "linear":
        raise ValueError(f"`head` must be linear to set its weights, it is {model.config.head!r}.")
    if (
        shape := (len(class_names), HEADS["linear"].num_features(model.config))
    ) != weight.shape or bias.shape != shape[:1]:
        raise ValueError(
            f"`weight` and `bias` must have the shapes {shape} and {shape[:1]}, got {weight.shape} and {bias.shape}."
        )
    classifier = nn.Linear(*reversed(weight.shape))
    with torch.no_grad():
        classifier.weight.copy_(torch.from_numpy(weight))
        classifier.bias.copy_(torch.from_numpy(bias))
    model.classifier = classifier.to(model.device, model.dtype)
    model.config.id2label = dict(enumerate(class_names))
    model.config.label2id = {name: index for index, name in enumerate(class_names)}
    model.num_labels = model.config.num_labels
