"""Learning from a teacher while training: options, and what the trainer adds to the loss."""

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

DEFAULT_WEIGHTS = {"soft": 0.5, "hard": 0.3}  # of the original


@dataclass
class DistillationArguments(OptionGroup):
    """A teacher, and how much is learnt from it.

    Raises:
        ValueError: another kind, or a weight or temperature out of range.
    """

    _argument_group_name = "distillation"

    teacher: str | None = option("image classifier to learn from: folder or Hub repository [none]")
    teacher_revision: str | None = option("branch, tag or commit of the teacher [main]")
    distillation: str = option(
        "soft: Kullback-Leibler divergence to the teacher's probabilities; hard: cross-entropy to its class", "soft"
    )
    distillation_weight: float | None = option(
        "share of the loss that comes from the teacher, in [0, 1] [0.5 soft, 0.3 hard]"
    )
    distillation_temperature: float = option("divides the logits of both, soft only", 1.0)
    distill_tokens: bool = option(
        "dyvit: the kept tokens learn from the teacher's tokens, too [where it has one of each patch]", True
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
    """The teacher's image processor; the student's, with a warning, where it has none."""
    try:
        return read_image_processor(args.teacher, args.teacher_revision)
    except (OSError, ValueError):
        logger.warning(
            "`teacher` %s has no image processor: its images are normalised with the student's `image_mean` and `image_std`",
            args.teacher,
        )
        return student


class Distillation:
    """What a teacher adds to a student's training, called by `UFGIRTrainer.compute_loss`.

    A student whose reduction distils (DynamicViT, https://huggingface.co/papers/2106.02034) gets the teacher's logits and
    tokens as arguments of its forward and weighs them itself, by `reduction_kwargs`. For any other, the loss becomes
    (1 - weight) * loss + weight * distance of the logits (https://huggingface.co/papers/2012.12877).

    Args:
        args: the options, with a teacher.
        config: of the student.
        image_processor: of the student: where the teacher's normalises in another way, its images are normalised anew. None:
            it takes them as they are.
        insists_on_tokens: refuse a teacher without the tokens that `distill_tokens` asks for. By default the student learns
            from such a teacher's logits alone, with a warning.

    Raises:
        ValueError: a teacher that cannot be loaded, of other classes or another image size, or without tokens that fit, or
            options that the student's method weighs itself.
    """

    def __init__(
        self,
        args: DistillationArguments,
        config: CLCAViTConfig,
        image_processor: Any = None,
        insists_on_tokens: bool = False,
    ) -> None:
        self.args = args
        self.by_method = get_reduction(config.reduction).distils
        if self.by_method and (args.distillation_weight is not None or args.distillation == "hard"):
            raise ValueError(
                f"`distillation` and `distillation_weight` do not apply to `reduction`={config.reduction!r}, which weighs "
                "its teacher by its own `reduction_kwargs`."
            )
        self.weight = args.distillation_weight
        if self.weight is None:
            self.weight = DEFAULT_WEIGHTS[args.distillation]
        try:
            model = AutoModelForImageClassification.from_pretrained(
                args.teacher, revision=args.teacher_revision, dtype=torch.float32
            )
        except (OSError, ValueError) as error:
            raise ValueError(f"`teacher` {args.teacher} cannot be loaded as an image classifier: {error}") from error
        names = list(config.id2label.values())
        theirs = [model.config.id2label[index] for index in range(model.config.num_labels)]
        if theirs != names:
            raise ValueError(
                f"`teacher` {args.teacher} knows {len(theirs)} classes ({', '.join(theirs[:3])}, ...), the student has "
                f"{len(names)} ({', '.join(names[:3])}, ...): they must be the same, in the same order."
            )
        size = getattr(model.config, "image_size", config.image_size)
        if size != config.image_size:
            raise ValueError(
                f"`teacher` {args.teacher} takes images of {size} pixels, the student {config.image_size}."
            )
        processors = None if image_processor is None else (image_processor, _processor_of(args, image_processor))
        use_tokens = self.by_method and args.distill_tokens
        self.teacher = Teacher(model, config.num_patches, use_tokens, processors)
        if use_tokens and (problem := self.teacher.why_no_tokens(config)):
            if insists_on_tokens:
                raise ValueError(
                    f"`distill_tokens`: `teacher` {args.teacher} {problem}: choose a teacher that has them, or learn from its "
                    "logits alone with --distill_tokens false"
                )
            logger.warning("`teacher` %s %s: the student learns from its logits alone", args.teacher, problem)
            self.teacher.use_tokens = False

    def inputs(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the teacher says of images (B, C, height, width), on their device."""
        if self.teacher.model.device != pixel_values.device:
            self.teacher.model.to(pixel_values.device)
        return self.teacher(pixel_values)

    def loss(self, outputs: Any, teacher_logits: torch.Tensor) -> torch.Tensor:
        """The student's loss with the teacher's share; also puts that into `outputs.loss_terms`."""
        logits = outputs.logits
        distance = distillation_loss(
            logits, teacher_logits.to(logits.dtype), self.args.distillation, self.args.distillation_temperature
        )
        outputs.loss_terms = {**(outputs.loss_terms or {}), "distillation": (self.weight * distance).detach()}
        return (1 - self.weight) * outputs.loss + self.weight * distance
