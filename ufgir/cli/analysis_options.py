"""Options, models, images and provenance records shared by `ufgir analyze`, `compare` and `embed`."""

import argparse
import json
import logging
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from clca import CLCAViTForImageClassification
from clca.configuration_clca import as_pair

from ..analysis.inputs import Batch, as_json, batches, no_file
from ..checkpoints.config_options import check_fields
from ..checkpoints.loading import first_few, load_config, load_image_processor, load_model
from ..data.checks import DatasetError
from ..data.labels import class_feature, is_multi_label
from ..data.load import load_ufgir_dataset
from ..data.splits import random_subset
from ..data.streams import StreamedImages
from ..data.transformed import TransformedImages
from ..evaluation.prediction import file_names
from ..transforms.preprocessing import EvalTransform, make_image_processor
from ..utils.files import write_text_atomically
from ..utils.provenance import PACKAGES, _version, describe_host, now
from .common import json_object
from .outputs import check_folder


logger = logging.getLogger(__name__)


def add_data_options(parser: argparse.ArgumentParser, batch_size: int = 64, streaming: bool = True) -> None:
    """Add the options that choose the images and how they are loaded."""
    group = parser.add_argument_group("images")
    group.add_argument(
        "--dataset",
        required=True,
        metavar="NAME|FOLDER",
        help="synthetic_leaves, a folder, a name or an id of the Hub",
    )
    group.add_argument("--split", default="test", help="train, validation or test [%(default)s]")
    group.add_argument(
        "--dataset-options",
        type=json_object,
        default={},
        metavar="JSON",
        help="further arguments of load_ufgir_dataset",
    )
    group.add_argument(
        "--max-images", type=int, metavar="N", help="use N random images, or the first N of a stream [all]"
    )
    group.add_argument(
        "--seed", type=int, default=0, metavar="N", help="random seed of the choice of images [%(default)s]"
    )
    if streaming:
        group.add_argument(
            "--streaming",
            action="store_true",
            help="read images while they are used, without loading the data set first [no]",
        )
    group.add_argument("--skip-broken", action="store_true", help="skip images that cannot be read [raise an error]")
    group.add_argument(
        "--batch-size", type=int, default=batch_size, metavar="N", help="images per batch [%(default)s]"
    )
    group.add_argument(
        "--num-workers", type=int, default=0, metavar="N", help="number of processes that load images [%(default)s]"
    )
    group.add_argument(
        "--device", default="auto", help="auto (an accelerator if available), cpu or cuda:1 [%(default)s]"
    )


def check_numbers(args: argparse.Namespace, **least: int) -> None:
    """Check the numeric options of `add_data_options`, and those named in `least` (option -> smallest value).

    Raises:
        ValueError: if a number is too small.
    """
    for name, value in ({"batch_size": 1, "num_workers": 0, "seed": 0, "max_images": 1} | least).items():
        given = getattr(args, name)
        if given is not None and given < value:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least {value}, got {given}.")


def device_of(args: argparse.Namespace) -> torch.device:
    """Return the device that `--device` names.

    Raises:
        ValueError: if the device is not available.
    """
    if args.device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return torch.device("cpu") if accelerator is None else accelerator
    try:
        device = torch.device(args.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        raise ValueError(f"`--device` {args.device} is not available: use auto or cpu.") from error
    return device


def images_of(
    args: argparse.Namespace, models: Sequence["OpenModel"], class_names: Sequence[str] | None = None
) -> "OpenImages":
    """Load the images that the options of `add_data_options` name."""
    if getattr(args, "streaming", False) and args.skip_broken:
        raise ValueError("`--skip-broken` cannot be combined with `--streaming`: remove one of them.")
    return open_images(
        args.dataset,
        args.split,
        [model.transform for model in models],
        batch_size=args.batch_size,
        class_names=class_names,
        streaming=getattr(args, "streaming", False),
        max_images=args.max_images,
        **{"seed": args.seed} | args.dataset_options,
    )


def batches_of(args: argparse.Namespace, images: "OpenImages", progress: str) -> Iterator[Batch]:
    """Yield batches of the images, as the options of `add_data_options` say; `progress` is the label of the bar."""
    return batches(
        images.dataset,
        args.batch_size,
        num_workers=args.num_workers,
        files=images.files,
        skip_broken=args.skip_broken,
        progress=progress,
    )


# Models


class OpenModel(NamedTuple):
    """A loaded model and its source."""

    name: str  # folder or Hub repository
    model: CLCAViTForImageClassification
    transform: EvalTransform
    changes: Mapping[str, Any]  # configuration fields that override the checkpoint's
    untrained: list[str]  # names of weights that the checkpoint does not contain

    def described(self) -> dict[str, Any]:
        """Return the entry of this model in a provenance record."""
        config = self.model.config
        fields = (
            "reduction",
            "reduction_layers",
            "keep_rate",
            "keep_tokens",
            "reduction_kwargs",
            "image_size",
            "head",
        )
        return {
            "name": self.name,
            "revision": getattr(config, "_commit_hash", None),
            **{field: getattr(config, field) for field in (*fields, "cross_layer_cache")},
            "changes": dict(self.changes),
            "untrained": self.untrained,
        }

    def notes(self) -> list[str]:
        """Return a note about weights that the checkpoint does not contain; empty if it contains all of them."""
        if not self.untrained:
            return []
        return [
            f"{self.name} is not fully trained: {first_few(self.untrained)} are random (seed 0), but not used here."
        ]


def open_model(
    name: str,
    revision: str | None = None,
    changes: Mapping[str, Any] | None = None,
    device: torch.device | str = "cpu",
    unused: Sequence[str] = (),
) -> OpenModel:
    """Load a checkpoint in evaluation mode, with the transform of its images.

    Args:
        name: folder or Hub repository.
        revision: branch, tag or commit of the Hub repository.
        changes: configuration fields that override the checkpoint's, such as `keep_rate`.
        device: device of the model.
        unused: prefixes of the names of weights that are not used and may be missing.

    Raises:
        ValueError: if there is no such checkpoint, a field or value in `changes` is invalid, weights are missing or do not
            fit, or `image_size` is not square.
    """
    check_fields(changes or {}, "`changes`")
    config = load_config(name, dict(changes or {}), revision)
    height, width = as_pair(config.image_size)
    if height != width:
        raise ValueError(
            f"`image_size` of {name} must be square, got {height} x {width}: images are resized to squares."
        )
    try:
        transform = EvalTransform(load_image_processor(name, height, revision=revision))
    except OSError:
        logger.warning("%s has no image processor; using the mean and std of ImageNet", name)
        transform = EvalTransform(make_image_processor(height))
    model, untrained = load_model(name, config, revision, unused)
    model.config._commit_hash = getattr(config, "_commit_hash", None)
    return OpenModel(name, model.to(device), transform, dict(changes or {}), untrained)


# Images


class OpenImages(NamedTuple):
    """Images of a split, with their file names, classes and provenance."""

    dataset: Dataset  # {"pixel_values": (3, H, W), "labels": ...}; with a second model also "pixel_values_2"
    images: Any  # the `datasets.Dataset` or stream behind it
    files: Callable[[int], str | None]
    class_names: list[str]
    described: dict[str, Any]  # entry of the provenance record


class TwoTransforms:
    """Transform that prepares each image for two models."""

    def __init__(self, first: EvalTransform, second: EvalTransform) -> None:
        self.first, self.second = first, second

    def __call__(self, image: Any, generator: Any = None) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.first(image), "pixel_values_2": self.second(image)}


