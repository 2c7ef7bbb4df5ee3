"""`ufgir analyze`: predictions, kept patches and features of every image of a data set, with statistics, in one pass."""

import argparse
from pathlib import Path

from ..analysis import figures as analysis_figures
from ..analysis.dataset_pass import RECORD, analyze
from ..analysis.inputs import check_cls
from ..interpret.attention_maps import checked_layers
from ..interpret.patterns import PatternStatistics, stage_layers
from ..utils import plotting as figures
from .analysis_options import add_data_options, check_numbers, device_of, images_of, open_model, provenance
from .common import add_reduction_options, config_values, require
from .outputs import check_folder


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint: folder or Hub repository")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of MODEL on the Hub [main]")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder for parquet files, tables, figures and analysis.json"
    )
    parser.add_argument(
        "--features",
        type=int,
        nargs="+",
        default=[],
        metavar="LAYER",
        help="write the CLS token after these layers (0-based) [none]",
    )
    parser.add_argument("--assignments", action="store_true", help="write the token that each patch ends up in [no]")
    parser.add_argument(
        "--shard-size",
        type=int,
        default=1024,
        metavar="N",
        help="images per parquet file and per saved state [%(default)s]",
    )
    add_data_options(parser)
    add_reduction_options(parser)


def run(args: argparse.Namespace) -> str | tuple[str, int]:
    """Analyze the data set and write the folder; status 1 if some images could not be read."""
    check_numbers(args, shard_size=1)
    check_folder(args.output, whole=True)
    require("matplotlib")
    opened = open_model(args.model, args.revision, config_values(args), device_of(args))
    config = opened.model.config
    if args.features:
        check_cls(config, args.model, "`--features`")
        checked_layers(args.features, config, "`--features`")
    if args.assignments:
        stage_layers(config, args.model)
    names = [config.id2label[k] for k in range(config.num_labels)]
    images = images_of(args, [opened], names)
    try:
        result = analyze(
            opened.model,
            images.dataset,
            args.output,
            layers=args.features,
            assignments=args.assignments,
            class_names=names,
            files=images.files,
            batch_size=args.batch_size,
            num_workers=args.num_workers,
            shard_size=args.shard_size,
            skip_broken=args.skip_broken,
            progress=True,
            data=images.described,
            record=provenance([opened], images),
            figure=_draw,
        )
    except KeyboardInterrupt:
        return "interrupted: run the same command again to continue after the last complete shard", 130
    lines = [
        f"{result.images} images"
        + (f", {result.resumed_at} of them from the interrupted run" if result.resumed_at else "")
    ]
    lines += [f"{name}: {value:.4f}" for name, value in result.metrics.items()]
    lines += [f"wrote {result.path} (provenance in {RECORD})"]
    if not result.broken:
        return "\n".join(lines)
    return "\n".join([*lines, f"{len(result.broken)} could not be read:", *map("  {}".format, result.broken)]), 1


def _draw(folder: Path, patterns: PatternStatistics) -> None:
    maps = patterns.maps()
    with figures.style():
        depth = analysis_figures.draw_maps(
            {"mean depth": maps["depth_mean"]}, patterns.num_layers, "Layer at which a patch loses its token"
        )
        kept = {f"layer {a}": maps[f"kept_stage_{i}"] for i, a in enumerate(patterns.layers)}
        shares = analysis_figures.draw_maps(kept, 1.0, "Share of images that keep the patch")
        for name, figure in (("depth", depth), ("kept", shares)):
            for kind in ("png", "pdf"):
                figures.save_figure(figure, folder / f"{name}.{kind}")
