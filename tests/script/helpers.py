"""A tiny recipe for run_ufgir.py, and functions that run it in this process."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

import run_ufgir
from ufgir.utils.arguments import RecipeParser


CLASSES = ["blue", "green", "red"]
MODEL = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "reduction": "evit",
    "reduction_layers": [1],
    "keep_rate": 0.5,
    "cross_layer_cache": True,
    "num_clr_tokens": 1,
    "head": "cla",
}
TRAINING = {
    "do_train": True,
    "num_train_epochs": 2,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 5,
}


def draw_leaves(root: Path) -> Path:
    """Draw three classes of noisy colors: 6 images per class for training, 3 for validation, 2 for test."""
    generator = np.random.default_rng(0)
    for split, count in (("train", 6), ("validation", 3), ("test", 2)):
        for channel, name in enumerate(reversed(CLASSES)):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 100, (20, 24, 3))
                pixels[..., channel] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{name}{i}.png")
    return root


def recipe(folder: Path, data: Path, out: Path, **changes) -> str:
    """Write a recipe file in `folder`, and return its path."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({"dataset": str(data), "output_dir": str(out), **MODEL, **TRAINING, **changes}))
    return str(path)


def run(*argv: str) -> dict:
    return run_ufgir.main(list(argv))


def mistake(capsys, *argv: str) -> str:
    """Return the error message of the script; fail if it does not end with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        run(*argv)
    error = capsys.readouterr().err
    assert caught.value.code == 2
    said = [line for line in error.splitlines() if line.startswith("run_ufgir.py: error: ")]
    rest = error[error.index(said[0]) :]  # a list of files has a line each
    assert len(said) == 1 and "Traceback" not in error, error
    assert all(line.startswith("  ") for line in rest.splitlines()[1:]), error
    return rest


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def parse(*argv: str):
    """Return the options of the model, the data and the training."""
    options = run_ufgir.Options(*RecipeParser(run_ufgir.GROUPS, prog="run_ufgir.py").parse(list(argv)))
    return options.model, options.data, options.training
