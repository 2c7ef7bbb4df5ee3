"""`ufgir compare`: measure how similar two models, or the layers of one model, are."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..analysis import figures as analysis_figures
from ..analysis.comparison import FEATURES, WHAT, Comparison, check_comparison, check_images, compare_models
from ..checkpoints.config_options import check_fields
from ..checkpoints.loading import HEAD
from ..interpret.attention_maps import checked_layers
from ..utils import plotting as figures
from ..utils.files import new_folder, write_csv
from .analysis_options import (
    OpenModel,
    add_data_options,
    batches_of,
    check_numbers,
    check_output,
    complete,
    device_of,
    images_of,
    open_model,
    provenance,
)
from .common import json_object, require
from .outputs import print_before_error


RECORD = "comparison.json"
EPILOG = """
measures (on CLS features unless noted):
  cka          unbiased linear CKA, averaged over batches; with --features tokens, on all tokens of a layer
  cka-plain    linear CKA of all images at once
  pwcca        projection-weighted CCA distance (needs more images than channels)
  cca          mean canonical correlation (needs more images than channels)
  cca-squared  mean squared canonical correlation (needs more images than channels)
  procrustes   squared distance after optimal rotation, in [0, 2]
  norms        norms of all tokens of a layer, and distances between them
  patterns     patches kept and merged per stage (needs two models with equal patch grids): IoU, homogeneity,
               completeness, NMI, maps of the depth of each patch, and saliency metrics between these

  ufgir compare outputs/a --dataset leaves --output layers                      the layers of one model
  ufgir compare outputs/a outputs/b --dataset leaves --what cka pwcca --layers 3 6 9 11 --output a_b
  ufgir compare outputs/a outputs/a --changes-b '{"keep_rate": [0.25]}' --dataset leaves --what patterns --output rates
"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EPILOG
    parser.add_argument("model_a", metavar="MODEL_A", help="checkpoint: folder or Hub repository")
    parser.add_argument(
        "model_b", nargs="?", metavar="MODEL_B", help="second model [compare the layers of MODEL_A with each other]"
    )
    parser.add_argument("--what", nargs="+", default=["cka"], metavar="MEASURE", help=f"{', '.join(WHAT)} [cka]")
    parser.add_argument(
        "--features", default="cls", metavar="NAME", help=f"features for cka: {' or '.join(FEATURES)} [cls]"
    )
    parser.add_argument("--layers", type=int, nargs="+", metavar="LAYER", help="layers of both models (0-based) [all]")
    parser.add_argument(
        "--layers-b",
        type=int,
        nargs="+",
        metavar="LAYER",
        help="layers of MODEL_B, if different (0-based) [same as --layers]",
    )
    for side in "ab":
        name = f"MODEL_{side.upper()}"
        parser.add_argument(
            f"--revision-{side}", metavar="REV", help=f"branch, tag or commit of {name} on the Hub [main]"
        )
        parser.add_argument(
            f"--changes-{side}", type=json_object, metavar="JSON", help=f"configuration fields of {name} to override"
        )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder for tables, figures and comparison.json"
    )
    add_data_options(parser)


def run(args: argparse.Namespace) -> str:
    """Compare the models and write the folder."""
    check_numbers(args)
    output = check_output(args.output, RECORD)
    if args.model_b is None and (args.layers_b or args.changes_b or args.revision_b):
        raise ValueError("`--layers-b`, `--changes-b` and `--revision-b` require MODEL_B.")
    for side in "ab":
        check_fields(getattr(args, f"changes_{side}") or {}, f"`--changes-{side}`")
    what = list(dict.fromkeys(args.what))
    require("matplotlib", *(("sklearn", "scipy", "ot") if "patterns" in what else ()))
    device = device_of(args)
    sides = [(args.model_a, args.revision_a, args.changes_a), (args.model_b, args.revision_b, args.changes_b)]
    models = [open_model(*side, device=device, unused=HEAD) for side in sides if side[0] is not None]
    names, configs = _names(models), [model.model.config for model in models]
    check_comparison(configs, what, args.features, names)
    layers = (args.layers, args.layers_b or args.layers)
    for some, config, option in zip(
        layers, configs, ("layers", "layers-b" if args.layers_b else "layers"), strict=False
    ):
        checked_layers(some, config, f"`--{option}`")
    images = images_of(args, models)
    if not args.streaming:
        check_images(configs, what, len(images.dataset))
    result = compare_models(
        [model.model for model in models],
        batches_of(args, images, "Comparing"),
        what,
        layers=layers,
        features=args.features,
        names=names,
    )
    record = provenance(models, images, what=what, features=args.features, images=result.images, names=names)
    lines = [f"{name}: {value:.4f}" for name, value in result.scalars().items()]
    notes = dict.fromkeys(note for model in models for note in model.notes())
    text = "\n".join([f"{result.images} images", *lines, *notes])
    with print_before_error([text]), new_folder(output) as folder:
        _write(folder, result, names, record)
    return f"{text}\nwrote {output}"


def _names(models: list[OpenModel]) -> tuple[str, str]:
    """Return different short names of the models, including overridden fields; a single model's name twice."""
    names = [", ".join([Path(model.name).name, *_short_changes(model.changes)]) for model in models]
    if len(names) == 2 and names[0] == names[1]:
        names = [f"{name} ({side})" for name, side in zip(names, "ab", strict=True)]
    return names[0], names[-1]


def _short_changes(changes: Mapping[str, Any]) -> list[str]:
    """Format overridden fields for a figure, such as "keep rate 0.25"."""
    return [
        f"{name.replace('_', ' ')} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in changes.items()
    ]


def _write(folder: Path, result: Comparison, names: tuple[str, str], record: dict[str, Any]) -> None:
    with figures.style():

        def save(figure: Any, name: str) -> None:
            for kind in ("png", "pdf"):
                figures.save_figure(figure, folder / f"{name}.{kind}")

        for measure, matrix in result.matrices.items():
            rows = [
                {"measure": measure, "layer_a": a, "layer_b": b, "value": float(matrix[i, j])}
                for i, a in enumerate(result.layers[0])
                for j, b in enumerate(result.layers[1])
            ]
            write_csv(folder / f"{measure}.csv", rows)
            save(analysis_figures.draw_layers(matrix, result.layers, names, measure), measure)
        if result.norms:
            write_csv(folder / "norms.csv", result.norms)
            shown = names if any(row["model"] == "b" for row in result.norms) else names[:1]
            save(analysis_figures.draw_spread(result.norms, shown), "norms")
        if result.stages:
            write_csv(folder / "patterns.csv", result.stages)
            write_csv(folder / "maps.csv", map_rows(dict(zip("ab", result.maps, strict=True))))
            depths = {name: maps["depth_mean"] for name, maps in zip(names, result.maps, strict=True)}
            high = max(float(depth.max()) for depth in depths.values())
            save(analysis_figures.draw_maps(depths, high, "Mean layer at which a patch loses its token"), "depth")
    if result.map_metrics:
        write_csv(folder / "map_metrics.csv", [result.map_metrics])
    record |= {"layers": result.layers, "scalars": result.scalars()}
    record |= {"matrices": result.matrices, "norms": result.norms, "stages": result.stages}
    complete(folder, RECORD, record)


def map_rows(maps: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one table row per patch from maps over the patches, by model and map name."""
    return [
        {"model": model, "row": row, "column": column, **{n: float(v[row, column]) for n, v in named.items()}}
        for model, named in maps.items()
        for row, column in _cells(next(iter(named.values())))
    ]


def _cells(values: Any) -> Any:
    return ((row, column) for row in range(values.shape[0]) for column in range(values.shape[1]))
