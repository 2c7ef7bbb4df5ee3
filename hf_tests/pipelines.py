"""Tests of pipelines for transformers' `PipelineTesterMixin`.

The mixin loads a model and calls the class of a task to create a pipeline and examples and to check the results. The source distribution
does not contain these classes, so they are defined here.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import ImageClassificationPipeline, ImageFeatureExtractionPipeline, Pipeline, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor


def _images() -> list[Image.Image]:
    """Create images of several sizes and modes."""
    sizes = {"RGB": (40, 30), "L": (16, 16), "RGBA": (20, 50)}
    return [Image.effect_noise(size, 64).convert(mode) for mode, size in sizes.items()]


class _ImagePipelineTests:
    pipeline_class: type[Pipeline]

    def get_test_pipeline(
        self,
        model: PreTrainedModel,
        tokenizer: None = None,
        image_processor: BaseImageProcessor | None = None,
        dtype: str = "float32",
    ) -> tuple[Pipeline, list[Image.Image]]:
        """Return a pipeline and its inputs."""
        pipe = self.pipeline_class(model=model, image_processor=image_processor, dtype=getattr(torch, dtype))
        return pipe, _images()

    def run_pipeline_test(self, pipe: Pipeline, examples: list[Image.Image]) -> None:
        """Check the results for one image, several images, batches and a file, which must be equal."""
        singly = [pipe(image) for image in examples]
        for result in singly:
            self.check(pipe, result)
        self.same(singly, pipe(examples))
        self.same(singly, pipe(examples, batch_size=2))
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "image.png"
            examples[0].save(file)
            self.same(singly[:1], [pipe(str(file))])

    def check(self, pipe: Pipeline, result: Any) -> None:
        raise NotImplementedError

    def values(self, result: Any) -> torch.Tensor:
        raise NotImplementedError

    def same(self, results: list[Any], others: list[Any]) -> None:
        for result, other in zip(results, others, strict=True):
            torch.testing.assert_close(self.values(result), self.values(other), atol=2e-3, rtol=2e-3)


class ImageClassificationPipelineTests(_ImagePipelineTests):
    """The result contains every class with its score, in descending order."""

    pipeline_class = ImageClassificationPipeline

    def check(self, pipe: Pipeline, result: list[dict[str, Any]]) -> None:
        names = set(pipe.model.config.id2label.values())
        assert {answer["label"] for answer in result} == names and len(result) == len(names)
        scores = [answer["score"] for answer in result]
        assert scores == sorted(scores, reverse=True) and abs(sum(scores) - 1) < 1e-2

    def values(self, result: list[dict[str, Any]]) -> torch.Tensor:
        return torch.tensor([answer["score"] for answer in sorted(result, key=lambda answer: answer["label"])])

    def run_pipeline_test(self, pipe: Pipeline, examples: list[Image.Image]) -> None:
        super().run_pipeline_test(pipe, examples)
        assert pipe(examples[0], top_k=1) == pipe(examples[0])[:1]


class ImageFeatureExtractionPipelineTests(_ImagePipelineTests):
    """The result contains the final tokens."""

    pipeline_class = ImageFeatureExtractionPipeline

    def check(self, pipe: Pipeline, result: list[list[list[float]]]) -> None:
        tokens = self.values(result)
        assert tokens.dim() == 3 and tokens.shape[0] == 1 and tokens.shape[-1] == pipe.model.config.hidden_size
        assert tokens.isfinite().all()

    def values(self, result: list[list[list[float]]]) -> torch.Tensor:
        return torch.tensor(result)
