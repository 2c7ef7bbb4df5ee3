"""File names and logits of a saved model."""

from pathlib import Path

import torch
from safetensors.torch import load_file

import clca
from tests.helpers import images


PACKAGE = Path(clca.__file__).parent
CODE = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py", "image_processing_clca.py"}  # of a model
NAMES = {0: "wild", 1: "bred", 2: "crossed"}


def on_disk(folder: Path) -> set[str]:
    return set(load_file(folder / "model.safetensors"))


def logits_of(model: torch.nn.Module, pixels: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(images().float() if pixels is None else pixels).logits
