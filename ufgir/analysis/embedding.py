"""Embed image features in two dimensions with scikit-learn: t-SNE and PCA (`ufgir embed`).

Shapes: n images, F features.
"""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import nn

from clca import CLCAViTForImageClassification
from clca.configuration_clca import CLCAViTConfig
from clca.heads_clca import heads_reading

from ..interpret.attention_maps import checked_layers, evaluation_mode
from ..transforms.images import to_rgb
from ..utils.extras import install_command
from .inputs import Batch, LayerOutputs, check_cls


METHODS = ("tsne", "pca")
FEATURES = ("cls", "cla", "pooled")
MISSING = "embeddings need scikit-learn"
_FEWEST = 4  # minimal number of images
_BEFORE_TSNE = 50  # principal components as input of t-SNE, as in its authors' code


def check_features(config: CLCAViTConfig, features: str, name: str = "the model") -> None:
    """Check that a model has the requested features.

    Raises:
        ValueError: if `features` is unknown, is `cls` and the model has no CLS token, or is `cla` and its head does not aggregate.
    """
    if features not in FEATURES:
        raise ValueError(f"`features` must be one of {', '.join(FEATURES)}, got {features!r}.")
    if features == "cls":
        check_cls(config, name, "`features` cls")
    if features == "cla" and config.head not in heads_reading("cls_tokens"):
        raise ValueError(
            f"{name} has `head`={config.head!r}, which aggregates no CLS tokens. Use `features` cls or pooled, or a model with "
            f"the head {' or '.join(heads_reading('cls_tokens'))}."
        )


def check_images(count: int) -> None:
    """Check the number of images before any is read.

    Raises:
        ValueError: if there are fewer than four.
    """
    if count < _FEWEST:
        raise ValueError(f"an embedding needs at least {_FEWEST} images, got {count}.")


class Features(NamedTuple):
    """The result of `collect_features`."""

    values: np.ndarray  # (n, F), float32
    indices: list[int]  # of the images in the data set
    labels: list[int]  # class indices, -1 if unknown; the first of several classes


def collect_features(
    model: CLCAViTForImageClassification, batches: Iterable[Batch], features: str = "cls", layer: int | None = None
) -> Features:
    """Compute the features of all images and hold them in memory.

    Args:
        model: a CLCA classifier.
        batches: batches of images, see `ufgir.analysis.inputs.batches`.
        features: `cls`: CLS after a layer, not normalized. `cla`: the aggregated CLS tokens that an aggregation head (CLA, IFA)
            classifies. `pooled`: the tokens pooled by `config.pooling`.
        layer: 0-based index of the layer for `cls`; None for the last layer.

    Raises:
        ValueError: as `check_features`, if there is no such layer, or if there are no images.
    """
    check_features(model.config, features)
    layers = checked_layers([model.config.num_hidden_layers - 1 if layer is None else layer], model.config)
    taken: list[torch.Tensor] = []

    def take(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        taken.append(inputs[0].flatten(1))

    values, indices, labels = [], [], []
    with evaluation_mode(model), LayerOutputs(model, layers) as outputs:
        handle = model.classifier.out_proj.register_forward_pre_hook(take) if features == "cla" else None
        try:
            for batch in batches:
                if not batch.indices:
                    continue
                pixels = batch.columns["pixel_values"].to(model.device)
                if features == "pooled":
                    found = model.vit(pixels).pooler_output
                else:
                    model(pixels)
                    found = taken.pop() if features == "cla" else outputs.cls()[0]
                values.append(found.float().cpu().numpy())
                indices += batch.indices
                labels += _single(batch.columns.get("labels"), len(batch.indices))
        finally:
            if handle is not None:
                handle.remove()
    if not values:
        raise ValueError("no images to embed: `batches` is empty.")
    return Features(np.concatenate(values), indices, labels)


def _single(labels: torch.Tensor | None, count: int) -> list[int]:
    if labels is None:
        return [-1] * count
    if labels.dim() == 1:
        return labels.tolist()
    return [int(row.argmax()) if row.any() else -1 for row in labels > 0]


def embed(features: np.ndarray, method: str = "tsne", seed: int = 0, perplexity: float = 30.0) -> np.ndarray:
    """Embed features (n, F) as points (n, 2).

    Args:
        features: (n, F), finite.
        method: `tsne` (https://jmlr.org/papers/v9/vandermaaten08a.html), initialized with the first principal components, or `pca`.
        seed: random seed of t-SNE.
        perplexity: perplexity of t-SNE, about the number of neighbors; at most (n - 1) / 3 is used.

    Raises:
        ValueError: if the method is unknown, there are fewer than four images, features are not finite, or `perplexity` is below 1.
        ImportError: if scikit-learn is not installed.
    """
    if method not in METHODS:
        raise ValueError(f"`method` must be {' or '.join(METHODS)}, got {method!r}.")
    check_images(len(features))
    if perplexity < 1:
        raise ValueError(f"`perplexity` must be at least 1, got {perplexity}.")
    if not np.isfinite(features).all():
        raise ValueError("`features` must be finite, got NaN or infinite values for some images.")
    try:
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError(f"{MISSING}: {install_command('analysis')}") from error
    # float64: principal components of float32 differ between machines
    make = partial(PCA, svd_solver="full")
    features = np.asarray(features, dtype=np.float64)
    if method == "pca":
        return make(2).fit_transform(features) if features.shape[1] > 1 else np.pad(features, ((0, 0), (0, 1)))
    components = min(_BEFORE_TSNE, *features.shape)
    tsne = TSNE(init="pca", perplexity=min(perplexity, (len(features) - 1) / 3), random_state=seed)
    return tsne.fit_transform(make(components).fit_transform(features))


def spread_out(points: np.ndarray, count: int, apart: float = 0.0) -> list[int]:
    """Return indices of points (n, 2) that are far from each other: each is the farthest from all before it.

    Args:
        points: (n, 2).
        count: number of points; fewer are returned if the next one would be closer than `apart`.
        apart: minimal distance, as a share of the width or of the height.
    """
    if count == 0:
        return []
    scale = np.ptp(points, axis=0)
    points = points / np.where(scale > 0, scale, 1)
    chosen = [int(np.linalg.norm(points - points.mean(axis=0), axis=1).argmin())]
    distances = np.full(len(points), np.inf)
    while len(chosen) < min(count, len(points)):
        distances = np.minimum(distances, np.abs(points - points[chosen[-1]]).max(axis=1))
        if distances.max() < apart or distances.max() == 0:
            break
        chosen.append(int(distances.argmax()))
    return chosen


def thumbnail(image: Image.Image, side: int) -> Image.Image:
    """Return a small RGB copy whose longer side is `side` pixels."""
    image = to_rgb(image).copy()
    image.thumbnail((side, side))
    return image


def point_rows(
    points: np.ndarray, found: Features, class_names: Sequence[str], files: Sequence[str | None]
) -> list[dict[str, Any]]:
    """Return a row per image: index, file, label, x, y."""
    return [
        {
            "index": index,
            "file": file or "",
            "label": class_names[label] if label >= 0 else "",
            "x": float(x),
            "y": float(y),
        }
        for (x, y), index, label, file in zip(points, found.indices, found.labels, files, strict=True)
    ]
