"""Count the multiply-accumulate operations (MACs) of a model, as the paper counts them."""

import copy
from collections.abc import Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from clca import CLCAViTConfig, CLCAViTForImageClassification
from clca.configuration_clca import as_pair
from clca.reductions_clca import get_reduction


def dense_config(config: CLCAViTConfig) -> CLCAViTConfig:
    """Return the same network without reduction, cache and aggregation, the reference for costs."""
    dense = {"reduction": None, "reduction_kwargs": None, "keep_rate": [1.0], "keep_tokens": None}
    dense |= {"train_keep_rates": None}
    dense |= {"cross_layer_cache": False, "num_clr_tokens": 0, "head": "linear"}
    dense |= {"num_selected_features": None, "vqt_original_slicing": False}
    return CLCAViTConfig.from_dict({**config.to_dict(), **dense})


def on_meta(config: CLCAViTConfig) -> CLCAViTForImageClassification:
    """Create a model on the meta device: shapes without memory."""
    with torch.device("meta"):
        return CLCAViTForImageClassification(config)


def count_macs(
    model: PreTrainedModel, image_size: int | tuple[int, int] | None = None, as_executed: bool = False
) -> int:
    """Count the multiply-adds of the forward pass for one image, as the paper does ("FLOPs" in its tables).

    Projections, convolutions and attention products count; norms, activations, softmax and indexing do not. The model runs once in evaluation
    mode on the meta device. A method whose token counts depend on the image (ATS without padding) runs with real numbers on a blank image.

    Args:
        model: a CLCA model or any other image model of transformers.
        image_size: pixels, one number or (height, width); default: that of the model.
        as_executed: count only what runs. By default a CLCA model is counted as in the paper, including queries, projections and parts of the
            last layer that it skips because their results are unused.

    Returns:
        The number of multiply-adds (half the number of FLOPs).

    Raises:
        ValueError: if neither `image_size` nor the configuration gives an image size.
    """
    own_size = getattr(model.config, "image_size", None)
    if image_size is None and own_size is None:
        raise ValueError("`image_size` is required, because the configuration of this model has none.")
    size = as_pair(own_size if image_size is None else image_size)
    resized = own_size is not None and size != as_pair(own_size)
    clone = copy.deepcopy(model).eval().requires_grad_(False)  # VQT's gradients break the counter
    # The counter supports matrix products on every device, but fused attention only on some.
    if own_size is not None:
        clone.set_attn_implementation("eager")
    for module in clone.modules():
        if hasattr(module, "skip_unread_rows"):
            module.skip_unread_rows = as_executed
    if get_reduction(getattr(model.config, "reduction", None)).is_static(model.config):
        clone.to("meta")
    weight = next(clone.parameters())
    pixels = torch.zeros(1, model.config.num_channels, *size, dtype=weight.dtype, device=weight.device)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        clone(pixels, **({"interpolate_pos_encoding": True} if resized else {}))
    return counter.get_total_flops() // 2


def macs_in_advance(config: CLCAViTConfig) -> int | None:
    """Return `count_macs` for a configuration, or None if token counts and therefore multiply-adds differ by image."""
    return count_macs(on_meta(config)) if get_reduction(config.reduction).is_static(config) else None


def cost_in_words(macs: int | None, dense_macs: int) -> str:
    """Describe the cost of an image compared with the dense model in a few words.

    Args:
        macs: multiply-adds per image; None if they differ by image.
        dense_macs: multiply-adds of the dense model.
    """
    if macs is None:
        return f"GMACs differ by image ({dense_macs / 1e9:.3f} dense)"
    return f"{macs / 1e9:.3f} GMACs per image ({100 * macs / dense_macs:.1f} % of {dense_macs / 1e9:.3f} dense)"


def describe(config: CLCAViTConfig) -> str:
    """Describe the network in two lines."""
    first = (
        f"ViT: {config.num_hidden_layers} layers, width {config.hidden_size}, image {_by(config.image_size)} px, "
        f"patch {_by(config.patch_size)} px, {config.num_labels} classes"
    )
    parts = ["no reduction"]
    if config.reduction:
        budget = f"keep rate {_listed(config.keep_rate)}"
        if config.keep_tokens is not None:
            budget = f"{_listed(config.keep_tokens)} tokens kept"
        parts = [f"{config.reduction} in layers {_listed(config.reduction_layers)}, {budget}"]
    if config.cross_layer_cache:
        summary = ["GAP"] * config.cache_gap + [f"{config.num_clr_tokens} CLR"] * (config.num_clr_tokens > 0)
        parts.append(f"cross-layer cache of {' and '.join(summary)}")
    return f"{first}\n{'; '.join(parts)}; head {config.head}"


def _by(size: int | Sequence[int]) -> str:
    return str(size) if isinstance(size, int) else " x ".join(map(str, size))


def _listed(values: Sequence[float]) -> str:
    return ", ".join(map(str, values))
