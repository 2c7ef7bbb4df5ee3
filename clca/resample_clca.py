"""Resample the weights of a ViT for images, or patches, of another size.

Position embeddings are resampled like images, bicubic and antialiased. Patch projections follow FlexiViT
(https://huggingface.co/papers/2212.08013): on resized patches, the new weights approximate what the old weights return
for the original patches. `from_pretrained` does both while it loads weights, through `conversions`.
"""

import logging
import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, WeightConverter

from .budget_clca import as_pair


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig

logger = logging.getLogger(__name__)


def resample_position_embeddings(
    table: torch.Tensor,
    num_prefix: int,
    old_grid: Sequence[int],
    new_grid: Sequence[int],
    num_suffix: int = 0,
) -> torch.Tensor:
    """Resample position embeddings to another grid of patches: bicubic, antialiased, in float32 (float64 stays
    float64).

    Args:
        table: (1, num_prefix + rows * columns + num_suffix, D).
        num_prefix: number of leading embeddings that belong to no patch (CLS, registers) and stay unchanged.
        old_grid: (rows, columns) of patches in `table`.
        new_grid: (rows, columns) of patches to resample to.
        num_suffix: number of trailing embeddings that belong to no patch (CLR) and stay unchanged.

    Returns:
        (1, num_prefix + new rows * new columns + num_suffix, D), in the dtype of `table`.

    Raises:
        ValueError: if the shape of `table` does not fit, or a grid is not two positive integers.
    """
    old_grid, new_grid = _pair("old_grid", old_grid), _pair("new_grid", new_grid)
    num_patches = old_grid[0] * old_grid[1]
    if table.dim() != 3 or table.shape[0] != 1 or table.shape[1] != num_prefix + num_patches + num_suffix:
        raise ValueError(
            f"`table` must have the shape (1, {num_prefix} + {num_patches} + {num_suffix}, width), one position for each "
            f"token of the prefix, of the {old_grid[0]} x {old_grid[1]} patches and of the suffix, got {tuple(table.shape)}."
        )
    if old_grid == new_grid:
        return table
    prefix, patches, suffix = table.split([num_prefix, num_patches, num_suffix], dim=1)
    patches = _at_least_float32(patches).unflatten(1, old_grid).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    patches = nn.functional.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2).to(table.dtype), suffix], dim=1)


def resample_patch_weights(weight: torch.Tensor, new_size: Sequence[int]) -> torch.Tensor:
    """Resample the weights of a patch projection to another patch size, with the pseudo-inverse of the resize
    operator.

    Let R be the matrix that resizes a patch from the old size to the new one. The new weights pinv(R^T) w are the
    least-squares solution of <R x, new> = <x, old> for all patches x. R is computed in float32, the rest in float64.

    Args:
        weight: (D, C, height, width).
        new_size: (height, width).

    Returns:
        (D, C, *new_size), in the dtype of `weight`.

    Raises:
        ValueError: if `weight` does not have four dimensions, or `new_size` is not two positive integers.
    """
    if weight.dim() != 4:
        raise ValueError(f"`weight` must have the shape (width, channels, height, width), got {tuple(weight.shape)}.")
    new_size, old_size = _pair("new_size", new_size), tuple(weight.shape[-2:])
    if old_size == new_size:
        return weight
    basis = torch.eye(old_size[0] * old_size[1], device=weight.device).unflatten(1, old_size).unsqueeze(1)
    resize = nn.functional.interpolate(basis, size=new_size, mode="bicubic", align_corners=False, antialias=True)
    inverse = torch.linalg.pinv(resize.flatten(1).double())  # of R^T, which has a row per old pixel: (new, old)
    return (weight.flatten(2).double() @ inverse.T).unflatten(-1, new_size).to(weight.dtype)


