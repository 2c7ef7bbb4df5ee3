"""What `run_ufgir.py` checks before it trains: options without effect across groups, and what a run depends on.

`options` is its `Options`: all groups, parsed.
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
    """Whether the run's method may be `such` a one: a checkpoint, which is not looked into here, may bring any."""
    name = options.model.reduction
    if name is None and options.model.model_name_or_path:
        return True
    return such(get_reduction(None if name == "none" else name))


# Of `Options`. What options of one group need of each other stands with the group, what fields of the configuration need with
# `ufgir.checkpoints.loading.check_meaning`.
REQUIREMENTS = (
    Requirement(
        ("distill_tokens",),
        "a `reduction` that learns from tokens, such as dyvit",
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
# Of the configuration, when the classes of the data are known.
OF_CLASSES = (
    Requirement(
        ("multi_label_loss",),
        "images with several classes, see `label_separator`",
        lambda config: config.problem_type == "multi_label_classification",
    ),
)


def choose_best_metric(options: Any, multi_label: bool, num_labels: int, given: Collection[str]) -> None:
    """Check `metric_for_best_model` against the metrics that there will be; of images with several classes it is `map` by
    default.

    Raises:
        ValueError: there will be no such metric.
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
            f"`metric_for_best_model` must be one of {', '.join(names)}, which these data and options give, got "
            f"{training.metric_for_best_model}"
        )


def check_smoothing(options: Any, config: CLCAViTConfig) -> None:
    """Check that labels are smoothed once: by the option, or in the loss of a checkpoint whose configuration says so.

    Raises:
        ValueError: by both.
    """
    smoothing = options.augmentation.label_smoothing
    if options.training.do_train and smoothing and config.label_smoothing:
        raise ValueError(
            f"`label_smoothing` must be 0, got {smoothing}: the loss of {options.model.model_name_or_path} smooths its labels by "
            f"{config.label_smoothing} itself. Leave the option out, or set `label_smoothing` in its config.json to 0."
        )


def evaluated_data(options: Any) -> dict[str, dict[str, Any] | None]:
    """The options on which the images that are evaluated depend, beside the name of the data set: `source`, which tell it from
    others of that name, and for `validation` and `test` those that choose images of it; None where all are trained on."""
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


# What a resumed training must have as it began, of each group of options; data are compared by their contents, too.
_STEPS = ("learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim")
_STEPS += ("optim_args", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "seed", "data_seed")
_STEPS += ("train_sampling_strategy", "dataloader_drop_last")
_DATA = ("shots", "train_on_trainval", "max_train_samples", "validation_fraction", "validation_split")
_ELSEWHERE = {"augmentation_device", "mixed_precision", "teacher", "teacher_revision"}  # where and how it is computed


def training_settings(options: Any, config: Any, image_processor: Any) -> dict[str, Any]:
    """The options, and the model's configuration, on which the course of a training depends."""
    settings = {name: getattr(options.training, name) for name in _STEPS}
    settings |= {name: v for name, v in vars(options.data).items() if name in _DATA or name.startswith("synthetic_")}
    for group in (options.augmentation, options.optimization, options.distillation, options.adapter):
        settings |= {name: value for name, value in vars(group).items() if name not in _ELSEWHERE}
    settings |= {name: getattr(image_processor, name) for name in ("image_mean", "image_std")}
    settings |= {"resize_size": image_processor.resize_size[0]}
    return settings | {name: value for name, value in config.to_dict().items() if name not in NOT_STORED}


def free_settings(options: Any) -> set[str]:
    """Those of `training_settings` that a training may change on its way: they take effect at once."""
    dropouts = {"hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"}
    return {"max_grad_norm", *dropouts, *vars(options.augmentation)}


def digest_of_images(images: TransformedImages, class_names: Sequence[str]) -> str:
    """Of training images and their classes, the same wherever the files are."""
    about = identity_of_data(images, file_names(images.dataset))
    about["images"] = [[Path(name or "").name, *size[:1]] for name, *size in about["images"]]
    del about["transform"]
    return hashlib.sha256(json.dumps([about, list(class_names)]).encode()).hexdigest()
