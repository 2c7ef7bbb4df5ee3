"""Which parameters learn how fast: parameter groups, learning rate schedules in epochs, freezing and mixed precision, for
`transformers.Trainer`.

Sources: the recipe of CLCA (https://huggingface.co/papers/2501.00243); layer-wise learning rates as in BEiT
(https://huggingface.co/papers/2106.08254).
"""

import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any

import torch
import transformers
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader
from transformers.trainer_optimizer import is_optimizer_factory
from transformers.trainer_utils import has_length
from transformers.training_args import OptimizerNames
from transformers.utils import is_torch_bf16_gpu_available

from ..utils.arguments import option
from ..utils.options import OptionGroup, Requirement
from .freezing import check_parts, freeze, hold_statistics, own_name, part_names
from .schedules import SCHEDULES, GroupSchedule, schedule_options


logger = logging.getLogger(__name__)

CHOICES = {
    "schedule": ("trainer", *SCHEDULES),
    "schedule_per": ("step", "epoch"),
    "parameter_groups": ("default", "original"),
    "mixed_precision": ("auto", "no", "fp16", "bf16"),
}
# Option of a schedule in epochs -> the schedules that have it
SCHEDULES_WITH = {
    option: tuple(name for name in SCHEDULES if option in schedule_options(name))
    for option in dict.fromkeys(option for name in SCHEDULES for option in schedule_options(name))
}


