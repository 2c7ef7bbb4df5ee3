"""A teacher for distillation: any image classifier of transformers."""

import re
from typing import Any

import torch
from transformers import PreTrainedModel

from clca import CLCAViTConfig
from clca.configuration_clca import as_pair
from clca.reductions_clca import get_reduction

from ..transforms.preprocessing import normalization


MOST_PREFIX_TOKENS = 16  # CLS, a distillation token, registers


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
        ValueError: tokens are asked for and the model has none that fit. `why_no_tokens` tells it beforehand.
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
        tokens = self._patch_tokens(output)
        if tokens is None:
            raise ValueError(
                f"`model` {type(self.model).__name__} has no {self.num_patches} patch tokens to learn from: use a ViT with "
                "the student's image and patch size, or `use_tokens`=False."
            )
        return {"teacher_logits": output.logits, "teacher_tokens": tokens}

    @torch.no_grad()
    def why_no_tokens(self, student: CLCAViTConfig) -> str | None:
        """Why the tokens of a student cannot learn from this model's, in words that follow its name; None if they can. Asked
        of a blank image, before a training finds out."""
        config = self.model.config
        blank = torch.zeros(1, student.num_channels, *as_pair(student.image_size), device=self.model.device)
        if not isinstance(config, CLCAViTConfig):
            output = self.model(blank, output_hidden_states=True)
        else:
            output = self.model(blank, output_hidden_states=True, output_assignments=True)
            static = get_reduction(config.reduction).is_static(config)  # else the blank image tells nothing of others
            if not static or not all(map(_in_place, output.assignments or ())):
                return (
                    f"reduces its tokens (`reduction` {config.reduction}), so that not each of the student's "
                    f"{self.num_patches} patches has one"
                )
        tokens = self._patch_tokens(output)
        if tokens is None:
            return f"has no token of each of the student's {self.num_patches} patches"
        if tokens.shape[2] != student.hidden_size:
            return f"has tokens of width {tokens.shape[2]}, the student {student.hidden_size}"
        return None

    def _patch_tokens(self, output: Any) -> torch.Tensor | None:
        """The tokens (B, patches, D) of the last layer of which each is one of the student's patches; None if there are none."""
        tokens = output.hidden_states[-1] if output.hidden_states else None
        if tokens is None or tokens.dim() != 3:
            return None
        config, others = self.model.config, tokens.shape[1] - self.num_patches
        if isinstance(config, CLCAViTConfig):  # CLR and recalled rows come last
            prefix, fits = config.num_prefix_tokens, config.num_patches == self.num_patches and others >= 0
        else:  # with more of them, the patches are others
            prefix, fits = others, 0 <= others <= min(MOST_PREFIX_TOKENS, self.num_patches)
        return self._final_norm(tokens)[:, prefix : prefix + self.num_patches] if fits else None

    def _final_norm(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens normalised as the teacher's head sees them: the student's are, too."""
        for name, module in self.model.named_modules():
            if name.rsplit(".", 1)[-1] in ("layernorm", "post_layernorm") and not re.search(
                r"\.\d+\.|embeddings", name
            ):
                return module(tokens)
        return tokens


def _in_place(assignment: torch.Tensor) -> bool:
    """Whether a stage (B, M, N) left every row where it was."""
    diagonal = torch.diag_embed(assignment.diagonal(dim1=1, dim2=2))
    return assignment.shape == diagonal.shape and torch.equal(assignment, diagonal)
