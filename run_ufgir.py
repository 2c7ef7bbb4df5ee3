"""Train, evaluate and predict with a CLCA ViT on ultra-fine-grained images.

    python run_ufgir.py recipes/demo.yaml
    python run_ufgir.py recipes/demo.yaml --learning_rate 1e-3 --reduction topk
    python run_ufgir.py recipes/image_folder.yaml --dataset path/to/images --output_dir outputs/mine
    python run_ufgir.py --model_name_or_path outputs/mine --dataset path/to/images --do_predict

A recipe is a YAML or JSON file of `option: value`; what follows on the command line wins over it.
"""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from datasets import Dataset, concatenate_datasets
from transformers import ViTImageProcessorPil, set_seed
from transformers.trainer_utils import IntervalStrategy

from clca import CLCAViTConfig, CLCAViTForImageClassification
from ufgir.checkpoints.loading import OF_REDUCTION, checkpoint_config
from ufgir.checkpoints.model_card import write_model_card
from ufgir.data.catalog import FINE_GRAINED
from ufgir.data.labels import class_feature, is_multi_label, unify_labels
from ufgir.data.load import IdleArgument, load_ufgir_dataset
from ufgir.data.splits import random_subset
from ufgir.data.transformed import SetEpoch, TransformedImages
from ufgir.evaluation.metrics import compute_metrics, compute_multilabel_metrics
from ufgir.evaluation.prediction import file_names, predict_to_file, read_predictions
from ufgir.profiling.macs import cost_in_words, dense_config, macs_in_advance
from ufgir.runs.records import mark_pushed, prediction_files, remove_run_record, write_run_record
from ufgir.runs.tables import forget_metrics, summary_table
from ufgir.training.adapters import AdapterArguments, merge
from ufgir.training.augmentation import prepare_augmentation
from ufgir.training.callbacks import CallbackArguments, make_callbacks
from ufgir.training.checkpointing import (
    ADAPTER_FOLDER,
    KEPT_PATCHES_FILE,
    check_fits,
    check_settings,
    find_checkpoint,
    last_complete_checkpoint,
    remove_checkpoints,
    remove_results,
)
from ufgir.training.distillation import Distillation, DistillationArguments
from ufgir.training.distributed import DistributedArguments
from ufgir.training.optimization import OptimizationArguments, set_precision
from ufgir.training.option_checks import (
    Need,
    check_needs,
    choose_best_metric,
    digest_of_images,
    evaluated_data,
    free_settings,
    training_settings,
)
from ufgir.training.trainer import UFGIRTrainer, load_pretrained
from ufgir.transforms.augmentation import AugmentationArguments
from ufgir.transforms.images import to_rgb
from ufgir.transforms.preprocessing import EvalTransform, make_image_processor
from ufgir.utils.arguments import RecipeParser, option, switch
from ufgir.utils.locks import only_one
from ufgir.utils.metric_names import METRIC_NAMES
from ufgir.utils.provenance import PREDICTIONS_FILE
from ufgir.utils.text import one_sentence
from ufgir.visualization.kinds import kept_patches_image
from ufgir.visualization.sheet import save_picture


logger = logging.getLogger("run_ufgir")


