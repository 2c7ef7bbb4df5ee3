"""Heads that classify from CLS tokens of several layers.

Shapes: B batch, M layers that are read, D width, K classes.
"""

import torch
from torch import nn

from .configuration_clca import CLCAViTConfig


class CLAHead(nn.Module):
    """Cross-layer aggregation (https://huggingface.co/papers/2501.00243): a depth-wise convolution over the layers mixes
    the CLS tokens channel by channel, a point-wise one classifies.

    BatchNorm -> depth-wise Conv1d, kernel M, `cla_multiplier` channels out per channel in -> BatchNorm -> GELU -> classes.
    """

    def __init__(self, config: CLCAViTConfig, num_labels: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.hidden_size * config.cla_multiplier
        self.norm_in = nn.BatchNorm1d(width)
        self.aggregate = nn.Conv1d(width, inner, kernel_size=len(config.aggregation_layers), groups=width)
        self.norm_out = nn.BatchNorm1d(inner)
        self.activation = nn.GELU()
        self.out_proj = nn.Conv1d(inner, num_labels, kernel_size=1)

    def forward(self, cls_tokens: torch.Tensor) -> torch.Tensor:
        """CLS tokens (B, M, D), not normalised, to logits (B, K)."""
        hidden = self.norm_in(cls_tokens.transpose(1, 2))  # (B, D, M)
        hidden = self.activation(self.norm_out(self.aggregate(hidden)))  # (B, D * multiplier, 1)
        return self.out_proj(hidden).squeeze(-1)


class IFAHead(nn.Module):
    """Intermediate feature aggregation: one learnt weighted sum over the layers, then a linear classifier.

    Linear(M, 1) over the layers -> ReLU -> LayerNorm -> classes.
    """

    def __init__(self, config: CLCAViTConfig, num_labels: int) -> None:
        super().__init__()
        self.aggregate = nn.Linear(len(config.aggregation_layers), 1)
        self.activation = nn.ReLU()
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.out_proj = nn.Linear(config.hidden_size, num_labels)

    def forward(self, cls_tokens: torch.Tensor) -> torch.Tensor:
        """CLS tokens (B, M, D), not normalised, to logits (B, K)."""
        hidden = self.aggregate(cls_tokens.transpose(1, 2)).squeeze(-1)  # (B, D)
        return self.out_proj(self.layernorm(self.activation(hidden)))


def build_head(config: CLCAViTConfig) -> nn.Module:
    """The classifier that a configuration asks for. CLA and IFA take the CLS tokens (B, M, D), the linear head the pooled
    features (B, D)."""
    if config.num_labels == 0:
        return nn.Identity()
    if config.head == "cla":
        return CLAHead(config, config.num_labels)
    if config.head == "ifa":
        return IFAHead(config, config.num_labels)
    return nn.Linear(config.hidden_size, config.num_labels)
