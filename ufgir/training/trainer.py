"""`UFGIRTrainer`, the Trainer of `run_ufgir.py`."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel
from transformers.trainer import hf_api

from ..checkpoints.loading import load_pretrained as load_pretrained  # re-exported for scripts
from .augmentation import AugmentationMixin
from .callbacks import ObserverMixin, SingleImageGuard
from .checkpointing import CheckpointMixin
from .distillation import Distillation
from .distributed import DistributedMixin
from .keep_rates import draw_keep_rate
from .optimization import OptimizationMixin


class UFGIRTrainer(
    ObserverMixin, CheckpointMixin, DistributedMixin, OptimizationMixin, AugmentationMixin, transformers.Trainer
):
    """A `transformers.Trainer` with distillation, logging of loss terms and evaluation of every image.

    The mixins add averaged weights and other callbacks, complete checkpoints and exact resumption, training in several
    processes, parameter groups and schedules, and augmentation.

    `dataloader_drop_last` only applies to training (a last batch of one image fails in a BatchNorm). transformers
    would also apply it to evaluation and silently ignore images.

    Args:
        distillation: the teacher and its options; None for none.
        optimization: parameter groups, schedule and freezing, see `OptimizationMixin`; None for the defaults.
    """

    model: PreTrainedModel  # or a peft model, which forwards attributes to it

    def __init__(self, *args: Any, distillation: Distillation | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._remove_jit_callback()
        self.add_callback(SingleImageGuard)
        self.distillation = distillation
        self._loss_terms: dict[str, list[torch.Tensor]] = {}  # name -> values since the last log line

    def _remove_jit_callback(self) -> None:
        """Remove transformers' callback and SIGTERM handler of `enable_jit_checkpoint`; see `CheckpointMixin`."""
        for callback in list(self.callback_handler.callbacks):
            if type(callback).__name__ == "JITCheckpointCallback":
                callback.on_train_end(self.args, self.state, self.control)  # restores the earlier handler
                self.remove_callback(callback)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """Compute the loss; in training, with the distillation loss and the keep rate drawn for the step, if any."""
        teacher = {}
        rates = getattr(self.model.config, "train_keep_rates", None)
        if rates and model.training:
            inputs = {**inputs, "keep_rate": draw_keep_rate(rates, self.args.seed, self.state.global_step)}
        if self.distillation is not None and model.training:
            teacher = self.distillation.inputs(inputs["pixel_values"])
            if self.distillation.by_method:
                inputs, teacher = {**inputs, **teacher}, {}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if teacher:
            loss = self.distillation.loss(outputs, teacher["teacher_logits"])
        if model.training and len(outputs.loss_terms or {}) > 1:
            for name, term in outputs.loss_terms.items():
                self._loss_terms.setdefault(name, []).append(term)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the mean of each loss term since the last line, in addition to the loss, if there are several."""
        if "loss" in logs:
            logs |= {f"loss_{name}": torch.stack(v).mean().item() for name, v in self._loss_terms.items()}
            self._loss_terms = {}
        super().log(logs, *args, **kwargs)

    @contextlib.contextmanager
    def _keeping_last_batch(self) -> Iterator[None]:
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return batches of all evaluation images."""
        with self._keeping_last_batch():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Return batches of all test images."""
        with self._keeping_last_batch():
            return super().get_test_dataloader(*args, **kwargs)

    def init_hf_repo(self, token: str | None = None, *args: Any, **kwargs: Any) -> None:
        """Also create the branch `hub_revision`: uploads to a missing branch fail."""
        super().init_hf_repo(token, *args, **kwargs)
        if self.args.hub_revision is not None and self.is_world_process_zero():
            token = token if token is not None else self.args.hub_token
            hf_api().create_branch(self.hub_model_id, branch=self.args.hub_revision, token=token, exist_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing, so that a push keeps the README.md of `ufgir.checkpoints.model_card.write_model_card`."""
