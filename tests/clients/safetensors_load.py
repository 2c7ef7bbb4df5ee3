"""Weights read with safetensors, loaded into a model created from the configuration."""

from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageClassification

from tests.clients.common import difference, logits_of, main, pixels, same_weights, save


def check(folder: Path) -> str:
    model = save(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    empty = AutoModelForImageClassification.from_config(config, trust_remote_code=True)
    empty.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    same_weights(empty.state_dict(), model.state_dict())
    return f"load_state_dict(strict=True), {difference(logits_of(empty.eval(), pixels()), logits_of(model, pixels()), 1e-6)}"


if __name__ == "__main__":
    main(check)
