"""transformers' common tests of models, configurations, pipelines and backbones for `CLCAViTModel`, `CLCAViTForImageClassification` and
`CLCAViTBackbone`: without a reduction, and with methods that drop, fuse and merge tokens, with the cross-layer cache and the CLA head.
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


# The tests use these tables to determine the labels of a class.
modeling_auto.MODEL_MAPPING_NAMES["clca_vit"] = "CLCAViTModel"
modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES["clca_vit"] = "CLCAViTBackbone"
modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES["clca_vit"] = "CLCAViTForImageClassification"

for task, name in {
    "image-classification": "ImageClassificationPipelineTests",
    "image-feature-extraction": "ImageFeatureExtractionPipelineTests",
}.items():
    test_pipeline_mixin.pipeline_test_mapping[task] = {"test": f"hf_tests.pipelines.{name}"}


class CLCAViTModelTester:
    """Configuration and inputs of tiny models. The tests read the attributes."""

    def __init__(self, parent: unittest.TestCase, **options: Any) -> None:
        self.parent = parent
        self.options = options
        self.batch_size = 5
        self.image_size = 32
        self.patch_size = 8  # 16 patches
        self.num_channels = 3
        self.hidden_size = 32
        self.num_hidden_layers = 3  # two layers that reduce, and one after them
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
    """Tests of every configuration."""

    all_model_classes = (CLCAViTModel, CLCAViTForImageClassification, CLCAViTBackbone)
    pipeline_model_mapping: ClassVar = {
        "image-classification": CLCAViTForImageClassification,
        "image-feature-extraction": CLCAViTModel,
    }
    test_resize_embeddings = False  # there is no vocabulary
    test_can_init_all_missing_weights_before_2023 = True  # otherwise skipped for files without a year

    options: ClassVar[dict[str, Any]] = {}
    # Tokens that enter each layer, and those after the last: CLS, 16 patches, CLR, and tokens retrieved from the cache.
    token_counts: tuple[int, ...] = (17, 17, 17, 17)
    attended_first = 17  # tokens in the attention of the first layer

    def setUp(self) -> None:
        set_seed(0)
        self.model_tester = CLCAViTModelTester(self, **self.options)
        self.config_tester = ConfigTester(self, config_class=CLCAViTConfig, has_text_modality=False, **self.options)

    def test_config(self) -> None:
        self.config_tester.run_common_tests()

    def test_tokens_are_reduced(self) -> None:
        """Tokens are reduced, so that the other tests check a model with a reduction."""
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
        """The original allows two layers, but a reduction in both needs a third."""
        self.assertEqual(self.model_tester.num_hidden_layers, 3)

    def test_attention_outputs(self) -> None:
        """The original, with the number of tokens in the first attention, which is smaller than that of the embeddings for a method that
        merges tokens before a layer."""
        with mock.patch.object(self.model_tester, "encoder_seq_length", self.attended_first, create=True):
            super().test_attention_outputs()

    def test_model_get_set_embeddings(self) -> None:
        """The original expects an embedding of words; ours is the projection of patches."""
        config, _ = self.model_tester.prepare_config_and_inputs_for_common()
        for model_class in self.all_model_classes:
            model = model_class(config)
            self.assertIs(model.get_input_embeddings(), model.base_model.embeddings.patch_embeddings)
            self.assertIsNone(model.get_output_embeddings())
            other = torch.nn.Identity()
            model.set_input_embeddings(other)
            self.assertIs(model.get_input_embeddings(), other)

    def test_enable_input_require_grads_with_gradient_checkpointing(self) -> None:
        """The original needs the attribute `weight` of the embeddings, which ours have one level below."""

        def projection(model: CLCAViTModel) -> torch.nn.Module:
            return model.embeddings.patch_embeddings.projection

        with mock.patch.object(CLCAViTModel, "get_input_embeddings", projection):
            super().test_enable_input_require_grads_with_gradient_checkpointing()

    def test_reverse_loading_mapping(self) -> None:
        """The original, with the key names of older ViT files. They are the default of transformers, but an option of ours, because
        Trainer cannot resume from such files."""
        save = CLCAViTPreTrainedModel.save_pretrained

        def save_old_names(model: CLCAViTPreTrainedModel, folder: str) -> None:
            save(model, folder, save_original_format=True)

        # Every pattern must find a key: DeiT's distillation token becomes a register token.
        register = mock.patch.dict(self.model_tester.options, num_register_tokens=1)
        with register, mock.patch.object(CLCAViTPreTrainedModel, "save_pretrained", save_old_names):
            super().test_reverse_loading_mapping()

    def test_can_load_ignoring_mismatched_shapes_of_any_head(self) -> None:
        """Replaces the original, which is skipped without a linear layer, as in the CLA head."""
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
        """The original requires timm without using it."""
        self.run_task_tests("image-feature-extraction")

    def test_pipeline_image_feature_extraction_fp16(self) -> None:
        """The original requires timm without using it."""
        self.run_task_tests("image-feature-extraction", dtype="float16")

    def run_pipeline_test(self, task: str, repo_name: str, model_architecture: type, **kwargs: Any) -> None:
        """Run the original with a model of this configuration instead of one from the Hub."""
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
    "keep_rate": [0.5],  # a list, as in a saved configuration, because the tests compare them
    "cross_layer_cache": True,
    "num_clr_tokens": 1,
    "head": "cla",
}


class NoReductionTest(CommonTests, unittest.TestCase):
    """ViT without reduction."""


class TopKTest(CommonTests, unittest.TestCase):
    """Method that drops tokens."""

    options = CLCA | {"reduction": "topk"}
    token_counts = (18, 10, 8, 8)
    attended_first = 18


class EViTTest(CommonTests, unittest.TestCase):
    """Method that fuses dropped tokens into one."""

    options = CLCA | {"reduction": "evit"}
    token_counts = (18, 11, 9, 9)
    attended_first = 18


class ToMeTest(CommonTests, unittest.TestCase):
    """Method that merges pairs of tokens."""

    options = CLCA | {"reduction": "tome"}
    token_counts = (18, 10, 8, 8)
    attended_first = 18


class DPCKNNTest(CommonTests, unittest.TestCase):
    """Method that merges clusters of tokens before a layer."""

    options = CLCA | {"reduction": "dpcknn"}
    token_counts = (18, 10, 8, 8)
    attended_first = 10


class BackboneCommonTests(BackboneTesterMixin):
    """Tests of feature maps."""

    all_model_classes = (CLCAViTBackbone,)
    config_class = CLCAViTConfig
    options: ClassVar[dict[str, Any]] = {}

    def setUp(self) -> None:
        set_seed(0)
        self.model_tester = CLCAViTModelTester(self, **self.options)


class NoReductionBackboneTest(BackboneCommonTests, unittest.TestCase):
    """Backbone without reduction."""


class EViTBackboneTest(BackboneCommonTests, unittest.TestCase):
    """Backbone with a method that drops and fuses tokens."""

    options = CLCA | {"reduction": "evit"}


class ToMeBackboneTest(BackboneCommonTests, unittest.TestCase):
    """Backbone with a method that merges tokens."""

    options = CLCA | {"reduction": "tome"}
