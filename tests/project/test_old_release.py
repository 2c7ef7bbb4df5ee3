"""What release 0.1.0 wrote is still good: its model and its checkpoint load, with their own code and with ours, and its training
goes on, bit for bit. See tests/fixtures/release_0_1_0/README.md.

Only doors that users have are used, each in a process of its own: `import clca`, transformers' Auto classes, run_ufgir, ufgir.
"""

import csv
import importlib.metadata
import json
import platform
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.make_release_fixture import PROCESS, VERSIONS, run_pinned


pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64",
    reason="the bits are those of x86 processors under Linux",
)

RELEASE = Path(__file__).parents[1] / "fixtures" / "release_0_1_0"
CHECKPOINT = "checkpoint-37"  # of 60 steps
FOLDERS = ("model", CHECKPOINT)
TRAIN = "from run_ufgir import main; main()"
COMMANDS = (
    ["predict", str(RELEASE / "model"), "pictures", "--output", "predictions.csv"],
    ["profile", str(RELEASE / CHECKPOINT)],
    ["results", str(RELEASE / "model")],  # reads the record of the run
)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    return load_file(RELEASE / "expected.safetensors")


def assert_same_bits(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    differences = {}
    for name, tensor in found.items():
        assert (tensor.shape, tensor.dtype) == (expected[name].shape, expected[name].dtype), name
        if not torch.equal(tensor, expected[name]):
            differences[name] = f"{(tensor.double() - expected[name].double()).abs().max():.1e}"
    with safe_open(RELEASE / "expected.safetensors", "pt") as file:
        then = file.metadata()
    now = {name: importlib.metadata.version(name) for name in VERSIONS}
    changed = [f"{name} {then[name]} is {now[name]} now" for name in now if then[name] != now[name]]
    assert differences == {}, f"largest differences by name; {', '.join(changed) or 'libraries as they were'}"


class Loaded(NamedTuple):
    """Results of a process that loaded both folders."""

    scratch: Path
    tensors: dict[str, torch.Tensor]  # pixels, and logits.<folder>
    notes: dict[str, Any]
    output: str


def load(how: str, scratch: Path, expected: dict[str, torch.Tensor]) -> Loaded:
    save_file({"pictures": expected["pictures"]}, scratch / "pictures.safetensors")
    (scratch / "pictures").mkdir()
    for index, picture in enumerate(expected["pictures"]):
        Image.fromarray(picture.numpy()).save(scratch / "pictures" / f"{index}.png")
    (scratch / "commands.json").write_text(json.dumps(COMMANDS))
    package = {} if how == "package" else {"package": None}
    folders = (RELEASE / name for name in FOLDERS)
    output = run_pinned(PROCESS, how, scratch, *folders, cwd=scratch, home=scratch / "home", **package)
    notes = json.loads((scratch / f"{how}.json").read_text())
    return Loaded(scratch, load_file(scratch / f"{how}.safetensors"), notes, output)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, expected: dict[str, torch.Tensor]) -> Loaded:
    """Load with the current package."""
    return load("package", tmp_path_factory.mktemp("package"), expected)


@pytest.fixture(scope="module")
def own_code(tmp_path_factory: pytest.TempPathFactory, expected: dict[str, torch.Tensor]) -> Loaded:
    """Load with the code in each folder, without the package."""
    return load("own_code", tmp_path_factory.mktemp("own_code"), expected)


@pytest.fixture(params=["package", "own_code"])
def loaded(request: pytest.FixtureRequest) -> Loaded:
    return request.getfixturevalue(request.param)


def test_the_image_processor_makes_the_same_pixels(loaded: Loaded, expected: dict[str, torch.Tensor]) -> None:
    assert loaded.notes["capability"] == "DEFAULT"  # or else these bits would be those of one processor only
    assert_same_bits({"pixels": loaded.tensors["pixels"]}, {"pixels": expected["pixels"]})


@pytest.mark.parametrize("folder", FOLDERS)
def test_logits_are_those_of_the_release(loaded: Loaded, expected: dict[str, torch.Tensor], folder: str) -> None:
    name = f"logits.{folder}"
    assert_same_bits({name: loaded.tensors[name]}, {name: expected[name]})


def test_each_model_is_of_the_code_that_it_should_be_of(package: Loaded, own_code: Loaded) -> None:
    assert [name.partition(".")[0] for name in package.notes["modules"].values()] == ["clca"] * 2
    assert [name.partition(".")[0] for name in own_code.notes["modules"].values()] == ["transformers_modules"] * 2
    assert own_code.notes["imported"] == []


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_pipeline_of_their_own_code_says_what_the_logits_say(
    own_code: Loaded, expected: dict[str, torch.Tensor], folder: str
) -> None:
    for guesses, logits in zip(own_code.notes["classified"][folder], expected[f"logits.{folder}"], strict=True):
        scores = {guess["label"]: guess["score"] for guess in guesses}
        wanted = {f"cultivar_0{index}": share for index, share in enumerate(logits.softmax(-1).tolist())}
        assert scores == pytest.approx(wanted, abs=1e-5)


def test_commands_read_both(package: Loaded, expected: dict[str, torch.Tensor]) -> None:
    assert package.notes["statuses"] == [0] * len(COMMANDS)
    with (package.scratch / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    probabilities = expected["logits.model"].softmax(-1)
    assert [row["prediction"] for row in rows] == [f"cultivar_0{index}" for index in probabilities.argmax(-1)]
    found = [float(row["probability_1"]) for row in rows]
    assert found == pytest.approx(probabilities.amax(-1).tolist(), abs=1e-5)
    assert "evit in layers 1, 2, keep rate 0.5" in package.output  # profile
    assert "synthetic_leaves" in package.output  # results


def test_the_training_goes_on_bit_for_bit(tmp_path: Path, expected: dict[str, torch.Tensor]) -> None:
    """Resuming from a copy of the checkpoint with the recipe of that release gives the weights of the uninterrupted training."""
    output = tmp_path / "moved"
    shutil.copytree(RELEASE / CHECKPOINT, output / CHECKPOINT)
    options = ("--output_dir", output, "--resume_from_checkpoint", "true")
    run_pinned("-c", TRAIN, RELEASE / "recipe.yaml", *options, cwd=tmp_path, home=tmp_path / "home")

    assert Path(json.loads((output / "run.json").read_text())["resumed_from"]).name == CHECKPOINT
    assert json.loads((output / "trainer_state.json").read_text())["global_step"] == 60
    found = {f"model.{name}": value for name, value in load_file(output / "model.safetensors").items()}
    found |= {f"ema.{name}": value for name, value in load_file(output / "ema" / "model.safetensors").items()}
    assert_same_bits(found, {k: v for k, v in expected.items() if k.startswith(("model.", "ema."))})
