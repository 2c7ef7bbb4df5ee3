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
    """The same network without reduction, cache and aggregation: what costs are compared with."""
    dense = {"reduction": None, "reduction_kwargs": None, "keep_rate": [1.0], "keep_tokens": None}
    dense |= {"train_keep_rates": None}
    dense |= {"cross_layer_cache": False, "num_clr_tokens": 0, "head": "linear"}
    dense |= {"num_selected_features": None, "vqt_original_slicing": False}
    return CLCAViTConfig.from_dict({**config.to_dict(), **dense})


def on_meta(config: CLCAViTConfig) -> CLCAViTForImageClassification:
    """A model of shapes without numbers: made at once, whatever its size."""
    with torch.device("meta"):
        return CLCAViTForImageClassification(config)


def count_macs(
    model: PreTrainedModel, image_size: int | tuple[int, int] | None = None, as_executed: bool = False
) -> int:
    """Multiply-adds of the forward pass of one image, as the paper reports them ("FLOPs" in its tables): projections,
    convolutions and attention products; norms, activations, softmax and indexing are free.

    The model runs once, in evaluation mode, on a blank image, on the meta device: shapes are computed, numbers are not.
    A method whose token counts depend on the image (ATS, unless padded) is run for real: its figure is that of a blank image.

    Args:
        model: a CLCA model or any other image model of transformers.
        image_size: pixels, one number or (height, width); the model's own by default.
        as_executed: count what really runs. By default a CLCA model is counted as the paper does it, with the queries,
            projections and last layer of rows that nobody reads, which it leaves out.

    Returns:
        Multiply-adds (not FLOPs, which count two for each).

    Raises:
        ValueError: no `image_size`, and none in the model's configuration.
    """
    own_size = getattr(model.config, "image_size", None)
    if image_size is None and own_size is None:
        raise ValueError("`image_size` must be given: the configuration of this model names none.")
    size = as_pair(own_size if image_size is None else image_size)
    resized = own_size is not None and size != as_pair(own_size)
    clone = copy.deepcopy(model).eval().requires_grad_(False)  # the counter follows gradients, and trips over VQT's
    # The counter knows matrix products on every device, fused attention on some.
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
    """`count_macs` of a model of this configuration; None where token counts, and so multiply-adds, differ by image."""
    return count_macs(on_meta(config)) if get_reduction(config.reduction).is_static(config) else None


def cost_in_words(macs: int | None, dense_macs: int) -> str:
    """What an image costs beside the dense model, in a few words.

    Args:
        macs: multiply-adds of one image, None where they differ by image.
        dense_macs: those of the dense model.
    """
    if macs is None:
        return f"GMACs differ by image ({dense_macs / 1e9:.3f} dense)"
    return f"{macs / 1e9:.3f} GMACs an image ({100 * macs / dense_macs:.1f} % of {dense_macs / 1e9:.3f} dense)"


def describe(config: CLCAViTConfig) -> str:
    """What the network is, in two lines."""
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
