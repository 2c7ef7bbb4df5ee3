"""Training in more than one process: what Trainer leaves to be done so that the numbers are those of one process.

Each of P processes takes every P-th batch of `per_device_train_batch_size` images, and the gradients are averaged: a step is
that of one process with P times the batch. Two things cannot be: a BatchNorm sees the images of its own process only (see
`DistributedArguments`), and a loss that is no mean over the images, such as token distillation over the tokens kept, is
averaged over processes all the same.
"""

import logging
import os
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from clca.heads_clca import SwitchableBatchNorm

from ..utils.arguments import option
from ..utils.distributed import broadcast_buffers


logger = logging.getLogger(__name__)


@dataclass
class DistributedArguments:
    """Training in more than one process, started with torchrun or accelerate launch."""

    _argument_group_name = "more than one process (torchrun --nproc_per_node N run_ufgir.py ...)"

    sync_batchnorm: bool = option(
        "the BatchNorms of the cla head normalise by the images of all processes, not by their own; GPUs only", False
    )

    def prepare(self, model: nn.Module, args: transformers.TrainingArguments) -> nn.Module:
        """The model for this process, with other BatchNorms if that was asked for. Before a Trainer is made of it.

        Raises:
            ValueError: `sync_batchnorm` on a CPU or for a model of several keep rates, or `do_predict` in the same run as a
                training with FSDP or DeepSpeed.
        """
        if args.do_train and args.do_predict and is_sharded(args):
            raise ValueError(
                "`do_predict` needs whole weights, FSDP and DeepSpeed cut them in pieces: run it after the training, with "
                "`model_name_or_path`"
            )
        switchable = any(isinstance(module, SwitchableBatchNorm) for module in model.modules())
        norms = switchable or any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        if self.sync_batchnorm and args.device.type == "cpu":
            raise ValueError(
                "`sync_batchnorm` needs GPUs, torch's SyncBatchNorm refuses a CPU's tensors: leave it out"
            )
        if self.sync_batchnorm and switchable:
            raise ValueError(
                "`sync_batchnorm` cannot be with `train_keep_rates`: torch's SyncBatchNorm keeps one set of statistics, the "
                "head one for each rate. Leave it out"
            )
        if not norms or args.world_size == 1 or not args.do_train:
            return model
        if self.sync_batchnorm:
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if args.process_index == 0:
            logger.warning(
                "BatchNorm normalises by the %d images of its own process, not by the %d of a step, and the statistics of "
                "the first process are kept: the run differs from that of one process with the larger batch%s",
                args.per_device_train_batch_size,
                args.per_device_train_batch_size * args.world_size,
                "" if switchable or args.device.type == "cpu" else " (`sync_batchnorm` makes them equal)",
            )
        return model


def is_sharded(args: transformers.TrainingArguments) -> bool:
    """Whether weights, or what belongs to them, are cut in pieces: FSDP or DeepSpeed, by an option or by accelerate launch."""
    launched = (os.environ.get(f"ACCELERATE_USE_{name}", "false") for name in ("FSDP", "DEEPSPEED"))
    return bool(args.fsdp or args.deepspeed) or any(value.lower() in ("1", "true") for value in launched)


def is_lost_process(error: Exception) -> bool:
    """Whether an error says that another process of the run is no longer there."""
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "Connection closed by peer" in text or "Connection reset by peer" in text
    )


class DistributedMixin:
    """For a `transformers.Trainer`: several processes train and evaluate as one would."""

    def get_train_dataloader(self) -> DataLoader:
        """Batches of training images. From here on each process draws dropout and the like for itself."""
        loader = super().get_train_dataloader()  # all have drawn the same order of images
        if self.args.process_index > 0:
            torch.manual_seed(self.args.seed + self.args.process_index)
        return loader

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with the statistics of the first process, which are those that are saved.

        (DDP copies them to the others when a training step begins, and takes no part in an evaluation.)
        """
        broadcast_buffers(self.model)
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model; with FSDP whole, also where checkpoints are sharded (Trainer would save nothing)."""
        if self.is_fsdp_enabled and not _internal_call:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """Loss, logits and labels of a batch.

        The last batches are filled up with images from the beginning of the data set, so that every process has as many.
        Trainer leaves their logits and labels out, but their loss would count.
        """
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        loading = self.accelerator.gradient_state
        if loss is not None and self.args.world_size > 1 and loading.end_of_dataloader and loading.remainder > 0:
            count = len(inputs["pixel_values"])
            real = loading.remainder - self.args.process_index * count
            if 0 < real < count:
                loss = super().prediction_step(model, {k: v[:real] for k, v in inputs.items()}, True)[0]
        return loss, logits, labels
