"""Training in more than one process: additions to Trainer so that results match those of one process.

Each of P processes takes every P-th batch of `per_device_train_batch_size` images, and gradients are averaged, so that
a step equals that of one process with P times the batch size. There are two exceptions: a BatchNorm only uses the
images of its own process (see `DistributedArguments`), and a loss that is not a mean over images, such as token
distillation over the kept tokens, is averaged over processes.
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
    """Options for training in more than one process, started with torchrun or accelerate launch."""

    _argument_group_name = "more than one process (torchrun --nproc_per_node N run_ufgir.py ...)"

    sync_batchnorm: bool = option("synchronize the BatchNorms of the cla head across processes; GPUs only", False)

    def prepare(self, model: nn.Module, args: transformers.TrainingArguments) -> nn.Module:
        """Return the model for this process, with `SyncBatchNorm` if requested. Call it before creating the Trainer.

        Raises:
            ValueError: for `sync_batchnorm` on a CPU or with several keep rates, and for `do_predict` in the same run
                as training with FSDP or DeepSpeed.
        """
        if args.do_train and args.do_predict and is_sharded(args):
            raise ValueError(
                "`do_predict` does not work in the same run as training with FSDP or DeepSpeed. Run it afterwards, "
                "with `model_name_or_path`"
            )
        switchable = any(isinstance(module, SwitchableBatchNorm) for module in model.modules())
        norms = switchable or any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
        if self.sync_batchnorm and args.device.type == "cpu":
            raise ValueError(
                "`sync_batchnorm` needs GPUs, since torch's SyncBatchNorm does not support CPU tensors. Omit it"
            )
        if self.sync_batchnorm and switchable:
            raise ValueError(
                "`sync_batchnorm` does not work with `train_keep_rates`: torch's SyncBatchNorm has one set of statistics, but "
                "the head needs one per rate. Omit it"
            )
        if not norms or args.world_size == 1 or not args.do_train:
            return model
        if self.sync_batchnorm:
            return nn.SyncBatchNorm.convert_sync_batchnorm(model)
        if args.process_index == 0:
            logger.warning(
                "BatchNorm uses the %d images of its own process, not the %d of a step, and the statistics of the first "
                "process are saved: results differ from those of one process with the larger batch%s",
                args.per_device_train_batch_size,
                args.per_device_train_batch_size * args.world_size,
                "" if switchable or args.device.type == "cpu" else " (`sync_batchnorm` avoids this)",
            )
        return model


def is_sharded(args: transformers.TrainingArguments) -> bool:
    """Return whether FSDP or DeepSpeed shards the weights, set by an option or by accelerate launch."""
    launched = (os.environ.get(f"ACCELERATE_USE_{name}", "false") for name in ("FSDP", "DEEPSPEED"))
    return bool(args.fsdp or args.deepspeed) or any(value.lower() in ("1", "true") for value in launched)


def is_lost_process(error: Exception) -> bool:
    """Return whether an error means that another process of the run has ended."""
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "Connection closed by peer" in text or "Connection reset by peer" in text
    )


class DistributedMixin:
    """Mixin for `transformers.Trainer`: training and evaluation in several processes give the results of one."""

    def get_train_dataloader(self) -> DataLoader:
        """Return batches of training images. Seeds torch differently in each process, e.g. for dropout."""
        loader = super().get_train_dataloader()  # every process has drawn the same order of images
        if self.args.process_index > 0:
            torch.manual_seed(self.args.seed + self.args.process_index)
        return loader

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate with the buffers (BatchNorm statistics) of the first process, which are the ones saved.

        DDP copies them to the other processes when a training step begins, but not for an evaluation.
        """
        broadcast_buffers(self.model)
        return super().evaluation_loop(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the full model, also with FSDP and sharded checkpoints (where Trainer would save nothing)."""
        if self.is_fsdp_enabled and not _internal_call:
            self.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        super().save_model(output_dir, _internal_call)

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """Return loss, logits and labels of a batch.

        The last batches are padded with images from the beginning of the data set, so that every process has the same
        number. Trainer drops the logits and labels of the padding; this method also removes it from the loss.
        """
        loss, logits, labels = super().prediction_step(model, inputs, *args, **kwargs)
        loading = self.accelerator.gradient_state
        if loss is not None and self.args.world_size > 1 and loading.end_of_dataloader and loading.remainder > 0:
            count = len(inputs["pixel_values"])
            real = loading.remainder - self.args.process_index * count
            if 0 < real < count:
                loss = super().prediction_step(model, {k: v[:real] for k, v in inputs.items()}, True)[0]
        return loss, logits, labels
