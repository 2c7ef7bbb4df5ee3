"""Saved models with their own code, in a clean process without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    ViTImageProcessorPil,
)

from clca import REDUCTIONS, CLCAViTBackbone, CLCAViTForImageClassification
from clca.resample_clca import resample_position_embeddings
from tests.clca.shared import CODE, NAMES, PACKAGE, logits_of
from tests.helpers import images, tiny_model


REPOSITORY = PACKAGE.parent


# A clean process.


class Remote(NamedTuple):
    """Results of the clean process, and the models it used."""

    results: dict[str, dict[str, Any]]
    logits: dict[str, torch.Tensor]
    models: dict[str, CLCAViTForImageClassification]
    folder: Path

    def step(self, name: str) -> dict[str, Any]:
        result = self.results[name]
        assert "error" not in result, result["error"]
        return result


@pytest.fixture(scope="module")
def remote(tmp_path_factory: pytest.TempPathFactory) -> Remote:
    """Save two models, the second with marked code, and use them in a process without the package, in
    another folder."""
    folder = tmp_path_factory.mktemp("remote")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    models = {
        "one": tiny_model(
            reduction="evit", keep_rate=0.5, cross_layer_cache=True, num_clr_tokens=1, head="cla", id2label=NAMES
        ).float(),
        "two": tiny_model(reduction="tome" if "tome" in REDUCTIONS else "topk", keep_rate=0.5).float(),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    with (folder / "two" / "modeling_clca.py").open("a") as file:
        file.write('\nMARK = "two"\n')
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "one")
    Image.effect_noise((40, 50), 90).convert("RGB").save(folder / "image.png")
    save_file({"pixels": images().float()}, folder / "pixels.safetensors")

    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(elsewhere / "home"),
        "HF_MODULES_CACHE": str(elsewhere / "modules"),
        "OMP_NUM_THREADS": "1",
    }
    script = Path(__file__).with_name("remote_process.py")
    process = subprocess.run(
        [sys.executable, "-P", str(script), str(folder), str(REPOSITORY)],
        cwd=elsewhere,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    results = json.loads((folder / "results.json").read_text())
    return Remote(results, load_file(folder / "logits.safetensors"), models, folder)


def test_remote_load(remote: Remote) -> None:
    """AutoModelForImageClassification returns equal logits and class names without importing the package."""
    result = remote.step("load_first")
    assert result["module"].startswith("transformers_modules.")
    assert result["labels"] == list(NAMES.values())
    assert torch.equal(remote.logits["one"], logits_of(remote.models["one"]))
    assert remote.step("package_was_absent")["imported"] == []


def test_remote_auto_classes(remote: Remote) -> None:
    assert remote.step("auto_classes") == {
        "config": "CLCAViTConfig",
        "fresh": "CLCAViTForImageClassification",
        "keep_rate": [0.5],
    }


def test_remote_backbone(remote: Remote) -> None:
    """AutoModel loads the backbone from a saved classifier."""
    assert remote.step("load_backbone") == {"class": "CLCAViTModel"}
    with torch.no_grad():
        expected = remote.models["one"].vit(images().float()).last_hidden_state
    assert torch.equal(remote.logits["backbone"], expected)


def test_remote_feature_maps(remote: Remote) -> None:
    """AutoBackbone loads feature maps from a saved classifier, and a saved backbone lists its Auto class."""
    found = {"class": "CLCAViTBackbone", "again": "CLCAViTBackbone", "out_features": ["stage2", "stage5"]}
    assert remote.step("load_feature_maps") == found
    model = CLCAViTBackbone.from_pretrained(remote.folder / "one", out_indices=[2, 5]).eval()
    with torch.no_grad():
        assert torch.equal(remote.logits["maps"], torch.stack(model(images().float()).feature_maps))


def test_two_remote_models_with_different_code(remote: Remote) -> None:
    """Both load in one process, each with its own code, and the first one still works."""
    assert remote.step("load_second")["marks"] == [None, "two"]
    assert torch.equal(remote.logits["two"], logits_of(remote.models["two"]))
    assert torch.equal(remote.logits["one_again"], remote.logits["one"])


def test_remote_models_can_be_saved_again(remote: Remote) -> None:
    """They can be saved twice in a row, including code."""
    result = remote.step("save_again")
    assert result["module"].startswith("transformers_modules.")
    assert set(result["files"]) == {"config.json", "model.safetensors"} | CODE
    for name in ("three", "four"):
        assert torch.equal(remote.logits[name], remote.logits["one"])


def test_remote_overrides(remote: Remote) -> None:
    """Valid overrides have an effect, others are refused: the checks are part of the saved code."""
    result = remote.step("overrides")
    assert "`keep_rate`" in result["refused"]
    assert result["counts"][:3] == [18, 18, 20]  # nothing reduced, and two tokens retrieved


def test_remote_resize(remote: Remote) -> None:
    """Another image size works with both Auto classes, and again after the package has registered its own
    conversions."""
    result = remote.step("other_size")
    assert result["module"].startswith("transformers_modules.")
    assert not any(result["info"].values())
    table = remote.models["one"].vit.embeddings.position_embeddings.detach()
    expected = resample_position_embeddings(table, 1, (4, 4), (6, 6))
    remote.step("import_package")
    for name in ("positions", "positions_of_backbone", "positions_again"):
        assert torch.equal(remote.logits[name], expected)


def test_pipeline(remote: Remote) -> None:
    """Image classification from a folder with a stock image processor returns class names and probabilities."""
    predictions = remote.step("classify")["predictions"]
    processor = ViTImageProcessorPil.from_pretrained(remote.folder / "one")
    with Image.open(remote.folder / "image.png") as image:
        pixels = processor(image, return_tensors="pt")["pixel_values"]
    probabilities = logits_of(remote.models["one"], pixels).softmax(dim=-1)[0]
    best = probabilities.topk(2)
    assert [p["label"] for p in predictions] == [NAMES[int(i)] for i in best.indices]
    assert [p["score"] for p in predictions] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_the_package_after_a_remote_load(remote: Remote) -> None:
    """It registers its classes without a conflict."""
    result = remote.step("import_package")
    assert result["module"] == "clca.modeling_clca"
    assert torch.equal(remote.logits["package"], remote.logits["one"])
