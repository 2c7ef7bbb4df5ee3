"""Training callbacks: their options, the guards against NaN and single images, the last model, and the mixin."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_utils import EvalLoopOutput, IntervalStrategy, has_length

from clca.heads_clca import SwitchableBatchNorm

from ..utils.arguments import option
from ..utils.files import new_folder
from ..utils.options import OptionGroup, Requirement
from .checkpoint_files import LAST_FOLDER
from .distributed import is_sharded
from .ema import EMACallback
from .gradients import GradientRecorder


# Those that see one value of a channel an image, or few
_BATCH_NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm, SwitchableBatchNorm)


@dataclass
class CallbackArguments(OptionGroup):
    """Training callbacks: gradient records, NaN guard, EMA of the weights, early stopping."""

    _argument_group_name = "monitoring and averaging"

    record_gradients: bool = option(
        "record gradient magnitudes of each step in output_dir/gradients.csv and plot them", False
    )
    nan_guard: bool = option(
        "stop the training, with a message, when the loss, a gradient or a weight is NaN or infinite", True
    )
    ema_decay: float = option(
        "decay per step of an exponential moving average (EMA) of the weights, in [0, 1), e.g. 0.999; 0: no average",
        0.0,
    )
    ema_warmup: bool = option("EMA: limit the decay after n steps to (1 + n) / (10 + n), for short trainings", False)
    ema_as_final: bool = option(
        "EMA: use the averaged weights as the final model, for evaluation, predictions and saving; otherwise they are "
        "evaluated in addition and saved in output_dir/ema",
        False,
    )
    early_stopping_patience: int | None = option(
        "stop after this many evaluations without a better metric_for_best_model [never]"
    )
    early_stopping_threshold: float = option("early stopping: minimum improvement of the metric, in its unit", 0.0)
    save_last_model: bool = option(
        "with load_best_model_at_end, also save the last weights as a model in output_dir/last", False
    )

    requirements = (
        Requirement(("ema_warmup", "ema_as_final"), "`ema_decay`, e.g. 0.999", lambda group: group.ema_decay),
        Requirement(
            ("early_stopping_threshold",),
            "`early_stopping_patience`",
            lambda group: group.early_stopping_patience is not None,
        ),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), 0 for no average, got {self.ema_decay}")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ValueError(
                f"`early_stopping_patience` must be at least 1 evaluation, got {self.early_stopping_patience}"
            )
        if not self.early_stopping_threshold >= 0:
            raise ValueError(f"`early_stopping_threshold` must not be negative, got {self.early_stopping_threshold}")
        super().__post_init__()


def make_callbacks(args: CallbackArguments, training: transformers.TrainingArguments) -> list[TrainerCallback]:
    """Return the requested callbacks, in the order in which they must run.

    Args:
        args: options of the callbacks.
        training: options of the training; `eval_strategy` must be "no" if there are no validation images.

    Raises:
        ValueError: if options contradict each other.
    """
    callbacks: list[TrainerCallback] = []
    if args.record_gradients:
        callbacks.append(GradientRecorder())
    if args.nan_guard:  # first, before other callbacks use values that are not finite
        callbacks.append(NaNGuard())
    if args.ema_decay:
        if is_sharded(training):
            raise ValueError("`ema_decay` does not work with FSDP and DeepSpeed, which shard the weights. Use DDP")
        callbacks.append(EMACallback(args.ema_decay, args.ema_warmup, args.ema_as_final))
    if args.early_stopping_patience is not None:
        if training.eval_strategy == IntervalStrategy.NO or training.metric_for_best_model is None:
            raise ValueError(
                "`early_stopping_patience` needs validation images, `eval_strategy` epoch or steps, and a "
                "`metric_for_best_model`"
            )
        callbacks.append(EarlyStoppingCallback(args.early_stopping_patience, args.early_stopping_threshold))
    if args.save_last_model:
        callbacks.append(LastModel())
    return callbacks


class ObserverMixin:
    """Mixin for `transformers.Trainer` that calls further events of callbacks and evaluates averaged weights.

    A callback may define any of these methods:

        on_loss(loss)                           after each backward pass: the loss of the batch, a detached scalar
        on_gradients(args, state, model, scale) when the gradients of an optimizer step are complete, before clipping; in fp16
                                                they are `scale` times the true gradients
        on_load_best(trainer)                   before the weights of the best checkpoint replace the last ones
        on_abort()                              when training ends with an exception
    """

    def _notify(self, event: str, *args: Any) -> None:
        for callback in self.callback_handler.callbacks:
            method = getattr(callback, event, None)
            if method is not None:
                method(*args)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train; call `on_abort` of the callbacks if an exception is raised."""
        try:
            return super().train(*args, **kwargs)
        except BaseException:
            self._notify("on_abort")
            raise

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the forward and backward pass of one batch and return its loss."""
        loss = super().training_step(*args, **kwargs)
        self._notify("on_loss", loss.detach())
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        self._notify_gradients(model)
        return super()._clip_grad_norm(model)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        if grad_norm is None:  # nothing was clipped
            self._notify_gradients(model)
        return super()._get_grad_norm(model, grad_norm)

    def _notify_gradients(self, model: nn.Module) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        scale = 1.0 if scaler is None else scaler.get_scale()
        self._notify("on_gradients", self.args, self.state, self.accelerator.unwrap_model(model), scale)

    def _load_best_model(self) -> None:
        self._notify("on_load_best", self)
        super()._load_best_model()

    def _average(self) -> EMACallback | None:
        """Return the callback with the average of this model's weights, or None."""
        averages = (callback for callback in self.callback_handler.callbacks if isinstance(callback, EMACallback))
        return next((average for average in averages if average.belongs_to(self.model)), None)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        """Evaluate the model, and in addition its averaged weights, if there are any (`<prefix>_ema_top1`).

        With `ema_as_final`, only the averaged weights are evaluated.
        """
        own, average = super().evaluation_loop, self._average()
        if average is None:
            return own(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if average.as_final:
            with average.swapped(self.model):
                return own(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output = own(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        with average.swapped(self.model):
            averaged = own(*args, metric_key_prefix=f"{metric_key_prefix}_ema", **kwargs)
        output.metrics.update(averaged.metrics)
        return output

    def evaluate_average(self, images: torch.utils.data.Dataset, metric_key_prefix: str = "test") -> dict[str, float]:
        """Return metrics of the averaged weights, `<prefix>_ema_top1` etc.; an empty dict if there are none.

        For evaluations that do not use `evaluation_loop`.
        """
        average = self._average()
        if average is None:
            return {}
        with average.swapped(self.model):
            loader = self.get_test_dataloader(images)
            name = f"{metric_key_prefix}_ema"
            return super().evaluation_loop(loader, description="EMA", metric_key_prefix=name).metrics


class NaNGuard(TrainerCallback):
    """Callback that stops training at the first loss, gradient or weight that is not finite, and names it.

    It raises FloatingPointError before the step is taken or anything is saved, so that checkpoints only hold finite
    weights. It checks one number before and one after each step; single parameters are checked only if that number is
    not finite. In fp16, gradients that overflow are left to the loss scaler as long as it can lower its scale.

    Requires a `ufgir.training.callbacks.ObserverMixin`, which calls `on_loss` and `on_gradients`.
    """

    def __init__(self) -> None:
        self.loss: torch.Tensor | None = None  # of the batches since the last step, summed

    def on_loss(self, loss: torch.Tensor) -> None:
        """Add the loss of a batch."""
        self.loss = loss if self.loss is None else self.loss + loss

    def on_gradients(self, args: Any, state: Any, model: nn.Module, scale: float) -> None:
        """Check the loss and gradients of the step that follows `state.global_step`."""
        loss, self.loss = self.loss, None
        gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        if _is_finite([*gradients.values(), *([] if loss is None else [loss])]):
            return
        step = state.global_step + 1
        if loss is not None and not loss.isfinite():
            self._stop(args, step, f"the loss is {loss.item()}")
        if scale <= 1:  # otherwise the scaler skips this step
            self._search(args, step, "gradient", gradients)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        weights |= {n: b for n, b in model.named_buffers() if b.is_floating_point()}
        if not _is_finite(list(weights.values())):
            self._search(args, state.global_step, "weight", weights)

    def _search(self, args: Any, step: int, kind: str, tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            odd = _local(tensor).isfinite().logical_not().sum().item()
            if odd:
                self._stop(args, step, f"the {kind} of {name} is not finite in {odd} of {tensor.numel()} values")

    def _stop(self, args: Any, step: int, what: str) -> None:
        raise FloatingPointError(
            f"step {step}: {what}. Training was stopped; checkpoints in {args.output_dir} are from earlier "
            "steps and have finite weights. Try a lower `learning_rate`, a `max_grad_norm`, or no mixed precision"
        )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a tensor that FSDP shards."""
    tensor = tensor.detach()
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


def _is_finite(tensors: list[torch.Tensor]) -> bool:
    """Return whether all values are finite, with one fused kernel. A norm that overflows counts as not finite."""
    parts = [part for part in map(_local, tensors) if part.numel()]
    return not parts or math.isfinite(torch.stack(torch._foreach_norm(parts)).sum().item())


class SingleImageGuard(TrainerCallback):
    """Callback that raises an error before the first step if a batch would have one image and the model has a BatchNorm.

    The BatchNorm of a CLA head cannot be trained with such a batch, e.g. the last one of an epoch. Checks the number of images
    (if known), the batch size and the number of steps, in training with one process: with several, accelerate pads the last
    batches. Frozen BatchNorms count, too; `BatchNorm2d`, which sees many values per image, does not.

    For any `transformers.Trainer`; `UFGIRTrainer` adds it.

    Raises, when training begins:
        ValueError: if a batch would have one image.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, train_dataloader: Any = None, **kwargs: Any
    ) -> None:
        batches = getattr(train_dataloader, "batch_sampler", None)
        size, drop_last = getattr(batches, "batch_size", None), getattr(batches, "drop_last", False)
        sources = (getattr(batches, "sampler", None), getattr(train_dataloader, "dataset", None))
        images = next((source for source in sources if source is not None and has_length(source)), None)
        if size is None or args.world_size > 1 or not any(isinstance(m, _BATCH_NORMS) for m in model.modules()):
            return
        if size == 1:
            raise ValueError(
                "`per_device_train_batch_size` 1 makes batches of one image, but the head's BatchNorm needs at least two. "
                "Choose a larger batch size."
            )
        if images is None or drop_last or len(images) % size != 1:
            return
        last = math.ceil(len(images) / size)  # of the batches of an epoch
        if state.max_steps * args.gradient_accumulation_steps >= last:
            raise ValueError(
                f"`per_device_train_batch_size` {args.per_device_train_batch_size} leaves a last batch of one image "
                f"(of {len(images)}), but the head's BatchNorm needs at least two. Set `dataloader_drop_last` true, or choose "
                "another batch size."
            )


class LastModel(TrainerCallback):
    """Callback that saves the last weights as a model in `output_dir/last` before the best ones replace them.

    Requires a `ufgir.training.callbacks.ObserverMixin`, which calls `on_load_best`.
    """

    def on_load_best(self, trainer: transformers.Trainer) -> None:
        """Save the current model."""
        target = Path(trainer.args.output_dir) / LAST_FOLDER
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:  # every process writes its part
            trainer.save_model(str(target), _internal_call=True)
        elif trainer.args.should_save:
            with new_folder(target) as folder:
                trainer.save_model(str(folder), _internal_call=True)
