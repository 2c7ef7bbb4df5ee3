"""Weights of a ViT for images, or patches, of another size.

Position embeddings are resampled as pictures, bicubic and antialiased. Patch projections follow FlexiViT
(https://huggingface.co/papers/2212.08013): the new weights are those that, on a resized patch, come closest to what the old
ones give on the patch itself. `from_pretrained` does both through `conversions`, while the weights are loaded.
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
    """Position embeddings for another grid of patches: bicubic, antialiased, in float32 (or float64 if they are).

    Args:
        table: (1, num_prefix + rows * columns + num_suffix, D).
        num_prefix: leading rows that belong to no patch (CLS, registers) and stay as they are.
        old_grid: (rows, columns) of patches in `table`.
        new_grid: (rows, columns) of patches wanted.
        num_suffix: trailing rows that belong to no patch (CLR) and stay as they are.

    Returns:
        (1, num_prefix + new rows * new columns + num_suffix, D), in the dtype of `table`.

    Raises:
        ValueError: `table` does not have so many rows, or a grid is not two positive integers.
    """
    old_grid, new_grid = _pair("old_grid", old_grid), _pair("new_grid", new_grid)
    num_patches = old_grid[0] * old_grid[1]
    if table.dim() != 3 or table.shape[0] != 1 or table.shape[1] != num_prefix + num_patches + num_suffix:
        raise ValueError(
            f"`table` must have the shape (1, {num_prefix} + {num_patches} + {num_suffix}, width), one row for each of "
            f"the prefix, the {old_grid[0]} x {old_grid[1]} patches and the suffix; got {tuple(table.shape)}."
        )
    if old_grid == new_grid:
        return table
    prefix, patches, suffix = table.split([num_prefix, num_patches, num_suffix], dim=1)
    patches = _at_least_float32(patches).unflatten(1, old_grid).permute(0, 3, 1, 2)  # (1, D, rows, columns)
    patches = nn.functional.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2).to(table.dtype), suffix], dim=1)


def resample_patch_weights(weight: torch.Tensor, new_size: Sequence[int]) -> torch.Tensor:
    """Weights of a patch projection for patches of another size, by the pseudo-inverse of the resize operator.

    With R the matrix of the resize of a patch from the old size to the new one, the new weights are pinv(R^T) w: the
    solution of least squares of <R x, new> = <x, old> for all patches x. R is the one of float32 pictures; the rest is
    computed in float64.

    Args:
        weight: (D, C, height, width).
        new_size: (height, width).

    Returns:
        (D, C, *new_size), in the dtype of `weight`.

    Raises:
        ValueError: `weight` has not four dimensions, or `new_size` is not two positive integers.
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
    """Weights of a model made from `old`, under the names of `CLCAViTForImageClassification`, for one made from `new`:
    position embeddings and patch projection resampled where `image_size` or `patch_size` differ, the rest as it is.

    Args:
        state_dict: tensors by name; it may lack any.
        old: configuration whose `image_size`, `patch_size` and prefix the weights have.
        new: configuration whose `image_size` and `patch_size` they get.

    Raises:
        ValueError: the position embeddings are not those of `old`.
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


# While `from_pretrained` loads.


class Layout(NamedTuple):
    """Where the rows of a table of position embeddings belong, and the size of a patch."""

    grid: tuple[int, int]  # rows and columns of patches
    patch_size: tuple[int, int]
    has_class_row: bool
    register_rows: int

    @classmethod
    def of(
        cls, config: "CLCAViTConfig | Mapping[str, Any]", defaults: "type[CLCAViTConfig] | None" = None
    ) -> "Layout":
        """The layout that a configuration describes, or that the contents of a config.json describe with the defaults of a class
        in place of what is missing there."""
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
        """Rows before those of the patches."""
        return self.has_class_row + self.register_rows

    @property
    def num_rows(self) -> int:
        """All rows."""
        return self.num_prefix + math.prod(self.grid)


@dataclass
class Loading:
    """One call of `from_pretrained`: the layout of the checkpoint, None if it has no config.json, and what was done."""

    saved: Layout | None
    done: list[str] = field(default_factory=list)
    problem: str | None = None  # position embeddings that fit neither the checkpoint's configuration nor the model


_LOADING: ContextVar[Loading | None] = ContextVar("_LOADING", default=None)


@contextmanager
def resampling(checkpoint: Any, saved: Layout | None) -> Generator[None, None, None]:
    """Resample weights that are loaded in this block, in this thread, and log it.

    Args:
        checkpoint: its name, for messages.
        saved: the layout of its weights.

    Raises:
        ValueError: its position embeddings do not fit its configuration. They are never re-initialized.
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
        logger.info("Fitted weights of %s to the model: %s.", checkpoint, "; ".join(loading.done))


