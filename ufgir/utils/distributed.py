"""Helpers for distributed training."""

import torch
from torch import nn


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of the first process, such as BatchNorm statistics, to all processes. No effect in a single process."""
    if torch.distributed.is_initialized():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
