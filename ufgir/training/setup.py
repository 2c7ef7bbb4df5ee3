"""Build the parts of a run of `run_ufgir.py`: configuration, image processor, data, model and trainer."""

import json
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import nn
from transformers.trainer_utils import IntervalStrategy

from clca import CLCAImageProcessor, CLCAViTConfig, CLCAViTForImageClassification

from ..checkpoints.config_options import config_options, fields_of
from ..checkpoints.loading import check_trained, checkpoint_config, load_image_processor, load_with_report, new_config
from ..data.labels import class_feature, is_multi_label, unify_labels
from ..data.load import SYNTHETIC_LEAVES, load_ufgir_dataset
from ..data.splits import random_subset
from ..data.transformed import SetEpoch, TransformedImages
from ..evaluation.metrics import compute_metrics, compute_multilabel_metrics
from ..profiling.macs import dense_config, macs_in_advance
from ..profiling.targets import check_target, spend
from ..transforms.preprocessing import EvalTransform, make_image_processor
from ..utils.metric_names import METRIC_NAMES
from ..utils.options import called
from ..utils.text import one_sentence
from .arguments import ModelArguments, Options
from .augmentation import prepare_augmentation
from .callbacks import make_callbacks
from .checkpointing import check_settings
from .distillation import Distillation
from .option_checks import (
    checksum_of_images,
    choose_best_metric,
    free_settings,
    training_settings,
)
from .trainer import UFGIRTrainer


logger = logging.getLogger("run_ufgir")  # the name used by the script, which sets the level

# arguments of `load_ufgir_dataset` with the same name as the option, in addition to the CSV files
SAME_NAMES = ("image_column", "label_column", "label_separator", "validation_fraction", "validation_split", "shots")
# argument of `load_ufgir_dataset` -> option
NAMES = {"name_or_path": "dataset", "config_name": "dataset_config_name", "revision": "dataset_revision"}


@dataclass
class Run:
    """The objects that training and evaluation need, and the metrics measured so far."""

    checkpoint: str | None  # to resume from
    config: CLCAViTConfig
    image_processor: CLCAImageProcessor
    data: dict[str, Dataset]  # split -> raw images
    images: dict[str, TransformedImages]  # split -> images with the evaluation transform
    class_names: list[str]
    trainer: UFGIRTrainer
    macs: int | None  # multiply-adds per image, None if they differ between images
    dense_macs: int  # the same without reduction, cache and aggregation head
    evaluated: dict[str, dict[str, Any] | None]  # options that determine the evaluated images, see `evaluated_data`
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    images_per_second: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the summary table

    def keep_metrics(self, split: str, metrics: Mapping[str, float | None], seconds: float, images: int) -> None:
        """Store the metrics of a split and the throughput, for the table, `run.json` and the model card."""
        self.metrics[split] = {name: value for name in METRIC_NAMES if (value := metrics.get(name)) is not None}
        self.images_per_second[split] = images / seconds
        row = {"split": split, "images": len(self.images[split]), "seconds": seconds}
        self.rows.append(row | self.metrics[split])


def make_config(args: ModelArguments) -> CLCAViTConfig:
    """Return the checkpoint's configuration, or a new one, with all options applied and checked.

    Raises:
        ValueError: if a value is out of range, options contradict each other, or the checkpoint could not be loaded.
    """
    values = {name: value for name, value in fields_of(vars(args)).items() if name in config_options()}
    if "reduction_kwargs" in values:
        try:
            values["reduction_kwargs"] = dict(json.loads(args.reduction_kwargs))
        except (ValueError, TypeError) as error:
            raise ValueError(f"`reduction_kwargs` must be a JSON object, got {args.reduction_kwargs}") from error
    if values.get("reduction") == "none":
        values["reduction"] = None
    check_target(values, args.target_gmacs, "`target_gmacs`")
    if args.model_name_or_path is None:
        return new_config(values)
    try:
        return checkpoint_config(args.model_name_or_path, values, args.model_revision)
    except OSError as error:  # transformers' message names neither the option nor the alternative
        raise ValueError(
            f"`model_name_or_path`: could not load {args.model_name_or_path} ({one_sentence(error).rstrip('.')}). To work "
            "offline, pass a local folder"
        ) from error


