"""Class activation maps (Grad-CAM, https://huggingface.co/papers/1610.02391), and adapters for interpretability libraries.

pytorch-grad-cam and captum hook into modules whose output is a single tensor, such as `vit.layers[i].tokens`, and need models that
return a single tensor.

Shapes: B batch, N tokens, D width, K classes.
"""

from collections.abc import Sequence
from functools import partial
from inspect import signature
from typing import Any, Self

import torch
from torch import nn

from clca import CLCAViTForImageClassification, CLCAViTModel
from clca.dense_clca import TokenTracker, patch_shares, unmerge

from .attention_maps import checked_layers, evaluation_mode


class LogitsOnly(nn.Module):
    """A classifier that returns only its logits (B, K), as pytorch-grad-cam and captum expect.

    Args:
        model: any transformers classifier.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Classify `pixel_values` (B, C, height, width)."""
        return self.model(pixel_values).logits


class PatchGrid:
    """A `reshape_transform` for pytorch-grad-cam: maps the tokens of a layer to the grid of patches.

    The value of a patch is the mean of the tokens that hold a part of it, weighted by the parts; zero if no token holds it. Hooks
    record in each forward pass which tokens hold which patches. There may be several target layers, each of which must be a
    `model.vit.layers[i].tokens`. For heads that read CLS, the gradient of the patches in the last layer is zero; choose an
    earlier layer.

    Use it as a context manager, or call `close` to remove the hooks.

    Args:
        model: a CLCA classifier or backbone.

    Example:

    ```python
    from pytorch_grad_cam import GradCAM
    from ufgir.interpret import LogitsOnly, PatchGrid

    with PatchGrid(model) as grid, GradCAM(LogitsOnly(model), [model.vit.layers[-2].tokens], reshape_transform=grid) as cam:
        heat = cam(pixel_values, None)  # (B, height, width)
    ```
    """

    def __init__(self, model: CLCAViTForImageClassification | CLCAViTModel) -> None:
        self._backbone: Any = model.base_model
        self._grid: tuple[int, int] | None = None  # of the images of the latest forward pass
        self._tracker: TokenTracker | None = None
        self._assignment: torch.Tensor | None = None  # of the current layer
        self._shares: dict[int, torch.Tensor] = {}  # of the output tokens of each layer
        self._layer = 0  # the layer whose tokens, or their gradients, are mapped next
        self._handles = [self._backbone.register_forward_pre_hook(self._begin, with_kwargs=True)]
        for index, layer in enumerate(self._backbone.layers):
            if layer.reduction is not None:
                self._handles.append(layer.reduction.register_forward_hook(self._note))
            # Must run before the hooks of other libraries, which call this object.
            self._handles.append(layer.tokens.register_forward_hook(partial(self._leave, index), prepend=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._shares.clear()

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Map tokens of the current layer, or their gradients, to the grid of patches.

        Args:
            tensor: (B, N, D).

        Returns:
            (B, D, rows, columns).

        Raises:
            ValueError: if the model was not run before, or the tensor is not the output of a layer's `tokens`.
        """
        shares = self._shares.get(self._layer)
        if shares is None or self._grid is None:
            raise ValueError(
                "`PatchGrid` must be created before the forward pass whose tokens it maps, got no forward pass."
            )
        if tensor.dim() != 3 or tensor.shape[:2] != shares.shape[:2]:
            raise ValueError(
                f"`tensor` must hold the tokens of layer {self._layer}, ({shares.shape[0]}, {shares.shape[1]}, width), got "
                f"{tuple(tensor.shape)}. Take `model.vit.layers[i].tokens` as the target layer."
            )
        return unmerge(tensor, shares.to(tensor.device)).transpose(1, 2).unflatten(2, self._grid)

    def _begin(self, backbone: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Prepare a forward pass: request assignments and reset the shares."""
        call = signature(backbone.forward).bind(*args, **kwargs)
        pixel_values = call.arguments["pixel_values"]
        self._grid = self._backbone.embeddings.grid(pixel_values)
        shares = patch_shares(
            self._backbone.config, self._grid[0] * self._grid[1], len(pixel_values), pixel_values.device
        )
        self._tracker, self._shares = TokenTracker(shares, self._backbone.config, retrieve=False), {}
        call.arguments["output_assignments"] = True
        return call.args, call.kwargs

    def _note(self, stage: nn.Module, args: tuple, output: tuple) -> None:
        self._assignment = output[1].report.get("assignment")

    def _leave(self, index: int, point: nn.Module, args: tuple, tokens: torch.Tensor) -> None:
        assert self._tracker is not None  # `_begin` runs first in every forward pass
        self._shares[index] = self._tracker.pass_layer(index, self._assignment)
        self._assignment = None
        self._select(index)
        if tokens.requires_grad:
            tokens.register_hook(lambda _: self._select(index))

    def _select(self, index: int) -> None:
        self._layer = index


def class_activation_maps(
    model: CLCAViTForImageClassification,
    pixel_values: torch.Tensor,
    target: int | Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    interpolate_pos_encoding: bool = False,
) -> torch.Tensor:
    """Compute Grad-CAM on the output tokens of layers: weight the channels by the mean gradient of a class logit over the patches, sum
    them, and set negative values to zero. Patches held by no token are zero.

    Args:
        model: a CLCA classifier.
        pixel_values: normalized images (B, C, height, width).
        target: class index, one for all images or one per image; None for the predicted classes.
        layers: 0-based layer indices; None for the second to last layer, since heads that read CLS use no other token of the last.
        interpolate_pos_encoding: accept images whose size differs from the model's.

    Returns:
        (B, layers, P), non-negative, in units of the logit.

    Raises:
        ValueError: if there is no such class or layer.
    """
    config = model.config
    chosen = checked_layers([max(config.num_hidden_layers - 2, 0)] if layers is None else layers, config)
    tokens: dict[int, torch.Tensor] = {}
    maps: dict[int, torch.Tensor] = {}

    def keep(index: int, point: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        # Also works if all parameters are frozen; each layer gets the gradient with respect to its own tokens.
        tokens[index] = output if output.requires_grad else output.detach().requires_grad_()
        return tokens[index]

    hooks = [model.vit.layers[index].tokens.register_forward_hook(partial(keep, index)) for index in chosen]
    try:
        with evaluation_mode(model), torch.enable_grad(), PatchGrid(model) as grid:
            logits = model(pixel_values.to(model.device), interpolate_pos_encoding=interpolate_pos_encoding).logits
            classes = _checked_classes(target, logits)
            picked = logits.gather(1, classes.unsqueeze(1)).sum()
            gradients = torch.autograd.grad(picked, [tokens[index] for index in chosen], allow_unused=True)
            for index, gradient in zip(chosen, gradients, strict=True):
                grid._select(index)
                features = grid(tokens[index].detach())
                slopes = torch.zeros_like(features) if gradient is None else grid(gradient)
                weights = slopes.mean(dim=(2, 3), keepdim=True)
                maps[index] = (weights * features).sum(dim=1).clamp(min=0).flatten(1)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([maps[index] for index in chosen], dim=1)


def _checked_classes(target: int | Sequence[int] | None, logits: torch.Tensor) -> torch.Tensor:
    """Return the target class of each image, (B,)."""
    batch, count = logits.shape
    if target is None:
        return logits.argmax(dim=1)
    classes = [target] * batch if isinstance(target, int) else list(target)
    if len(classes) != batch or not all(0 <= index < count for index in classes):
        raise ValueError(f"`target` must be a class in 0 .. {count - 1}, or {batch} of them, got {target!r}.")
    return torch.tensor(classes, device=logits.device)
