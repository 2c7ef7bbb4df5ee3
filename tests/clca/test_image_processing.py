"""Image processor: sizes in memory and in files, old files, clients without its code, and all kinds of images."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from transformers import AutoImageProcessor, CLIPImageProcessorPil, ViTImageProcessorPil

import clca.image_processing_clca
from clca import CLCAImageProcessor
from clca.image_processing_clca import open_image, to_rgb


SQUARE = {"height": 24, "width": 24}
STATISTICS = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}


def leaf(width: int = 41, height: int = 57, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def pixels_of(processor: Any, *images: Any) -> torch.Tensor:
    return processor(images=list(images), return_tensors="pt").pixel_values


def cropping(resize: int = 30, **changes: Any) -> ViTImageProcessorPil:
    """Return the configuration in folders of earlier versions."""
    size = {"size": {"height": resize, "width": resize}, "crop_size": SQUARE, "do_center_crop": True}
    return ViTImageProcessorPil(**{**size, "resample": 3, "do_convert_rgb": True, **STATISTICS, **changes})


@pytest.mark.parametrize("resize", [24, 25, 27, 31, 109])
def test_a_file_of_an_earlier_version_keeps_its_sizes_and_pixels(resize, tmp_path):
    old = cropping(resize)
    old.save_pretrained(tmp_path)
    new = CLCAImageProcessor.from_pretrained(tmp_path)
    assert dict(new.size) == SQUARE and new.resize_size == (resize, resize)
    image = leaf()
    torch.testing.assert_close(pixels_of(new, image), pixels_of(old, image), rtol=0, atol=1e-6)
    new.save_pretrained(tmp_path)
    again = CLCAImageProcessor.from_pretrained(tmp_path)
    assert again.resize_size == (resize, resize) and torch.equal(pixels_of(again, image), pixels_of(new, image))


def test_every_resize_size_survives_as_a_share():
    for size in (1, 96, 224, 448, 1000):
        for resize in range(size, 3 * size + 2):
            processor = CLCAImageProcessor(size={"height": size, "width": size}, crop_pct=size / resize)
            assert processor.resize_size == (resize, resize)


@pytest.mark.parametrize(
    "values, sizes",
    [
        ({"size": 24}, ((24, 24), SQUARE)),
        ({"size": {"height": 24, "width": 48}, "crop_pct": [0.8, 0.96]}, ((30, 50), {"height": 24, "width": 48})),
        ({"size": 30, "crop_size": 24, "do_center_crop": False}, ((30, 30), {"height": 30, "width": 30})),
        ({"size": 30, "crop_size": 24, "do_center_crop": True, "crop_pct": 0.5}, ((30, 30), SQUARE)),
    ],
    ids=str,
)
def test_sizes(values, sizes):
    processor = CLCAImageProcessor(**values)
    assert (processor.resize_size, dict(processor.size)) == sizes
    size = sizes[1]
    assert pixels_of(processor, leaf()).shape == (1, 3, size["height"], size["width"])


def test_another_size_keeps_the_share(tmp_path):
    CLCAImageProcessor(size=24, crop_pct=0.8).save_pretrained(tmp_path)
    assert CLCAImageProcessor.from_pretrained(tmp_path, size={"height": 48, "width": 48}).resize_size == (60, 60)
    processor = CLCAImageProcessor(size=24, crop_pct=0.8)
    assert processor(leaf(), size={"height": 48, "width": 48}, return_tensors="pt").pixel_values.shape[-1] == 48


def test_the_shortest_edge_keeps_the_aspect_ratio():
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 30}, crop_size=SQUARE, **STATISTICS)
    ours = CLCAImageProcessor(
        size={"shortest_edge": 30},
        crop_size=SQUARE,
        do_center_crop=True,
        resample=3,
        do_convert_rgb=True,
        **STATISTICS,
    )
    assert dict(ours.size) == {"shortest_edge": 24}  # what clients take for the model's input
    torch.testing.assert_close(pixels_of(ours, leaf()), pixels_of(theirs, leaf()), rtol=0, atol=1e-6)
    assert CLCAImageProcessor(**ours.to_dict()).to_dict() == ours.to_dict()
    with pytest.raises(ValueError, match="`size`"):
        ours.resize_size  # noqa: B018


@pytest.mark.parametrize("share", [0, 1.2, -0.5, [0.5, 0.5, 0.5], float("nan")])
def test_a_share_out_of_range(share):
    with pytest.raises(ValueError, match="`crop_pct` must be in"):
        CLCAImageProcessor(size=24, crop_pct=share)


def test_switches_are_obeyed():
    image = leaf(30, 30)
    raw = CLCAImageProcessor(size=24, do_resize=False, do_rescale=False, do_normalize=False)
    assert torch.equal(pixels_of(raw, image)[0], torch.from_numpy(np.array(image)).permute(2, 0, 1).float())
    scaled = CLCAImageProcessor(size=24, do_resize=False, do_normalize=False)
    torch.testing.assert_close(pixels_of(scaled, image), pixels_of(raw, image) / 255)
    assert isinstance(raw(image).pixel_values[0], np.ndarray)


def test_arrays_and_tensors_are_as_their_image():
    processor, image = CLCAImageProcessor(size=24, crop_pct=0.8, do_convert_rgb=True), leaf()
    expected = pixels_of(processor, image)
    assert torch.equal(pixels_of(processor, np.array(image)), expected)
    assert torch.equal(pixels_of(processor, torch.from_numpy(np.array(image)).permute(2, 0, 1)), expected)
    grey = np.array(image.convert("L"))
    assert torch.equal(pixels_of(processor, grey[None]), pixels_of(processor, Image.fromarray(grey)))


def test_a_batch_of_images_of_other_sizes():
    processor, images = CLCAImageProcessor(size=24, crop_pct=0.8), [leaf(), leaf(80, 20, 1)]
    assert torch.equal(pixels_of(processor, *images), torch.cat([pixels_of(processor, image) for image in images]))


# What other clients load


def saved(folder: Path) -> CLCAImageProcessor:
    processor = CLCAImageProcessor(size=24, crop_pct=24 / 30, resample=3, do_convert_rgb=True, **STATISTICS)
    processor.save_pretrained(folder)
    return processor


def test_the_folder_holds_its_code(tmp_path):
    saved(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"preprocessor_config.json", "image_processing_clca.py"}
    file = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert file["image_processor_type"] == "ViTImageProcessor" and file["size"] == SQUARE
    assert file["auto_map"] == {"AutoImageProcessor": "image_processing_clca.CLCAImageProcessor"}


def test_trusted_code_is_ours_and_others_get_the_stock_class_without_the_crop(tmp_path):
    processor, image = saved(tmp_path), leaf()
    trusted = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=True)
    assert type(trusted).__name__ == "CLCAImageProcessor"
    assert torch.equal(pixels_of(trusted, image), pixels_of(processor, image))
    trusted.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "image_processing_clca.py").is_file()

    stock = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(stock) is ViTImageProcessorPil and dict(stock.size) == SQUARE
    whole = CLCAImageProcessor(size=24, resample=3, **STATISTICS)
    torch.testing.assert_close(pixels_of(stock, image), pixels_of(whole, image), rtol=0, atol=1e-6)


def test_two_lines_put_the_stock_class_right(tmp_path):
    """The two lines of the model card restore the crop."""
    processor = saved(tmp_path)
    crop = {"size": {"height": 30, "width": 30}, "do_center_crop": True, "crop_size": SQUARE}
    for trust in (False, True):
        restored = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=trust, **crop)
        torch.testing.assert_close(pixels_of(restored, leaf()), pixels_of(processor, leaf()), rtol=0, atol=1e-6)


def test_what_training_scripts_read_is_the_input_of_the_model(tmp_path):
    """The scripts of transformers crop to `size`: its shortest edge, or its height and width."""
    saved(tmp_path)
    for trust in (False, True):
        processor = AutoImageProcessor.from_pretrained(tmp_path, trust_remote_code=trust)
        if "shortest_edge" in processor.size:
            size = processor.size["shortest_edge"]
        else:
            size = (processor.size["height"], processor.size["width"])
        assert size == (24, 24)
        assert {name: list(getattr(processor, name)) for name in STATISTICS} == STATISTICS


# Images of every kind


def kinds_of_images(folder: Path) -> dict[str, Path]:
    """Return ten leaves: rotated by EXIF, transparent, with 16 bits, with palettes."""
    rng = np.random.default_rng(3)
    image, alpha = leaf(60, 40, 5), Image.fromarray(rng.integers(0, 256, (40, 60), dtype=np.uint8))
    transparent, palette = image.copy(), image.quantize(16)
    transparent.putalpha(alpha)
    deep = rng.integers(0, 2**16, (40, 60)).astype(np.uint16)
    files: dict[str, Path] = {}

    def save(name: str, what: Image.Image, **options: Any) -> None:
        files[name] = folder / name
        what.save(files[name], **options)

    for orientation in (3, 6, 8):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientation
        save(f"turned_{orientation}.jpg", image, exif=exif)
    save("transparent.png", transparent)
    save("grey_transparent.png", transparent.convert("LA"))
    save("palette.png", palette)
    save("transparent_palette.png", palette, transparency=3)
    save("deep.png", Image.fromarray(deep))
    save("deep.tif", Image.fromarray(deep.astype(np.int32)))
    save("turned_transparent.png", transparent, exif=exif)
    return files


@pytest.fixture(scope="module")
def leaves(tmp_path_factory) -> dict[str, Path]:
    return kinds_of_images(tmp_path_factory.mktemp("leaves"))


def test_ten_kinds_of_images_in_every_way_they_are_given(leaves, tmp_path):
    processor = saved(tmp_path)
    assert len(leaves) == 10
    for file in leaves.values():
        expected = pixels_of(processor, open_image(file))
        assert torch.equal(pixels_of(processor, str(file)), expected)
        with Image.open(file) as image:
            assert torch.equal(pixels_of(processor, image), expected)
        assert torch.equal(pixels_of(processor, processor.open_image(file)), expected)
        with file.open("rb") as stream:
            assert torch.equal(pixels_of(processor, open_image(stream)), expected)


def test_an_image_is_known_by_its_content(tmp_path):
    leaf().save(tmp_path / "a.avif")
    leaf().save(tmp_path / "a.mpo", save_all=True, append_images=[leaf(seed=1)])
    for name, suffix in (("a.avif", ".jpg"), ("a.mpo", ".txt")):
        renamed = (tmp_path / name).rename(tmp_path / f"renamed{suffix}")
        assert open_image(renamed).size == (41, 57)


class TestUnusedBits:
    @pytest.fixture(autouse=True)
    def forget(self, monkeypatch):
        monkeypatch.setattr(clca.image_processing_clca, "_depths_warned_of", set())

    @pytest.mark.parametrize("high, bits", [(4095, 12), (1023, 10), (16383, 14), (3000, 12)])
    def test_a_camera_of_fewer_bits(self, high, bits, caplog, tmp_path):
        file = tmp_path / "sensor.tif"
        Image.fromarray(np.linspace(0, high, 600).reshape(20, 30).astype(np.uint16)).save(file)
        with caplog.at_level(logging.WARNING, logger="clca"):
            image = open_image(file)
            open_image(file)
        assert image.mode == "RGB"
        assert [record.levelno for record in caplog.records] == [logging.WARNING]
        assert "sensor.tif" in caplog.text and f"{bits} bits" in caplog.text
        assert f"by {2 ** (16 - bits)} " in caplog.text

    @pytest.mark.parametrize("values", [[[0, 65535]], [[0, 20000]], [[0, 0]]], ids=["16 bits", "rather dark", "black"])
    def test_others_are_not_warned_of(self, values, caplog):
        with caplog.at_level(logging.WARNING, logger="clca"):
            to_rgb(Image.fromarray(np.array(values, np.uint16)))
            to_rgb(Image.fromarray(np.array([[0, 255]], np.int32)))  # 8 bits
        assert not caplog.records
