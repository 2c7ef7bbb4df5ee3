"""Faults in a model's files raise one-sentence errors with the file or value, from every function and command, before memory is allocated."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.checkpoints.timm_sources import write_folder
from tests.checkpoints.transformers_sources import make_source, save
from tests.helpers import TINY
from ufgir.app.viewer import load_checkpoint
from ufgir.checkpoints import load, load_image_processor
from ufgir.checkpoints.checks import MOST, check_header, read_header
from ufgir.cli.entry import main
from ufgir.transforms.preprocessing import make_image_processor, sizes_of


Fault = Callable[[Path], None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save valid models of three kinds, each with an image processor."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    CLCAViTForImageClassification(CLCAViTConfig(**TINY)).save_pretrained(folder / "clca")
    save(make_source("siglip-classifier", torch.float32), folder / "siglip")
    write_folder(folder / "timm")
    for name in ("clca", "siglip"):
        make_image_processor(32).save_pretrained(folder / name)
    Image.new("RGB", (40, 40)).save(folder / "leaf.png")
    return folder


def states(file: str, values: dict[str, Any]) -> Fault:
    """Return a fault that changes values of a JSON file, also those in nested objects."""

    def fault(folder: Path) -> None:
        contents = json.loads((folder / file).read_text())
        for name, value in values.items():
            inner = next((part for part in ("vision_config", "model_args") if part in contents), None)
            (contents[inner] if inner and name in contents[inner] else contents)[name] = value
        (folder / file).write_text(json.dumps(contents))

    return fault


def holds(file: str, text: str) -> Fault:
    return lambda folder: (folder / file).write_text(text) and None


def is_a_folder(file: str) -> Fault:
    def fault(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return fault


def weights(change: Callable[[torch.Tensor], torch.Tensor], name: str = "layers.1.mlp.fc1.weight") -> Fault:
    """Change a tensor of the weights."""

    def fault(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        key = next(key for key in state if key.endswith(name))
        save_file(state | {key: change(state[key])}, folder / "model.safetensors", metadata={"format": "pt"})

    return fault


def poked(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[3] = value
        return tensor

    return change


def cut(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


CONFIG, PROCESSOR, WEIGHTS = "config.json", "preprocessor_config.json", "model.safetensors"

# name -> fault, and what its sentence names
FAULTS: dict[str, tuple[Fault, str]] = {
    "config is a list": (holds(CONFIG, "[1, 2]"), "config.json"),
    "config is no JSON": (holds(CONFIG, "{"), "config.json"),
    "config is nested without end": (holds(CONFIG, "[" * 100_000), "config.json"),
    "config is a folder": (is_a_folder(CONFIG), "config.json"),
    "labels are a list": (states(CONFIG, {"id2label": [1, 2]}), "id2label"),
    "labels have names as keys": (states(CONFIG, {"id2label": {"ash": "0"}}), "id2label"),
    "no such dtype": (states(CONFIG, {"dtype": "x"}), "dtype"),
    "half a class": (states(CONFIG, {"num_labels": 1.5}), "num_labels"),
    "a width in words": (states(CONFIG, {"hidden_size": "wide"}), "hidden_size"),
    "no width": (states(CONFIG, {"num_hidden_layers": True}), "num_hidden_layers"),
    **{f"{name} of {value}": (states(CONFIG, {name: value}), name) for name, value in {
        "num_labels": 10**9, "num_hidden_layers": 10**7, "hidden_size": 10**6, "image_size": 20_000, "intermediate_size": 10**8,
    }.items()},
    "labels not borne out": (states(CONFIG, {"num_labels": 40_000, "id2label": None, "label2id": None}), "num_labels"),
    "layers not borne out": (states(CONFIG, {"num_hidden_layers": 900}), "num_hidden_layers"),
    "width not borne out": (states(CONFIG, {"hidden_size": 32_768}), "hidden_size"),
    "pixels not borne out": (states(CONFIG, {"image_size": 8000}), "image_size"),
    "not a number": (weights(poked(float("nan"))), "mlp.fc1.weight"),
    "infinite": (weights(poked(float("inf"))), "mlp.fc1.weight"),
    "int8": (weights(lambda tensor: tensor.to(torch.int8)), "mlp.fc1.weight"),
    "weights are a folder": (is_a_folder(WEIGHTS), WEIGHTS),
    "weights are cut off": (cut, "weights"),
    "weights are empty": (holds(WEIGHTS, ""), "weights"),
    "weights have an endless header": (holds(WEIGHTS, "\xff" * 16), "weights"),
}  # fmt: skip
OF_PROCESSORS: dict[str, tuple[Fault, str]] = {
    "std of zeros": (states(PROCESSOR, {"image_std": [0, 0, 0]}), "image_std"),
    "std of NaN": (states(PROCESSOR, {"image_std": [1, 1, float("nan")]}), "image_std"),
    "mean of two": (states(PROCESSOR, {"image_mean": [0.5, 0.5]}), "image_mean"),
    "mean in words": (states(PROCESSOR, {"image_mean": "grey"}), "image_mean"),
    "factor of zero": (states(PROCESSOR, {"rescale_factor": 0}), "rescale_factor"),
    "size of 20,000": (states(PROCESSOR, {"size": {"height": 20_000, "width": 20_000}}), "size"),
    "size of nothing": (states(PROCESSOR, {"size": {"depth": 3}}), "size"),
    "a share of nothing": (states(PROCESSOR, {"crop_pct": 1e-9}), "size"),
    "processor is a list": (holds(PROCESSOR, "[]"), PROCESSOR),
    "processor is no JSON": (holds(PROCESSOR, "{"), PROCESSOR),
    "processor is a folder": (is_a_folder(PROCESSOR), PROCESSOR),
}


def spoiled(models: Path, kind: str, fault: Fault, folder: Path) -> Path:
    shutil.copytree(models / kind, folder / kind)
    fault(folder / kind)
    return folder / kind


def sentence(error: BaseException, word: str) -> None:
    """Check that an error is one sentence with the word in it."""
    assert word in str(error) and "Traceback" not in str(error) and len(str(error)) < 700, str(error)


@pytest.mark.parametrize("kind", ["clca", "siglip"])
@pytest.mark.parametrize("name", FAULTS)
def test_a_model_is_refused(name: str, kind: str, models: Path, tmp_path: Path) -> None:
    fault, word = FAULTS[name]
    source = spoiled(models, kind, fault, tmp_path)
    for door in (load, load_checkpoint):
        with pytest.raises((ValueError, OSError)) as caught:
            door(str(source))
        sentence(caught.value, word)


@pytest.mark.parametrize("kind", ["clca", "siglip"])
@pytest.mark.parametrize("name", OF_PROCESSORS)
def test_an_image_processor_is_refused(name: str, kind: str, models: Path, tmp_path: Path) -> None:
    fault, word = OF_PROCESSORS[name]
    source = spoiled(models, kind, fault, tmp_path)
    if (name, kind) == ("size of 20,000", "siglip"):  # sizes of other models are brought to that of the input
        assert max(sizes_of(load_image_processor(source))[0]) < 40
        return
    for door in (load_image_processor, load_checkpoint):
        with pytest.raises((ValueError, OSError)) as caught:
            door(str(source))
        sentence(caught.value, word)


@pytest.mark.parametrize("name", ["labels are a list", "num_labels of 1000000000", "not a number", "std of zeros"])
def test_commands_end_with_status_2(
    name: str, models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    fault, word = (FAULTS | OF_PROCESSORS)[name]
    source, leaf = str(spoiled(models, "clca", fault, tmp_path)), str(models / "leaf.png")
    commands = [["predict", source, leaf]] + ([["profile", source]] if "label" in name else [])
    for argv in commands:
        with pytest.raises(SystemExit) as stop:
            main(argv)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and word in error and error.count("\n") == 1, error


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_from_pretrained_refuses_weights_that_are_not_finite(value: float, models: Path, tmp_path: Path) -> None:
    source = spoiled(models, "clca", weights(poked(value)), tmp_path)
    with pytest.raises(ValueError, match=r"not finite: .*mlp\.fc1\.weight"):
        CLCAViTForImageClassification.from_pretrained(source)


@pytest.mark.parametrize(
    "values",
    [{"depth": 10**7}, {"embed_dim": 10**6}, {"img_size": 10**6}, {"num_heads": "two"}, {"depth": 500}],
    ids=str,
)
def test_numbers_of_timm_are_refused(values: dict[str, Any], models: Path, tmp_path: Path) -> None:
    source = spoiled(models, "timm", states("config.json", values), tmp_path)
    with pytest.raises(ValueError):
        load(source)


def test_sound_models_pass(models: Path) -> None:
    for name in ("clca", "siglip", "timm"):
        assert load(models / name) is not None and load_image_processor(models / name) is not None


def test_the_header_is_read_without_the_weights(models: Path) -> None:
    header = read_header(models / "clca")
    assert header is not None
    state = load_file(models / "clca" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        n: stored.shape for n, stored in header.items()
    }
    contents = json.loads((models / "clca" / "config.json").read_text())
    check_header(contents, header, "here")
    for name in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_channels"):
        with pytest.raises(ValueError, match=f"`{name}`.*here.* {MOST[name]}, .*weights have {contents[name]}"):
            check_header(contents | {name: MOST[name]}, header, "here")
