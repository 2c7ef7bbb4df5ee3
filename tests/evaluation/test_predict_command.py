"""`ufgir predict`: its output, broken images by name, and one-line errors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clca import CLCAViTForImageClassification
from tests.evaluation.helpers import NAMES, PROCESSOR, rows_of
from ufgir.cli.entry import main
from ufgir.transforms.preprocessing import EvalTransform


# The command


@pytest.fixture(scope="module")
def saved(model: CLCAViTForImageClassification, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model.config.id2label = dict(enumerate(NAMES))
    model.save_pretrained(folder)
    PROCESSOR.save_pretrained(folder)
    return folder


def command(*argv: Any) -> int:
    return main(["predict", *map(str, argv)])


def test_command(
    saved: Path, model: CLCAViTForImageClassification, leaves: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Files and folders in the given order; images in a folder in natural order."""
    first = leaves / "b" / "c" / "leaf5.png"
    assert command(saved, first, leaves, "--output", tmp_path / "new" / "p.csv", "--batch-size", 4) == 0
    rows = rows_of(tmp_path / "new" / "p.csv")
    names = [Path(row["file"]).name for row in rows]
    assert names == [f"leaf{i}.png" for i in (5, 0, 2, 4, 6, 8, 10, 12, 1, 3, 5, 7, 9, 11)]
    assert {row["label"] for row in rows} == {""} and [row["index"] for row in rows] == [str(i) for i in range(14)]
    with torch.no_grad():
        for row in rows:
            logits = model.eval()(EvalTransform(PROCESSOR)(Image.open(row["file"]))[None]).logits
            assert row["prediction"] == NAMES[logits.argmax()]
    assert "14 images" in capsys.readouterr().out


def test_command_names_broken_images(saved: Path, leaves: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good, empty, cut = (tmp_path / f"{name}.png" for name in ("good", "empty", "cut"))
    content = (leaves / "a" / "leaf0.png").read_bytes()
    for file, bytes_ in ((good, content), (empty, b""), (cut, content[: len(content) // 2])):
        file.write_bytes(bytes_)
    for batch_size in (1, 8):
        assert command(saved, tmp_path, "--output", tmp_path / "p.jsonl", "--batch-size", batch_size) == 1
        out = capsys.readouterr().out
        assert "empty.png" in out and "cut.png" in out and "good.png" not in out
        (line,) = map(json.loads, (tmp_path / "p.jsonl").read_text().splitlines())
        assert (line["index"], line["file"]) == (2, str(good))
    good.unlink()
    assert command(saved, tmp_path, "--output", tmp_path / "p.jsonl") == 1
    assert (tmp_path / "p.jsonl").read_text() == ""


def test_command_names_files_left_out(
    saved: Path, leaves: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """In the summary and next to the table; the exit status is 1 if photos are left out."""
    folder, output = tmp_path / "in", tmp_path / "out" / "p.csv"
    folder.mkdir()
    content = (leaves / "a" / "leaf0.png").read_bytes()
    for name in ("leaf.png", "leaf", "leaf.NEF", "notes.txt", ".hidden.txt"):
        (folder / name).write_bytes(b"words" if name.endswith(".txt") else content)
    (folder / "gone.jpg").symlink_to("nowhere")
    assert command(saved, folder, "--output", output) == 1
    text = capsys.readouterr().out
    found = json.loads((output.parent / "p.provenance.json").read_text())
    assert found["images"] == found["predicted"] == 2 and found["broken"] == []
    assert {Path(name).name for name in found["no_images"]} == {"leaf.NEF", "notes.txt"}
    assert {Path(name).name for name in found["unusable"]} == {"gone.jpg"}
    assert (
        all(name in text for name in ("leaf.NEF", "notes.txt", "gone.jpg", "2 files", "1 .NEF"))
        and "hidden" not in text
    )
    for name in ("leaf.NEF", "gone.jpg"):
        (folder / name).unlink()
    assert command(saved, folder, "--output", output) == 0
    assert "notes.txt" in capsys.readouterr().out
    (tmp_path / "q.provenance.json").mkdir()
    with pytest.raises(SystemExit):
        command(saved, folder, "--output", tmp_path / "q.csv")
    assert "q.provenance.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv, words",
    [
        (["MODEL", "/nowhere", "--output", "p.csv"], "/nowhere"),
        (["MODEL", "LEAVES", "--output", "p.png"], "must end in .csv or .jsonl"),
        (["MODEL", "LEAVES", "--batch-size", "0"], "`--batch-size`"),
        (["MODEL", "LEAVES", "--top", "0"], "`--top`"),
        (["MODEL", "LEAVES", "--device", "toaster"], "toaster"),
        (["LEAVES", "LEAVES"], "leaves"),
        (["MODEL"], "IMAGE"),
    ],
)
def test_errors_of_the_command(
    saved: Path,
    leaves: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    argv: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as caught:
        command(*({"MODEL": saved, "LEAVES": leaves}.get(a, a) for a in argv))
    error = capsys.readouterr().err
    assert caught.value.code == 2 and words in error and len(error.splitlines()) == 1, error
    assert not list(tmp_path.iterdir())