class _Resample(ConversionOps):
    """A step of transformers' weight loading. Outside of `resampling` it changes nothing, when a model is saved, for example."""

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
        """`weight` as the module takes it that it is loaded into."""
        raise NotImplementedError

    @property
    def reverse_op(self) -> ConversionOps:
        return self


class ResamplePositions(_Resample):
    """Loads position embeddings for the model's grid. Rows of CLS and registers stay as they are; rows of registers that are new
    to the checkpoint are drawn as the model draws them."""

    def fit(self, weight: torch.Tensor, module: Any, loading: Loading) -> torch.Tensor:
        config, saved = module.config, loading.saved
        new = Layout.of(config)
        if saved is None or weight.dim() != 3 or weight.shape[1] != saved.num_rows:
            if weight.shape[1:] != module.position_embeddings.shape[1:]:
                loading.problem = _misfit(weight, saved, new)
            return weight
        if saved._replace(patch_size=new.patch_size) == new:
            return weight
        patches = weight[:, saved.num_prefix :]
        table = resample_position_embeddings(patches, 0, saved.grid, new.grid)
        if saved.grid != new.grid:
            loading.done.append(f"position embeddings resampled from {_by(saved.grid)} to {_by(new.grid)} patches")
        prefix = weight[:, : saved.num_prefix]
        if (saved.has_class_row, saved.register_rows) != (new.has_class_row, new.register_rows):
            prefix = _fit_prefix(prefix, saved, new, config.initializer_range)
            loading.done.append(f"position embeddings of {new.num_prefix} instead of {saved.num_prefix} other tokens")
        return torch.cat([prefix, table], dim=1)


class ResamplePatchProjection(_Resample):
    """Loads a patch projection for the model's `patch_size`."""

    def fit(self, weight: torch.Tensor, module: Any, loading: Loading) -> torch.Tensor:
        size = tuple(module.kernel_size)
        if weight.dim() != 4 or tuple(weight.shape[-2:]) == size:
            return weight
        loading.done.append(f"patch projection resampled from {_by(weight.shape[-2:])} to {_by(size)} pixels")
        return resample_patch_weights(weight, size)


def conversions() -> list[WeightConverter]:
    """For transformers' mapping of a model's weights."""
    # With the module's name: the positions of CLR are a table of their own.
    positions, projection = "embeddings.position_embeddings", "patch_embeddings.projection.weight"
    return [
        WeightConverter(positions, positions, [ResamplePositions()]),
        WeightConverter(projection, projection, [ResamplePatchProjection()]),
    ]


def _fit_prefix(prefix: torch.Tensor, saved: Layout, new: Layout, std: float) -> torch.Tensor:
    """Rows of CLS and registers for another number of those."""
    class_row, registers = prefix.split([int(saved.has_class_row), saved.register_rows], dim=1)
    parts = []
    for rows, count in ((class_row, int(new.has_class_row)), (registers, new.register_rows)):
        drawn = torch.empty(1, max(count - rows.shape[1], 0), rows.shape[2], device=rows.device)
        parts += [rows[:, :count], nn.init.trunc_normal_(drawn, std=std).to(rows.dtype)]
    return torch.cat(parts, dim=1)


def _misfit(weight: torch.Tensor, saved: Layout | None, new: Layout) -> str:
    why = "the checkpoint has no config.json that says its `image_size` and `patch_size`"
    if saved is not None:
        why = f"they do not fit the checkpoint's own config.json, which describes {saved.num_rows} rows"
    return (
        f"Position embeddings of the shape {tuple(weight.shape)} cannot be resampled to the {_by(new.grid)} patches of the model: "
        f"{why}. Correct its config.json, or load it at its own `image_size`."
    )


def _by(size: Sequence[int]) -> str:
    return f"{size[0]} x {size[1]}"


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _pair(name: str, size: Sequence[int]) -> tuple[int, int]:
    pair = tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"`{name}` must be two positive integers, for height and width, got {size}.")
    return pair