@dataclass
class ModelArguments:
    """The model. Unset options keep what the checkpoint says or, from scratch, the defaults of CLCAViTConfig."""

    _argument_group_name = "model (unset: as the checkpoint says; from scratch: the default in brackets)"

    model_name_or_path: str | None = option(
        "CLCA or stock ViT checkpoint: folder or Hub repository [none: from scratch]"
    )
    model_revision: str | None = option("branch, tag or commit of the Hub repository [main]")
    ignore_mismatched_sizes: bool = option(
        "start weights whose shape differs anew, e.g. another number of classes", False
    )
    attn_implementation: str | None = option("sdpa, eager, flash_attention_2 or flex_attention [sdpa]")
    image_size: int | None = option("side of the input, pixels [224]")
    patch_size: int | None = option("side of a patch, pixels [16]")
    hidden_size: int | None = option("width of the tokens [768]")
    num_hidden_layers: int | None = option("number of layers [12]")
    num_attention_heads: int | None = option("attention heads a layer [12]")
    intermediate_size: int | None = option("width inside the MLP [4 x hidden_size]")
    layer_norm_eps: float | None = option("epsilon of every LayerNorm [1e-6]")
    qkv_bias: bool | None = switch("bias on queries, keys and values [true]")
    hidden_dropout_prob: float | None = option("dropout, probability [0]")
    attention_probs_dropout_prob: float | None = option("dropout on attention, probability [0]")
    drop_path_rate: float | None = option("stochastic depth of the last layer, probability; grows from 0 [0]")
    reduction: str | None = option("token reduction method, e.g. evit, topk; none switches it off [none]")
    reduction_layers: list[int] | None = option("layers, counted from 0, that reduce; the CLA head reads them [3 6 9]")
    keep_rate: list[float] | None = option("share of tokens kept, in (0, 1]: one number or one a stage [1]")
    train_keep_rates: list[float] | None = option(
        "train at one of these rates a step, drawn at random: one model for all of them [keep_rate]"
    )
    keep_tokens: list[int] | None = option("tokens kept, one count a stage, instead of keep_rate")
    reduction_kwargs: str | None = option("the method's own options, as JSON [{}]")
    cross_layer_cache: bool | None = switch("cross-layer cache (CLC) [false]")
    num_clr_tokens: int | None = option("cross-layer registers (CLR) [0]")
    cache_gap: bool | None = switch("cache the mean of the tokens (GAP) [true]")
    cache_pool_cls: bool | None = switch("CLS takes part in the GAP [false]")
    cache_pool_clr: bool | None = switch("CLR take part in the GAP before the first recall [false]")
    cache_recover_at_last: bool | None = switch("recall the rest before the last layer [true]")
    head: str | None = option("linear, cla, ifa, h2t or vqt [linear]")
    cla_multiplier: int | None = option("channels of the CLA convolution per input channel [2]")
    num_query_tokens: int | None = option("queries a layer of the vqt head [5]")
    multi_label_loss: str | None = option("loss where images have several classes: bce or asymmetric [bce]")
    group_lasso_weight: float | None = option("weight of a group lasso on the head, a group per input feature [0]")
    layerscale_value: float | None = option("initial LayerScale [none]")
    pre_norm: bool | None = switch("LayerNorm before the first layer, as CLIP [false]")
    num_register_tokens: int | None = option("register tokens, as DINOv2 [0]")
    prefix_position_embeddings: bool | None = switch("CLS, registers and CLR have position embeddings [true]")
    use_class_token: bool | None = switch("the sequence begins with CLS [true]")
    pooling: str | None = option("what a linear head reads: cls, mean, normed_mean or map [cls]")
    use_qk_norm: bool | None = switch("LayerNorm on queries and keys [false]")
    use_swiglu_ffn: bool | None = switch("SwiGLU in the MLP [false]")


# what load_ufgir_dataset says, and how the script calls it
CALLED = {
    "`name_or_path`": "`dataset`",
    "`config_name`": "`dataset_config_name`",
    "`revision`": "`dataset_revision`",
    "`class_names`": "classes of the model",
}
# what load_ufgir_dataset takes, beside the CSV files
LOADING = ("image_column", "label_column", "label_separator", "validation_fraction", "validation_split", "shots")
LOCAL = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "disable_tqdm",
    "hub_token",
    "run_name",
)  # not in the card
NOT_IN_CONFIG = ("model_name_or_path", "model_revision", "ignore_mismatched_sizes", "attn_implementation")


