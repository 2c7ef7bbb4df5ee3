"""PiToMe: merge tokens that resemble many others, protect isolated ones (https://huggingface.co/papers/2405.16148).

Its official code is CC-BY-NC 4.0 and none of it is used here. Differences: attention is proportional to the sizes of
the tokens, unless `proportional` is off; a stage merges at most half of its tokens, where the official code raises an
error; registers, CLR and retrieved tokens may be merged as well. The paper's variant for text is not implemented.
"""

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from .attention_clca import at_least_float32, full_precision, gather_rows
from .reduction_base import Matching, Merging, descending_order


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


class PiToMeReduction(Merging):
    """Between attention and MLP, merge tokens with similar keys, among those that have many similar tokens. The keep
    rate is a share of the current tokens; rates below 0.5 merge half of them.

    Args:
        margin: cosine above which tokens count as similar in layer 0. It decreases linearly and would reach 0 after
            the last layer.
        matching: `protect`: only as many tokens as necessary are matched, those with the highest energy. `ordered`:
            all tokens are matched, and the most similar pairs are merged. `auto`: `ordered` in the first half of the
            layers and `protect` in the second, as in the official code for DeiT.
        proportional: attention is proportional to the sizes of the tokens. The published numbers seem to be without
            it.
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
        """Return the index (B, N) of the new token of each token.

        The new order is: token 0, tokens that stay, destinations by descending energy. Tokens that stay are the
        protected ones by descending energy, or sources by descending similarity."""
        metric = nn.functional.normalize(at_least_float32(metric[:, 1:]), dim=-1)
        with full_precision(metric):
            similarity = metric @ metric.transpose(1, 2)  # (B, n, n)
        order = descending_order(self.energy(similarity))  # (B, n)
        matched, protected = order.tensor_split([2 * merged if self.protects else order.shape[1]], dim=1)
        sources, destinations = matched[:, ::2], matched[:, 1::2]
        columns = destinations.unsqueeze(1).expand(-1, sources.shape[1], -1)
        best, partner = gather_rows(similarity, sources).gather(2, columns).max(dim=2)
        by_similarity = descending_order(best)
        removed, stay = by_similarity[:, :merged], by_similarity[:, merged:]
        first = torch.zeros_like(order[:, :1])
        alone = torch.cat([first, 1 + sources.gather(1, stay), 1 + protected], dim=1)
        destination = partner.gather(1, removed) + alone.shape[1]
        return Matching(
            torch.cat([alone, 1 + destinations], dim=1), 1 + sources.gather(1, removed), destination
        ).target

    def energy(self, similarity: torch.Tensor) -> torch.Tensor:
        """Return how much each token resembles all tokens, including itself: (B, n) from `similarity` (B, n, n).

        This is the mean of the differences to the margin where they are positive, and of exp(difference) - 1 where
        they are negative."""
        above = similarity - self.margin
        # This is ELU, written out because TensorRT has no operator for it.
        return (above.clamp(min=0) + above.clamp(max=0).exp() - 1).mean(dim=2)
