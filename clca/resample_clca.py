"""Weights of a ViT for images, or patches, of another size.

Position embeddings are resampled as pictures, bicubic and antialiased. Patch projections follow FlexiViT
(https://huggingface.co/papers/2212.08013): the new weights are those that, on a resized patch, come closest to what the old
ones give on the patch itself.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from .budget_clca import as_pair


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


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


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _pair(name: str, size: Sequence[int]) -> tuple[int, int]:
    pair = tuple(size)
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"`{name}` must be two positive integers, for height and width, got {size}.")
    return pair