@dataclass
class DataArguments:
    """The images, and how they become pixels."""

    _argument_group_name = "data"

    dataset: str = option(
        "synthetic_leaves, a folder of images, CSV or parquet, or a Hub repository", "synthetic_leaves"
    )
    dataset_config_name: str | None = option("configuration of a data set on the Hub [its default]")
    dataset_revision: str | None = option("branch, tag or commit of a data set on the Hub [main]")
    image_column: str | None = option("column of the images [found by its type and name]")
    label_column: str | None = option("column of the classes [found by its type and name]")
    label_separator: str | None = option("what stands between several classes in one label, e.g. ; [one class]")
    validation_fraction: float = option(
        "share of each class's training images to validate on, if no split is there", 0.2
    )
    validation_split: str | None = option("last: the last of each class validate, as the original; or random [last]")
    shots: int | None = option("train on at most that many images of each class, chosen at random [all]")
    csv_train: str | None = option("CSV file (class_id,dir) in the folder [train.csv]")
    csv_validation: str | None = option("the same for validation [val.csv]")
    csv_test: str | None = option("the same for test [test.csv]")
    csv_data_folder: str | None = option("what `dir` in the CSV files is relative to [found in the folder]")
    csv_class_names: str | None = option("CSV file of class_id,class_name [classid_classname.csv]")
    synthetic_num_classes: int = option("synthetic_leaves: number of cultivars", 10)
    synthetic_images_per_class: list[int] = field(
        default_factory=lambda: [80, 20, 20],
        metadata={"help": "synthetic_leaves: images a class for training, validation and test"},
    )
    synthetic_image_size: int | None = option("synthetic_leaves: side of the pictures, pixels [resize_size]")
    synthetic_difficulty: str = option("synthetic_leaves: how small the differences are", "easy")
    synthetic_seed: int = option("synthetic_leaves: seed of the drawings", 0)
    resize_size: int | None = option("side of the square that images are resized to, pixels [image_size / 0.875]")
    image_mean: list[float] | None = option("mean of red, green, blue in [0, 1] [the checkpoint's, or ImageNet's]")
    image_std: list[float] | None = option("deviation of red, green, blue [the checkpoint's, or ImageNet's]")
    train_on_trainval: bool = option("train on train + validation; only test is left to evaluate", False)
    verify_images: bool | None = switch("open every image before anything else [only those in a local folder]")
    max_train_samples: int | None = option("use that many random training images [all]")
    max_eval_samples: int | None = option("use that many random validation images [all]")
    max_predict_samples: int | None = option("use that many random test images [all]")
    predictions_file: str = option("predictions, in output_dir: .csv or .jsonl", PREDICTIONS_FILE)
    num_pictures: int = option("test images shown in kept_patches.png, if the model reduces tokens", 4)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' training arguments with defaults for fine-grained images."""

    _argument_group_name = "training (transformers' TrainingArguments)"

    output_dir: str = option("folder for checkpoints, the model, its card and predictions", "outputs/ufgir")
    do_train: bool = option("train on the training images", False)
    do_eval: bool = option("evaluate on the validation images", False)
    do_predict: bool = option("evaluate on the test images and write the predictions", False)
    overwrite_output_dir: bool = option("delete checkpoints found in output_dir and start over", False)
    per_device_train_batch_size: int = option("training images a step and device", 32)
    per_device_eval_batch_size: int = option("evaluation images a step and device", 64)
    learning_rate: float = option("highest learning rate", 1e-4)
    weight_decay: float = option("weight decay; of the weights of linear and convolution layers", 0.05)
    lr_scheduler_type: str = option("course of the learning rate: cosine, linear, constant_with_warmup, ...", "cosine")
    warmup_steps: float = option("steps of linear warmup; below 1: share of all steps", 0.04)
    num_train_epochs: float = option("epochs", 50.0)
    logging_steps: float = option("steps between two log lines; below 1: share of all steps", 0.02)
    eval_strategy: str = option("evaluate on validation while training: no, steps or epoch", "epoch")
    save_strategy: str = option("save checkpoints: no, steps, epoch or best", "epoch")
    save_total_limit: int | None = option("checkpoints to keep; the best is among them", 2)
    load_best_model_at_end: bool = option("end with the best checkpoint instead of the last", True)
    metric_for_best_model: str | None = option(
        "what best means: top1, top5, macro_f1 or loss; of images with several classes map [by default], micro_f1, macro_f1 "
        "or loss; with ema_ in front of it that of the averaged weights",
        "top1",
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "trackers: tensorboard, trackio, wandb, ..., all or none"}
    )
    dataloader_drop_last: bool = option("drop the last incomplete training batch; evaluation drops nothing", True)
    resume_from_checkpoint: str | None = option(
        "true: the last complete checkpoint in output_dir; auto: that, or from the beginning; or a checkpoint's folder [false]"
    )
    ddp_find_unused_parameters: bool | None = option("look for parameters that a step does not use; none are", False)
    remove_unused_columns: bool = option("must stay false: the transforms need the columns", False)

    def __post_init__(self) -> None:
        if not self.do_train:  # without this, evaluation is switched on by the strategy
            self.eval_strategy, self.save_strategy, self.load_best_model_at_end = "no", "no", False
        self.run_name = self.run_name or Path(self.output_dir).name  # of trackers, which would invent one
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        super().__post_init__()


