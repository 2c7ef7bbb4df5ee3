"""A teacher for distillation: any image classifier of transformers."""

import re
from typing import Any

import torch
from transformers import PreTrainedModel

from clca import CLCAViTConfig
from clca.configuration_clca import as_pair
from clca.reductions_clca import get_reduction

from ..transforms.preprocessing import normalization


MAX_PREFIX_TOKENS = 16  # CLS, a distillation token, registers


class Teacher:
    """Callable that returns a teacher's outputs as arguments of a student: `student(x, labels, **teacher(x))`.

    Args:
        model: an image classifier with the student's classes. Its tokens can be distilled if its hidden states have
            one token per patch of the student, optionally preceded by others (CLS, registers).
        num_patches: number of patches per image of the student.
        use_tokens: whether to return tokens in addition to logits.
        processors: image processors of the student and of the teacher, if they may differ: pixels normalized for the
            student are renormalized for the teacher.

    Raises:
        ValueError: in a call, if `use_tokens` is set and the model has no suitable tokens; see `token_mismatch`.
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
            self._factor = std * own_scale / (scale * own_std)  # (3, 1, 1), derived from 8-bit pixel values
            self._shift = (mean * own_scale / scale - own_mean) / own_std
        self._same_normalization = bool(torch.all(self._factor == 1) and torch.all(self._shift == 0))

    @torch.no_grad()
    def __call__(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return `teacher_logits` (B, K) and `teacher_tokens` (B, patches, D) for images (B, C, height, width)."""
        pixel_values = pixel_values.to(self.model.device)
        if not self._same_normalization:
            pixel_values = pixel_values * self._factor.to(pixel_values) + self._shift.to(pixel_values)
        output = self.model(pixel_values, output_hidden_states=self.use_tokens)
        if not self.use_tokens:
            return {"teacher_logits": output.logits}
        tokens = self._patch_tokens(output)
        if tokens is None:
            raise ValueError(
                f"`model` {type(self.model).__name__} does not have {self.num_patches} patch tokens. Use a ViT with the "
                "student's image and patch size, or `use_tokens`=False."
            )
        return {"teacher_logits": output.logits, "teacher_tokens": tokens}

    @torch.no_grad()
    def token_mismatch(self, student: CLCAViTConfig) -> str | None:
        """Return why the student cannot learn from this model's tokens, None if it can.

        The text continues a sentence that starts with the model's name. The model is run on a blank image.
        """
        config = self.model.config
        blank = torch.zeros(1, student.num_channels, *as_pair(student.image_size), device=self.model.device)
        if not isinstance(config, CLCAViTConfig):
            output = self.model(blank, output_hidden_states=True)
        else:
            output = self.model(blank, output_hidden_states=True, output_assignments=True)
            static = get_reduction(config.reduction).is_static(
                config
            )  # otherwise other images may differ from the blank one
            if not static or not all(map(_in_place, output.assignments or ())):
                return (
                    f"reduces its tokens (`reduction` {config.reduction}), so it does not have one for each of the student's "
                    f"{self.num_patches} patches"
                )
        tokens = self._patch_tokens(output)
        if tokens is None:
            return f"does not have one token for each of the student's {self.num_patches} patches"
        if tokens.shape[2] != student.hidden_size:
            return f"has tokens of width {tokens.shape[2]} instead of the student's {student.hidden_size}"
        return None

    def _patch_tokens(self, output: Any) -> torch.Tensor | None:
        """Return the last layer's tokens (B, patches, D), one per patch of the student; None if there are none."""
        tokens = output.hidden_states[-1] if output.hidden_states else None
        if tokens is None or tokens.dim() != 3:
            return None
        config, others = self.model.config, tokens.shape[1] - self.num_patches
        if isinstance(config, CLCAViTConfig):  # CLR tokens and tokens retrieved from the cache come last
            prefix, fits = config.num_prefix_tokens, config.num_patches == self.num_patches and others >= 0
        else:  # more tokens mean other patches
            prefix, fits = others, 0 <= others <= min(MAX_PREFIX_TOKENS, self.num_patches)
        return self._final_norm(tokens)[:, prefix : prefix + self.num_patches] if fits else None

    def _final_norm(self, tokens: torch.Tensor) -> torch.Tensor:
        """Apply the teacher's final norm to its tokens, since the student's are normalized, too."""
        for name, module in self.model.named_modules():
            if name.rsplit(".", 1)[-1] in ("layernorm", "post_layernorm") and not re.search(
                r"\.\d+\.|embeddings", name
            ):
                return module(tokens)
        return tokens


def _in_place(assignment: torch.Tensor) -> bool:
    """Return whether an assignment (B, M, N) maps every token to itself."""
    diagonal = torch.diag_embed(assignment.diagonal(dim1=1, dim2=2))
    return assignment.shape == diagonal.shape and torch.equal(assignment, diagonal)
