"""`ufgir convert` for pretrained models: one line creates a CLCA model; invalid sources raise one-sentence errors."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from transformers.models.dinov2.configuration_dinov2 import Dinov2Config
from transformers.models.dinov2.modeling_dinov2 import Dinov2Model

from ufgir.cli.entry import main


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = Dinov2Config(
        image_size=28, patch_size=7, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, mlp_ratio=2
    )
    folder = tmp_path_factory.mktemp("dinov2")
    Dinov2Model(config).save_pretrained(folder)
    return folder


REDUCED = ["--reduction", "evit", "--keep-rate", "0.5", "--reduction-layers", "1", "2", "--clca", "--num-labels", "3"]


def test_a_model_of_transformers(dinov2: Path, tmp_path: Path) -> None:
    output = tmp_path / "mine"
    assert main(["convert", str(dinov2), "--output", str(output), *REDUCED, "--image-size", "42"]) == 0
    model = AutoModelForImageClassification.from_pretrained(output)
    assert (model.config.reduction, model.config.head, model.num_labels) == ("evit", "cla", 3)
    assert AutoImageProcessor.from_pretrained(output).size["height"] == 42
    answer = pipeline("image-classification", model=str(output), image_processor=str(output))
    assert len(answer(Image.new("RGB", (60, 50)))) == 3
    card = (output / "README.md").read_text()
    assert "library_name: transformers" in card and "`classifier" in card


def test_weights_of_timm(tmp_path: Path) -> None:
    """A weights file needs the architecture; the weights of ViT-Tiny are created here under timm's names."""
    width, state = 192, {}
    state["cls_token"], state["pos_embed"] = torch.zeros(1, 1, width), torch.zeros(1, 197, width)
    state["patch_embed.proj.weight"], state["patch_embed.proj.bias"] = (
        torch.zeros(width, 3, 16, 16),
        torch.zeros(width),
    )
    for i in range(12):
        for name, shape in {
            "norm1": (width,),
            "norm2": (width,),
            "attn.qkv": (3 * width, width),
            "attn.proj": (width, width),
            "mlp.fc1": (4 * width, width),
            "mlp.fc2": (width, 4 * width),
        }.items():
            state[f"blocks.{i}.{name}.weight"] = torch.zeros(shape)
            state[f"blocks.{i}.{name}.bias"] = torch.zeros(shape[0])
    state["norm.weight"], state["norm.bias"] = torch.ones(width), torch.zeros(width)
    file, output = tmp_path / "model.safetensors", tmp_path / "tiny"
    save_file(state, file)
    command = ["convert", str(file), "--output", str(output)]
    with pytest.raises(SystemExit) as error:
        main(command)
    assert error.value.code == 2
    assert not output.exists()
    assert (
        main([*command, "--architecture", "deit_tiny_patch16_224.fb_in1k", "--reduction", "tome", "--num-labels", "3"])
        == 0
    )
    config = json.loads((output / "config.json").read_text())
    assert (config["hidden_size"], config["reduction"]) == (192, "tome")
    assert "license: apache-2.0" in (output / "README.md").read_text()


class Code:
    """Object that must not run when unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


def broken(name: str, folder: Path, dinov2: Path) -> list[str]:
    """Write a source with one fault, and return the other arguments of the command."""
    source = folder / name
    source.mkdir()
    weights = dinov2 / "model.safetensors"
    if name == "truncated":
        (source / "config.json").write_bytes((dinov2 / "config.json").read_bytes())
        (source / "model.safetensors").write_bytes(weights.read_bytes()[:2000])
    elif name == "pickle":
        (source / "config.json").write_bytes((dinov2 / "config.json").read_bytes())
        with (source / "pytorch_model.bin").open("wb") as file:
            pickle.dump({"weight": Code(folder / "executed")}, file)
    elif name == "no_such_model":
        (source / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    elif name == "architecture":
        return [str(weights), "--architecture", "deit_tinny_patch16_224"]
    elif name == "indivisible":
        return [str(dinov2), "--image-size", "30"]
    elif name == "classes":
        return [str(dinov2), "--num-labels", "-1"]
    elif name == "nothing":
        return [str(folder / "nowhere")]
    return [str(source)]


@pytest.mark.parametrize(
    "name", ["truncated", "pickle", "no_such_model", "architecture", "indivisible", "classes", "nothing"]
)
def test_bad_sources(name: str, tmp_path: Path, dinov2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One sentence, status 2, nothing written and nothing executed."""
    output = tmp_path / "output"
    with pytest.raises(SystemExit) as error:
        main(["convert", *broken(name, tmp_path, dinov2), "--output", str(output)])
    assert error.value.code == 2
    message = capfd.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("ufgir") and "error: " in message
    assert not output.exists() and not (tmp_path / "executed").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_what_is_there_is_not_replaced(dinov2: Path, tmp_path: Path) -> None:
    """Existing files are not replaced, except a converted model on request."""
    (tmp_path / "thesis.txt").write_text("mine")
    command = ["convert", str(dinov2), "--output"]
    for options in ([], ["--overwrite"]):
        with pytest.raises(SystemExit):
            main([*command, str(tmp_path), *options])
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    output = str(tmp_path / "model")
    assert main([*command, output]) == 0
    with pytest.raises(SystemExit):
        main([*command, output])
    assert main([*command, output, "--overwrite", "--reduction", "topk", "--reduction-layers", "1"]) == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["reduction"] == "topk"


def test_a_trained_model_is_never_replaced(dinov2: Path, tmp_path: Path) -> None:
    """`--overwrite` replaces only results of a conversion."""
    output = tmp_path / "trained"
    assert main(["convert", str(dinov2), "--output", str(output)]) == 0
    (output / "conversion.json").unlink()
    (output / "checkpoint-5").mkdir()
    with pytest.raises(SystemExit):
        main(["convert", str(dinov2), "--output", str(output), "--overwrite"])
    assert (output / "checkpoint-5").exists()


def test_options_that_an_original_checkpoint_tells_itself(tmp_path: Path) -> None:
    file = tmp_path / "run.pth"
    torch.save({}, file)
    with pytest.raises(SystemExit) as error:
        main(["convert", str(file), "--output", str(tmp_path / "out"), "--reduction", "evit"])
    assert error.value.code == 2
