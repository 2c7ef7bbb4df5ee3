"""A teacher for distillation: any image classifier of transformers."""

import re
from typing import Any

import torch
from transformers import PreTrainedModel

from .transforms import normalization


class Teacher:
    """Gives a student what its loss wants of a teacher: `student(pixels, labels, **teacher(pixels))`.

    Args:
        model: an image classifier with the student's classes. Where its output can hold hidden states with as many tokens
            as the student has patches, or with some before them (CLS, registers), the student's tokens learn from them.
        num_patches: patches of an image, as the student cuts it.
        use_tokens: ask for tokens at all.
        processors: image processors of the student and of the model, where they may differ: pixels that are normalised for
            the student are normalised anew.

    Raises:
        ValueError: tokens are asked for and the model has none that fit.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_patches: int,
        use_tokens: bool = True,
        processors: tuple[Any, Any] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.num_patches = num_patches
        self.use_tokens = use_tokens
        self._factor, self._shift = torch.ones(1), torch.zeros(1)
        if processors is not None:
            (scale, mean, std), (own_scale, own_mean, own_std) = map(normalization, processors)
            self._factor = std * own_scale / (scale * own_std)  # (3, 1, 1), by way of 8-bit levels
            self._shift = (mean * own_scale / scale - own_mean) / own_std
        self._as_they_are = bool(torch.all(self._factor == 1) and torch.all(self._shift == 0))

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """`teacher_logits` (B, K) and `teacher_tokens` (B, patches, D) of the student's images (B, C, height, width)."""
        pixel_values = pixel_values.to(self.model.device)
        if not self._as_they_are:
            pixel_values = pixel_values * self._factor.to(pixel_values) + self._shift.to(pixel_values)
        output = self.model(pixel_values, output_hidden_states=self.use_tokens)
        if not self.use_tokens:
            return {"teacher_logits": output.logits}
        tokens = output.hidden_states[-1] if output.hidden_states else None
        if tokens is None or tokens.dim() != 3 or tokens.shape[1] < self.num_patches:
            raise ValueError(
                f"`model` {type(self.model).__name__} has no {self.num_patches} patch tokens to learn from: use a ViT with "
                "the student's image and patch size, or `use_tokens`=False."
            )
        prefix = getattr(self.model.config, "num_prefix_tokens", tokens.shape[1] - self.num_patches)
        tokens = self._final_norm(tokens)[:, prefix : prefix + self.num_patches]
        return {"teacher_logits": output.logits, "teacher_tokens": tokens}

    def _final_norm(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens normalised as the teacher's head sees them: the student's are, too."""
        for name, module in self.model.named_modules():
            if name.rsplit(".", 1)[-1] in ("layernorm", "post_layernorm") and not re.search(
                r"\.\d+\.|embeddings", name
            ):
                return module(tokens)
        return tokens
