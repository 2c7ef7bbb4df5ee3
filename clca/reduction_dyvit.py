"""DynamicViT: a small network scores the tokens before a layer (https://huggingface.co/papers/2106.02034).

Its official code is MIT. In evaluation the tokens with the best scores are kept. In training no token is removed: a
straight-through Gumbel sample decides which tokens later attention may use, and a loss pulls their share towards the
keep rate.

Differences from the paper: registers, CLR and retrieved tokens are candidates as well. As in the original CLCA code,
retrieved tokens count as kept in training but not in evaluation, the smoothed softmax is used from layer 0 on, and
with a cache a stage keeps int(rate * (N - 2)) of its N tokens instead of a share of the initial tokens. Attention
weights have no dropout in training.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .budget_clca import Budget
from .loss_clca import keep_ratio_loss, kl_divergence, token_distillation_loss
from .reduction_base import LossInputs, ScoredPruning, TokenState, identity_assignment


if TYPE_CHECKING:
    from .configuration_clca import CLCAViTConfig


_SMOOTHING = 1e-6


class DyViTReduction(ScoredPruning):
    """Keep the tokens that a predictor gives the best scores. The keep rate is a share of the first layer's tokens,
    cumulative.

    Args:
        ratio_weight: weight of the loss that pulls the share of kept tokens to its target.
        ratio_targets: cumulative targets of that loss, one per stage; by default the products of the keep rates.
        cls_distill_weight: weight of the distillation of the class logits, if those of a teacher are given.
        token_distill_weight: weight of the distillation of the kept tokens, if those of a teacher are given.
        token_distill: distance between tokens, `mse` or `kl`.
    """

    name = "dyvit"
    always_sorts = True  # as in the original: with registers and mean pooling, the order of the tokens matters
    differentiable_tracks = True
    distils = True

    def __init__(
        self,
        config: "CLCAViTConfig",
        stage: int,
        *,
        ratio_weight: float = 2.0,
        ratio_targets: list[float] | None = None,
        cls_distill_weight: float = 0.5,
        token_distill_weight: float = 0.5,
        token_distill: str = "mse",
    ) -> None:
        super().__init__(config, stage)
        width = config.hidden_size
        self.in_proj = nn.Sequential(nn.LayerNorm(width, eps=1e-5), nn.Linear(width, width), nn.GELU())
        self.out_proj = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    @classmethod
    def check(cls, config: "CLCAViTConfig") -> None:
        super().check(config)
        stages = len(config.reduction_layers)
        for name in ("ratio_weight", "cls_distill_weight", "token_distill_weight"):
            cls.check_option(config, name, lambda v: v >= 0, "at least 0")
        cls.check_option(
            config,
            "ratio_targets",
            lambda v: v is None or (len(v) == stages and all(0 < target <= 1 for target in v)),
            f"one share in (0, 1] per stage, {stages} of them",
        )
        cls.check_option(config, "token_distill", lambda v: v in ("mse", "kl"), "'mse' or 'kl'")

    @classmethod
    def loss_terms(cls, config: "CLCAViTConfig", inputs: LossInputs) -> dict[str, torch.Tensor]:
        """Return `keep_ratio`; with a teacher also `cls_distillation` and `token_distillation`."""
        decisions = inputs.reports.get("decision")
        if decisions is None:  # a frozen backbone in evaluation mode reports no decisions
            return {}
        budget, num_tokens = inputs.budget, decisions[0].shape[1]
        targets = cls.option(config, "ratio_targets") if budget == Budget.of(config) else None
        if targets is None:
            counts = [budget.tokens(stage) for stage in range(len(decisions))]
            targets = [
                budget.cumulative_rate(stage) if count is None else min(count / num_tokens, 1.0)
                for stage, count in enumerate(counts)
            ]
        terms = {"keep_ratio": cls.option(config, "ratio_weight") * keep_ratio_loss(decisions, targets)}
        if inputs.teacher_logits is not None and inputs.logits is not None:
            weight = cls.option(config, "cls_distill_weight")
            terms["cls_distillation"] = weight * kl_divergence(inputs.logits, inputs.teacher_logits)
        if inputs.teacher_tokens is not None:
            # In training no token has moved, so the patches still follow the prefix.
            patches = slice(config.num_prefix_tokens, config.num_prefix_tokens + inputs.teacher_tokens.shape[1])
            kept = nn.functional.pad(decisions[-1], (1, 0), value=1.0)[:, patches]
            distance = token_distillation_loss(
                inputs.tokens[:, patches], inputs.teacher_tokens, kept, cls.option(config, "token_distill")
            )
            terms["token_distillation"] = cls.option(config, "token_distill_weight") * distance
        return terms

    @classmethod
    def keep(cls, config: "CLCAViTConfig", stage: int, num_tokens: int, state: TokenState) -> int:
        count = state.budget.tokens(stage)
        if count is None and config.cross_layer_cache:
            count = int((num_tokens - 2) * state.budget.rate(stage))
        elif count is None:
            first = config.num_prefix_tokens + state.num_patches + config.num_clr_tokens
            count = int((first - 1) * state.budget.cumulative_rate(stage))
        return min(max(count, 0), num_tokens - 1)

    @classmethod
    def start(cls, hidden_states: torch.Tensor, state: TokenState, training: bool) -> TokenState:
        return state.with_tracks(decision=hidden_states.new_ones(hidden_states.shape[:2]))

    @classmethod
    def retrieved_value(cls, name: str, track: torch.Tensor, training: bool) -> float:
        return 1.0 if training else 0.0

    @classmethod
    def attend(
        cls,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float,
        state: TokenState,
        from_tokens: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Compute the softmax over the tokens kept so far and the token itself, smoothed so that it is never empty."""
        logits = query @ key.transpose(-1, -2) * scaling
        num_tokens = logits.shape[-1]
        policy = state.tracks["decision"][:, None, None, :]
        mask = policy  # (B, 1, 1, N)
        if from_tokens:
            itself = torch.eye(num_tokens, dtype=policy.dtype, device=policy.device)
            mask = policy + (1.0 - policy) * itself  # (B, 1, N, N)
        exponentials = (logits - logits.amax(dim=-1, keepdim=True)).float().exp() * mask.float()
        weights = (exponentials + _SMOOTHING / num_tokens) / (exponentials.sum(dim=-1, keepdim=True) + _SMOOTHING)
        weights = weights.to(value.dtype)
        return (weights @ value).transpose(1, 2), weights

    @staticmethod
    def draw_gumbel(log_probabilities: torch.Tensor) -> torch.Tensor:
        """Draw Gumbel noise of the shape of `log_probabilities` (B, n, 2). Override it to make a training step
        reproducible."""
        return -torch.empty_like(log_probabilities).exponential_().log()

    def before_layer(self, hidden_states: torch.Tensor, state: TokenState) -> tuple[torch.Tensor, TokenState]:
        decision = state.tracks["decision"][:, 1:]  # (B, N - 1)
        scores = self.predict(hidden_states[:, 1:], decision)  # (B, N - 1, 2)
        if not self.training:
            return self.prune(hidden_states, state, scores[..., 0])
        soft = (scores + self.draw_gumbel(scores)).softmax(dim=-1)[..., 0]
        hard = (soft >= 0.5).to(soft.dtype)
        decision = (hard - soft.detach() + soft).to(decision.dtype) * decision
        policy = nn.functional.pad(decision, (1, 0), value=1.0)
        state = state.with_tracks(decision=policy)
        # From now on dropped tokens hold nothing in the assignment, as if they were removed.
        state = state.with_assignment(lambda: identity_assignment(hidden_states) * policy.unsqueeze(-1))
        return hidden_states, state.with_report(decision=decision)

    def predict(self, tokens: torch.Tensor, decision: torch.Tensor) -> torch.Tensor:
        """Return the log-probabilities (B, n, 2) of keeping and dropping each token.

        Args:
            tokens: (B, n, D). Each is scored together with the mean of the tokens kept so far.
            decision: (B, n), one for tokens kept so far.
        """
        local, pooled = self.in_proj(tokens).chunk(2, dim=-1)
        weights = decision.unsqueeze(-1).to(pooled.dtype)
        kept = weights.sum(dim=1, keepdim=True)
        kept = torch.where(kept > 0, kept, torch.ones_like(kept))  # all dropped: mean 0 instead of 0 / 0
        pooled = (pooled * weights).sum(dim=1, keepdim=True) / kept + 1e-6
        return self.out_proj(torch.cat([local, pooled.expand_as(local)], dim=-1))
