"""Parameter groups, learning rate schedules in epochs, freezing and mixed precision for `transformers.Trainer`.

Sources: the recipe of CLCA (https://huggingface.co/papers/2501.00243); layer-wise learning rate decay as in BEiT
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
from .freezing import check_parts, freeze, freeze_statistics, own_name, part_names
from .schedules import SCHEDULES, GroupSchedule, schedule_options


logger = logging.getLogger(__name__)

CHOICES = {
    "schedule": ("trainer", *SCHEDULES),
    "schedule_per": ("step", "epoch"),
    "parameter_groups": ("default", "original"),
    "mixed_precision": ("auto", "no", "fp16", "bf16"),
}
# option of a schedule in epochs -> the schedules that use it
SCHEDULES_WITH = {
    option: tuple(name for name in SCHEDULES if option in schedule_options(name))
    for option in dict.fromkeys(option for name in SCHEDULES for option in schedule_options(name))
}


def _listed(names: Sequence[str]) -> str:
    return " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


@dataclass
class OptimizationArguments(OptionGroup):
    """Options in addition to transformers' learning_rate, weight_decay, lr_scheduler_type, warmup_steps and optim.

    The defaults only change which parameters decay.

    Raises:
        ValueError: if a name is unknown, a number is out of range, or options contradict each other.
    """

    _argument_group_name = "optimization"

    schedule: str = option(
        "learning rate schedule: trainer (lr_scheduler_type and warmup_steps), or, counted in epochs and with the same "
        "warmup and minimum rate for all parameter groups, cosine_epochs or step_epochs",
        "trainer",
    )
    schedule_per: str | None = option("cosine_epochs: update the learning rate every `step` or every `epoch` [epoch]")
    schedule_epochs: float | None = option(
        "cosine_epochs: epochs of the cosine; the rest of num_train_epochs is a cool-down [all]"
    )
    min_learning_rate: float | None = option("cosine_epochs: learning rate at the end and in the cool-down [1e-5]")
    warmup_epochs: float | None = option("cosine_epochs, step_epochs: epochs of linear warmup [2]")
    warmup_learning_rate: float | None = option("cosine_epochs, step_epochs: learning rate at the first step [1e-6]")
    decay_epochs: float | None = option("step_epochs: epochs between two drops of the learning rate [30]")
    decay_rate: float | None = option("step_epochs: factor of the learning rate at each drop [0.1]")
    parameter_groups: str = option(
        "default: only weights of linear and convolution layers decay, and the backbone is everything with pretrained "
        "weights; original: the groups of the CLCA code",
        "default",
    )
    backbone_lr_scale: float = option("factor of learning_rate for the backbone", 1.0)
    layer_lr_decay: float = option("factor of the learning rate from each layer to the one below it", 1.0)
    freeze: list[str] = field(
        default_factory=list,
        metadata={
            "help": "parts to freeze: backbone (a linear probe: only the head, CLR tokens, parameters of reductions and query "
            "tokens train), attention, mlp, norms, cls_token, position_embeddings, patch_embeddings, layers.0, ... [none]"
        },
    )
    unfreeze: list[str] = field(
        default_factory=list,
        metadata={"help": "parts to keep trainable although `freeze` includes them [none]"},
    )
    freeze_epochs: int = option("number of epochs at the start for which the backbone is frozen", 0)
    mixed_precision: str | None = option(
        "auto (bf16 on GPUs that support it, else fp16; none on a CPU), no, fp16 or bf16 [set by --fp16 and --bf16]"
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
                f"`layer_lr_decay` must be at most 1, got {self.layer_lr_decay}: lower layers have smaller learning rates"
            )
        values = self.schedule_values()
        warmup, end = values.get("warmup_epochs"), values.get("schedule_epochs")
        if end is not None and warmup >= end:
            raise ValueError(f"`warmup_epochs` {warmup:g} must be below `schedule_epochs` {end:g}")

    def schedule_values(self) -> dict[str, Any]:
        """Return the options of a schedule in epochs, with defaults filled in; empty for `schedule` trainer."""
        defaults = schedule_options(self.schedule) if self.schedule in SCHEDULES else {}
        return {
            name: default if getattr(self, name) is None else getattr(self, name) for name, default in defaults.items()
        }

    def check(self, args: transformers.TrainingArguments) -> None:
        """Check the options against transformers' arguments.

        Raises:
            ValueError: if they contradict each other.
        """
        epochs = args.num_train_epochs
        by_epochs = args.max_steps <= 0
        if by_epochs and self.freeze_epochs and self.freeze_epochs >= epochs:
            raise ValueError(
                f"`freeze_epochs` {self.freeze_epochs} must be below `num_train_epochs` {epochs:g}. To freeze the backbone "
                "for the whole training, use `freeze` backbone"
            )
        kind = transformers.SchedulerType(args.lr_scheduler_type).value
        if self.freeze_epochs and self.schedule == "trainer" and kind in ("reduce_lr_on_plateau", "greedy"):
            raise ValueError(f"`freeze_epochs` does not work with `lr_scheduler_type` {kind}. Choose another schedule")
        if self.schedule == "trainer":
            return
        values = self.schedule_values()
        warmup = values["warmup_epochs"]
        if by_epochs and warmup >= epochs:
            raise ValueError(f"`warmup_epochs` {warmup:g} must be below `num_train_epochs` {epochs:g}")
        if by_epochs and (values.get("schedule_epochs") or 0) > epochs:
            logger.warning(
                "`schedule_epochs` %g is longer than the training of %g epochs: the schedule is cut off.",
                values["schedule_epochs"],
                epochs,
            )
        if values.get("min_learning_rate", 0) > args.learning_rate:
            logger.warning(
                "`min_learning_rate` %g is above `learning_rate` %g: the learning rate rises.",
                values["min_learning_rate"],
                args.learning_rate,
            )


def parameter_groups(
    model: nn.Module, args: OptimizationArguments, learning_rate: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Return parameter groups of the trainable parameters, as torch's optimizers take them.

    With `parameter_groups` default, only the weights of linear and convolution layers decay: not CLS, CLR and register
    tokens, position embeddings, learned queries, LayerScale, norms and biases. `backbone_lr_scale`, `layer_lr_decay`
    and `freeze_epochs` apply to the backbone: all parameters except the head, CLR tokens, parameters of reductions,
    VQT's query tokens and peft's adapters.

    With `original`, patch and position embeddings are treated as new, like the head, and CLR tokens as backbone. All
    parameters that are not 1-D decay except CLS, position embeddings and CLR tokens; in a plain ViT, CLR tokens decay
    as well, because of a bug in the original.

    Args:
        model: may be wrapped (peft, torch.compile, DistributedDataParallel, FSDP).
        args: options.
        learning_rate: rate of parameters that are not scaled.
        weight_decay: weight decay of parameters that decay.

    Returns:
        dicts of `params`, `param_names`, `lr`, `weight_decay` and `freeze_epochs`, sorted by decreasing learning rate.
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
    """Return whether a parameter belongs to the backbone, and whether it decays, for `parameter_groups` default."""
    owner, _, leaf = name.rpartition(".")
    is_matrix = isinstance(model.get_submodule(owner), nn.Linear | nn.modules.conv._ConvNd)
    return part == "backbone", is_matrix and leaf == "weight"


def _original_plan(model: nn.Module, name: str, parameter: nn.Parameter, part: str) -> tuple[bool, bool]:
    """Return the same as `_default_plan`, for `parameter_groups` original."""
    own = own_name(name)
    embeds = re.match(r"embeddings\.((clr_)?position_embeddings|patch_embeddings\.)", own)
    kept = {"embeddings.cls_token", "embeddings.position_embeddings", "embeddings.clr_position_embeddings"}
    if any(module.config.reduction is not None for module in model.modules() if hasattr(module, "config")):
        kept.add("embeddings.clr_tokens")  # in a plain ViT, the original misspells this name
    is_new = embeds or part not in ("backbone", "clr_tokens")
    return not is_new, parameter.ndim > 1 and own not in kept


def _layer_scales(names: list[str], decay: float) -> dict[str, float]:
    """Return parameter of the backbone -> factor of its learning rate.

    The factor is 1 after the last layer and decay^(L + 1) in the embeddings.
    """
    found = {name: re.match(r"(?:layers\.(\d+)|(embeddings))\.", own_name(name)) for name in names}
    depth = 1 + max((int(match[1]) for match in found.values() if match and match[1]), default=-1)
    depths = {name: int(match[1] or -1) + 1 if match else depth + 1 for name, match in found.items()}
    return {name: decay ** (depth + 1 - depths[name]) for name in names}


def make_schedule(
    optimizer: Optimizer, args: OptimizationArguments, steps_per_epoch: float, num_training_steps: int
) -> GroupSchedule:
    """Return the schedule in epochs that `args` describes; groups with `freeze_epochs` are held at 0 for these epochs.

    Args:
        optimizer: with the learning rate of each group after the warmup.
        args: options.
        steps_per_epoch: optimizer steps per epoch.
        num_training_steps: steps of the whole training, the default length of the cosine.

    Raises:
        ValueError: if `schedule` is trainer, which uses transformers' own schedules.
    """
    if args.schedule not in SCHEDULES:
        raise ValueError(f"`schedule` must be {_listed(list(SCHEDULES))}, got {args.schedule}")
    values = args.schedule_values()
    if "schedule_epochs" in values:
        values["schedule_epochs"] = values["schedule_epochs"] or num_training_steps / steps_per_epoch
    rate_at = SCHEDULES[args.schedule](steps_per_epoch, **values)
    return GroupSchedule(optimizer, rate_at, held_steps(optimizer, steps_per_epoch))


def held_steps(optimizer: Optimizer, steps_per_epoch: float) -> list[float]:
    """Return the number of steps for which each parameter group is held, from its `freeze_epochs`."""
    return [group.get("freeze_epochs", 0) * steps_per_epoch for group in optimizer.param_groups]


def resolve_precision(name: str | None, use_cpu: bool = False) -> dict[str, bool]:
    """Return the fields of `TrainingArguments` for a `mixed_precision`; empty if `name` is None.

    Args:
        name: "auto" selects bf16 if the GPU supports it, fp16 on other GPUs, and neither on a CPU.
        use_cpu: whether the GPU is not used.

    Raises:
        ValueError: for fp16 without a GPU.
    """
    if name is None:
        return {}
    has_gpu = torch.cuda.is_available() and not use_cpu
    if name == "auto":
        name = "no" if not has_gpu else "bf16" if is_torch_bf16_gpu_available() else "fp16"
    if name == "fp16" and not has_gpu:
        raise ValueError("`mixed_precision` fp16 needs a GPU. Use auto, no or bf16")
    return {"fp16": name == "fp16", "bf16": name == "bf16"}


def set_precision(args: transformers.TrainingArguments, name: str | None) -> None:
    """Apply `mixed_precision` to existing `TrainingArguments`; see `resolve_precision`.

    Raises:
        ValueError: for fp16 without a GPU, or if `mixed_precision` contradicts `fp16` or `bf16`.
    """
    fields = resolve_precision(name, args.use_cpu)
    for other, value in fields.items():
        if getattr(args, other) and not value:
            raise ValueError(f"`{other}` contradicts `mixed_precision` {name}. Set only one of them")
        setattr(args, other, value)
    if fields:  # transformers has already read its two options
        args.mixed_precision = next((other for other, value in fields.items() if value), "no")
        if args.deepspeed_plugin is not None and not args.deepspeed:
            args.deepspeed_plugin.set_mixed_precision(args.mixed_precision)


class OptimizationMixin:
    """Mixin that applies `OptimizationArguments`; list it before `transformers.Trainer` among the bases."""

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
            logger.info("Frozen: %d of %d tensors", len(frozen), sum(1 for _ in self.model.parameters()))

    def create_optimizer(self, model: nn.Module | None = None) -> Optimizer:
        """Create the optimizer of `optim` with the groups of `parameter_groups`.

        Raises:
            ValueError: if `optim` makes its own groups and options require others.
        """
        if self.optimizer is not None or self.optimizer_cls_and_kwargs is not None:
            return super().create_optimizer(model)
        target = self.model if model is None else model
        kind, kwargs = self.get_optimizer_cls_and_kwargs(self.args, target)
        if is_optimizer_factory(kind) or {"params", "model", "optimizer_dict"} & kwargs.keys():
            default, optim = OptimizationArguments(), OptimizerNames(self.args.optim).value
            for name in ("parameter_groups", "backbone_lr_scale", "layer_lr_decay", "freeze_epochs"):
                if getattr(self.optimization, name) != getattr(default, name):
                    raise ValueError(
                        f"`{name}` does not work with `optim` {optim}, which makes its own parameter groups"
                    )
            return super().create_optimizer(model)
        groups = parameter_groups(target, self.optimization, self.args.learning_rate, self.args.weight_decay)
        for group in groups:
            shown = {name: value for name, value in group.items() if name not in ("params", "param_names")}
            logger.info("Parameter group: %d tensors, %s", len(group["params"]), shown)
        self.optimizer_cls_and_kwargs = (kind, kwargs | {"params": groups})  # Trainer reads the groups from here
        try:
            return super().create_optimizer(model)
        finally:
            self.optimizer_cls_and_kwargs = None

    def set_initial_training_values(self, args: transformers.TrainingArguments, dataloader: DataLoader) -> tuple:
        """Store the number of steps per epoch as Trainer counts them."""
        values = super().set_initial_training_values(args, dataloader)
        self._steps_per_epoch = values[1] if has_length(dataloader) else None
        return values

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LRScheduler:
        """Create the learning rate schedule.

        If the data set has no length, an epoch is the number of training steps divided by `num_train_epochs`.
        """
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
        """Compute the loss; in training, the statistics of frozen BatchNorms are not updated."""
        if self.optimization.freeze and model.training:
            freeze_statistics(model)
        return super().compute_loss(model, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run a training step; while the backbone is held, drop its gradients.

        They are dropped before clipping and the optimizer step, so that Adam's moments start with the first real step.
        With `parameter_groups` original they accumulate from the beginning.
        """
        loss = super().training_step(*args, **kwargs)
        if self.optimization.freeze_epochs and self.optimization.parameter_groups == "default":
            for group, held in zip(
                self.optimizer.param_groups, getattr(self.lr_scheduler, "held_steps", ()), strict=False
            ):
                if self.lr_scheduler.last_epoch < held:
                    for parameter in group["params"]:
                        parameter.grad = None
        return loss
