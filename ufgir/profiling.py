"""What a model costs, counted as the field counts it."""

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def count_macs(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> int:
    """Multiply-adds of the forward pass of one image, as the paper reports them ("FLOPs" in its tables): projections,
    convolutions and attention products; norms, activations, softmax and indexing are free.

    The model runs once, in evaluation mode, on a blank image, on the meta device: shapes are computed, numbers are not.
    A method whose token counts depend on the image is run for real on the model's own device.

    Args:
        model: a CLCA model or any other image model of transformers.
        image_size: pixels, one number or (height, width); the model's own by default.

    Returns:
        Multiply-adds (not FLOPs, which count two for each).
    """
    size = model.config.image_size if image_size is None else image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    config_size = model.config.image_size
    interpolate = size != ((config_size, config_size) if isinstance(config_size, int) else tuple(config_size))
    clone = copy.deepcopy(model).eval().to("meta")
    clone.set_attn_implementation("eager")  # the counter knows matrix products on every device, fused kernels on some
    pixels = torch.empty(1, model.config.num_channels, *size, dtype=next(clone.parameters()).dtype, device="meta")
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        clone(pixels, interpolate_pos_encoding=interpolate)
    return counter.get_total_flops() // 2
