"""GLSF: keep the tokens most similar to CLS and fuse the others into one (https://huggingface.co/papers/2407.12891).

The similarity of GLSim, which chooses a crop of the image by it, as a criterion of EViT, of the later CLCA code. The licence
of the official code was not checked, and none of it is used here. Differs from the original: CLS is compared with at any
number of tokens, where the original takes the mean of all tokens at a square number, and then looks one token aside; without
CLS that mean is taken always. Registers, CLR and retrieved tokens are candidates as well.
"""

import torch

from .attention_clca import AttentionContext, at_least_float32
from .reduction_base import ScoredPruning, TokenState


class GLSFReduction(ScoredPruning):
    """Between attention and MLP, keep the tokens with the largest cosine to CLS (without CLS, to the mean of all tokens) and
    one weighted sum of the others. The keep rate is a share of the current tokens.

    The weights are the cosines as they are, as in the original: some may be negative, and their sum far above one, so the
    fused token may be much longer than the others. Its reported shares are made of them, see `shares_of`.
    """

    name = "glsf"
    fuse_rest = True

    def before_mlp(
        self, hidden_states: torch.Tensor, state: TokenState, context: AttentionContext
    ) -> tuple[torch.Tensor, TokenState]:
        tokens = at_least_float32(hidden_states)
        whole = tokens[:, :1] if self.config.use_class_token else tokens.mean(dim=1, keepdim=True)
        return self.prune(hidden_states, state, torch.cosine_similarity(whole, tokens[:, 1:], dim=-1))