def resample_weights(
    state_dict: Mapping[str, torch.Tensor], old: "CLCAViTConfig", new: "CLCAViTConfig"
) -> dict[str, torch.Tensor]:
    """Resample the weights of a model made from `old` for a model made from `new`.

    Position embeddings and patch projection are resampled if `image_size` or `patch_size` differ. Other weights stay
    unchanged.

    Args:
        state_dict: tensors under the names of `CLCAViTForImageClassification`; any may be missing.
        old: configuration of the weights.
        new: configuration to resample to; its `image_size` and `patch_size` are used.

    Raises:
        ValueError: if the position embeddings do not fit `old`.
    """
    weights = dict(state_dict)
    positions, projection = "vit.embeddings.position_embeddings", "vit.embeddings.patch_embeddings.projection.weight"
    if old.image_grid != new.image_grid and positions in weights:
        num_prefix = old.num_prefix_tokens * old.prefix_position_embeddings
        weights[positions] = resample_position_embeddings(
            weights[positions], num_prefix, old.image_grid, new.image_grid
        )
    if as_pair(old.patch_size) != as_pair(new.patch_size) and projection in weights:
        weights[projection] = resample_patch_weights(weights[projection], as_pair(new.patch_size))
    return weights


# Resampling in `from_pretrained`.