def make_config(args: ModelArguments) -> CLCAViTConfig:
    """The checkpoint's configuration, or a new one, with every option that was set; checked."""
    values = {name: value for name, value in vars(args).items() if value is not None and name not in NOT_IN_CONFIG}
    if "reduction_kwargs" in values:
        try:
            values["reduction_kwargs"] = dict(json.loads(args.reduction_kwargs))
        except (ValueError, TypeError) as error:
            raise ValueError(f"`reduction_kwargs` must be a JSON object, got {args.reduction_kwargs}") from error
    if values.get("reduction") == "none":
        values["reduction"] = None
    if args.model_name_or_path is None:
        values.setdefault("layer_norm_eps", 1e-6)
        values.setdefault("intermediate_size", 4 * values.get("hidden_size", 768))
        return CLCAViTConfig(**values)
    try:
        return checkpoint_config(args.model_name_or_path, values, args.model_revision)
    except OSError as error:  # transformers' words do not say which one it was looking for, nor what else would do
        raise ValueError(
            f"`model_name_or_path`: {args.model_name_or_path} cannot be had ({one_sentence(error).rstrip('.')}). A folder with a "
            "checkpoint needs no network"
        ) from error


def load_data(
    options: "Options",
    synthetic_size: int,
    class_names: list[str] | None,
    typed: Collection[str],
    given: Collection[str],
) -> dict[str, Any]:
    """split -> images, the splits and numbers of them that were asked for; ValueError where one is missing. `typed` and `given`
    as in `prepare`."""
    data_args, args = options.data, options.training
    values = vars(data_args)
    limits = {"train": "max_train_samples", "validation": "max_eval_samples", "test": "max_predict_samples"}
    for name in limits.values():
        if values[name] is not None and values[name] < 1:
            raise ValueError(f"`{name}`, a number of images, must be at least 1, got {values[name]}")
    arguments = {k: v for k, v in values.items() if k.startswith("csv_") or k in LOADING}
    arguments |= {"config_name": data_args.dataset_config_name, "revision": data_args.dataset_revision}
    if data_args.dataset == "synthetic_leaves":
        arguments |= {k.removeprefix("synthetic_"): v for k, v in values.items() if k.startswith("synthetic_")}
        arguments["image_size"] = arguments["image_size"] or synthetic_size
    arguments |= {"class_names": class_names, "split_seed": args.seed, "verify": data_args.verify_images}
    try:
        try:
            data = dict(load_ufgir_dataset(data_args.dataset, **arguments))
        except IdleArgument:  # of the only one that depends on the data
            only = Need(("validation_split",), lambda _: False, "data that have no validation split")
            check_needs(options, typed, given, [only])
            data = dict(load_ufgir_dataset(data_args.dataset, **arguments | {"validation_split": None}))
    except ValueError as error:
        text = str(error)
        for theirs, ours in CALLED.items():
            text = text.replace(theirs, ours)
        raise ValueError(text) from error
    label = next(iter(data.values())).features["label"]
    if class_feature(label).num_classes == 1 and not is_multi_label(label):
        name = class_feature(label).names[0]
        raise ValueError(f"`dataset` {data_args.dataset} has a single class, {name}: there is nothing to tell apart")
    if data_args.train_on_trainval and data_args.shots is not None:
        raise ValueError("`shots` limits train, not validation: leave out `train_on_trainval`")
    if data_args.train_on_trainval and {"train", "validation"} <= set(data):
        data["train"] = concatenate_datasets([data["train"], data.pop("validation")])
    evaluates = args.do_eval and not args.do_train
    for split, wanted in (("train", args.do_train), ("validation", evaluates), ("test", args.do_predict)):
        if wanted and split not in data:
            raise ValueError(f"`dataset` {data_args.dataset} has no {split} images")
    data = {split: random_subset(data[split], values[limits[split]], args.seed, limits[split]) for split in data}
    batch = args.per_device_train_batch_size * args.world_size
    if args.do_train and args.dataloader_drop_last and len(data["train"]) < batch:
        raise ValueError(
            f"a training batch of {batch} images needs as many images, there are {len(data['train'])}: lower "
            "`per_device_train_batch_size`, or set `dataloader_drop_last` false"
        )
    return data


