"""GLSF: keep the tokens most similar to CLS and fuse the others into one (https://huggingface.co/papers/2407.12891).

The similarity of GLSim, which uses it to choose a crop of the image, as the criterion of EViT, from the later CLCA
code. The license of the official code was not checked, and none of it is used here. Differences from the original:
tokens are compared with CLS at any number of tokens; the original uses the mean of all tokens if their number is a
square, and then its indices are off by one. Without CLS the mean is always used. Registers, CLR and retrieved tokens
are candidates as well.
"""

import torch

from .attention_clca import AttentionContext, at_least_float32
from .reduction_base import ScoredPruning, TokenState


class GLSFReduction(ScoredPruning):
    """Between attention and MLP, keep the tokens with the largest cosine to CLS (without CLS, to the mean of all
    tokens) and one weighted sum of the others. The keep rate is a share of the current tokens.

    The weights are the cosines, as in the original. Some may be negative and their sum may be far above one, so the
    fused token may be much longer than the others. Its assignment is computed from them by `shares_of`."""

    name = "glsf"
    fuse_rest = True

    def before_mlp(
        self, hidden_states: torch.Tensor, state: TokenState, context: AttentionContext
    ) -> tuple[torch.Tensor, TokenState]:
        tokens = at_least_float32(hidden_states)
        whole = tokens[:, :1] if self.config.use_class_token else tokens.mean(dim=1, keepdim=True)
        return self.prune(hidden_states, state, torch.cosine_similarity(whole, tokens[:, 1:], dim=-1))
