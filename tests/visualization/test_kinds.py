"""One record per kind of figure; the command, the web page and the gallery are generated from the records."""

import argparse
import inspect
import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from clca import CLCAViTForImageClassification
from tests.helpers import tiny_config
from ufgir.app import page
from ufgir.app.viewer import Setting, Viewer, make_leaf
from ufgir.cli import entry as cli
from ufgir.cli.visualize import GRID_OPTIONS, configure
from ufgir.utils.plotting import METHOD_STYLES, OTHER_LINES, OTHER_MARKERS, method_style
from ufgir.visualization import draw
from ufgir.visualization.kinds import KINDS, kept_columns
from ufgir.visualization.records import STAGES, Kind, Option, Page
from ufgir.visualization.sheet import Cell, Column


DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture
def checkpoint(tmp_path):
    torch.manual_seed(0)
    CLCAViTForImageClassification(tiny_config(reduction="evit", keep_rate=0.5)).save_pretrained(tmp_path / "evit")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "evit")
    Image.effect_mandelbrot((40, 50), (-2, -1, 1, 1), 40).convert("RGB").save(tmp_path / "leaf.png")
    return tmp_path


@pytest.mark.parametrize("name", KINDS)
def test_record_matches_its_function(name):
    """The options are optional arguments of the function, and all texts have the same style."""
    kind = KINDS[name]
    arguments = inspect.signature(kind.function).parameters
    assert next(iter(arguments)) == "view"
    assert set(arguments) - {"view"} == set(kind.options)
    assert all(arguments[option].default is not inspect.Parameter.empty for option in kind.options)
    assert set(kind.example) <= set(kind.options)
    assert not kind.help.endswith(".") and kind.caption.endswith(".") and kind.title[0].isupper()
    assert kind.page is None or kind.page.about.endswith(".")


def test_kinds_share_options():
    """An option shared by several kinds differs only in its default."""
    found = {}
    for kind in KINDS.values():
        for name, option in kind.options.items():
            assert found.setdefault(name, option)._replace(default="") == option._replace(default="")
    assert not set(found) & set(GRID_OPTIONS)


def test_help_is_generated_from_the_records():
    parser = argparse.ArgumentParser()
    configure(parser)
    helps = {action.dest: action.help for action in parser._actions if action.help != argparse.SUPPRESS}
    options = KINDS["attention"].options["layers"], KINDS["merge"].options["colors"]
    assert helps["layers"] == (
        f"attention, similarity, gradcam: {options[0].help} [attention: all, similarity: after the final norm, gradcam: the "
        "second to last]"
    )
    assert helps["colors"] == f"merge: {options[1].help} [mean]"
    assert parser.parse_args(["model", "image.png", "--colours", "distinct"]).colors == "distinct"
    assert all(f"{name}: {kind.help}." in helps["what"] for name, kind in KINDS.items())


@pytest.mark.parametrize("name", KINDS)
def test_gallery_section_begins_with_the_caption(name):
    """For a kind without a section, the site generates one from the record."""
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    section = re.search(rf"^### {re.escape(KINDS[name].title)}\n\n(.*?)\n\n", text, re.MULTILINE | re.DOTALL)
    if section is None:
        pytest.skip(f"docs/gallery.md has no section on {name}; the site generates one from its record")
    assert " ".join(section[1].split()).startswith(KINDS[name].caption)


def blank_columns(view, shade=0.5, label=None):
    return [Column(f"shade {shade}", [Cell(torch.full_like(image, shade), str(label)) for image in view.images])]


BLANK = Kind(
    title="A plain color",
    help="nothing",
    caption="A plain color.",
    function=blank_columns,
    options={
        "shade": Option("how light", "0.5", type=float),
        "label": Option("words", nargs="+", convert=" ".join),
    },
    needs=(STAGES,),
    page=Page("A test picture.", options=lambda config: {"shade": 0.25}),
)


def test_command_accepts_a_new_record(monkeypatch, capsys, caplog, checkpoint):
    monkeypatch.setitem(KINDS, "blank", BLANK)
    monkeypatch.chdir(checkpoint)
    argv = ["visualize", "evit", "leaf.png", "--what"]
    assert cli.main([*argv, "blank", "--shade", "1", "--label", "a", "b"]) == 0
    assert Image.open("blank.png").width == 2 * 228 + 4
    assert Image.open("blank.png").getpixel((300, 100)) == (255, 255, 255)
    assert cli.main([*argv, "grid", "--of", "blank", "--keep-rates", "0.5", "0.25"]) == 0
    for what, option, taker in (("kept", "--shade", "blank"), ("blank", "--token", "trace")):
        assert cli.main([*argv, what, option, "1"]) == 0
        assert f"`{option}` needs `--what` {taker}" in caplog.text
    for wrong, words in (
        (["blank", "--reduction", "none"], "evit reduces no tokens: there are no stages to draw. Choose a method"),
        (["blank", "--shade", "dark"], "argument --shade: invalid float value"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit):
            cli.main([*argv, *wrong])
        assert words in capsys.readouterr().err


def test_page_accepts_a_new_record(monkeypatch, checkpoint):
    monkeypatch.setitem(KINDS, "blank", BLANK)
    viewer, name = Viewer(), str(checkpoint / "evit")
    leaf = make_leaf(Image.open(checkpoint / "leaf.png"))
    shown = page._Page(page.import_gradio(), viewer, name, [("a leaf", leaf)])
    assert shown.kind.choices[-1] == ("A plain color", "blank") and shown.kind.value == "kept"
    assert "shade 0.25" in shown._picture(name, leaf, Setting("evit", 0.5, False), "blank")
    hint = shown._picture(name, leaf, Setting(None, 1.0, False), "blank")
    assert STAGES.hint in hint and "<img" not in hint
    assert "row 1, column 2" in shown._pictures_of((1, 2), name, leaf, Setting("evit", 0.5, False))
    assert shown._pictures_of((1, 2), name, leaf, Setting(None, 1.0, False)) == ""


def test_record_is_called_like_its_function():
    model = CLCAViTForImageClassification(tiny_config(reduction="evit", keep_rate=0.5)).eval()
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32})
    image = Image.new("RGB", (32, 32), "green")
    alike = [draw(kind, model, processor, [image], side=32) for kind in (kept_columns, KINDS["kept"])]
    assert alike[0].tobytes() == alike[1].tobytes()
    dense = CLCAViTForImageClassification(tiny_config())
    with pytest.raises(ValueError, match="`model` reduces no tokens: there are no stages to draw"):
        draw(KINDS["kept"], dense, processor, [image])


# Methods in plots


def test_method_without_a_style_gets_one_from_its_name():
    """The style is the same in every process and differs from those of all listed methods."""
    names = [f"method_{index}" for index in range(12)]
    looks = [method_style(name) for name in names]
    assert [look.pop("label") for look in looks] == names
    assert looks == [{k: v for k, v in method_style(name).items() if k != "label"} for name in names]
    assert len({tuple(map(str, look.values())) for look in looks}) == len(names)
    assert method_style("stride") == {"label": "stride", "color": "#CC79A7", "linestyle": ":", "marker": "4"}
    listed = METHOD_STYLES.values()
    assert not {look["marker"] for look in listed} & set(OTHER_MARKERS)
    assert not {look["linestyle"] for look in listed} & set(OTHER_LINES)