def match_classes(data: dict[str, Any], known: list[str], options: "Options") -> tuple[dict[str, Any], bool]:
    """The training images with the classes of the checkpoint that is trained on, in its order where both have the same ones; and
    whether its head is for as many other classes. Of a head whose classes have no names it is not known: it is kept, with a
    warning.

    Raises:
        ValueError: the head is to be kept, but is of other classes.
    """
    source, checkpoint = options.data.dataset, options.model.model_name_or_path
    names = class_feature(next(iter(data.values())).features["label"]).names
    if sorted(names) == sorted(known):
        return (data if names == known else unify_labels(data, source, class_names=known)), False
    if len(names) == len(known) and known == [f"LABEL_{index}" for index in range(len(known))]:
        told = (checkpoint, source, names[0], names[-1])
        logger.warning("%s does not name its classes: its head is taken for those of %s, from %s to %s", *told)
        return data, False
    optimization = options.optimization
    if "head" in optimization.freeze and "head" not in optimization.unfreeze:
        theirs, ours = (f"{', '.join(some[:3])}{', ...' * (len(some) > 3)}" for some in (known, names))
        raise ValueError(
            f"`freeze` head would keep the head of {checkpoint}, which knows other classes ({theirs}) than `dataset` {source} "
            f"has ({ours}): let it train"
        )
    return data, len(names) == len(known)


def renew_head(model: CLCAViTForImageClassification) -> None:
    """Start the classifier anew."""
    fresh = CLCAViTForImageClassification._from_config(model.config)
    model.classifier.load_state_dict(fresh.classifier.state_dict())


@dataclass
class Options:
    """All groups of options, parsed."""

    model: ModelArguments
    data: DataArguments
    augmentation: AugmentationArguments
    optimization: OptimizationArguments
    distillation: DistillationArguments
    adapter: AdapterArguments
    callbacks: CallbackArguments
    distributed: DistributedArguments
    training: TrainingArguments


GROUPS = tuple(field.type for field in fields(Options))  # in the order of the help


@dataclass
class Run:
    """What training and evaluation need, checked."""

    checkpoint: str | None  # to resume from
    config: CLCAViTConfig
    image_processor: ViTImageProcessorPil
    data: dict[str, Dataset]  # split -> pictures
    images: dict[str, TransformedImages]  # split -> pixels
    class_names: list[str]
    trainer: UFGIRTrainer
    macs: int | None  # multiply-adds of an image, None where they differ by image
    dense_macs: int  # the same without reduction, cache and aggregation head
    evaluated: dict[str, dict[str, Any] | None]  # on what the images that are evaluated depend, see `evaluated_data`
    metrics: dict[str, dict[str, float]] = field(default_factory=dict)
    images_per_second: dict[str, float] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)  # of the table at the end


