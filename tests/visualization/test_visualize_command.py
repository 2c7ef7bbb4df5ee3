"""`ufgir visualize`, and the gallery."""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

from clca import REDUCTIONS, CLCAViTForImageClassification
from tests.helpers import tiny_config
from tests.visualization.helpers import noise, processor
from ufgir.cli import entry as cli
from ufgir.cli.visualize import configure
from ufgir.visualization.kinds import (
    KINDS,
)


DOCS = Path(__file__).parents[2] / "docs"


# The command


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Save a model with EViT and cache, one without CLS, and two images."""
    folder = tmp_path_factory.mktemp("visualize")
    variants = {
        "evit": {"reduction": "evit", "keep_rate": 0.5, "cross_layer_cache": True, "num_clr_tokens": 1},
        "no_cls": {"use_class_token": False, "pooling": "mean"},
    }
    for name, options in variants.items():
        torch.manual_seed(0)
        CLCAViTForImageClassification(tiny_config(**options)).save_pretrained(folder / name)
        processor().save_pretrained(folder / name)
    for index, image in enumerate(noise(2, 40, 50)):
        image.save(folder / f"{index}.png")
    return folder


def visualize(capsys, folder, options):
    """Run the command; return its output and the image."""
    model, image, file = (str(folder / name) for name in ("evit", "0.png", "out.png"))
    assert cli.main(["visualize", model, image, *options.split(), "--output", file, "--side", "32"]) == 0
    return capsys.readouterr().out, Image.open(file)


@pytest.mark.parametrize(
    ("argv", "columns"),
    [
        ("", 3),
        ("--what merge --colors distinct", 3),
        ("--what trace --patch 1 2", 3),
        ("--what trace --token 3", 2),
        ("--what attention", 6),
        ("--what attention --layers 0 4 --heads all", 5),
        ("--what attention --layers 3 --heads 1", 2),
        ("--what rollout", 5),
        ("--what rollout --ranges 0:2 1:5", 3),
        ("--what similarity", 3),
        ("--what similarity --to cls --layers 0 1 2", 4),
        ("--what attention --reduction none", 6),
        ("--what grid --methods topk tome evit", 4),
        ("--what grid --keep-rates 0.75 0.5 0.25 --of rollout --ranges 0:5", 4),
        ("--what grid --methods topk --keep_rates 0.75 0.5", 3),
    ],
)
def test_command_draws(capsys, checkpoints, argv, columns) -> None:
    text, image = visualize(capsys, checkpoints, argv)
    assert text == f"wrote {checkpoints / 'out.png'}\n"
    assert image.width == columns * 36 + 4


def test_command_draws_grids(capsys, checkpoints) -> None:
    """Rows of methods, columns of rates; several models; a note names untrained weights."""
    _, image = visualize(capsys, checkpoints, "--what grid --methods topk tome --keep-rates 0.75 0.5 0.25")
    assert image.size == (4 * 36 + 4, 16 + 2 * (16 + 32 + 16 + 4) + 4)
    models = f"--models {checkpoints / 'no_cls'} {checkpoints / 'evit'}"
    text, image = visualize(capsys, checkpoints, f"--what grid --of similarity --to mean {models}")
    assert image.width == 4 * 36 + 4 and text.count("\n") == 1
    text, _ = visualize(capsys, checkpoints, "--what grid --methods sit evit dyvit --keep-rates 0.5 0.25")
    assert f"{checkpoints / 'evit'} does not contain weights of sit: its 14 are random" in text
    assert text.count("does not contain weights") == 2
    first = (checkpoints / "out.png").read_bytes()
    visualize(capsys, checkpoints, "--what grid --methods sit evit dyvit --keep-rates 0.5 0.25")
    assert (checkpoints / "out.png").read_bytes() == first


def test_default_output_name(capsys, checkpoints, monkeypatch) -> None:
    monkeypatch.chdir(checkpoints)
    for options, name in (([], "kept_patches.png"), (["--what", "merge"], "merge.png")):
        assert cli.main(["visualize", "evit", "0.png", "1.png", *options]) == 0
        assert capsys.readouterr().out == f"wrote {name}\n" and (checkpoints / name).is_file()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("evit --side 5000", "`--side` must be between 1 and 4096, got 5000"),
        ("evit --output a.svg", "`--output` must end in"),
        ("evit --what nothing", "invalid choice: 'nothing'"),
        ("evit --what grid", "`--models`, `--methods` or `--keep-rates`"),
        ("evit --what grid --methods topk --reduction evit", "`--methods` cannot be combined with `--reduction`"),
        (
            "evit --what grid --keep-rates 0.5 --keep-tokens 4 2",
            "`--keep-rates` cannot be combined with `--keep-tokens`",
        ),
        ("evit --what grid --keep-rates 2", "`--keep-rates` must be in (0, 1], got 2.0"),
        ("evit --what grid --methods none topk", "reduces no tokens"),
        ("evit --what grid --methods nonsense", "nonsense"),
        ("evit --what grid --models nowhere", "there is no checkpoint nowhere"),
        ("evit --what trace", "`token` and `patch`"),
        ("evit --what trace --token 40", "`token` must be in"),
        ("evit --what attention --layers 5", "`layers` must name at least one layer of 0 .. 4, got 5"),
        ("evit --what attention --heads both", "`--heads` must be mean, all or head indices, got both"),
        ("evit --what attention --heads 2", "`heads` must be 'mean', 'all' or indices in 0 .. 1"),
        ("evit --what rollout --ranges 3", "such as 0:4, got 3"),
        ("evit --what rollout --ranges 3:9", "must lie in 0:5"),
        ("no_cls --what attention", "needs a CLS token, and no_cls has none"),
        ("no_cls --what similarity --to cls", "the similarity to CLS needs a CLS token"),
        ("no_cls --what merge", "reduces no tokens"),
    ],
)
def test_command_errors(capsys, checkpoints, monkeypatch, argv, words) -> None:
    """One sentence, status 2, no file."""
    monkeypatch.chdir(checkpoints)
    before = sorted(checkpoints.iterdir())
    model, *options = argv.split()
    with pytest.raises(SystemExit) as stop:
        cli.main(["visualize", model, "0.png", *options])
    out, error = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and error.count("\n") == 1 and words in error
    assert sorted(checkpoints.iterdir()) == before


@pytest.mark.parametrize(
    ("argv", "option", "takers"),
    [
        ("--token 3", "`--token`", "trace"),
        ("--what rollout --layers 3", "`--layers`", "attention or similarity or gradcam"),
        ("--methods topk", "`--methods`", "grid"),
        ("--what grid --of kept --methods topk --to cls", "`--to`", "similarity"),
    ],
)
def test_options_without_effect(capsys, caplog, checkpoints, argv, option, takers) -> None:
    """One warning names them; the image is the same without them."""
    visualize(capsys, checkpoints, argv)
    drawn = (checkpoints / "out.png").read_bytes()
    (warning,) = [r.getMessage() for r in caplog.records if option in r.getMessage()]
    assert f"`--what` {takers}" in warning
    words = argv.split()
    words = words[: words.index(option.strip("`"))] + words[words.index(option.strip("`")) + 2 :]
    visualize(capsys, checkpoints, " ".join(words))
    assert (checkpoints / "out.png").read_bytes() == drawn


def test_gallery_shows_every_kind_and_method(monkeypatch) -> None:
    """All commands can be parsed and belong to the figures shown, whose files are small. The site adds what the page lacks."""
    monkeypatch.syspath_prepend(DOCS / "_extensions")
    own = (DOCS / "gallery.md").read_text(encoding="utf-8")
    text = import_module("from_code").expanded(own)
    commands = [line for line in text.splitlines() if line.startswith(".venv/bin/ufgir visualize")]
    parser = argparse.ArgumentParser()
    configure(parser)
    parsed = [parser.parse_args(shlex.split(command)[2:]) for command in commands]
    assert {args.what for args in parsed} == {*KINDS, "grid"}
    shown = re.findall(r"\]\((figures/gallery/.*)\)", text)
    files = [f"figures/gallery/{file.name}" for file in (DOCS / "figures" / "gallery").iterdir()]
    made = [
        args.output.removeprefix("docs/") for args, command in zip(parsed, commands, strict=True) if command in own
    ]
    assert sorted(shown) == sorted(files) and {*made} <= {*files} and len(made) == len({*made})
    assert {*files} <= {args.output.removeprefix("docs/") for args in parsed}
    assert all((DOCS / file).stat().st_size < 150_000 for file in files)
    drawn = {args.reduction or args.model.removeprefix("outputs/demo_") for args in parsed} | {
        "evit"
    }  # the demo's own
    assert set(REDUCTIONS) <= drawn