def open_images(
    name: str,
    split: str,
    transforms: Sequence[EvalTransform],
    *,
    batch_size: int,
    class_names: Sequence[str] | None = None,
    streaming: bool = False,
    max_images: int | None = None,
    seed: int = 0,
    **options: Any,
) -> OpenImages:
    """Load the images of a split for one model or two.

    Args:
        name: data set, as `load_ufgir_dataset` takes it.
        split: train, validation or test.
        transforms: one transform per model.
        batch_size: images per batch; streams yield blocks of this size.
        class_names: classes of the model, to which those of the data set are mapped; None to use the data set's.
        streaming: read images while they are used.
        max_images: largest number of images: a random choice, or the first ones of a stream; None for all.
        seed: random seed of this choice and of the data set.
        options: further arguments of `load_ufgir_dataset`.

    Raises:
        ValueError: if there is no such split, it is empty, or its data cannot be used.
    """
    given = {"seed": seed, "verify": False} | ({"validation_fraction": 0.0} if streaming else {}) | options
    try:
        splits = load_ufgir_dataset(name, class_names=class_names, streaming=streaming, **given)
    except ValueError as error:
        raise DatasetError(str(error).replace("`name_or_path`", "`--dataset`")) from error
    if split not in splits:
        raise ValueError(f"`--split`: {name} has no {split} images; it has {', '.join(splits)}.")
    images = splits[split]
    if max_images is not None and max_images < 1:
        raise ValueError(f"`--max-images` must be at least 1, got {max_images}.")
    if streaming:
        images = images if max_images is None else images.take(max_images)
    else:
        if len(images) == 0:
            raise ValueError(f"`--dataset`: the {split} split of {name} is empty; choose another `--split`.")
        images = random_subset(images, max_images, seed)
    label = images.features["label"]
    names = class_feature(label).names
    transform = transforms[0] if len(transforms) == 1 else TwoTransforms(*transforms)
    if streaming:
        dataset = StreamedImages(images, transform, batch_size=batch_size)
        files = no_file
    else:
        dataset = TransformedImages(images, transform, num_labels=len(names) if is_multi_label(label) else None)
        files = file_names(images)
    about = {"dataset": name, "split": split, "images": None if streaming else len(images), **given}
    return OpenImages(dataset, images, files, names, about | {"max_images": max_images, "streaming": streaming})


def provenance(models: Sequence[OpenModel], images: OpenImages | None, /, **more: Any) -> dict[str, Any]:
    """Return the provenance record of a result: command, date, host, models, data and package versions."""
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": now(),
        "host": describe_host(),
        "models": [model.described() for model in models],
        "data": None if images is None else images.described,
        **more,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }


def check_output(folder: str | os.PathLike, marker: str) -> Path:
    """Check that a folder can be written: it is new, empty, or contains only an earlier result of the same command.

    Args:
        folder: folder that will be replaced.
        marker: name of the record file that `complete` writes.

    Raises:
        ValueError: if it contains other files, or cannot be written.
    """
    folder = Path(folder)
    check_folder(folder, whole=True)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    try:
        own = set(json.loads((folder / marker).read_text(encoding="utf-8"))["files"]) if there else set()
    except (OSError, ValueError, KeyError, TypeError):
        own = set()
    if others := sorted(there - own):
        raise ValueError(f"`--output` {folder} contains other files, such as {others[0]}: choose a new folder.")
    return folder


def complete(folder: Path, marker: str, record: Mapping[str, Any]) -> None:
    """Write the record of a result, including the names of its files, so that a later result may replace them."""
    files = sorted({path.name for path in folder.iterdir()} | {marker})
    write_text_atomically(folder / marker, as_json({**record, "files": files}))
