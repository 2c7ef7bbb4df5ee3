"""Overlays for images, and sheets: checked on the pixels."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.visualization.helpers import cell
from ufgir.visualization import sheet
from ufgir.visualization.sheet import (
    Cell,
    brightened,
    distinct_colors,
    draw_sheet,
    heat,
    heated,
    mean_colors,
    over_pixels,
    save_image,
)


# Overlays


def test_brightness() -> None:
    """Kept patches have full brightness, dropped ones 15 %."""
    image = torch.ones(3, 4, 6)
    shares = torch.tensor([[1.0, 0.0, 0.5], [0.0, 0.0, 1.0]])
    drawn = brightened(image, shares)
    assert drawn[0, ::2, ::2].tolist() == [pytest.approx([1.0, 0.15, 0.575]), pytest.approx([0.15, 0.15, 1.0])]
    assert torch.equal(over_pixels(shares, image)[:2, :2], torch.ones(2, 2))


def test_groups_have_their_mean_color() -> None:
    """Two separate patches of a group have one color, and so has a group with parts of several patches; a dropped patch is dark."""
    image = torch.zeros(3, 2, 8)
    image[0, :, :2], image[0, :, 6:], image[1, :, 2:4], image[2, :, 4:6] = 1.0, 0.5, 1.0, 1.0
    groups = torch.tensor([[7, 2, -1, 7]])
    drawn = mean_colors(image, groups)
    assert drawn[:, 0, ::2].T.tolist() == [
        [0.75, 0.0, 0.0],
        [0.0, 1.0, 0.0],
        pytest.approx([0.0, 0.0, 0.15]),
        [0.75, 0, 0],
    ]
    tinted = distinct_colors(image, groups)
    assert torch.equal(tinted[:, 0, 2].nonzero(), tinted[:, 1, 3].nonzero())  # one hue per group
    assert not torch.equal(tinted[:, 0, 0] > 0.1, tinted[:, 0, 2] > 0.1)
    assert (tinted[:, :, 4:6] <= 0.15).all()


def test_heat_brightness_increases_in_gray() -> None:
    luminance = heat(torch.linspace(0, 1, 50)) @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (luminance.diff() > 0).all()
    drawn = heated(torch.full((3, 2, 6), 0.5), torch.tensor([[0.0, 1.0, torch.nan]]))
    low, high, missing = drawn.mean(dim=(0, 1))[::2]
    assert missing < 0.1 < low < high


def test_lines_separate_groups() -> None:
    """Lines are one pixel wide, at the start of the next group, in pixels of the sheet rather than of the image."""
    groups = torch.tensor([[0, 0, 1], [2, 0, 1]])
    sheet = draw_sheet(["a"], [[Cell(torch.zeros(3, 16, 24), "", groups)]], None, side=48)
    white = (cell(sheet, 0, 48, 32) == 255).all(axis=2)
    expected = np.zeros((32, 48), dtype=bool)
    expected[:, 32] = True  # 0 | 1
    expected[16, :16] = True  # 0 over 2
    expected[16:, 16] = True  # 2 | 0
    assert np.array_equal(white, expected)


def test_sheet_size() -> None:
    """The longer side has the requested size and the other is in proportion; long texts are cut off with an ellipsis."""
    wide, square = torch.zeros(3, 8, 16), torch.zeros(3, 8, 8)
    sheet = draw_sheet(["a", "b" * 50], [[Cell(wide, "c" * 50), Cell(square)]] * 2, ["one", "two"], side=64, scale="s")
    assert sheet.size == (2 * 68 + 4, 16 + 2 * (16 + 64 + 16 + 4) + 4 + 20)
    pixels = np.asarray(sheet)
    assert (pixels[:16, 4 + 64 : 4 + 68] == 255).all()  # nothing of the long name between the columns
    assert (pixels[32:64, 4:68] == 0).all() and (pixels[64:96, 4:68] == 255).sum() > 0
    assert draw_sheet(["a"], [[Cell(wide)]], None, side=1).size[0] == 9


def test_images_are_saved_atomically(tmp_path, monkeypatch) -> None:
    image, path = Image.new("RGB", (4, 4)), tmp_path / "new" / "a.png"
    assert save_image(image, path) == path and Image.open(path).size == (4, 4)
    with pytest.raises(ValueError, match=r"`path` .*got a\.docx"):
        save_image(image, "a.docx")

    def fail(self, file, **kwargs):
        file.write_bytes(b"half")
        raise OSError("disk full")

    before = path.read_bytes()
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        save_image(image, path)
    assert path.read_bytes() == before and [file.name for file in path.parent.iterdir()] == ["a.png"]


@pytest.mark.parametrize("text", ["Grüner Veltliner", "Œil-de-Perdrix × 2", "Ağrı → Đà Lạt"])
def test_captions_have_no_boxes(text, monkeypatch):
    """With fonts of the system, or without accents where there are none."""
    for fonts in (sheet._FONTS, ()):
        monkeypatch.setattr(sheet, "_FONTS", fonts)
        font, drawn = sheet.font_for(text)
        box = bytes(font.getmask("\uffff"))
        assert all(bytes(font.getmask(mark)) != box for mark in drawn) and len(drawn) >= len(text) - 1
    assert sheet.font_for("Gr\u00fcner")[1] == sheet.font_for("Gru\u0308ner")[1] == "Gruner"
    assert sheet.font_for("Merlot")[1] == "Merlot"
