"""Distillation from a teacher: its options, and the term it adds to the loss."""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForImageClassification

from clca import CLCAViTConfig
from clca.loss_clca import distillation_loss
from clca.reductions_clca import get_reduction

from ..transforms.preprocessing import read_image_processor
from ..utils.arguments import option
from ..utils.options import OptionGroup, Requirement
from .teacher import Teacher


logger = logging.getLogger(__name__)

DEFAULT_WEIGHTS = {"soft": 0.5, "hard": 0.3}  # as in the original


@dataclass
class DistillationArguments(OptionGroup):
    """Options of the teacher and its weight in the loss.

    Raises:
        ValueError: if the kind of distillation is unknown, or a weight or temperature is out of range.
    """

    _argument_group_name = "distillation"

    teacher: str | None = option("teacher model, an image classifier: folder or Hub repository [none]")
    teacher_revision: str | None = option("branch, tag or commit of the teacher [main]")
    distillation: str = option(
        "soft: Kullback-Leibler divergence to the teacher's probabilities; hard: cross-entropy to its class", "soft"
    )
    distillation_weight: float | None = option(
        "weight of the teacher's term in the loss, in [0, 1] [0.5 soft, 0.3 hard]"
    )
    distillation_temperature: float = option(
        "temperature that divides the logits of teacher and student, for soft only", 1.0
    )
    distill_tokens: bool = option(
        "dyvit: also distill the teacher's tokens into the kept tokens [if the teacher has one token per patch]", True
    )

    requirements = (
        Requirement(
            (
                "teacher_revision",
                "distillation",
                "distillation_weight",
                "distillation_temperature",
                "distill_tokens",
            ),
            "a `teacher`",
            lambda group: group.teacher is not None,
        ),
    )

    def __post_init__(self) -> None:
        if self.distillation not in DEFAULT_WEIGHTS:
            raise ValueError(f"`distillation` must be soft or hard, got {self.distillation!r}.")
        if self.distillation_weight is not None and not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"`distillation_weight` must be in [0, 1], got {self.distillation_weight}.")
        if not self.distillation_temperature > 0:
            raise ValueError(f"`distillation_temperature` must be positive, got {self.distillation_temperature}.")
        super().__post_init__()


def _processor_of(args: DistillationArguments, student: Any) -> Any:
    """Return the teacher's image processor; the student's, with a warning, if it has none."""
    try:
        return read_image_processor(args.teacher, args.teacher_revision)
    except (OSError, ValueError):
        logger.warning(
            "`teacher` %s has no image processor: using the student's `image_mean` and `image_std`",
            args.teacher,
        )
        return student


class Distillation:
    """Teacher of a student in training, called by `UFGIRTrainer.compute_loss`.

    A student whose reduction has its own distillation loss (DynamicViT, https://huggingface.co/papers/2106.02034) gets
    the teacher's logits and tokens as arguments of its forward and weights them by `reduction_kwargs`. For other
    students, the loss becomes (1 - weight) * loss + weight * distance of the logits
    (https://huggingface.co/papers/2012.12877).

    Args:
        args: options, with a teacher.
        config: configuration of the student.
        image_processor: image processor of the student. If the teacher normalizes images differently, they are
            renormalized for it. None: the teacher gets the student's pixels.
        require_tokens: raise an error if `distill_tokens` is set and the teacher has no suitable tokens. By default
            the student then learns from the logits only, with a warning.

    Raises:
        ValueError: if the teacher could not be loaded, has other classes, another image size or no suitable tokens, or
            if options do not apply to the student's reduction.
    """

    def __init__(
        self,
        args: DistillationArguments,
        config: CLCAViTConfig,
        image_processor: Any = None,
        require_tokens: bool = False,
    ) -> None:
        self.args = args
        self.by_method = get_reduction(config.reduction).distils
        if self.by_method and (args.distillation_weight is not None or args.distillation == "hard"):
            raise ValueError(
                f"`distillation` and `distillation_weight` do not apply to `reduction`={config.reduction!r}, which "
                "weights the teacher by its own `reduction_kwargs`."
            )
        self.weight = args.distillation_weight
        if self.weight is None:
            self.weight = DEFAULT_WEIGHTS[args.distillation]
        try:
            model = AutoModelForImageClassification.from_pretrained(
                args.teacher, revision=args.teacher_revision, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise ValueError(
                f"`teacher` {args.teacher} could not be loaded as an image classifier: {error}"
            ) from error
        names = list(config.id2label.values())
        theirs = [model.config.id2label[index] for index in range(model.config.num_labels)]
        if theirs != names:
            raise ValueError(
                f"`teacher` {args.teacher} must have the student's classes in the same order: it has {len(theirs)} "
                f"({', '.join(theirs[:3])}, ...), the student {len(names)} ({', '.join(names[:3])}, ...)."
            )
        size = getattr(model.config, "image_size", config.image_size)
        if size != config.image_size:
            raise ValueError(
                f"`teacher` {args.teacher} must have the student's `image_size` {config.image_size}, got {size}."
            )
        processors = None if image_processor is None else (image_processor, _processor_of(args, image_processor))
        use_tokens = self.by_method and args.distill_tokens
        self.teacher = Teacher(model, config.num_patches, use_tokens, processors)
        if use_tokens and (problem := self.teacher.token_mismatch(config)):
            if require_tokens:
                raise ValueError(
                    f"`distill_tokens`: `teacher` {args.teacher} {problem}. Choose another teacher, or distill only its "
                    "logits with --distill_tokens false"
                )
            logger.warning("`teacher` %s %s: distilling only its logits", args.teacher, problem)
            self.teacher.use_tokens = False

    def inputs(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the teacher's outputs for images (B, C, height, width), on their device; see `Teacher.__call__`."""
        if self.teacher.model.device != pixel_values.device:
            self.teacher.model.to(pixel_values.device)
        return self.teacher(pixel_values)

    def loss(self, outputs: Any, teacher_logits: torch.Tensor) -> torch.Tensor:
        """Return the student's loss mixed with the distillation loss, which is also added to `outputs.loss_terms`."""
        logits = outputs.logits
        distance = distillation_loss(
            logits, teacher_logits.to(logits.dtype), self.args.distillation, self.args.distillation_temperature
        )
        outputs.loss_terms = {**(outputs.loss_terms or {}), "distillation": (self.weight * distance).detach()}
        return (1 - self.weight) * outputs.loss + self.weight * distance
