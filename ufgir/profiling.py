"""What a model costs, counted as the field counts it."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clca import REDUCTIONS
from clca.configuration_clca import as_pair


def count_macs(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> int:
    """Multiply-adds of the forward pass of one image, as the paper reports them ("FLOPs" in its tables): projections,
    convolutions and attention products; norms, activations, softmax and indexing are free.

    The model runs once, in evaluation mode, on a blank image, on the meta device: shapes are computed, numbers are not.
    A method whose token counts depend on the image (ATS) is run for real, so its figure is that of a blank image.

    Args:
        model: a CLCA model or any other image model of transformers.
        image_size: pixels, one number or (height, width); the model's own by default.

    Returns:
        Multiply-adds (not FLOPs, which count two for each).
    """
    size = as_pair(model.config.image_size if image_size is None else image_size)
    clone = copy.deepcopy(model).eval()
    clone.set_attn_implementation("eager")  # the counter knows matrix products on every device, fused kernels on some
    reduction = getattr(model.config, "reduction", None)
    if reduction is None or REDUCTIONS[reduction].static_shapes:
        clone.to("meta")
    weight = next(clone.parameters())
    pixels = torch.zeros(1, model.config.num_channels, *size, dtype=weight.dtype, device=weight.device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        clone(pixels, interpolate_pos_encoding=size != as_pair(model.config.image_size))
    return counter.get_total_flops() // 2
