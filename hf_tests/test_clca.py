"""`CLCAViTModel`, `CLCAViTForImageClassification` and `CLCAViTBackbone` under transformers' common tests of models, configurations,
pipelines and backbones: without a reduction, and with methods that drop, fuse and merge tokens, with the cross-layer cache and
the aggregation head.
"""

import tempfile
import unittest
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import torch
from transformers import ViTImageProcessorPil, set_seed
from transformers.models.auto import modeling_auto
from transformers.testing_utils import torch_device
from transformers_tests import test_pipeline_mixin
from transformers_tests.test_backbone_common import BackboneTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_pipeline_mixin import PipelineTesterMixin

from clca import CLCAViTBackbone, CLCAViTConfig, CLCAViTForImageClassification, CLCAViTModel, CLCAViTPreTrainedModel


# The tests know by these tables which class takes which labels.
modeling_auto.MODEL_MAPPING_NAMES["clca_vit"] = "CLCAViTModel"
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES["clca_vit"] = "CLCAViTBackbone"
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["clca_vit"] = "CLCAViTForImageClassification"

for task, name in {
    "image-classification": "ImageClassificationPipelineTests",
    "image-feature-extraction": "ImageFeatureExtractionPipelineTests",
}.items():
    test_pipeline_mixin.pipeline_test_mapping[task] = {"test": f"hf_tests.pipelines.{name}"}


class CLCAViTModelTester:
    """Tiny models and inputs for them. The tests read the attributes."""

    def __init__(self, parent: unittest.TestCase, **options: Any) -> None:
        self.parent = parent
        self.options = options
        self.batch_size = 5
        self.image_size = 32
        self.patch_size = 8  # 16 patches
        self.num_channels = 3
        self.hidden_size = 32
        self.num_hidden_layers = 3  # two may reduce, and one is left to work with the result
        self.num_attention_heads = 4
        self.num_labels = 4
        self.is_training = True
        self.seq_length = 1 + 16 + options.get("num_clr_tokens", 0)

    def get_config(self) -> CLCAViTConfig:
        return CLCAViTConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            num_channels=self.num_channels,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=37,
            num_labels=self.num_labels,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self) -> tuple[CLCAViTConfig, dict[str, torch.Tensor]]:
        pixels = torch.randn(self.batch_size, self.num_channels, self.image_size, self.image_size)
        return self.get_config(), {"pixel_values": pixels.to(torch_device)}


