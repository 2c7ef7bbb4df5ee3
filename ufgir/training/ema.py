"""Exponential moving average (EMA) of the weights, based on torch's `AveragedModel`."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import TrainerCallback

from ..utils.checksums import list_weights
from ..utils.files import new_folder, raise_disk_full
from .adapters import merge
from .checkpoint_files import EMA_FILE, EMA_FOLDER


logger = logging.getLogger(__name__)


def ema_function(decay: float, warmup: bool = False) -> Callable[[list[torch.Tensor], list[torch.Tensor], Any], None]:
    """Return the update function for `AveragedModel`: average = d * average + (1 - d) * weights, in place.

    Args:
        decay: d, in [0, 1).
        warmup: limit d to (1 + n) / (10 + n) after n updates, so that the poor first weights are soon forgotten; as in
            TensorFlow's ExponentialMovingAverage.
    """

    @torch.no_grad()
    def update(average: list[torch.Tensor], current: list[torch.Tensor], num_averaged: torch.Tensor | int) -> None:
        if not average[0].is_floating_point():  # e.g. the number of batches counted by a BatchNorm
            torch._foreach_copy_(average, current)
            return
        count = int(num_averaged)
        now = min(decay, (1 + count) / (10 + count)) if warmup else decay
        get_ema_multi_avg_fn(now)(average, current, num_averaged)

    return update


class EMACallback(TrainerCallback):
    """Callback that averages the weights after each optimizer step.

    The average is initialized with the weights after the first step. BatchNorm's running statistics are averaged with
    the same decay, as in the original, so that they match the averaged weights. The training itself does not change.

    - Evaluations report `ema_top1` etc. in addition to `top1`; `metric_for_best_model` may be `ema_top1`.
    - A checkpoint stores the average in `ema.safetensors`, with the keys of the model's own file; training resumes from it
      exactly.
    - At the end, `output_dir/ema` is a model of the same step as the one in `output_dir`: the last, or the best with
      `load_best_model_at_end`.
    - With `as_final`, the average becomes the model: only the average is evaluated, and it is saved in `output_dir`. The
      trained weights are in the checkpoints.

    Requires a Trainer with `ufgir.training.callbacks.ObserverMixin`, for evaluation, and
    `ufgir.training.checkpointing.CheckpointMixin`, which calls `save_to_checkpoint` and `load_from_checkpoint`. Does
    not work with FSDP and DeepSpeed, which shard the weights.

    Args:
        decay: weight of the previous average at each step, in (0, 1); 0.99996 in the original.
        warmup: see `ema_function`.
        as_final: see above.
    """

    def __init__(self, decay: float, warmup: bool = False, as_final: bool = False) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"`decay` must be in (0, 1), got {decay}.")
        self.decay = decay
        self.warmup = warmup
        self.as_final = as_final
        self.average: AveragedModel | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.average = AveragedModel(model, multi_avg_fn=ema_function(self.decay, self.warmup), use_buffers=True)
        self.average.requires_grad_(False)

    def on_step_end(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
        self.average.update_parameters(model)

    def belongs_to(self, model: nn.Module) -> bool:
        """Return whether there is an average with the tensors of this model; False before training."""
        return self.average is not None and _names(self.average.module) == _names(model)

    @contextlib.contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Swap the weights of `model` and the average within this context, without copying."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        for own, averaged in zip(_tensors(model), _tensors(self.average.module), strict=True):
            own.data, averaged.data = averaged.data, own.data

    def save_to_checkpoint(self, folder: Path) -> None:
        """Write the average into a checkpoint that is being saved."""
        weights = {name: value.contiguous() for name, value in self.average.module.state_dict().items()}
        with raise_disk_full(
            folder / EMA_FILE, sum(value.numel() * value.element_size() for value in weights.values())
        ):
            # safetensors writes several entries in an order that it draws: with one, the same average is the same bytes
            save_file(weights, folder / EMA_FILE, {"n_averaged": str(int(self.average.n_averaged))})

    def load_from_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Load the average from a checkpoint; start a new one, with a warning, if it has none."""
        file = Path(folder) / EMA_FILE
        if not file.is_file():
            logger.warning("%s has no averaged weights: starting a new average", folder)
            return
        self.average.module.load_state_dict(load_file(file))
        with safe_open(file, "pt") as opened:
            self.average.n_averaged.fill_(int(opened.metadata()["n_averaged"]))

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: nn.Module, processing_class: Any = None, **kwargs: Any
    ) -> None:
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.load_from_checkpoint(state.best_model_checkpoint)
        if self.as_final:
            self._swap(model)
            self.average = None
            return
        assert self.average is not None
        whole = cast("Any", self.average.module)
        if hasattr(whole, "peft_config"):  # save a full model, like the one in output_dir
            whole = self.average.module = merge(whole)
        if args.should_save:
            with new_folder(Path(args.output_dir) / EMA_FOLDER) as folder:
                whole.save_pretrained(folder)
                if processing_class is not None:
                    processing_class.save_pretrained(folder)
                list_weights(folder)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _names(model: nn.Module) -> list[str]:
    return [name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named]
