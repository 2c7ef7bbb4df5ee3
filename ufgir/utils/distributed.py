"""Helpers for several processes."""

import torch
from torch import nn


def broadcast_buffers(model: nn.Module) -> None:
    """Give every process the first one's buffers, such as a BatchNorm's statistics. Nothing happens in one process."""
    if torch.distributed.is_initialized():
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
