"""The image processor of a converted model."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.clip.configuration_clip import CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.configuration_deit import DeiTConfig
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.siglip.configuration_siglip import SiglipVisionConfig
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.vit.configuration_vit import ViTConfig
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from clca import CLCAImageProcessor
from tests.checkpoints.transformers_sources import MLP, SIZES
from ufgir.checkpoints.from_transformers import load_transformers_processor


PROCESSORS = {
    "vit": (ViTConfig, ViTImageProcessorPil(size={"height": 32, "width": 32}, do_convert_rgb=True)),
    "deit": (
        DeiTConfig,
        DeiTImageProcessorPil(size={"height": 36, "width": 36}, crop_size={"height": 32, "width": 32}),
    ),
    "clip_vision_model": (
        CLIPVisionConfig,
        CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    ),
    "siglip_vision_model": (SiglipVisionConfig, SiglipImageProcessorPil(size={"height": 32, "width": 32})),
}


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, size=(60, 45, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", PROCESSORS)
class TestProcessor:
    @pytest.fixture
    def source(self, name, tmp_path) -> Path:
        config, processor = PROCESSORS[name]
        config(**SIZES, **MLP).save_pretrained(tmp_path)
        processor.save_pretrained(tmp_path)
        return tmp_path

    def test_it_equals_the_source(self, name, source, tmp_path):
        processor = load_transformers_processor(source)
        assert isinstance(processor, CLCAImageProcessor)
        ours, theirs = (p(picture(), return_tensors="pt")["pixel_values"] for p in (processor, PROCESSORS[name][1]))
        assert ours.shape == (1, 3, 32, 32)
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        processor.save_pretrained(tmp_path / "ours")
        again = CLCAImageProcessor.from_pretrained(tmp_path / "ours")
        assert torch.equal(again(picture(), return_tensors="pt")["pixel_values"], ours)

    @pytest.mark.parametrize("image_size", [64, (48, 64)], ids=str)
    def test_another_size(self, name, source, image_size):
        processor = load_transformers_processor(source, image_size)
        pixels = processor(picture(), return_tensors="pt")["pixel_values"]
        assert pixels.shape[-2:] == ((64, 64) if image_size == 64 else image_size)
        expected = {"height": 64, "width": 64} if image_size == 64 else {"height": 48, "width": 64}
        if name == "clip_vision_model" and image_size == 64:
            expected = {"shortest_edge": 64}
        else:
            grown = 9 if name == "deit" else 8
            assert processor.resize_size == tuple(pixels * grown // 8 for pixels in expected.values())
        assert dict(processor.size) == expected

    def test_without_a_processor(self, name, source, caplog):
        (source / "preprocessor_config.json").unlink()
        with caplog.at_level(logging.WARNING, logger="ufgir"):
            processor = load_transformers_processor(source, (32, 48))
        assert "no image processor" in caplog.text
        assert processor(picture(), return_tensors="pt")["pixel_values"].shape == (1, 3, 32, 48)

    def test_a_file_of_an_old_class(self, name, source):
        file = source / "preprocessor_config.json"
        contents = json.loads(file.read_text())
        expected = load_transformers_processor(source)
        file.write_text(json.dumps(contents | {"image_processor_type": "ViTFeatureExtractor"}))
        assert load_transformers_processor(source).to_dict() == expected.to_dict()

    def test_errors(self, name, source):
        for image_size in (0, (32,)):
            with pytest.raises(ValueError, match="`image_size` must be a positive integer"):
                load_transformers_processor(source, image_size)
        with pytest.raises(ValueError, match="is not a folder"):
            load_transformers_processor(source / "preprocessor_config.json")
