"""The files of tests/goldens and tests/goldens_lab: tiny models that were run with the original code."""

import json
from pathlib import Path

import torch
from safetensors import safe_open


class Golden:
    """One file: `spec`, `state` under the original's keys, and other tensors by name."""

    def __init__(self, path: Path) -> None:
        with safe_open(path, "pt") as file:
            self.spec = json.loads(file.metadata()["config"])
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        self.state = self.group("state")
        self.training = self.spec.get("mode") == "train"
        self.images = self["input"]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(f"{prefix}."): v for k, v in self.tensors.items() if k.startswith(f"{prefix}.")}

    def per_layer(self, prefix: str) -> list[tuple[int, torch.Tensor]]:
        return sorted((int(k), v) for k, v in self.group(prefix).items() if k.isdigit())

    def __getitem__(self, key: str) -> torch.Tensor:
        return self.tensors[key]