def prepare(options: Options, typed: Collection[str] = (), given: Collection[str] = ()) -> Run:
    """Load everything; what can be wrong is looked at before anything is trained or written.

    Args:
        typed: names of the options that stand on the command line.
        given: those, and the recipe's.

    Raises:
        ValueError, OSError: a mistake of the user.
    """
    model_args, data_args, args = options.model, options.data, options.training
    set_precision(args, options.optimization.mixed_precision)
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("nothing to do: set `do_train`, `do_eval` or `do_predict`")
    if Path(data_args.predictions_file).suffix not in (".csv", ".jsonl"):
        raise ValueError(f"`predictions_file` must end in .csv or .jsonl, got {data_args.predictions_file}")
    check_needs(options, typed, given)
    checkpoint = find_checkpoint(args) if args.do_train else None
    options.augmentation.check(args)
    config = make_config(model_args)
    reduced = Need(OF_REDUCTION, lambda _: config.reduction, "a `reduction`")
    check_needs(options, typed, given, [reduced])
    pretrained = {"checkpoint": model_args.model_name_or_path, "revision": model_args.model_revision}
    numbers = (data_args.resize_size, data_args.image_mean, data_args.image_std)
    image_processor = make_image_processor(config.image_size, *numbers, **pretrained)
    known, new_head = None, False  # a trained model's classes; the data's may be fewer, and in another order
    if pretrained["checkpoint"]:
        known = [config.id2label[index] for index in range(config.num_labels)]
    data = load_data(options, image_processor.size["height"], None if args.do_train else known, typed, given)
    if known and args.do_train:
        data, new_head = match_classes(data, known, options)

    label = next(iter(data.values())).features["label"]
    names, multi_label = class_feature(label).names, is_multi_label(label)
    only = Need(("multi_label_loss",), lambda _: multi_label, "images with several classes, see `label_separator`")
    check_needs(options, typed, given, [only])
    config.id2label = dict(enumerate(names))
    config.label2id = {name: index for index, name in enumerate(names)}
    config.problem_type = "multi_label_classification" if multi_label else "single_label_classification"
    distillation = None
    if options.distillation.teacher is not None and args.do_train:
        insists = "distill_tokens" in given
        distillation = Distillation(options.distillation, config, image_processor, insists_on_tokens=insists)
    set_seed(args.seed)
    attention = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    if pretrained["checkpoint"]:
        anew = model_args.ignore_mismatched_sizes
        model = load_pretrained(**pretrained, config=config, ignore_mismatched_sizes=anew, **attention)
        if new_head:
            logger.info(
                "%s knows other classes than %s has: the head starts anew",
                *(pretrained["checkpoint"], data_args.dataset),
            )
            renew_head(model)
    else:
        model = CLCAViTForImageClassification._from_config(config, **attention)
    if args.do_train:
        model = options.adapter.adapt(model)
    if checkpoint:
        check_fits(checkpoint, model)

    # While training, the best checkpoint is chosen on validation images, never on test images.
    labels = {"num_labels": config.num_labels} if multi_label else {}
    images = {split: TransformedImages(data[split], EvalTransform(image_processor), **labels) for split in data}
    callbacks, collator, settings, digest = [], None, None, None
    if args.do_train:
        settings = training_settings(options, config, image_processor)
        digest = digest_of_images(images["train"], names)
        if checkpoint:
            check_settings(checkpoint, settings, free_settings(options), digest)
        transform, collator = prepare_augmentation(options.augmentation, args, image_processor, config.num_labels)
        copies = options.augmentation.repeated_augmentation
        images["train"] = TransformedImages(data["train"], transform, seed=args.seed, copies=copies, **labels)
        choose_best_metric(options, multi_label, config.num_labels, given)
        if "validation" not in images:
            if args.save_strategy == "best":
                raise ValueError("`save_strategy` best needs validation images: use epoch, steps or no")
            logger.info("No validation images: the last weights are kept, not the best.")
            args.eval_strategy, args.load_best_model_at_end = IntervalStrategy.NO, False
        callbacks = [SetEpoch(images["train"]), *make_callbacks(options.callbacks, args)]
    with torch.random.fork_rng():  # what is counted does not change what is drawn later
        macs, dense_macs = (macs_in_advance(counted) for counted in (config, dense_config(config)))
    trainer = UFGIRTrainer(
        model=options.distributed.prepare(model, args),
        args=args,
        data_collator=collator,
        train_dataset=images.get("train"),
        eval_dataset=images.get("validation"),
        processing_class=image_processor,
        compute_metrics=compute_multilabel_metrics if multi_label else compute_metrics,
        callbacks=callbacks,
        optimization=options.optimization if args.do_train else None,
        distillation=distillation,
    )
    trainer.settings, trainer.images_digest = settings, digest
    about = evaluated_data(options)
    return Run(checkpoint, config, image_processor, data, images, names, trainer, macs, dense_macs, about)


