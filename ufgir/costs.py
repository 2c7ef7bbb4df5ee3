"""What an image costs, as far as it can be said before there is one."""

from clca import CLCAViTConfig

from .commands.common import on_meta
from .profiling import count_macs


def macs_in_advance(config: CLCAViTConfig) -> int | None:
    """`count_macs` of a model of this configuration; None where token counts, and so multiply-adds, differ by image.

    Methods whose `static_shapes` is false differ, unless an option of theirs, such as `pad_to_bound`, makes them pad.
    """
    model = on_meta(config).to("meta")  # the constants of methods, too, which are made on the CPU
    try:
        return count_macs(model)
    except RuntimeError as error:  # a number was asked of the meta device: the counts follow from the pixels
        if "meta" not in str(error):
            raise
        return None


def cost_in_words(macs: int | None, dense_macs: int) -> str:
    """What an image costs beside the dense model, in a few words.

    Args:
        macs: multiply-adds of one image, None where they differ by image.
        dense_macs: those of the dense model.
    """
    if macs is None:
        return f"GMACs differ by image ({dense_macs / 1e9:.3f} dense)"
    return f"{macs / 1e9:.3f} GMACs an image ({100 * macs / dense_macs:.1f} % of {dense_macs / 1e9:.3f} dense)"