def _listed(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@dataclass
class OptimizationArguments(OptionGroup):
    """Beyond transformers' learning_rate, weight_decay, lr_scheduler_type, warmup_steps and optim. The defaults change
    nothing but which parameters decay.

    Raises:
        ValueError: an unknown name, a number out of its range, or options that exclude each other.
    """

    _argument_group_name = "optimization"

    schedule: str = option(
        "learning rate schedule: trainer (lr_scheduler_type and warmup_steps), or in epochs and with rates that hold "
        "for every parameter group: cosine_epochs, step_epochs",
        "trainer",
    )
    schedule_per: str | None = option(
        "cosine_epochs: the rate changes every `step`, or every `epoch` and is constant within [epoch]"
    )
    schedule_epochs: float | None = option(
        "cosine_epochs: epochs until its end; those left of num_train_epochs are a cool-down [all]"
    )
    min_learning_rate: float | None = option("cosine_epochs: rate at its end and in the cool-down [1e-5]")
    warmup_epochs: float | None = option("cosine_epochs, step_epochs: epochs of linear warm-up [2]")
    warmup_learning_rate: float | None = option("cosine_epochs, step_epochs: rate at the first step [1e-6]")
    decay_epochs: float | None = option("step_epochs: epochs from drop to drop [30]")
    decay_rate: float | None = option("step_epochs: factor of a drop [0.1]")
    parameter_groups: str = option(
        "default: weights of linear and convolution layers decay, the backbone is all that is not new; original: the "
        "groups of the CLCA code",
        "default",
    )
    backbone_lr_scale: float = option("learning rate of the backbone, as a factor of learning_rate", 1.0)
    layer_lr_decay: float = option("factor of the learning rate from each layer to the one below it", 1.0)
    freeze: list[str] = field(
        default_factory=list,
        metadata={
            "help": "parts that keep their weights: backbone (a linear probe; the head, CLR, parameters of reductions and "
            "queries train), attention, mlp, norms, cls_token, position_embeddings, patch_embeddings, layers.0, ... [none]"
        },
    )
    unfreeze: list[str] = field(
        default_factory=list,
        metadata={"help": "parts that train although `freeze` names them or a whole around them [none]"},
    )
    freeze_epochs: int = option("epochs for which the backbone is held before it trains, too", 0)
    mixed_precision: str | None = option(
        "auto (bf16 or else fp16 on a GPU, none on a CPU), no, fp16 or bf16 [as --fp16 and --bf16 say]"
    )

    requirements = (
        *(
            Requirement((option,), f"`schedule` {_listed(names)}", lambda group, names=names: group.schedule in names)
            for option, names in SCHEDULES_WITH.items()
        ),
        Requirement(("unfreeze",), "`freeze`", lambda group: group.freeze),
        Requirement(
            ("layer_lr_decay",),
            "`parameter_groups` default",
            lambda group: group.parameter_groups == "default",
            refused=True,
        ),
    )

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed and not (value is None and name in ("schedule_per", "mixed_precision")):
                close = get_close_matches(str(value), allowed, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise ValueError(f"`{name}` must be {_listed(allowed)}, got {value}{hint}")
        self._check_numbers()
        self.freeze, self.unfreeze = ([] if parts == ["none"] else parts for parts in (self.freeze, self.unfreeze))
        check_parts("freeze", self.freeze)
        check_parts("unfreeze", self.unfreeze)
        super().__post_init__()

    def _check_numbers(self) -> None:
        positive = ("schedule_epochs", "decay_epochs", "decay_rate", "backbone_lr_scale", "layer_lr_decay")
        for name in (*positive, "min_learning_rate", "warmup_epochs", "warmup_learning_rate", "freeze_epochs"):
            value = getattr(self, name)
            least = "above 0" if name in positive else "0 or above"
            if value is not None and (not math.isfinite(value) or value < 0 or (value == 0 and name in positive)):
                raise ValueError(f"`{name}` must be a number {least}, got {value}")
        if self.layer_lr_decay > 1:
            raise ValueError(
                f"`layer_lr_decay` must be at most 1, got {self.layer_lr_decay}: lower layers learn slower"
            )
        values = self.schedule_values()
        warmup, end = values.get("warmup_epochs"), values.get("schedule_epochs")
        if end is not None and warmup >= end:
            raise ValueError(f"`warmup_epochs` {warmup:g} must be below `schedule_epochs` {end:g}")

    def schedule_values(self) -> dict[str, Any]:
        """The options of the schedule in epochs: what was given, or the defaults. Those of trainer are transformers' own."""
        defaults = schedule_options(self.schedule) if self.schedule in SCHEDULES else {}
        return {
            name: default if getattr(self, name) is None else getattr(self, name) for name, default in defaults.items()
        }

    def check(self, args: transformers.TrainingArguments) -> None:
        """Raises ValueError for what does not go with transformers' arguments."""
        epochs = args.num_train_epochs
        by_epochs = args.max_steps <= 0
        if by_epochs and self.freeze_epochs and self.freeze_epochs >= epochs:
            raise ValueError(
                f"`freeze_epochs` {self.freeze_epochs} must be below `num_train_epochs` {epochs:g}; to hold the backbone for "
                "the whole training, use `freeze` backbone"
            )
        kind = transformers.SchedulerType(args.lr_scheduler_type).value
        if self.freeze_epochs and self.schedule == "trainer" and kind in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(f"`freeze_epochs` does not go with `lr_scheduler_type` {kind}: choose another")
        if self.schedule == "trainer":
            return
        values = self.schedule_values()
        warmup = values["warmup_epochs"]
        if by_epochs and warmup >= epochs:
            raise ValueError(f"`warmup_epochs` {warmup:g} must be below `num_train_epochs` {epochs:g}")
        if by_epochs and (values.get("schedule_epochs") or 0) > epochs:
            logger.warning(
                "The schedule of %g epochs is cut off: training ends after %g.", values["schedule_epochs"], epochs
            )
        if values.get("min_learning_rate", 0) > args.learning_rate:
            logger.warning(
                "`min_learning_rate` %g is above `learning_rate` %g: the rate rises.",
                values["min_learning_rate"],
                args.learning_rate,
            )


def parameter_groups(
    model: nn.Module, args: OptimizationArguments, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Groups of the trainable parameters, as torch's optimizers take them.

    Decayed are, by `default`, the weights of linear and convolution layers: never CLS, CLR, registers, position embeddings,
    learnt queries, LayerScale, norms and biases. The backbone, which `backbone_lr_scale`, `layer_lr_decay` and `freeze_epochs`
    are about, is all but the head, CLR, parameters of reductions, VQT's queries and peft's adapters. The groups of the
    `original` differ: patch and position embeddings are as new as the head, CLR is backbone; what is not 1-D decays but for
    CLS, position embeddings and CLR; and in a plain ViT CLR decays as well, for a slip in the original.

    Args:
        model: wrappers (peft, torch.compile, DistributedDataParallel, FSDP) may be around it.
        learning_rate: of what is not scaled.
        weight_decay: of what decays.

    Returns:
        dicts of `params`, `param_names`, `lr`, `weight_decay` and `freeze_epochs`, the fastest first.
    """
    plan = _original_plan if args.parameter_groups == "original" else _default_plan
    groups: dict[tuple, dict[str, Any]] = {}
    parts = part_names(model)
    scales = _layer_scales([name for name, part in parts.items() if part == "backbone"], args.layer_lr_decay)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_backbone, decays = plan(model, name, parameter, parts[name])
        rate = learning_rate * (args.backbone_lr_scale * scales.get(name, 1.0) if in_backbone else 1.0)
        key = (args.freeze_epochs if in_backbone else 0, rate, weight_decay if decays else 0.0)
        group = groups.setdefault(
            key, {"params": [], "param_names": [], "lr": key[1], "weight_decay": key[2], "freeze_epochs": key[0]}
        )
        group["params"].append(parameter)
        group["param_names"].append(name)
    return [groups[key] for key in sorted(groups, key=lambda key: (key[0], -key[1], -key[2]))]


def _default_plan(model: nn.Module, name: str, parameter: nn.Parameter, part: str) -> tuple[bool, bool]:
    """Whether a parameter is of the backbone, and whether it decays."""
    owner, _, leaf = name.rpartition(".")
    is_matrix = isinstance(model.get_submodule(owner), nn.Linear | nn.modules.conv._ConvNd)
    return part == "backbone", is_matrix and leaf == "weight"


def _original_plan(model: nn.Module, name: str, parameter: nn.Parameter, part: str) -> tuple[bool, bool]:
    """The same as the original has it."""
    own = own_name(name)
    embeds = re.match(r"embeddings\.((clr_)?position_embeddings|patch_embeddings\.)", own)
    kept = {"embeddings.cls_token", "embeddings.position_embeddings", "embeddings.clr_position_embeddings"}
    if any(module.config.reduction is not None for module in model.modules() if hasattr(module, "config")):
        kept.add("embeddings.clr_tokens")  # in a plain ViT the original looks for this name misspelt
    is_new = embeds or part not in ("backbone", "clr_tokens")
    return not is_new, parameter.ndim > 1 and own not in kept


def _layer_scales(names: list[str], decay: float) -> dict[str, float]:
    """Parameter of the backbone -> factor of its learning rate: 1 after the last layer, decay^(L + 1) in the embeddings."""
    found = {name: re.match(r"(?:layers\.(\d+)|(embeddings))\.", own_name(name)) for name in names}
    depth = 1 + max((int(match[1]) for match in found.values() if match and match[1]), default=-1)
    depths = {name: int(match[1] or -1) + 1 if match else depth + 1 for name, match in found.items()}
    return {name: decay ** (depth + 1 - depths[name]) for name in names}


def make_schedule(
    optimizer: Optimizer, args: OptimizationArguments, steps_per_epoch: float, num_training_steps: int
) -> GroupSchedule:
    """The schedule in epochs that `args` describes; groups with `freeze_epochs` are held at 0 for as long.

    Args:
        optimizer: with the learning rates that each group has after the warm-up.
        steps_per_epoch: steps of the optimizer.
        num_training_steps: of the whole training; `schedule_epochs` is as long where it is not set.

    Raises:
        ValueError: `schedule` is trainer, whose schedules are transformers' own.
    """
    if args.schedule not in SCHEDULES:
        raise ValueError(f"`schedule` must be {_listed(list(SCHEDULES))}, got {args.schedule}")
    values = args.schedule_values()
    if "schedule_epochs" in values:
        values["schedule_epochs"] = values["schedule_epochs"] or num_training_steps / steps_per_epoch
    course = SCHEDULES[args.schedule](steps_per_epoch, **values)
    return GroupSchedule(optimizer, course, held_steps(optimizer, steps_per_epoch))


def held_steps(optimizer: Optimizer, steps_per_epoch: float) -> list[float]:
    """Steps for which each parameter group is held, by its `freeze_epochs`."""
    return [group.get("freeze_epochs", 0) * steps_per_epoch for group in optimizer.param_groups]


def resolve_precision(name: str | None, use_cpu: bool = False) -> dict[str, bool]:
    """Fields of `TrainingArguments` for a `mixed_precision`; none where it is not set.

    Args:
        name: "auto" is bf16 where the GPU computes in it, else fp16, and neither without a GPU.
        use_cpu: the GPU is not to be used.

    Raises:
        ValueError: fp16 without a GPU.
    """
    if name is None:
        return {}
    has_gpu = torch.cuda.is_available() and not use_cpu
    if name == "auto":
        name = "no" if not has_gpu else "bf16" if is_torch_bf16_gpu_available() else "fp16"
    if name == "fp16" and not has_gpu:
        raise ValueError("`mixed_precision` fp16 needs a GPU: use auto, no or bf16")
    return {"fp16": name == "fp16", "bf16": name == "bf16"}


def set_precision(args: transformers.TrainingArguments, name: str | None) -> None:
    """Let `TrainingArguments` that are made already follow `mixed_precision`; see `resolve_precision`.

    Raises:
        ValueError: fp16 without a GPU, or `mixed_precision` contradicts `fp16` or `bf16`.
    """
    fields = resolve_precision(name, args.use_cpu)
    for other, value in fields.items():
        if getattr(args, other) and not value:
            raise ValueError(f"`{other}` contradicts `mixed_precision` {name}: give only one of them")
        setattr(args, other, value)
    if fields:  # transformers read its two options before
        args.mixed_precision = next((other for other, value in fields.items() if value), "no")
        if args.deepspeed_plugin is not None and not args.deepspeed:
            args.deepspeed_plugin.set_mixed_precision(args.mixed_precision)


class OptimizationMixin:
    """What `OptimizationArguments` change in a `transformers.Trainer`; to be named before it among the bases."""

    def __init__(self, *args: Any, optimization: OptimizationArguments | None = None, **kwargs: Any) -> None:
        self.optimization = optimization or OptimizationArguments()
        self._steps_per_epoch: int | None = None
        super().__init__(*args, **kwargs)
        self.optimization.check(self.args)
        if self.optimization.freeze:
            frozen = freeze(
                self.model,
                self.optimization.freeze,
                self.optimization.unfreeze,
                as_original=self.optimization.parameter_groups == "original",
            )
            logger.info("Frozen: %d tensors of %d", len(frozen), sum(1 for _ in self.model.parameters()))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """The optimizer of `optim`, on the groups of `parameter_groups`.

        Raises:
            ValueError: `optim` makes groups of its own, and options ask for others.
        """
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(model)
        target = self.model if model is None else model
        kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, target)
        if is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & kwargs.keys():
            default, optim = OptimizationArguments(), OptimizerNames(self.args.optim).value
            for name in ("parameter_groups", "backbone_lr_scale", "layer_lr_decay", "freeze_epochs"):
                if getattr(self.optimization, name) != getattr(default, name):
                    raise ValueError(f"`{name}` does not go with `optim` {optim}, which makes its own groups")
            return super().create_optimizer(model)
        groups = parameter_groups(target, self.optimization, self.args.learning_rate, self.args.weight_decay)
        for group in groups:
            shown = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            logger.info("Parameter group: %d tensors, %s", len(group["params"]), shown)
        self.optimizer_cls_and_kwargs = (kind, kwargs | {"params": groups})  # Trainer takes groups from there
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = None

    def set_initial_training_values(self, args: transformers.TrainingArguments, dataloader: DataLoader) -> tuple:
        """Remembers the steps of an epoch as Trainer counts them."""
        values = super().set_initial_training_values(args, dataloader)
        self._steps_per_epoch = values[1] if has_length(dataloader) else None
        return values

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """The learning-rate schedule of `schedule`. Where the data have no length, an epoch is the share of all steps that
        `num_train_epochs` makes of it."""
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        optimizer = self.optimizer if optimizer is None else optimizer
        steps_per_epoch = self._steps_per_epoch or num_training_steps / self.args.num_train_epochs
        if self.optimization.schedule != "trainer":
            self.lr_scheduler = make_schedule(optimizer, self.optimization, steps_per_epoch, num_training_steps)
        else:
            self.lr_scheduler = super().create_scheduler(num_training_steps, optimizer)
            if self.optimization.freeze_epochs and isinstance(self.lr_scheduler, LambdaLR):
                factor = self.lr_scheduler.lr_lambdas[0]  # the same for every group
                held = held_steps(optimizer, steps_per_epoch)
                self.lr_scheduler = GroupSchedule(optimizer, lambda base, step: base * factor(step), held)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The loss, in training with the statistics of frozen BatchNorms as they are."""
        if self.optimization.freeze and model.training:
            hold_statistics(model)
        return super().compute_loss(model, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """While the backbone is held, its gradients are dropped before they are clipped and stepped with: Adam's moments
        start with its first step. With the groups of the `original` they grow from the beginning."""
        loss = super().training_step(*args, **kwargs)
        if self.optimization.freeze_epochs and self.optimization.parameter_groups == "default":
            for group, held in zip(
                self.optimizer.param_groups, getattr(self.lr_scheduler, "held_steps", ()), strict=False
            ):
                if self.lr_scheduler.last_epoch < held:
                    for parameter in group["params"]:
                        parameter.grad = None
        return loss
