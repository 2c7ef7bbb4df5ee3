"""What an image costs, as far as it can be said before there is one."""

from clca import CLCAViTConfig
from clca.reductions_clca import get_reduction

from .profiling import count_macs, on_meta


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
