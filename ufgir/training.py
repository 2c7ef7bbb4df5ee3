"""What `run_ufgir.py` adds to transformers' loading and Trainer: care with weights, checkpoints and the model card."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader
from transformers.trainer import hf_api

from clca import CLCAViTConfig, CLCAViTForImageClassification

from .augmentation import AugmentationMixin
from .callbacks import ObserverMixin
from .checkpointing import CheckpointMixin
from .distillation import Distillation
from .distributed import DistributedMixin
from .elastic import draw_keep_rate
from .optimization import OptimizationMixin
from .resample import resample_weights


class UFGIRTrainer(
    ObserverMixin, CheckpointMixin, DistributedMixin, OptimizationMixin, AugmentationMixin, transformers.Trainer
):
    """A Trainer that evaluates every image, learns from a teacher, logs the parts of the loss, and leaves our model card
    alone. The mixins say what they add: averaged weights and other observers, whole checkpoints and exact resumption, several
    processes, parameter groups and schedules, augmentation.

    `dataloader_drop_last` is for training (a last batch of one image breaks a BatchNorm); transformers would apply it
    to evaluation, too, and silently leave images out.

    Args:
        distillation: a teacher and how much is learnt from it, None for none.
        optimization: parameter groups, schedule and freezing, see `OptimizationMixin`; None for the defaults.
    """

    def __init__(self, *args: Any, distillation: Distillation | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.distillation = distillation
        self._loss_terms: dict[str, list[torch.Tensor]] = {}  # name -> values since the last log line

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """The model's loss; while training at the keep rate drawn for the step, if there are several, and with the teacher's
        share."""
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
        """Beside the loss, the means of its parts since the last line, where it has several."""
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
        """Batches of all evaluation images."""
        with self._keeping_last_batch():
            return super().get_eval_dataloader(*args, **kwargs)

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> DataLoader:
        """Batches of all test images."""
        with self._keeping_last_batch():
            return super().get_test_dataloader(*args, **kwargs)

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """Also make the branch that `hub_revision` names: an upload to one that is missing fails."""
        super().init_hf_repo(token, private)
        if self.args.hub_revision is not None and self.is_world_process_zero():
            token = token if token is not None else self.args.hub_token
            hf_api().create_branch(self.hub_model_id, branch=self.args.hub_revision, token=token, exist_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Does nothing: `ufgir.model_card.write_model_card` writes README.md, a push must not replace it."""


def load_pretrained(
    checkpoint: str, config: CLCAViTConfig, revision: str | None = None, **kwargs: Any
) -> CLCAViTForImageClassification:
    """The weights of a CLCA or stock ViT checkpoint in a model made from `config`, in float32.

    Where `config.image_size` or `config.patch_size` is not the checkpoint's, position embeddings and patch projection are
    resampled, see `ufgir.resample`; a token that is new to the checkpoint starts as the model starts it.

    Args:
        checkpoint: folder or Hub repository.
        config: of the model wanted.
        revision: of the Hub repository.
        kwargs: more arguments of `from_pretrained`, such as `ignore_mismatched_sizes` and `attn_implementation`.

    Raises:
        ValueError: weights of other shapes, e.g. another number of classes, without `ignore_mismatched_sizes`.
    """
    saved = CLCAViTConfig.get_config_dict(checkpoint, revision=revision)[0]
    sizes = {name: saved.get(name, getattr(config, name)) for name in ("image_size", "patch_size")}
    as_saved = CLCAViTConfig.from_dict(config.to_dict() | sizes)
    try:
        model = CLCAViTForImageClassification.from_pretrained(
            checkpoint, config=as_saved, revision=revision, dtype=torch.float32, **kwargs
        )
        if (as_saved.image_grid, as_saved.patch_size) != (config.image_grid, config.patch_size):
            weights = resample_weights(model.state_dict(), as_saved, config)
            attention = model.config._attn_implementation
            model = CLCAViTForImageClassification._from_config(config, attn_implementation=attention)
            own = model.state_dict()
            # Slots of a reduction that the checkpoint did not have were made for its size; they start anew at this one.
            new = {k for k in weights if ".reduction." in k and saved.get("reduction") != config.reduction}
            new = {k for k in new if weights[k].shape != own[k].shape}
            model.load_state_dict({k: v for k, v in weights.items() if k not in new} | {k: own[k] for k in new})
    except RuntimeError as error:  # transformers' and torch's word for shapes that differ
        raise ValueError(
            f"weights of {checkpoint} have other shapes than the model's, perhaps for another number of classes; "
            f"`ignore_mismatched_sizes` starts those anew: {error}"
        ) from error
    return model