def make_processor(options: Options, config: CLCAViTConfig) -> CLCAImageProcessor:
    """Return the checkpoint's image processor, or one with ImageNet's mean and std, with all options applied."""
    model, data, saved = options.model, options.data, None
    if model.model_name_or_path is not None:
        try:
            saved = load_image_processor(model.model_name_or_path, revision=model.model_revision)
        except OSError:
            logger.warning("%s has no image processor: using ImageNet's mean and std", model.model_name_or_path)
    return make_image_processor(config.image_size, data.resize_size, data.image_mean, data.image_std, saved)


def load_data(options: Options, synthetic_size: int, class_names: list[str] | None) -> dict[str, Any]:
    """Load the splits of the data set, limited to the requested numbers of images.

    Args:
        options: all groups.
        synthetic_size: side of synthetic leaves in pixels, unless an option sets it.
        class_names: classes of the model; None for those of the data.

    Returns:
        dict of split -> images.

    Raises:
        ValueError: if the data cannot be used or a split is missing.
    """
    args, values = options.data, vars(options.data)
    with called(NAMES):
        splits = load_ufgir_dataset(args.dataset, **_loader_arguments(options, synthetic_size, class_names))
    data: dict[str, Any] = {str(split): images for split, images in splits.items()}
    _check_classes(data, args.dataset)
    if args.train_on_trainval and {"train", "validation"} <= set(data):
        data["train"] = concatenate_datasets([data["train"], data.pop("validation")])
    _check_splits(data, options)
    limits = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}
    seed = options.training.seed
    data = {split: random_subset(data[split], values[limits[split]], seed, limits[split]) for split in data}
    _check_batch(data, options)
    return data


def _loader_arguments(options: Options, synthetic_size: int, class_names: list[str] | None) -> dict[str, Any]:
    """Return the arguments of `load_ufgir_dataset`."""
    args, values = options.data, vars(options.data)
    arguments = {name: value for name, value in values.items() if name.startswith("csv_") or name in SAME_NAMES}
    arguments |= {"config_name": args.dataset_config_name, "revision": args.dataset_revision}
    if args.dataset == SYNTHETIC_LEAVES:
        prefix = "synthetic_"
        arguments |= {name.removeprefix(prefix): v for name, v in values.items() if name.startswith(prefix)}
        arguments["image_size"] = arguments["image_size"] or synthetic_size
    return arguments | {
        "class_names": class_names,
        "split_seed": options.training.seed,
        "verify": args.verify_images,
    }


def _check_classes(data: Mapping[str, Any], source: str) -> None:
    label = next(iter(data.values())).features["label"]
    if class_feature(label).num_classes == 1 and not is_multi_label(label):
        name = class_feature(label).names[0]
        raise ValueError(f"`dataset` {source} has only one class ({name}); classification needs at least two")


def _check_splits(data: Mapping[str, Any], options: Options) -> None:
    args = options.training
    evaluates = args.do_eval and not args.do_train
    for split, wanted in (("train", args.do_train), ("validation", evaluates), ("test", args.do_predict)):
        if wanted and split not in data:
            raise ValueError(f"`dataset` {options.data.dataset} has no {split} images")


def _check_batch(data: Mapping[str, Any], options: Options) -> None:
    args = options.training
    batch = args.per_device_train_batch_size * args.world_size
    if args.do_train and args.dataloader_drop_last and len(data["train"]) < batch:
        raise ValueError(
            f"`per_device_train_batch_size` times the number of processes is {batch}, but there are only "
            f"{len(data['train'])} training images: lower it, or set `dataloader_drop_last` false"
        )


