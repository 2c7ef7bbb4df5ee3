"""The options of `run_ufgir.py`: one dataclass per group, and `Options`, which holds all groups.

Model options are the fields of `CLCAViTConfig` (`ufgir.checkpoints.config_options`). Groups that belong to a single
part of the training are defined in that part's module.
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


# options left out of the model card
LOCAL = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "disable_tqdm", "hub_token", "run_name")


@dataclass
class CheckpointArguments:
    """Options that select the checkpoint to load."""

    model_name_or_path: str | None = option(
        "CLCA or stock ViT checkpoint: folder or Hub repository [none: from scratch]"
    )
    model_revision: str | None = option("branch, tag or commit of the Hub repository [main]")
    ignore_mismatched_sizes: bool = option(
        "re-initialize weights whose shape differs from the checkpoint, e.g. a head with another number of classes",
        False,
    )
    attn_implementation: str | None = option("sdpa, eager, flash_attention_2 or flex_attention [sdpa]")


@dataclass
class CostArguments:
    """Options that limit the compute per image."""

    target_gmacs: float | None = option(
        "maximum GMACs per image: sets keep_rate, equal for all stages, to the largest value that stays below it [none]"
    )


def _config_fields() -> list[tuple]:
    """Return a field, None unless set, for each option of the configuration."""
    as_given = {dict: str}  # JSON
    return [
        (o.name, as_given.get(o.type, o.type) | None, switch(o.help) if o.type is bool else option(o.help))
        for o in config_options().values()
    ]


if TYPE_CHECKING:

    class ModelArguments(CheckpointArguments, CostArguments):
        """Declare the fields to type checkers, which cannot see those that `make_dataclass` adds."""

        def __getattr__(self, name: str) -> Any: ...

else:
    ModelArguments = make_dataclass(
        "ModelArguments",
        _config_fields(),
        bases=(CheckpointArguments, CostArguments),
        namespace={
            "__doc__": "Options of the model. Unset ones keep the checkpoint's value or the default of CLCAViTConfig.",
            "__module__": __name__,
            "_argument_group_name": "model (unset options keep the checkpoint's value; from scratch, the default in brackets)",
        },
    )


@dataclass
class DataArguments(OptionGroup):
    """Options of the data set and its preprocessing."""

    _argument_group_name = "data"

    dataset: str = option(
        "synthetic_leaves, a folder of images, CSV or parquet, or a Hub repository", SYNTHETIC_LEAVES
    )
    dataset_config_name: str | None = option("configuration of a data set on the Hub [its default]")
    dataset_revision: str | None = option("branch, tag or commit of a data set on the Hub [main]")
    image_column: str | None = option("column with the images [detected by type and name]")
    label_column: str | None = option("column with the classes [detected by type and name]")
    label_separator: str | None = option(
        "separator between the classes of a multi-label image, e.g. ; [one class per image]"
    )
    validation_fraction: float = option(
        "fraction of each class's training images used for validation if the data set has no validation split", 0.2
    )
    validation_split: str | None = option(
        "training images used for validation: last (the last ones of each class, as in the original) or random [last]"
    )
    shots: int | None = option("maximum number of training images per class, chosen at random [all]")
    csv_train: str | None = option(
        "CSV file with the training images (class_id,dir), inside the data set folder [train.csv]"
    )
    csv_validation: str | None = option("CSV file with the validation images [val.csv]")
    csv_test: str | None = option("CSV file with the test images [test.csv]")
    csv_data_folder: str | None = option("folder that the `dir` column of the CSV files is relative to [detected]")
    csv_class_names: str | None = option("CSV file with class names (class_id,class_name) [classid_classname.csv]")
    synthetic_num_classes: int = option("synthetic_leaves: number of cultivars", 10)
    synthetic_images_per_class: list[int] = field(
        default_factory=lambda: [80, 20, 20],
        metadata={"help": "synthetic_leaves: images per class for training, validation and test"},
    )
    synthetic_image_size: int | None = option("synthetic_leaves: side of the images, pixels [resize_size]")
    synthetic_difficulty: str = option("synthetic_leaves: easy, medium or hard: how similar the cultivars are", "easy")
    synthetic_seed: int = option("synthetic_leaves: seed used to draw the leaves", 0)
    resize_size: int | None = option(
        "side of the square that images are resized to before cropping, pixels [image_size / 0.875]"
    )
    image_mean: list[float] | None = option(
        "mean of red, green and blue used for normalization, in [0, 1] [the checkpoint's, or ImageNet's]"
    )
    image_std: list[float] | None = option(
        "std of red, green and blue used for normalization [the checkpoint's, or ImageNet's]"
    )
    train_on_trainval: bool = option(
        "train on the training and validation images; only the test split is evaluated", False
    )
    verify_images: bool | None = switch(
        "open every image before the run starts, to find unreadable files [only for local folders]"
    )
    max_train_samples: int | None = option("maximum number of training images, chosen at random [all]")
    max_eval_samples: int | None = option("maximum number of validation images, chosen at random [all]")
    max_predict_samples: int | None = option("maximum number of test images, chosen at random [all]")
    predictions_file: str = option(
        "name of the file with the predictions in output_dir: .csv or .jsonl", PREDICTIONS_FILE
    )
    num_pictures: int = option("number of test images shown in kept_patches.png, if the model reduces tokens", 4)

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
                raise ValueError(f"`{name}` must be at least 1 image, got {value}")
        super().__post_init__()


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """transformers' training arguments with defaults for fine-grained images."""

    _argument_group_name = "training (transformers' TrainingArguments)"

    output_dir: str = option("folder for checkpoints, the model, its card and predictions", "outputs/ufgir")
    do_train: bool = option("train on the training images", False)
    do_eval: bool = option("evaluate on the validation images", False)
    do_predict: bool = option("evaluate on the test images and save the predictions", False)
    overwrite_output_dir: bool = option("delete the checkpoints in output_dir and start over", False)
    per_device_train_batch_size: int = option("training batch size per device", 32)
    per_device_eval_batch_size: int = option("evaluation batch size per device", 64)
    learning_rate: float = option("maximum learning rate", 1e-4)
    weight_decay: float = option("weight decay, applied to the weights of linear and convolution layers", 0.05)
    lr_scheduler_type: str = option("learning rate schedule: cosine, linear, constant_with_warmup, ...", "cosine")
    warmup_steps: float = option("steps of linear warmup; below 1: fraction of all steps", 0.04)
    num_train_epochs: float = option("number of training epochs", 50.0)
    logging_steps: float = option("steps between two log lines; below 1: fraction of all steps", 0.02)
    eval_strategy: str = option(
        "when to evaluate on the validation images during training: no, steps or epoch", "epoch"
    )
    save_strategy: str = option("when to save checkpoints: no, steps, epoch or best", "epoch")
    save_total_limit: int | None = option("number of checkpoints to keep, including the best one", 2)
    load_best_model_at_end: bool = option(
        "load the best checkpoint at the end of training instead of keeping the last weights", True
    )
    metric_for_best_model: str | None = option(
        "metric that selects the best checkpoint: top1, top5, macro_f1 or loss; for multi-label images map (the default), "
        "micro_f1, macro_f1 or loss; the prefix ema_ selects by the metric of the averaged weights",
        "top1",
    )
    report_to: list[str] = field(
        default_factory=lambda: ["none"], metadata={"help": "trackers: tensorboard, trackio, wandb, ..., all or none"}
    )
    dataloader_drop_last: bool = option("drop the last incomplete training batch; evaluation uses every image", True)
    resume_from_checkpoint: str | None = option(
        "true: resume from the last complete checkpoint in output_dir; auto: the same, or start if there is none; or a "
        "checkpoint folder [false]"
    )
    ddp_find_unused_parameters: bool | None = option(
        "search for parameters without gradients at each step (DDP); not needed, since all are used", False
    )
    remove_unused_columns: bool = option("must stay false: the transforms need the columns", False)

    def __post_init__(self) -> None:
        if not self.do_train:  # otherwise the strategy enables evaluation
            self.eval_strategy, self.save_strategy, self.load_best_model_at_end = "no", "no", False
        self.run_name = self.run_name or Path(self.output_dir).name  # otherwise trackers generate a name
        self.dataloader_pin_memory = self.dataloader_pin_memory and torch.accelerator.is_available()
        super().__post_init__()
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started > 1 and "LOCAL_RANK" in os.environ and self.world_size == 1:
            raise ValueError(
                f"`use_cpu` must be true to train in {started} processes without an accelerator; otherwise each process "
                "trains on its own. Add --use_cpu true"
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
