"""Checks of `run_ufgir.py` before training: options without effect across groups, and the settings of a run.

`options` is an instance of `ufgir.training.arguments.Options`: all groups, parsed.
"""

import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from clca import CLCAViTConfig, TokenReduction
from clca.reductions_clca import get_reduction

from ..data.load import SYNTHETIC_LEAVES
from ..data.transformed import TransformedImages
from ..evaluation.prediction import file_names, identity_of_data
from ..utils.options import Requirement
from ..utils.provenance import NOT_STORED


def _method_may_be(options: Any, such: Callable[[type[TokenReduction]], bool]) -> bool:
    """Return whether the run's reduction may satisfy `such`; always True for a checkpoint, which is not read here."""
    name = options.model.reduction
    if name is None and options.model.model_name_or_path:
        return True
    return such(get_reduction(None if name == "none" else name))


# Requirements across groups of `Options`. Requirements within a group are defined with the group, those between configuration
# fields in `ufgir.checkpoints.loading.warn_fields_without_effect`.
REQUIREMENTS = (
    Requirement(
        ("distill_tokens",),
        "a `reduction` trained with a teacher's tokens, such as dyvit",
        lambda options: _method_may_be(options, lambda method: method.distils),
    ),
    Requirement(
        ("keep_rate", "keep_tokens", "reduction_kwargs"),
        "a `reduction`",
        lambda options: _method_may_be(options, lambda method: method.name is not None),
    ),
    Requirement(
        ("warmup_steps", "lr_scheduler_type", "lr_scheduler_kwargs"),
        "`schedule` trainer",
        lambda options: options.optimization.schedule == "trainer",
    ),
    Requirement(
        ("teacher", "freeze", "unfreeze", "lora_rank", "ema_decay", "resume_from_checkpoint"),
        "`do_train`",
        lambda options: options.training.do_train,
    ),
)
# Requirements on the configuration, checked once the classes of the data are known.
OF_CLASSES = (
    Requirement(
        ("multi_label_loss",),
        "images with several classes, see `label_separator`",
        lambda config: config.problem_type == "multi_label_classification",
    ),
)


def choose_best_metric(options: Any, multi_label: bool, num_labels: int, given: Collection[str]) -> None:
    """Set and check `metric_for_best_model`; for multi-label images the default is `map`.

    Args:
        options: all groups; `options.training.metric_for_best_model` is changed in place.
        multi_label: whether images have several classes.
        num_labels: number of classes.
        given: names of the options that were given.

    Raises:
        ValueError: if the run does not compute that metric.
    """
    training, callbacks = options.training, options.callbacks
    if multi_label and "metric_for_best_model" not in given:
        training.metric_for_best_model = "map"
    if training.metric_for_best_model is None:
        return
    names = ["map", "micro_f1", "macro_f1", "loss"] if multi_label else ["top1", "top5", "macro_f1", "loss"]
    names = [name for name in names if name != "top5" or num_labels > 5]
    if callbacks.ema_decay and not callbacks.ema_as_final:
        names += [f"ema_{name}" for name in names]
    if training.metric_for_best_model.removeprefix("eval_") not in names:
        raise ValueError(
            f"`metric_for_best_model` must be one of {', '.join(names)} for this data and these options, got "
            f"{training.metric_for_best_model}"
        )


def check_smoothing(options: Any, config: CLCAViTConfig) -> None:
    """Check that labels are not smoothed twice: by the option and by the loss of the checkpoint.

    Raises:
        ValueError: if both smooth the labels.
    """
    smoothing = options.augmentation.label_smoothing
    if options.training.do_train and smoothing and config.label_smoothing:
        raise ValueError(
            f"`label_smoothing` must be 0, got {smoothing}: the configuration of "
            f"{options.model.model_name_or_path} already smooths labels by {config.label_smoothing}. Omit the option, or "
            "set `label_smoothing` to 0 in its config.json."
        )


def evaluated_data(options: Any) -> dict[str, dict[str, Any] | None]:
    """Return the options that determine the evaluated images, in addition to the name of the data set.

    Returns:
        dict with `source`, the options that distinguish data sets of the same name, and, for `validation` and `test`,
        the options that select their images; `validation` is None if all its images are used for training.
    """
    data, seed = options.data, options.training.seed

    def given(*names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(data, name)) is not None}

    drawn = [name for name in vars(data) if name.startswith("synthetic_")] if data.dataset == SYNTHETIC_LEAVES else []
    columns = ("image_column", "label_column", "label_separator", "csv_data_folder", "csv_class_names")
    parted = ("csv_train", "csv_validation", "validation_fraction", "max_eval_samples")
    way = data.validation_split or "last"
    validation = given(*columns, *parted) | {"validation_split": way}
    test = given(*columns, "csv_test", "max_predict_samples")
    if way == "random" or "max_eval_samples" in validation:
        validation["seed"] = seed
    if "max_predict_samples" in test:
        test["seed"] = seed
    source = given("dataset_config_name", "dataset_revision", *drawn)
    return {"source": source, "validation": None if data.train_on_trainval else validation, "test": test}


# Options that must not change when a training resumes, by group; the training images are also compared by a checksum.
_STEPS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim")
_STEPS += ("optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "seed", "data_seed")
_STEPS += ("train_sampling_strategy", "dataloader_drop_last")
_DATA = ("shots", "train_on_trainval", "max_train_samples", "validation_fraction", "validation_split")
_ELSEWHERE = {
    "augmentation_device",
    "mixed_precision",
    "teacher",
    "teacher_revision",
}  # these only affect where and how the run is computed


def training_settings(options: Any, config: Any, image_processor: Any) -> dict[str, Any]:
    """Return the options and configuration fields that determine the result of a training."""
    settings = {name: getattr(options.training, name) for name in _STEPS}
    settings |= {name: v for name, v in vars(options.data).items() if name in _DATA or name.startswith("synthetic_")}
    for group in (options.augmentation, options.optimization, options.distillation, options.adapter):
        settings |= {name: value for name, value in vars(group).items() if name not in _ELSEWHERE}
    settings |= {name: getattr(image_processor, name) for name in ("image_mean", "image_std")}
    settings |= {"resize_size": image_processor.resize_size[0]}
    return settings | {name: value for name, value in config.to_dict().items() if name not in NOT_STORED}


def free_settings(options: Any) -> set[str]:
    """Return the names in `training_settings` that may change when a training resumes; they take effect at once."""
    dropouts = {"hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"}
    return {"max_grad_norm", *dropouts, *vars(options.augmentation)}


def checksum_of_images(images: TransformedImages, class_names: Sequence[str]) -> str:
    """Return a checksum of the training images and their classes; it does not depend on where the files are."""
    about = identity_of_data(images, file_names(images.dataset))
    about["images"] = [[Path(name or "").name, *size[:1]] for name, *size in about["images"]]
    del about["transform"]
    return hashlib.sha256(json.dumps([about, list(class_names)]).encode()).hexdigest()
