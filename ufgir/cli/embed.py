"""`ufgir embed`: embed the features of images in two dimensions, colored by class."""

import argparse

from ..analysis import figures as analysis_figures
from ..analysis.embedding import (
    FEATURES,
    METHODS,
    check_features,
    check_images,
    collect_features,
    embed,
    point_rows,
    spread_out,
    thumbnail,
)
from ..checkpoints.loading import HEAD
from ..interpret.attention_maps import checked_layers
from ..utils import plotting as figures
from ..utils.files import new_folder, write_csv
from ..utils.options import Requirement, check_options
from .analysis_options import (
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
from .common import add_reduction_options, config_values, require


RECORD = "embedding.json"
OF_CLS = Requirement(("--layer",), "`--features` cls", lambda args: args.features == "cls")
LARGEST_SEED = 2**32 - 1  # largest seed of scikit-learn
AXES = {"tsne": ("t-SNE 1", "t-SNE 2"), "pca": ("Principal component 1", "Principal component 2")}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("model", metavar="MODEL", help="checkpoint: folder or Hub repository")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of MODEL on the Hub [main]")
    parser.add_argument(
        "--features",
        default="cls",
        metavar="NAME",
        help=f"{', '.join(FEATURES)}: the CLS token after a layer, the input of the CLA head, or the input of a linear head [cls]",
    )
    parser.add_argument("--layer", type=int, metavar="LAYER", help="layer of the CLS token (0-based) [the last]")
    parser.add_argument(
        "--method", nargs="+", choices=METHODS, default=list(METHODS), help=f"{' and '.join(METHODS)} [both]"
    )
    parser.add_argument(
        "--perplexity", type=float, default=30.0, metavar="X", help="perplexity of t-SNE [%(default)s]"
    )
    parser.add_argument(
        "--thumbnails", type=int, default=0, metavar="N", help="number of images to draw as thumbnails [%(default)s]"
    )
    parser.add_argument(
        "--thumbnail-size", type=int, default=28, metavar="PIXELS", help="longer side of a thumbnail [%(default)s]"
    )
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder for tables, figures and embedding.json"
    )
    add_data_options(parser, streaming=False)
    add_reduction_options(parser)
    parser.set_defaults(max_images=2000)


def run(args: argparse.Namespace) -> str:
    """Compute the embeddings and write the folder."""
    check_numbers(args, thumbnails=0, thumbnail_size=4, perplexity=1)
    if args.seed > LARGEST_SEED:
        raise ValueError(f"`--seed` must be at most {LARGEST_SEED}, got {args.seed}.")
    output = check_output(args.output, RECORD)
    require("matplotlib", "sklearn")
    if args.layer is not None and check_options(args, ["--layer"], [OF_CLS]):
        args.layer = None
    unused = () if args.features == "cla" else HEAD
    opened = open_model(args.model, args.revision, config_values(args), device_of(args), unused=unused)
    check_features(opened.model.config, args.features, args.model)
    if args.layer is not None:
        checked_layers([args.layer], opened.model.config, "`--layer`")
    images = images_of(args, [opened])
    check_images(len(images.dataset))
    found = collect_features(
        opened.model,
        batches_of(args, images, "Embedding"),
        args.features,
        args.layer,
    )
    files = [images.files(index) for index in found.indices]
    with new_folder(output) as folder, figures.style():
        for method in dict.fromkeys(args.method):
            points = embed(found.values, method, args.seed, args.perplexity)
            write_csv(folder / f"{method}.csv", point_rows(points, found, images.class_names, files))
            thumbnails = {
                i: thumbnail(images.images[found.indices[i]]["image"], args.thumbnail_size)
                for i in spread_out(points, args.thumbnails, analysis_figures.thumbnail_share(args.thumbnail_size))
            }
            figure = analysis_figures.draw_points(
                points, found.labels, images.class_names, AXES[method], thumbnails=thumbnails
            )
            for kind in ("png", "pdf"):
                figures.save_figure(figure, folder / f"{method}.{kind}")
        record = provenance([opened], images, images=len(found.indices), width=found.values.shape[1])
        options = ("features", "layer", "method", "perplexity", "seed")
        record |= {"options": {name: getattr(args, name) for name in options}, "classes": images.class_names}
        complete(folder, RECORD, record)
    text = f"{len(found.indices)} images, {found.values.shape[1]} features"
    return "\n".join([text, *opened.notes(), f"wrote {output}"])
