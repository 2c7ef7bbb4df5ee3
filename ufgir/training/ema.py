"""An exponential moving average (EMA) of the weights: torch's `AveragedModel`, evaluated, saved and resumed with a training."""

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

from ..utils.files import new_folder, raise_disk_full
from .adapters import merge
from .checkpoint_files import EMA_FILE, EMA_FOLDER


logger = logging.getLogger(__name__)


def ema_function(decay: float, warmup: bool = False) -> Callable[[list[torch.Tensor], list[torch.Tensor], Any], None]:
    """What an `AveragedModel` calls: average = d * average + (1 - d) * weights, in place.

    Args:
        decay: d, in [0, 1).
        warmup: d is at most (1 + n) / (10 + n) after n updates, so that the first weights, which are poor, are soon
            forgotten; as in TensorFlow's ExponentialMovingAverage.
    """

    @torch.no_grad()
    def update(average: list[torch.Tensor], current: list[torch.Tensor], num_averaged: torch.Tensor | int) -> None:
        if not average[0].is_floating_point():  # the number of batches that a BatchNorm has seen
            torch._foreach_copy_(average, current)
            return
        count = int(num_averaged)
        now = min(decay, (1 + count) / (10 + count)) if warmup else decay
        get_ema_multi_avg_fn(now)(average, current, num_averaged)

    return update


class EMACallback(TrainerCallback):
    """Averages the weights after each optimizer step.

    The average starts as the weights after the first step. BatchNorm's running statistics are averaged with the same
    decay, as in the original, so that they belong to the averaged weights. The training itself is not changed.

    - Evaluations, on the way and at the end, report `ema_top1` etc. beside `top1`; `metric_for_best_model` may be
      `ema_top1`.
    - A checkpoint holds the average as `ema.safetensors`, keys as in the model's own file; a training that resumes goes on
      with it, bit by bit.
    - At the end `output_dir/ema` is a model like the one in `output_dir`, of the same step: the last, or with
      `load_best_model_at_end` the best one.
    - With `as_final` the average is the model: evaluations are of it alone, and it is in `output_dir` at the end. The
      trained weights are in the checkpoints.

    For a Trainer with `ufgir.training.callbacks.ObserverMixin`, which evaluates, and `ufgir.training.checkpointing.CheckpointMixin`, which
    calls `save_to_checkpoint` and `load_from_checkpoint`. With FSDP and DeepSpeed weights are cut in pieces: not with them.

    Args:
        decay: share of the average that stays at each step, in (0, 1); the original's is 0.99996.
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
        """Whether there is an average of this model, or of one like it: not so before training."""
        return self.average is not None and _names(self.average.module) == _names(model)

    @contextlib.contextmanager
    def swapped(self, model: nn.Module) -> Iterator[None]:
        """Within this context `model` holds the average, and the average the model's weights; nothing is copied."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    def _swap(self, model: nn.Module) -> None:
        for own, averaged in zip(_tensors(model), _tensors(self.average.module), strict=True):
            own.data, averaged.data = averaged.data, own.data

    def save_to_checkpoint(self, folder: Path) -> None:
        """Write the average into a checkpoint that is being made."""
        weights = {name: value.contiguous() for name, value in self.average.module.state_dict().items()}
        with raise_disk_full(
            folder / EMA_FILE, sum(value.numel() * value.element_size() for value in weights.values())
        ):
            # safetensors writes several entries in an order that it draws: with one, the same average is the same bytes
            save_file(weights, folder / EMA_FILE, {"n_averaged": str(int(self.average.n_averaged))})

    def load_from_checkpoint(self, folder: str | os.PathLike[str]) -> None:
        """Go on with the average that a checkpoint holds; with a warning, start a new one where it holds none."""
        file = Path(folder) / EMA_FILE
        if not file.is_file():
            logger.warning("%s holds no averaged weights: the average starts with the weights of this step", folder)
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
        if hasattr(whole, "peft_config"):  # a whole model, as the one in output_dir will be
            whole = self.average.module = merge(whole)
        if args.should_save:
            with new_folder(Path(args.output_dir) / EMA_FOLDER) as folder:
                whole.save_pretrained(folder)
                if processing_class is not None:
                    processing_class.save_pretrained(folder)


def _tensors(model: nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _names(model: nn.Module) -> list[str]:
    return [name for named in (model.named_parameters(), model.named_buffers()) for name, _ in named]
