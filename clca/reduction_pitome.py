"""PiToMe: merge tokens that resemble many others, protect isolated ones (https://huggingface.co/papers/2405.16148).

Its official code is CC-BY-NC 4.0 and none of it is used here. Differs from it: attention is proportional to the tokens'
sizes, unless `proportional` is off; a stage merges at most half of its tokens, where the official code raises; registers,
CLR and recalled rows may be merged as well. For images alone: the paper's variant for text is not here.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from .attention_clca import at_least_float32, full_precision, gather_rows
from .reduction_base import Matching, Merging, falling_order


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class PiToMeReduction(Merging):
    """Between attention and MLP, merge rows with similar keys, of those with many similar ones. The keep rate is a share of
    the current tokens; rates below 0.5 merge half of them.

    Args:
        margin: cosine above which rows count as similar in layer 0. It falls linearly, and would be 0 after the last layer.
        matching: `protect`, only as many rows as are needed are matched, those with the highest energy; `ordered`, all rows
            are matched, and the most similar pairs merge; `auto`, `ordered` in the first half of the layers and `protect`
            after, as the official code has it for DeiT.
        proportional: attention is proportional to the tokens' sizes. The published numbers seem to be made without.
    """

    name = "pitome"
    from_patches = False

    def __init__(
        self,
        config: "CLCAViTConfig",
        stage: int,
        *,
        margin: float = 0.75,
        matching: Literal["auto", "protect", "ordered"] = "auto",
        proportional: bool = True,
    ) -> None:
        super().__init__(config, stage)
        layer, depth = config.reduction_layers[stage], config.num_hidden_layers
        self.margin = margin * (1 - layer / depth)
        self.protects = matching == "protect" or (matching == "auto" and layer >= (depth + 1) // 2)
        self.size_track = "size" if proportional else "silent_size"

    def match(self, metric: torch.Tensor, merged: int) -> torch.Tensor:
        """The new order: row 0, rows that stay, destinations by falling energy. Rows that stay are the protected ones by
        falling energy, or sources by falling similarity."""
        metric = nn.functional.normalize(at_least_float32(metric[:, 1:]), dim=-1)
        with full_precision(metric):
            similarity = metric @ metric.transpose(1, 2)  # (B, n, n)
        order = falling_order(self.energy(similarity))  # (B, n)
        matched, protected = order.tensor_split([2 * merged if self.protects else order.shape[1]], dim=1)
        sources, destinations = matched[:, ::2], matched[:, 1::2]
        columns = destinations.unsqueeze(1).expand(-1, sources.shape[1], -1)
        best, partner = gather_rows(similarity, sources).gather(2, columns).max(dim=2)
        by_similarity = falling_order(best)
        gone, stay = by_similarity[:, :merged], by_similarity[:, merged:]
        first = torch.zeros_like(order[:, :1])
        alone = torch.cat([first, 1 + sources.gather(1, stay), 1 + protected], dim=1)
        into = partner.gather(1, gone) + alone.shape[1]
        return Matching(torch.cat([alone, 1 + destinations], dim=1), 1 + sources.gather(1, gone), into).target

    def energy(self, similarity: torch.Tensor) -> torch.Tensor:
        """How much each row resembles the others, itself among them: (B, n) of `similarity` (B, n, n). The mean of what lies
        above the margin, and of an exponential, above -1, of what lies below."""
        above = similarity - self.margin
        # ELU, which is not among TensorRT's operators.
        return (above.clamp(min=0) + above.clamp(max=0).exp() - 1).mean(dim=2)
