"""AutoModel, AutoModelForImageClassification and AutoImageProcessor where this package is not installed."""

import os
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from tests.clients.common import difference, logits_of, main, pixels, same_weights, save


PROGRAM = """
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification

model = AutoModelForImageClassification.from_pretrained("model", trust_remote_code=True).eval()
backbone = AutoModel.from_pretrained("model", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules") and backbone.config.reduction == "evit"
assert AutoImageProcessor.from_pretrained("model", trust_remote_code=True).size["height"] == 32
with torch.no_grad():
    save_file(model.state_dict(), "weights.safetensors")
    save_file({"logits": model(load_file("pixels.safetensors")["pixels"]).logits}, "logits.safetensors")
"""


def check(folder: Path) -> str:
    model = save(folder / "model")
    save_file({"pixels": pixels()}, folder / "pixels.safetensors")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-P", "-c", PROGRAM]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-250:]
    same_weights(load_file(folder / "weights.safetensors"), model.state_dict())
    found = load_file(folder / "logits.safetensors")["logits"]
    return f"from remote code, {difference(found, logits_of(model, pixels()), 1e-6)}"


if __name__ == "__main__":
    main(check)
