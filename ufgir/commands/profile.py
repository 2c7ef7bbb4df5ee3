"""`ufgir profile`: what a model costs."""

import argparse
from collections.abc import Sequence

from clca import CLCAViTConfig, token_schedule
from clca.cache_clca import recovery_layers

from ..profiling import count_macs, dense_config
from .common import CLCA, add_network_options, add_reduction_options, align, config_values, load_config, on_meta


# GMACs of ViT-B/16 with EViT from the authors' log of their runs on SoyGene, which its accuracy-over-FLOPs figure shows.
# (image size, keep rate) -> without CLCA, with CLCA
PAPER_LABELS = 1110
PAPER_GMACS = {
    (224, 0.1): (5.64, 5.96),
    (224, 0.25): (6.53, 6.97),  # the three base points at 224 px and 0.25, 0.5, 0.7: as the log has them for another
    (224, 0.5): (
        8.82,
        9.32,
    ),  # backbone of this shape. It has 6.45, 8.72 and 11.49 for the backbone of the figure, which
    (224, 0.7): (11.61, 12.18),  # the original code, counted again, does not give.
    (224, 1.0): (17.57, 18.38),
    (448, 0.1): (24.80, 25.18),
    (448, 0.25): (28.57, 29.00),
    (448, 0.5): (38.22, 38.78),
    (448, 0.7): (50.18, 50.87),
    (448, 1.0): (78.53, 79.52),
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="checkpoint: folder or Hub repository [ViT-B/16]")
    parser.add_argument("--paper", action="store_true", help="all models of the paper's accuracy-over-FLOPs figure")
    add_reduction_options(parser)
    add_network_options(parser)


def run(args: argparse.Namespace) -> str:
    """Two tables."""
    values = config_values(args)
    if args.paper:
        if values or args.model:
            raise ValueError("`--paper` takes no model and no other option.")
        return paper_table()
    config = load_config(args.model, values)
    dense = dense_config(config)
    rows = [["", "this model", "dense", "share"]]
    this, other = on_meta(config), on_meta(dense)
    counts = [sum(p.numel() for p in model.parameters()) for model in (this, other)]
    rows.append(["parameters", *(f"{n:,}" for n in counts), f"{counts[0] / counts[1]:.1%}"])
    dense_macs = count_macs(other)
    try:
        macs = count_macs(this)
    except RuntimeError as error:  # a number was asked of the meta device: the counts follow from the pixels
        if "meta" not in str(error):
            raise
        note = (
            "Token counts differ by image: the table shows the most there can be, and GMACs cannot be said in advance."
        )
        rows.append(["GMACs, one image", "-", f"{dense_macs / 1e9:.3f}", "-"])
    else:
        note = ""
        rows.append(["GMACs, one image", f"{macs / 1e9:.3f}", f"{dense_macs / 1e9:.3f}", f"{macs / dense_macs:.1%}"])
    return "\n\n".join(part for part in (describe(config), token_table(config), align(rows), note) if part)


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


def token_table(config: CLCAViTConfig) -> str:
    """Tokens that enter each layer, that leave it, and that the cache appends, CLS and all included."""
    schedule = token_schedule(config)
    recovery = recovery_layers(config)
    rows = [["layer", "tokens in", "tokens out", "recalled"]]
    for index, (before, after) in enumerate(zip(schedule.before, schedule.after, strict=False)):
        recalled = schedule.before[index + 1] - after if index in recovery else 0
        rows.append([str(index), str(before), str(after), f"+{recalled}" if recalled else ""])
    rows.append(["final norm", str(schedule.before[-1]), "", ""])
    return align(rows)


def paper_table() -> str:
    """Our counts beside the paper's, for all twenty models of its figure of accuracy over FLOPs."""
    rows = [["image", "keep rate", "EViT", "paper", "difference", "EViT + CLCA", "paper", "difference"]]
    for (size, rate), published in PAPER_GMACS.items():
        row = [f"{size} px", str(rate)]
        for options, theirs in zip(({}, CLCA), published, strict=True):
            values = {"image_size": size, "reduction": "evit", "keep_rate": rate, "num_labels": PAPER_LABELS}
            ours = count_macs(on_meta(CLCAViTConfig(**values | options))) / 1e9
            row += [f"{ours:.3f}", f"{theirs:.2f}", f"{ours / theirs - 1:+.2%}"]
        rows.append(row)
    return f"GMACs of one image, ViT-B/16, {PAPER_LABELS} classes\n\n{align(rows)}"
