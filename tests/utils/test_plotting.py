"""One style for all figures: equal and distinct styles, and files."""

import builtins
import itertools
import logging
import re

import matplotlib
import numpy as np
import pytest
from PIL import Image

from clca import REDUCTIONS
from ufgir.training.gradients import stability_figure
from ufgir.utils.extras import install_command
from ufgir.utils.plotting import (
    METHOD_STYLES,
    PALETTE,
    VARIANT_STYLES,
    label,
    method_style,
    new_figure,
    plain_style,
    save_figure,
    style,
    variant_style,
)


LOOKS = ("color", "linestyle", "marker")


def luminance(color: str) -> float:
    """Return the relative luminance of a color (WCAG), from 0 to 1."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))


def test_every_method_and_variant_has_a_look_of_its_own():
    assert set(METHOD_STYLES) <= {"none", *REDUCTIONS}
    assert list(VARIANT_STYLES) == ["base", "CLC", "CLA", "CLCA"]
    for table in (METHOD_STYLES, VARIANT_STYLES):
        for (one, a), (other, b) in itertools.combinations(table.items(), 2):
            assert a["marker"] != b["marker"], f"{one} and {other} have the same marker"
            assert (a["color"], a["linestyle"]) != (b["color"], b["linestyle"]), f"{one} and {other} look alike"
    # without colours, variants differ in their lines, too
    assert len({look["linestyle"] for look in VARIANT_STYLES.values()}) == 4


def test_colours_can_be_read_on_paper():
    """WCAG requires a contrast of 3 between the parts of a figure and the background; the two lightest colors have less, and differ in line
    and marker."""
    contrast = {color: 1.05 / (luminance(color) + 0.05) for color in PALETTE}
    assert len(contrast) == 7
    assert min(contrast.values()) > 2
    assert sum(value >= 3 for value in contrast.values()) >= 4


def test_styles_by_name():
    assert variant_style("CLCA") == {"label": "CLCA", **VARIANT_STYLES["CLCA"]}
    assert method_style(None) == {"label": "none", **METHOD_STYLES["none"]}
    assert method_style("evit")["label"] == "evit"
    with pytest.raises(ValueError, match="`variant` must be one of base, CLC, CLA, CLCA, got 'clcla'"):
        variant_style("clcla")
    assert plain_style("clca, 53.2 %") == {"label": "clca, 53.2 %", **VARIANT_STYLES["CLCA"]}
    assert plain_style("EViT at 0.1")["color"] == METHOD_STYLES["evit"]["color"]
    assert plain_style("mine", 1)["color"] == PALETTE[1] == plain_style("", 1 + len(PALETTE))["color"]


def test_style_is_gone_after_the_context():
    before = dict(matplotlib.rcParams)
    with style():
        assert matplotlib.rcParams["axes.grid"] is True
        _, axes = new_figure(1, 2, sharey=True)
        label(axes[0], "x", "y", "title")  # nothing drawn: no legend
    assert dict(matplotlib.rcParams) == before
    assert len(axes) == 2
    assert axes[0].get_legend() is None
    assert (axes[0].get_xlabel(), axes[0].get_ylabel(), axes[0].get_title()) == ("x", "y", "title")


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_figures_are_written_whole_and_the_same_each_time(tmp_path, kind):
    paths = [tmp_path / "new" / f"{name}.{kind}" for name in "ab"]
    for path in paths:
        with style():
            figure, axes = new_figure()
            axes.plot([1, 2], [3, 4], **variant_style("CLA"))
            label(axes, "Keep rate", "Top-1 (%)")
            assert save_figure(figure, path) == path
    assert paths[0].read_bytes() == paths[1].read_bytes()
    assert sorted(p.name for p in paths[0].parent.iterdir()) == [f"a.{kind}", f"b.{kind}"]
    if kind == "png":
        assert Image.open(paths[0]).size == (1000, 680)  # 5 x 3.4 inches, 200 dots an inch


def test_a_figure_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    with style():
        figure, _ = new_figure()
        with pytest.raises(ValueError, match=r"must end in \.png, \.svg or \.pdf"):
            save_figure(figure, tmp_path / "a.txt")
        (tmp_path / "a.png").write_text("old")

        def fails(file, **kwargs):
            file.write_text("half")
            raise OSError("disk full")

        monkeypatch.setattr(figure, "savefig", fails)
        with pytest.raises(OSError, match="disk full"):
            save_figure(figure, tmp_path / "a.png")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "old"


@pytest.fixture
def records(tmp_path):
    """Write three files of recorded gradients: 30 steps, 30 steps, 20 steps."""
    files = []
    for i, steps in enumerate((30, 30, 20)):
        files.append(tmp_path / f"run{i}" / "gradients.csv")
        files[-1].parent.mkdir()
        lines = [f"{step},{step * (i + 1) / 10},0.5" for step in range(1, steps + 1)]
        files[-1].write_text("\n".join(["step,max_grad_all,max/vit.layers.0", *lines, ""]))
    return files


def test_stability_figure_shows_what_was_recorded(records):
    with style():
        figure = stability_figure(records, ["CLCA 53.2", "base", "base"])
    (axes,) = figure.axes
    clca, base, again = axes.get_lines()
    assert clca.get_xdata().tolist() == list(range(1, 31))
    assert clca.get_ydata().tolist() == pytest.approx([step / 10 for step in range(1, 31)])
    assert again.get_ydata().tolist() == pytest.approx([3 * step / 10 for step in range(1, 21)])
    assert clca.get_color() == VARIANT_STYLES["CLCA"]["color"]
    assert base.get_color() == again.get_color() == VARIANT_STYLES["base"]["color"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["CLCA 53.2", "base"]
    assert axes.get_xlabel() == "Training step"
    assert axes.get_ylim()[0] == 0


def test_stability_figure_of_other_columns_and_without_labels(records):
    with style():
        one = stability_figure(records[:1], column="max/vit.layers.0", log=True).axes[0]
        several = stability_figure(records).axes[0]
    assert one.get_legend() is None
    assert one.get_yscale() == "log"
    assert one.get_ylabel() == "|gradient|, max/vit.layers.0"
    assert one.get_lines()[0].get_ydata().tolist() == [0.5] * 30
    assert [text.get_text() for text in several.get_legend().get_texts()] == ["run0", "run1", "run2"]
    assert len({line.get_color() for line in several.get_lines()}) == 3


def test_long_trainings_show_every_step_and_their_level(tmp_path):
    values = np.full(200, 0.25)
    values[[50, 120]] = 3.0  # two peaks
    lines = [f"{step},{value}" for step, value in enumerate(values, start=1)]
    (tmp_path / "g.csv").write_text("\n".join(["step,max_grad_all", *lines, ""]))
    with style():
        (axes,) = stability_figure([tmp_path / "g.csv"], ["CLC"]).axes
    steps, level = axes.get_lines()
    assert steps.get_ydata().tolist() == values.tolist()
    assert level.get_ydata().tolist() == [0.25] * 200
    assert level.get_linestyle() == VARIANT_STYLES["CLC"]["linestyle"]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["CLC"]


def test_stability_figure_of_nothing(records):
    with style():
        with pytest.raises(ValueError, match=r"`labels` must .*, got 0 for 0"):
            stability_figure([])
        with pytest.raises(ValueError, match="got 1 for 3"):
            stability_figure(records, ["a"])
        with pytest.raises(ValueError, match=r"`column` must be .*max_grad_all, max/vit\.layers\.0.*, got 'max'"):
            stability_figure(records, column="max")


def test_without_matplotlib_the_record_is_kept_and_the_way_out_is_named(tmp_path, monkeypatch, caplog):
    from types import SimpleNamespace

    from ufgir.training.gradients import GradientRecorder

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=re.escape(install_command("visualization"))), style():
        pass
    (tmp_path / "g.csv").write_text("step,max_grad_all\n1,0.5\n")
    with caplog.at_level(logging.INFO):
        state = SimpleNamespace(is_world_process_zero=True)
        GradientRecorder(tmp_path / "g.csv").on_train_end(None, state, None)
    assert "are not plotted: figures need matplotlib" in caplog.text
    assert [p.name for p in tmp_path.iterdir()] == ["g.csv"]