def train(run: Run, args: TrainingArguments) -> None:
    """Train, and save the model."""
    trainer = run.trainer
    if trainer.is_world_process_zero():
        earlier = prediction_files(args.output_dir)
        remove_run_record(args.output_dir)
        if args.overwrite_output_dir:
            remove_checkpoints(args.output_dir, after=run.checkpoint)
            if run.checkpoint is None:
                remove_results(args.output_dir, earlier)
    metrics = trainer.train(resume_from_checkpoint=run.checkpoint).metrics
    if hasattr(trainer.model, "peft_config"):  # the adapter stays in a folder of its own, the model is whole again
        trainer.save_model(str(Path(args.output_dir) / ADAPTER_FOLDER))
        trainer.model = trainer.model_wrapped = merge(trainer.model)
    trainer.save_model()
    trainer.save_state()
    run.rows.append({"split": "train", "images": len(run.images["train"]), "seconds": metrics["train_runtime"]})
    if run.checkpoint is not None:  # loss and speed are those since then, which the files would not say
        metrics = {name: value for name, value in metrics.items() if not name.startswith("train_")}
        if trainer.is_world_process_zero():
            forget_metrics(args.output_dir, "train")
    trainer.save_metrics("train", metrics)


def evaluate(run: Run, split: str) -> None:
    """Metrics of all images of a split."""
    output = run.trainer.predict(run.images[split], metric_key_prefix=split)
    run.trainer.save_metrics(split, output.metrics)
    metrics = {name: output.metrics.get(f"{split}_{name}") for name in METRIC_NAMES}
    keep_metrics(run, split, metrics, output.metrics[f"{split}_runtime"], len(run.images[split]))


def predict(run: Run, data_args: DataArguments, args: TrainingArguments) -> None:
    """Metrics and a file of predictions of the test images, and a picture of the patches that were kept of some of them."""
    output_dir, trainer = Path(args.output_dir), run.trainer
    path = output_dir / data_args.predictions_file
    outcome = predict_to_file(
        trainer.model,
        run.images["test"],
        path,
        run.class_names,
        files=file_names(run.data["test"]),
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        precision=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        progress=not args.disable_tqdm,
        data={"dataset": data_args.dataset, "split": "test", **run.evaluated["source"], **run.evaluated["test"]},
    )
    logger.info("Predictions: %s", path)
    trainer.save_metrics("test", {f"test_{name}": value for name, value in outcome.metrics.items()})
    keep_metrics(run, "test", outcome.metrics, outcome.seconds, outcome.predicted)
    if averaged := trainer.evaluate_average(run.images["test"], "test"):
        trainer.save_metrics("test_ema", averaged)
        shown = {name: averaged[f"test_ema_{name}"] for name in METRIC_NAMES if f"test_ema_{name}" in averaged}
        text = ", ".join(f"{METRIC_NAMES[name][1]} {100 * value:.2f} %" for name, value in shown.items())
        logger.info("Averaged weights (EMA), test: %s", text)
    if trainer.is_world_process_zero() and run.config.reduction is not None and data_args.num_pictures > 0:
        count = len(run.images["test"])
        chosen = np.linspace(0, count - 1, min(data_args.num_pictures, count)).astype(int).tolist()
        rows = read_predictions(path, chosen)
        titles = [f"{rows[i]['label']} -> {rows[i]['prediction']}" for i in chosen]
        pictures = [to_rgb(run.data["test"][i]["image"]) for i in chosen]
        picture = kept_patches_image(trainer.model, run.image_processor, pictures, titles)
        save_picture(picture, output_dir / KEPT_PATCHES_FILE)
        logger.info("Patches kept: %s", output_dir / KEPT_PATCHES_FILE)


def keep_metrics(run: Run, split: str, metrics: dict[str, float | None], seconds: float, images: int) -> None:
    """For the table, the record and the card: the metrics by name, and how fast they were measured."""
    run.metrics[split] = {name: metrics[name] for name in METRIC_NAMES if metrics.get(name) is not None}
    run.images_per_second[split] = images / seconds
    run.rows.append({"split": split, "images": len(run.images[split]), "seconds": seconds, **run.metrics[split]})


