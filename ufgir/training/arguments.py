"""The options of `run_ufgir.py`: a dataclass for each group, and `Options`, all of them.

The options of the model are the fields of `CLCAViTConfig` (`ufgir.checkpoints.config_options`); groups that belong to one part of
the training stand beside its code.
"""

import os
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from ..checkpoints.config_options import config_options
from ..data.load import SYNTHETIC_LEAVES
from ..transforms.augmentation import AugmentationArguments
from ..utils.arguments import option, switch
from ..utils.options import OptionGroup, Requirement
from ..utils.provenance import PREDICTIONS_FILE
from .adapters import AdapterArguments
from .callbacks import CallbackArguments
from .distillation import DistillationArguments
from .distributed import DistributedArguments
from .optimization import OptimizationArguments


# options that are not in the model card
LOCAL = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "disable_tqdm", "hub_token", "run_name")


@dataclass
class CheckpointArguments:
    """Where the weights come from."""

    model_name_or_path: str | None = option(
        "CLCA or stock ViT checkpoint: folder or Hub repository [none: from scratch]"
    )
    model_revision: str | None = option("branch, tag or commit of the Hub repository [main]")
    ignore_mismatched_sizes: bool = option(
        "re-initialize weights whose shape differs from the checkpoint, e.g. of another number of classes", False
    )
    attn_implementation: str | None = option("sdpa, eager, flash_attention_2 or flex_attention [sdpa]")


@dataclass
class CostArguments:
    """What an image may cost."""

    target_gmacs: float | None = option(
        "GMACs that an image may cost at most: keep_rate becomes the largest that allows it, the same for all stages [none]"
    )


def _config_fields() -> list[tuple]:
    """A field, None unless it is set, for each option of the configuration."""
    as_given = {dict: str}  # JSON
    return [
        (o.name, as_given.get(o.type, o.type) | None, switch(o.help) if o.type is bool else option(o.help))
        for o in config_options().values()
    ]


if TYPE_CHECKING:

    class ModelArguments(CheckpointArguments, CostArguments):
        """To a type checker, which does not know the fields."""

        def __getattr__(self, name: str) -> Any: ...

else:
    ModelArguments = make_dataclass(
        "ModelArguments",
        _config_fields(),
        bases=(CheckpointArguments, CostArguments),
        namespace={
            "__doc__": "The model. Unset options keep what the checkpoint says or, from scratch, the defaults of CLCAViTConfig.",
            "__module__": __name__,
            "_argument_group_name": "model (unset: as the checkpoint says; from scratch: the default in brackets)",
        },
    )


@dataclass
class DataArguments(OptionGroup):
    """The images, and how they become pixels."""

    _argument_group_name = "data"

    dataset: str = option(
        "synthetic_leaves, a folder of images, CSV or parquet, or a Hub repository", SYNTHETIC_LEAVES
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

    requirements = (
        Requirement(("synthetic_",), f"`dataset` {SYNTHETIC_LEAVES}", lambda group: group.dataset == SYNTHETIC_LEAVES),
        Requirement(("shots",), "`train_on_trainval` false", lambda group: not group.train_on_trainval, refused=True),
    )

    def __post_init__(self) -> None:
        if Path(self.predictions_file).suffix not in (".csv", ".jsonl"):
            raise ValueError(f"`predictions_file` must end in .csv or .jsonl, got {self.predictions_file}")
        for name in ("max_train_samples", "max_eval_samples", "max_predict_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}`, a number of images, must be at least 1, got {value}")
        super().__post_init__()


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
    lr_scheduler_type: str = option("learning rate schedule: cosine, linear, constant_with_warmup, ...", "cosine")
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
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 and "LOCAL_RANK" in os.environ and self.world_size == 1:
            raise ValueError(
                f"`use_cpu` must be true to train in {started} processes on a CPU, and no accelerator was found here: each "
                "would take itself for the only one. Add --use_cpu true"
            )


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
