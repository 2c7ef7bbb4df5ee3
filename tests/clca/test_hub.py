"""Saving and loading: files, and the rules for code that is shared on the Hub."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
)

from clca import REDUCTIONS, CLCAViTConfig, CLCAViTForImageClassification, CLCAViTModel
from tests.clca.shared import CODE, PACKAGE, logits_of, on_disk
from tests.helpers import METHODS, TINY, Case, images, tiny_config, tiny_model


# Files.


def test_what_is_saved(tmp_path: Path) -> None:
    """Only weights as safetensors under the names in memory, the configuration, and the flat code are saved."""
    model = tiny_model(reduction="evit", cross_layer_cache=True, num_clr_tokens=1, head="cla")
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.rglob("*")} == {"config.json", "model.safetensors"} | CODE
    assert on_disk(tmp_path) == set(model.state_dict())
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoConfig"] == "configuration_clca.CLCAViTConfig"
    classifier = "modeling_clca.CLCAViTForImageClassification"
    assert config["auto_map"]["AutoModelForImageClassification"] == classifier
    assert config["architectures"] == ["CLCAViTForImageClassification"]
    for name in CODE:
        assert (tmp_path / name).read_text() == (PACKAGE / name).read_text()


def test_what_is_saved_of_the_backbone(tmp_path: Path) -> None:
    CLCAViTModel(tiny_config()).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"]["AutoModel"] == "modeling_clca.CLCAViTModel"
    assert {p.name for p in tmp_path.rglob("*")} == {"config.json", "model.safetensors"} | CODE


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("tokens", ["registers", "no_cls"])
def test_saved_and_loaded(method: str | None, tokens: str, tmp_path: Path) -> None:
    """No key is missing or unexpected, and tensors and logits are equal, with the class and the Auto class."""
    model = Case(method, "clca" if tokens == "registers" else "cache", tokens).model().float()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(0.01)  # so that no initialization gives the same
    model.save_pretrained(tmp_path)
    for loader in (CLCAViTForImageClassification, AutoModelForImageClassification):
        loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info.values()), info
        assert type(loaded) is CLCAViTForImageClassification
        assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
        assert torch.equal(logits_of(loaded), logits_of(model))


def test_the_backbone_of_a_saved_classifier(tmp_path: Path) -> None:
    model = tiny_model(reduction="evit", keep_rate=0.5).float()
    model.save_pretrained(tmp_path)
    backbone, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(backbone) is CLCAViTModel
    assert not info["missing_keys"]
    with torch.no_grad():
        expected = model.vit(images().float()).last_hidden_state
        assert torch.equal(backbone.eval()(images().float()).last_hidden_state, expected)


def test_the_auto_classes_know_the_model() -> None:
    config = AutoConfig.for_model("clca_vit", **TINY)
    assert type(config) is CLCAViTConfig
    assert type(AutoModel.from_config(config)) is CLCAViTModel
    assert type(AutoModelForImageClassification.from_config(config)) is CLCAViTForImageClassification


# The rules of code on the Hub.


def modules() -> list[Path]:
    return sorted(PACKAGE.glob("*.py"))


def imports(path: Path) -> list[tuple[int, str]]:
    """Return (level, module) of every import of a file, at any depth.

    Imports of other packages inside `try` are excluded: they are optional, and transformers ignores them for code from
    the Hub."""
    found, tree = [], ast.parse(path.read_text())
    optional = {node for block in ast.walk(tree) if isinstance(block, ast.Try) for node in block.body}
    for node in ast.walk(tree):
        if node in optional and not getattr(node, "level", 0):
            continue
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.level, node.module or ""))
    return found


def test_the_package_is_flat() -> None:
    assert not [p for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"]


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_imports_are_few_and_flat(path: Path) -> None:
    """Files import packages that transformers depends on, the standard library, and siblings by `from .name import x`.
    Other packages are imported inside `try`."""
    packages = {"torch", "transformers", "huggingface_hub", *sys.stdlib_module_names}
    packages |= {"numpy", "PIL"} if path.stem == "image_processing_clca" else set()
    for level, module in imports(path):
        if level == 0:
            assert module.partition(".")[0] in packages
        else:
            assert level == 1
            assert (PACKAGE / f"{module}.py").is_file(), module
    # transformers finds siblings line by line, in docstrings, too.
    for sibling in re.findall(r"^\s*from\s+\.(\S+)\s+import", path.read_text(), flags=re.MULTILINE):
        assert (PACKAGE / f"{sibling}.py").is_file(), sibling
    assert not re.search(r"^\s*import\s+\.", path.read_text(), flags=re.MULTILINE)


def test_the_index_names_every_file() -> None:
    """A file that no other file imports would not be saved with a model."""
    files = {p.stem.removeprefix("reduction_") for p in PACKAGE.glob("reduction_*.py")} - {"base"}
    assert files == set(REDUCTIONS)
    for name, method in REDUCTIONS.items():
        assert method.name == name
        assert method.__module__ == f"clca.reduction_{name}"


@pytest.mark.parametrize("name", sorted(REDUCTIONS))
def test_methods_do_not_know_each_other(name: str) -> None:
    others = {f"reduction_{other}" for other in REDUCTIONS}
    siblings = {module for level, module in imports(PACKAGE / f"reduction_{name}.py") if level}
    assert not siblings & {*others, "reductions_clca", "modeling_clca"}
    assert "reduction_base" in siblings


def test_the_top_level_modules_export_the_same() -> None:
    import configuration_clca
    import modeling_clca

    assert modeling_clca.CLCAViTForImageClassification is CLCAViTForImageClassification
    assert modeling_clca.CLCAViTModel is CLCAViTModel
    assert configuration_clca.CLCAViTConfig is CLCAViTConfig
