"""Uploaded images: they are small and RGB, and harmful files are rejected."""

import logging

import pytest
import torch
from PIL import Image

from tests.app.helpers import png
from ufgir.app.viewer import (
    LONGEST_SIDE,
    drawn_examples,
    folder_examples,
    load_checkpoint,
    make_leaf,
    open_leaf,
)
from ufgir.cli.common import open_image
from ufgir.data.load import load_images
from ufgir.data.transformed import TransformedImages
from ufgir.transforms.preprocessing import EvalTransform
from ufgir.visualization.kinds import make_view


# Pictures


def test_pictures_of_all_kinds_become_small_and_rgb(tmp_path):
    turned = Image.new("RGB", (40, 20), "green")
    turned.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright
    turned.save(tmp_path / "turned.png", exif=exif)
    assert open_leaf(tmp_path / "turned.png").image.size == (20, 40)
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_leaf(tmp_path / "clear.png").image.getpixel((5, 5)) == (255, 255, 255)
    Image.new("CMYK", (3000, 200)).save(tmp_path / "long.jpg")
    assert open_leaf(tmp_path / "long.jpg").image.size[0] == LONGEST_SIDE
    for mode in ("1", "L", "P", "I;16"):
        Image.new(mode, (8, 6)).save(tmp_path / "mode.png")
        assert open_leaf(tmp_path / "mode.png").image.mode == "RGB"


def test_a_huge_picture_is_made_small_and_a_bomb_is_refused(tmp_path):
    (tmp_path / "huge.png").write_bytes(png(12000, 9000))
    assert open_leaf(tmp_path / "huge.png").image.size == (1024, 768)
    (tmp_path / "bomb.png").write_bytes(png(30000, 30000, rows=1))
    with pytest.raises(ValueError, match=r"bomb.png has more than 120 million pixels: make it smaller"):
        open_leaf(tmp_path / "bomb.png")


def test_an_image_is_no_thread(tmp_path):
    """Resizing a very narrow image by its shorter side would make the longer side huge."""
    Image.new("RGB", (4, 80)).save(tmp_path / "leaf.png")
    assert open_leaf(tmp_path / "leaf.png").image.size == (4, 80)
    Image.new("RGB", (4, 81)).save(tmp_path / "thread.png")
    with pytest.raises(ValueError, match=r"thread\.png is more than 20 times as long as wide"):
        open_leaf(tmp_path / "thread.png")


def test_no_file_reaches_another_program(tmp_path, monkeypatch):
    """Pillow opens EPS files with Ghostscript, regardless of the file name."""
    called = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *eps, **options: called.append(eps))
    (tmp_path / "leaf.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n%%EOF\n")
    with pytest.raises(ValueError, match=r"leaf\.png is not an image"):
        open_leaf(tmp_path / "leaf.png")
    assert called == []


def test_a_file_is_the_same_picture_everywhere(tmp_path, viewer, checkpoint):
    """The page, `ufgir visualize` and `ufgir predict` give the same pixels for rotated, transparent and 16-bit images."""
    turned, exif = Image.effect_mandelbrot((40, 40), (-2, -1, 1, 1), 40).convert("RGB"), Image.Exif()
    exif[274] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    clear = turned.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize((40, 40)))
    clear.save(tmp_path / "clear.png")
    levels = torch.arange(1600, dtype=torch.int32).view(40, 40).mul(40).numpy().astype("uint16")
    Image.fromarray(levels).save(tmp_path / "deep.png")
    model, processor = viewer.checkpoint(checkpoint)[:2]
    for file in sorted(tmp_path.iterdir()):
        images = TransformedImages(load_images(str(file), verify=False), EvalTransform(processor), label_column=None)
        expected = images[0]["pixel_values"]
        for pixels in (
            viewer.view(checkpoint, open_leaf(file)).pixels[0],
            make_view(model, processor, [open_image(str(file))]).pixels[0],
        ):
            torch.testing.assert_close(pixels, expected)


@pytest.mark.parametrize("content", [b"", b"no picture", png(64, 64)[:60]], ids=["empty", "text", "cut off"])
def test_broken_files_are_refused(tmp_path, content):
    (tmp_path / "leaf.png").write_bytes(content)
    with pytest.raises(ValueError, match=r"^leaf.png is not an image that can be read"):
        open_leaf(tmp_path / "leaf.png")


def test_equal_pictures_are_equal_leaves():
    green, other = Image.new("RGB", (8, 8), "green"), Image.new("RGB", (8, 8), "olive")
    assert make_leaf(green) == make_leaf(green.copy()) and hash(make_leaf(green)) == hash(make_leaf(green.copy()))
    assert make_leaf(green) != make_leaf(other)
    assert make_leaf(Image.new("RGB", (4, 16), "green")) != make_leaf(green)


def test_examples_are_drawn_only_for_a_model_of_drawn_leaves(checkpoint):
    config = load_checkpoint(checkpoint).config
    examples = drawn_examples(config, count=2)
    assert [name for name, _ in examples] == ["cultivar_00", "cultivar_01"]
    assert examples[0][1].image.size == (32, 32) and examples[0][1] != examples[1][1]
    config.id2label = {0: "oak", 1: "ash", 2: "elm"}
    assert drawn_examples(config) == []


def test_examples_of_a_folder(tmp_path, caplog):
    with pytest.raises(ValueError, match="contains no readable image"):
        folder_examples(tmp_path)
    (tmp_path / "ash").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "ash" / "a leaf.png")
    (tmp_path / "b.png").write_bytes(b"broken")
    (tmp_path / "notes.txt").write_text("no picture")
    with caplog.at_level(logging.WARNING):
        assert [name for name, _ in folder_examples(tmp_path)] == ["a leaf"]
    assert "b.png is not an image" in caplog.text
    with pytest.raises(ValueError, match="must be a folder of images"):
        folder_examples(tmp_path / "b.png")