class CommonTests(ModelTesterMixin, PipelineTesterMixin):
    """What every configuration goes through."""

    all_model_classes = (CLCAViTModel, CLCAViTForImageClassification, CLCAViTBackbone)
    pipeline_model_mapping: ClassVar = {
        "image-classification": CLCAViTForImageClassification,
        "image-feature-extraction": CLCAViTModel,
    }
    test_resize_embeddings = False  # there is no vocabulary
    test_can_init_all_missing_weights_before_2023 = True  # else skipped where the file does not tell its year

    options: ClassVar[dict[str, Any]] = {}
    # Rows that enter each layer, and those that leave the last: CLS, 16 patches, CLR; what the cache recalls.
    token_counts: tuple[int, ...] = (17, 17, 17, 17)
    attended_first = 17  # rows in the attention of the first layer

    def setUp(self) -> None:
        set_seed(0)
        self.model_tester = CLCAViTModelTester(self, **self.options)
        self.config_tester = ConfigTester(self, config_class=CLCAViTConfig, has_text_modality=False, **self.options)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_tokens_are_reduced(self) -> None:
        """The other tests would mean little if they met a model that does not reduce."""
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        config._attn_implementation = "eager"
        for model_class in self.all_model_classes:
            model = model_class(config).to(torch_device).eval()
            outputs = model(**inputs, output_hidden_states=True, output_attentions=True)
            self.assertEqual(outputs.token_counts, self.token_counts)
            self.assertEqual(outputs.attentions[0].shape[-1], self.attended_first)
            self.assertEqual(len(outputs.hidden_states), len(self.token_counts))

    # Overrides.

    def test_num_layers_is_small(self) -> None:
        """Theirs allows two layers; a reduction in the first ones needs a third."""
        self.assertEqual(self.model_tester.num_hidden_layers, 3)

    def test_attention_outputs(self) -> None:
        """Theirs, told how many rows the first layer attends to: a method that merges tokens before a layer leaves fewer
        than the embeddings have."""
        with mock.patch.object(self.model_tester, "encoder_seq_length", self.attended_first, create=True):
            super().test_attention_outputs()

    def test_model_get_set_embeddings(self) -> None:
        """Theirs expects a table of words; here it is the projection of patches."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIs(model.get_input_embeddings(), model.base_model.embeddings.patch_embeddings)
            self.assertIsNone(model.get_output_embeddings())
            other = torch.nn.Identity()
            model.set_input_embeddings(other)
            self.assertIs(model.get_input_embeddings(), other)

    def test_enable_input_require_grads_with_gradient_checkpointing(self) -> None:
        """Theirs, which looks for `weight` in the embeddings; here it is one level below."""

        def projection(model: CLCAViTModel) -> torch.nn.Module:
            return model.embeddings.patch_embeddings.projection

        with mock.patch.object(CLCAViTModel, "get_input_embeddings", projection):
            super().test_enable_input_require_grads_with_gradient_checkpointing()

    def test_reverse_loading_mapping(self) -> None:
        """Theirs, with the old key names of stock ViT files. It takes them for the default; here they are an option,
        since Trainer cannot resume from such files."""
        save = CLCAViTPreTrainedModel.save_pretrained

        def save_old_names(model: CLCAViTPreTrainedModel, folder: str) -> None:
            save(model, folder, save_original_format=True)

        # Every pattern must find a key: DeiT's distillation token becomes a register token.
        register = mock.patch.dict(self.model_tester.options, num_register_tokens=1)
        with register, mock.patch.object(CLCAViTPreTrainedModel, "save_pretrained", save_old_names):
            super().test_reverse_loading_mapping()

    def test_can_load_ignoring_mismatched_shapes_of_any_head(self) -> None:
        """Their test of almost this name looks for a linear layer and skips where it finds none, as in the CLA head."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        old = CLCAViTForImageClassification(config)
        with tempfile.TemporaryDirectory() as folder:
            old.save_pretrained(folder)
            with self.assertRaises(RuntimeError):
                CLCAViTForImageClassification.from_pretrained(folder, num_labels=9)
            new = CLCAViTForImageClassification.from_pretrained(folder, num_labels=9, ignore_mismatched_sizes=True)
        before, after = old.state_dict(), new.state_dict()
        self.assertEqual(before.keys(), after.keys())
        changed = {name for name in before if before[name].shape != after[name].shape}
        last = "classifier." if config.head == "linear" else "classifier.out_proj."
        self.assertEqual(changed, {f"{last}weight", f"{last}bias"})
        for name in before.keys() - changed:
            self.assertTrue(torch.equal(before[name], after[name]), name)
        for name in changed:
            self.assertEqual(len(after[name]), 9)
            self.assertTrue(after[name].isfinite().all())

    def test_pipeline_image_feature_extraction(self) -> None:
        """Theirs requires timm, which has no part in it."""
        self.run_task_tests("image-feature-extraction")

    def test_pipeline_image_feature_extraction_fp16(self) -> None:
        """Likewise."""
        self.run_task_tests("image-feature-extraction", dtype="float16")

    def run_pipeline_test(self, task: str, repo_name: str, model_architecture: type, **kwargs: Any) -> None:
        """Theirs, on a model of this configuration instead of one from the Hub."""
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / model_architecture.config_class.model_type / repo_name
            model_architecture(self.model_tester.get_config()).save_pretrained(model)
            size = {"height": self.model_tester.image_size, "width": self.model_tester.image_size}
            ViTImageProcessorPil(size=size, do_convert_rgb=True).save_pretrained(model)
            with mock.patch.object(test_pipeline_mixin, "TRANSFORMERS_TINY_MODEL_PATH", folder):
                super().run_pipeline_test(task, repo_name, model_architecture, **kwargs)


# Reductions in the first two of three layers; CLC with GAP and one CLR; CLA.
CLCA: dict[str, Any] = {
    "reduction_layers": [0, 1],
    "keep_rate": [0.5],  # a list, as it is stored: they compare
    "cross_layer_cache": True,
    "num_clr_tokens": 1,
    "head": "cla",
}


class NoReductionTest(CommonTests, unittest.TestCase):
    """A ViT."""


class TopKTest(CommonTests, unittest.TestCase):
    """Drops tokens."""

    options = CLCA | {"reduction": "topk"}
    token_counts = (18, 10, 8, 8)
    attended_first = 18


class EViTTest(CommonTests, unittest.TestCase):
    """Drops tokens, and keeps their weighted sum."""

    options = CLCA | {"reduction": "evit"}
    token_counts = (18, 11, 9, 9)
    attended_first = 18


class ToMeTest(CommonTests, unittest.TestCase):
    """Merges pairs of tokens."""

    options = CLCA | {"reduction": "tome"}
    token_counts = (18, 10, 8, 8)
    attended_first = 18


class DPCKNNTest(CommonTests, unittest.TestCase):
    """Merges clusters of tokens, before the layer."""

    options = CLCA | {"reduction": "dpcknn"}
    token_counts = (18, 10, 8, 8)
    attended_first = 10


class BackboneCommonTests(BackboneTesterMixin):
    """Feature maps."""

    all_model_classes = (CLCAViTBackbone,)
    config_class = CLCAViTConfig
    options: ClassVar[dict[str, Any]] = {}

    def setUp(self) -> None:
        set_seed(0)
        self.model_tester = CLCAViTModelTester(self, **self.options)


class NoReductionBackboneTest(BackboneCommonTests, unittest.TestCase):
    """Of a ViT."""


class EViTBackboneTest(BackboneCommonTests, unittest.TestCase):
    """Of a model that drops and fuses tokens."""

    options = CLCA | {"reduction": "evit"}


class ToMeBackboneTest(BackboneCommonTests, unittest.TestCase):
    """Of a model that merges tokens."""

    options = CLCA | {"reduction": "tome"}