def match_classes(data: dict[str, Any], known: list[str], options: Options) -> tuple[dict[str, Any], bool]:
    """Match the classes of the training images with those of the checkpoint.

    If both have the same classes, the images get the checkpoint's order. A head whose classes have no names
    (`LABEL_0`, ...) is kept if it has as many classes, with a warning.

    Args:
        data: split -> images.
        known: class names of the checkpoint.
        options: all groups.

    Returns:
        the images, and whether to re-initialize the head because it has as many, but different, classes.

    Raises:
        ValueError: if the head is frozen but has different classes.
    """
    source, checkpoint = options.data.dataset, options.model.model_name_or_path
    names = class_feature(next(iter(data.values())).features["label"]).names
    if sorted(names) == sorted(known):
        return (data if names == known else unify_labels(data, source, class_names=known)), False
    if len(names) == len(known) and known == [f"LABEL_{index}" for index in range(len(known))]:
        values = (checkpoint, source, names[0], names[-1])
        logger.warning("%s does not name its classes: assuming those of %s, from %s to %s", *values)
        return data, False
    optimization = options.optimization
    if "head" in optimization.freeze and "head" not in optimization.unfreeze:
        theirs, ours = (f"{', '.join(some[:3])}{', ...' * (len(some) > 3)}" for some in (known, names))
        raise ValueError(
            f"`freeze` head: the head of {checkpoint} has other classes ({theirs}) than `dataset` {source} ({ours}). "
            "Do not freeze it"
        )
    return data, len(names) == len(known)


def set_classes(config: CLCAViTConfig, data: Mapping[str, Any]) -> None:
    """Store the classes of the data and the problem type (single- or multi-label) in the configuration."""
    label = next(iter(data.values())).features["label"]
    names = class_feature(label).names
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "multi_label_classification" if is_multi_label(label) else "single_label_classification"


def set_budget(config: CLCAViTConfig, args: ModelArguments) -> None:
    """Set the keep rate from `target_gmacs`, if given. Set the classes first: the cost includes the head.

    Raises:
        ValueError: if the model reduces no tokens, or if no keep rate meets the target.
    """
    if args.target_gmacs is None:
        return
    rate = spend(config, args.target_gmacs, keep_options=args.reduction_kwargs is not None)
    logger.info("Keep rate for `target_gmacs` %g: %g", args.target_gmacs, rate)


def class_names_of(config: CLCAViTConfig) -> list[str]:
    """Return the class names of a model by index."""
    return [config.id2label[index] for index in range(config.num_labels)]


def _is_multi_label(config: CLCAViTConfig) -> bool:
    return config.problem_type == "multi_label_classification"


def make_distillation(
    options: Options, config: CLCAViTConfig, image_processor: CLCAImageProcessor, given: Collection[str]
) -> Distillation | None:
    """Return the teacher for training, or None.

    Args:
        options: all groups.
        config: configuration of the student.
        image_processor: image processor of the student.
        given: names of the options that were given. If `distill_tokens` is one of them, the teacher must have tokens.
    """
    if options.distillation.teacher is None or not options.training.do_train:
        return None
    required = "distill_tokens" in given
    return Distillation(options.distillation, config, image_processor, require_tokens=required)


def make_model(options: Options, config: CLCAViTConfig, new_head: bool) -> nn.Module:
    """Return the model with the checkpoint's weights, if any, and with an adapter if `lora_rank` is set for training.

    Args:
        options: all groups.
        config: configuration of the model.
        new_head: re-initialize the head.
    """
    args = options.model
    attention = {"attn_implementation": args.attn_implementation} if args.attn_implementation else {}
    if args.model_name_or_path is None:
        model = CLCAViTForImageClassification._from_config(config, **attention)
    else:
        model, untrained = load_with_report(
            args.model_name_or_path,
            config,
            args.model_revision,
            ignore_mismatched_sizes=args.ignore_mismatched_sizes,
            advice="e.g. a head with another number of classes; `ignore_mismatched_sizes` re-initializes them",
            **attention,
        )
        if not options.training.do_train:
            check_trained(args.model_name_or_path, config, untrained)
    if new_head:
        logger.info(
            "%s has other classes than %s: the head is re-initialized", args.model_name_or_path, options.data.dataset
        )
        fresh = CLCAViTForImageClassification._from_config(config)
        model.classifier.load_state_dict(fresh.classifier.state_dict())
    return options.adapter.adapt(model) if options.training.do_train else model