class Layout(NamedTuple):
    """Layout of a table of position embeddings, and the patch size."""

    grid: tuple[int, int]  # (rows, columns) of patches
    patch_size: tuple[int, int]
    has_class_position: bool
    register_positions: int

    @classmethod
    def of(
        cls, config: "CLCAViTConfig | Mapping[str, Any]", defaults: "type[CLCAViTConfig] | None" = None
    ) -> "Layout":
        """Return the layout of a configuration.

        Args:
            config: a configuration, or the contents of a config.json.
            defaults: configuration class that provides the defaults of missing keys.
        """
        values: dict[str, Any] = dict(config) if isinstance(config, Mapping) else vars(config)
        if defaults is not None:
            values = {f.name: f.default for f in fields(defaults)} | values
        size, patch_size = as_pair(values["image_size"]), as_pair(values["patch_size"])
        positions = values["prefix_position_embeddings"]
        return cls(
            (size[0] // patch_size[0], size[1] // patch_size[1]),
            (patch_size[0], patch_size[1]),
            bool(values["use_class_token"] and positions),
            values["num_register_tokens"] * positions,
        )

    @property
    def num_prefix(self) -> int:
        """Number of position embeddings before those of the patches."""
        return self.has_class_position + self.register_positions

    @property
    def num_positions(self) -> int:
        """Number of all position embeddings."""
        return self.num_prefix + math.prod(self.grid)


@dataclass
class Loading:
    """State of one call of `from_pretrained`: the layout of the checkpoint (None if it has no config.json) and what
    was resampled."""

    saved: Layout | None
    done: list[str] = field(default_factory=list)
    problem: str | None = None  # set if position embeddings fit neither the checkpoint's configuration nor the model


_LOADING: ContextVar[Loading | None] = ContextVar("_LOADING", default=None)


@contextmanager
def resampling(checkpoint: Any, saved: Layout | None) -> Generator[None, None, None]:
    """Resample weights that are loaded inside this context, in this thread, and log it.

    Args:
        checkpoint: its name, for messages.
        saved: layout of its weights.

    Raises:
        ValueError: if its position embeddings do not fit its configuration. They are never re-initialized.
    """
    loading = Loading(saved)
    token = _LOADING.set(loading)
    try:
        yield
    except RuntimeError as error:
        if loading.problem is None:
            raise
        raise ValueError(f"{loading.problem} Checkpoint: {checkpoint}.") from error
    finally:
        _LOADING.reset(token)
    if loading.problem is not None:
        raise ValueError(f"{loading.problem} Checkpoint: {checkpoint}.")
    if loading.done:
        logger.info("Resampled weights of %s: %s.", checkpoint, "; ".join(loading.done))


class _Resample(ConversionOps):
    """Step of transformers' weight loading. Outside of `resampling`, for example while saving, it changes nothing."""

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> dict[str, list[torch.Tensor]]:
        (found,) = input_dict.values()
        weight, loading = found[0] if isinstance(found, list) else found, _LOADING.get()
        if loading is not None and model is not None:
            weight = self.fit(weight, model.get_submodule(full_layer_name.rpartition(".")[0]), loading)
        return {full_layer_name: [weight]}

    def fit(self, weight: torch.Tensor, module: Any, loading: Loading) -> torch.Tensor:
        """Return `weight` in the shape that the module it is loaded into needs."""
        raise NotImplementedError

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class ResamplePositions(_Resample):
    """Load position embeddings for the grid of the model.

    Those of CLS and registers stay unchanged. Those of registers that the checkpoint does not have are drawn as for a
    new model."""

    def fit(self, weight: torch.Tensor, module: Any, loading: Loading) -> torch.Tensor:
        config, saved = module.config, loading.saved
        new = Layout.of(config)
        if saved is None or weight.dim() != 3 or weight.shape[1] != saved.num_positions:
            if weight.shape[1:] != module.position_embeddings.shape[1:]:
                loading.problem = _mismatch(weight, saved, new)
            return weight
        if saved._replace(patch_size=new.patch_size) == new:
            return weight
        patches = weight[:, saved.num_prefix :]
        table = resample_position_embeddings(patches, 0, saved.grid, new.grid)
        if saved.grid != new.grid:
            loading.done.append(
                f"position embeddings resampled from {_size_text(saved.grid)} to {_size_text(new.grid)} patches"
            )
        prefix = weight[:, : saved.num_prefix]
        if (saved.has_class_position, saved.register_positions) != (new.has_class_position, new.register_positions):
            prefix = _fit_prefix(prefix, saved, new, config.initializer_range)
            loading.done.append(f"position embeddings of {new.num_prefix} instead of {saved.num_prefix} other tokens")
        return torch.cat([prefix, table], dim=1)


class ResamplePatchProjection(_Resample):
    """Load a patch projection for the `patch_size` of the model."""

    def fit(self, weight: torch.Tensor, module: Any, loading: Loading) -> torch.Tensor:
        size = tuple(module.kernel_size)
        if weight.dim() != 4 or tuple(weight.shape[-2:]) == size:
            return weight
        loading.done.append(
            f"patch projection resampled from {_size_text(weight.shape[-2:])} to {_size_text(size)} pixels"
        )
        return resample_patch_weights(weight, size)


def conversions() -> list[WeightConverter]:
    """Return the resampling steps for transformers' mapping of the weights of a model."""
    # The module's name is part of the pattern, because CLR has a separate table of positions.
    positions, projection = "embeddings.position_embeddings", "patch_embeddings.projection.weight"
    return [
        WeightConverter(positions, positions, [ResamplePositions()]),
        WeightConverter(projection, projection, [ResamplePatchProjection()]),
    ]


def _fit_prefix(prefix: torch.Tensor, saved: Layout, new: Layout, std: float) -> torch.Tensor:
    """Cut or extend the position embeddings of CLS and registers to another number of these tokens."""
    class_position, registers = prefix.split([int(saved.has_class_position), saved.register_positions], dim=1)
    parts = []
    for table, count in ((class_position, int(new.has_class_position)), (registers, new.register_positions)):
        drawn = torch.empty(1, max(count - table.shape[1], 0), table.shape[2], device=table.device)
        parts += [table[:, :count], nn.init.trunc_normal_(drawn, std=std).to(table.dtype)]
    return torch.cat(parts, dim=1)


def _mismatch(weight: torch.Tensor, saved: Layout | None, new: Layout) -> str:
    why = "the checkpoint has no config.json with its `image_size` and `patch_size`"
    if saved is not None:
        why = f"they do not fit the checkpoint's own config.json, which describes {saved.num_positions} positions"
    return (
        f"Position embeddings of the shape {tuple(weight.shape)} cannot be resampled to the {_size_text(new.grid)} patches of the model: "
        f"{why}. Correct its config.json, or load it with the `image_size` it was saved with."
    )


def _size_text(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _pair(name: str, size: Sequence[int]) -> tuple[int, int]:
    pair = tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"`{name}` must be two positive integers, for height and width, got {size}.")
    return pair
