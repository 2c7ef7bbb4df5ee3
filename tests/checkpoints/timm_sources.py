"""Weights of timm from tests/goldens_timm: state dicts, and folders as timm writes them."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file


FILES = {file.stem: file for file in sorted((Path(__file__).parents[1] / "goldens_timm").glob("*.safetensors"))}


def read(name: str, dtype: torch.dtype = torch.float32) -> tuple[dict, dict, dict]:
    """Return state dict, other tensors and description of a golden file."""
    with safe_open(FILES[name], "pt") as file:
        spec = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key).to(dtype) for key in file.keys()}  # noqa: SIM118
    state = {key.removeprefix("state."): tensor for key, tensor in tensors.items() if key.startswith("state.")}
    return state, {key: tensor for key, tensor in tensors.items() if not key.startswith("state.")}, spec


def write_folder(folder: Path, name: str = "vit", file: str = "model.safetensors", **data) -> Path:
    """Write the files of timm's save_for_hf for a golden file."""
    state, _, spec = read(name)
    network, _, tag = spec["architecture"].partition(".")
    args = {"img_size": 16, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2, "mlp_ratio": 2.0}
    described = {"tag": tag, "input_size": [3, 16, 16], "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}
    described |= {"crop_pct": 0.8, "interpolation": "bilinear", "license": "mit", "label_names": ["a", "b", "c"]}
    data = {"architecture": network, "num_classes": 3, "model_args": args, "pretrained_cfg": described} | data
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(data))
    if file.endswith("safetensors"):
        save_file(state, folder / file)
    else:
        torch.save(state, folder / file)
    return folder