def count_costs(config: CLCAViTConfig) -> tuple[int | None, int]:
    """Return the multiply-adds per image (None if they differ between images) and those of the dense model.

    Leaves torch's random state unchanged.
    """
    with torch.random.fork_rng():
        macs, dense_macs = macs_in_advance(config), macs_in_advance(dense_config(config))
    assert dense_macs is not None  # without a reduction, all images have the same cost
    return macs, dense_macs


def make_images(
    data: Mapping[str, Dataset], config: CLCAViTConfig, image_processor: CLCAImageProcessor
) -> dict[str, TransformedImages]:
    """Return split -> images with the evaluation transform."""
    transform = EvalTransform(image_processor)
    return {split: TransformedImages(data[split], transform, **_targets(config)) for split in data}


def _targets(config: CLCAViTConfig) -> dict[str, int]:
    """Return the arguments of `TransformedImages` that turn several labels into a vector."""
    return {"num_labels": config.num_labels} if _is_multi_label(config) else {}


def make_trainer(
    options: Options,
    model: nn.Module,
    config: CLCAViTConfig,
    image_processor: CLCAImageProcessor,
    images: dict[str, TransformedImages],
    distillation: Distillation | None = None,
    checkpoint: str | None = None,
    given: Collection[str] = (),
) -> UFGIRTrainer:
    """Return the trainer, also for evaluation. For training, `images["train"]` is replaced by augmented images.

    Args:
        options: all groups.
        model: to train or evaluate.
        config: configuration of the model.
        image_processor: saved with the model.
        images: split -> images with the evaluation transform.
        distillation: the teacher.
        checkpoint: to resume from.
        given: names of the options that were given.

    Raises:
        ValueError: if the options do not fit the data or the checkpoint.
    """
    args = options.training
    for_training: dict[str, Any] = {}
    settings, checksum = None, None
    if args.do_train:
        settings = training_settings(options, config, image_processor)
        checksum = checksum_of_images(images["train"], class_names_of(config))
        if checkpoint:
            check_settings(checkpoint, settings, free_settings(options), checksum)
        collator = _augment(options, config, image_processor, images)
        _choose_checkpoints(options, config, images, given)
        callbacks = [SetEpoch(images["train"]), *make_callbacks(options.callbacks, args)]
        for_training = {"data_collator": collator, "callbacks": callbacks, "optimization": options.optimization}
    trainer = UFGIRTrainer(
        model=options.distributed.prepare(model, args),
        args=args,
        train_dataset=images.get("train"),
        eval_dataset=images.get("validation"),
        processing_class=image_processor,
        compute_metrics=compute_multilabel_metrics if _is_multi_label(config) else compute_metrics,
        distillation=distillation,
        **for_training,
    )
    trainer.settings, trainer.images_checksum = settings, checksum
    return trainer


def _augment(
    options: Options,
    config: CLCAViTConfig,
    image_processor: CLCAImageProcessor,
    images: dict[str, TransformedImages],
) -> Any:
    """Replace `images["train"]` by augmented images; return the collator for their batches."""
    args, augmentation = options.training, options.augmentation
    transform, collator = prepare_augmentation(augmentation, args, image_processor, config.num_labels)
    copies = augmentation.repeated_augmentation
    plain = images["train"].dataset
    images["train"] = TransformedImages(plain, transform, seed=args.seed, copies=copies, **_targets(config))
    return collator


def _choose_checkpoints(
    options: Options, config: CLCAViTConfig, images: Mapping[str, TransformedImages], given: Collection[str]
) -> None:
    """Set how the best checkpoint is chosen: by validation images, never by test images."""
    args = options.training
    choose_best_metric(options, _is_multi_label(config), config.num_labels, given)
    if "validation" not in images:
        if args.save_strategy == "best":
            raise ValueError("`save_strategy` best needs validation images. Use epoch, steps or no")
        logger.info("No validation images: keeping the last weights instead of the best.")
        args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
