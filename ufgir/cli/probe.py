"""`ufgir probe`: fit a linear classifier on the frozen features of a model, and save the model with it."""

import argparse

import numpy as np

from ..analysis.embedding import collect_features
from ..analysis.probe import fit_probe
from ..checkpoints.classifiers import set_classifier
from ..checkpoints.loading import HEAD
from ..data.labels import is_multi_label
from ..utils.files import new_folder
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
from .common import load_image_processor, require


RECORD = "probe.json"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="checkpoint: folder or Hub repository; its classifier, if any, is not used"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of MODEL on the Hub [main]")
    parser.add_argument(
        "--output", required=True, metavar="FOLDER", help="folder for the model with its new classifier"
    )
    add_data_options(parser, streaming=False)
    parser.set_defaults(split="train")


def run(args: argparse.Namespace) -> str:
    """Fit the classifier and write the model folder."""
    check_numbers(args)
    output = check_output(args.output, RECORD)
    require("sklearn")
    opened = open_model(args.model, args.revision, {"head": "linear"}, device_of(args), unused=HEAD)
    image_processor = load_image_processor(args.model, opened.model.config)
    args.dataset_options = {"validation_fraction": 0.0} | args.dataset_options  # all training images
    images = images_of(args, [opened])
    if is_multi_label(images.images.features["label"]):
        raise ValueError(f"`--dataset` {args.dataset} has several classes per image; a linear probe needs one.")
    found = collect_features(
        opened.model,
        batches_of(args, images, "Computing features"),
        "pooled",
    )
    try:
        probe = fit_probe(found.values, np.array(found.labels), len(images.class_names))
    except ValueError as error:
        raise ValueError(f"`--dataset` {args.dataset}, {args.split}: {error}") from error
    set_classifier(opened.model, probe.weight, probe.bias, images.class_names)
    chosen = {"strength": probe.strength, "cross_validated_accuracy": probe.accuracy}
    with new_folder(output) as folder:
        opened.model.save_pretrained(folder)
        image_processor.save_pretrained(folder)
        complete(folder, RECORD, provenance([opened], images, images=len(found.indices), **chosen))
    accuracy = "" if probe.accuracy is None else f", cross-validated accuracy {probe.accuracy:.1%}"
    return f"{len(found.indices)} images, {len(images.class_names)} classes{accuracy}\nwrote {output}"