def how_to_go_on(args: TrainingArguments) -> str:
    """What is left of a run that was interrupted, a sentence."""
    if not args.do_train:
        return "The same command takes predictions up where they stopped"
    checkpoint = last_complete_checkpoint(args.output_dir)
    if checkpoint is None:
        return f"There is no complete checkpoint in {args.output_dir} yet"
    return f"The same command with `--resume_from_checkpoint true` goes on from {checkpoint}"


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the script; returns split -> metrics. A user's mistake ends it with one sentence and status 2."""
    start = time.perf_counter()
    parser = RecipeParser(GROUPS, prog="run_ufgir.py", description=__doc__)
    options = Options(*parser.parse(sys.argv[1:] if argv is None else argv))
    args = options.training
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
    logger.setLevel(logging.INFO if args.should_log else logging.WARNING)
    with contextlib.ExitStack() as stack:
        try:
            if args.process_index == 0:
                refusal = f"`output_dir` {args.output_dir} is that of a run at work: wait for it, or choose another"
                stack.enter_context(only_one(Path(args.output_dir), refusal))
            run = prepare(options, parser.typed, parser.given)
        except (ValueError, OSError) as error:
            parser.error(one_sentence(error))
        except KeyboardInterrupt:
            parser.exit(130, f"{parser.prog}: interrupted\n")
        try:
            return carry_out(options, parser, run, start)
        except KeyboardInterrupt:
            parser.exit(130, f"{parser.prog}: interrupted. {how_to_go_on(args)}\n")


def carry_out(options: Options, parser: RecipeParser, run: Run, start: float) -> dict[str, dict[str, float]]:
    """Train, evaluate and write what comes of it, as the options say, and return split -> metrics.

    Args:
        start: when the script began, seconds on the clock of `time.perf_counter`.
    """
    data_args, args = options.data, options.training
    config, trainer, output_dir = run.config, run.trainer, Path(args.output_dir)
    macs, dense_macs = run.macs, run.dense_macs
    cost = cost_in_words(macs, dense_macs)
    sizes = ", ".join(f"{len(images)} {split}" for split, images in run.data.items())
    logger.info("%s: %d classes, %s images; %s", data_args.dataset, len(run.class_names), sizes, cost)

    if args.do_train:
        try:
            train(run, args)
        except FloatingPointError as error:  # of the guard: the checkpoints are sound
            parser.exit(1, f"{parser.prog}: error: {one_sentence(error)}\n")
    if args.do_eval and "validation" in run.images:
        evaluate(run, "validation")
    if args.do_predict:
        predict(run, data_args, args)

    num_parameters = trainer.model.num_parameters()
    settings = parser.settings(*vars(options).values(), leave_out=LOCAL)
    sizes = {split: len(images) for split, images in run.images.items()}
    if trainer.is_world_process_zero() and (args.do_train or args.push_to_hub):
        known = FINE_GRAINED.get(data_args.dataset)
        on_hub = data_args.dataset != "synthetic_leaves" and not Path(data_args.dataset).exists()
        write_model_card(
            output_dir,
            config=config,
            dataset_name=Path(data_args.dataset).name,
            dataset_id=(known.hub_id if known else data_args.dataset) if on_hub else None,
            dataset_config=data_args.dataset_config_name,
            dataset_revision=data_args.dataset_revision,
            revision=args.hub_revision,
            class_names=run.class_names,
            split_sizes=sizes,
            metrics=run.metrics,
            settings=settings,
            macs=macs,
            dense_macs=dense_macs,
            num_parameters=num_parameters,
            model_id=getattr(trainer, "hub_model_id", None) or args.hub_model_id,
            base_model=options.model.model_name_or_path,
        )
    if trainer.is_world_process_zero():  # when all else is there; it is uploaded, too
        write_run_record(
            output_dir,
            settings=settings,
            dataset=data_args.dataset,
            split_sizes=sizes,
            config=config,
            metrics=run.metrics,
            macs=macs,
            dense_macs=dense_macs,
            num_parameters=num_parameters,
            seed=args.seed,
            train_seconds=next((row["seconds"] for row in run.rows if row["split"] == "train"), None),
            images_per_second=run.images_per_second,
            resumed_from=run.checkpoint,
            data=run.evaluated,
            pushed=False if args.push_to_hub else None,
        )
    if args.push_to_hub:
        trainer.push_to_hub()
        if trainer.is_world_process_zero():
            mark_pushed(output_dir)
    where = f"{time.perf_counter() - start:.0f} seconds in all; see {output_dir}"
    logger.info("Results\n%s\n%s, %s parameters\n%s", summary_table(run.rows), cost, f"{num_parameters:,}", where)
    return run.metrics


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
