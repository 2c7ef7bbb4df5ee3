"""Files of torch.export."""

import io
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from .checks import Logits, Run, example


class _Cast(nn.Module):
    """Compute in another precision, with images and logits in float32."""

    def __init__(self, program: Logits, dtype: torch.dtype) -> None:
        super().__init__()
        self.program, self.dtype = program.to(dtype), dtype

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.program(pixel_values.to(self.dtype)).float()


def torch_program(program: Logits, precision: str = "float32") -> torch.export.ExportedProgram:
    """Export `program`, which is changed if the precision is not float32, for any batch size."""
    module = program if precision == "float32" else _Cast(program, getattr(torch, precision))
    shapes = {"pixel_values": {0: torch.export.Dim("batch", min=1, max=2**16)}}
    with torch.no_grad():
        return torch.export.export(module, (example(program, 2),), dynamic_shapes=shapes)


def write_torch(program: torch.export.ExportedProgram, path: Path, facts: dict[str, str] | None = None) -> None:
    """Write a program, with facts about it."""
    content = io.BytesIO()  # if the disk is full, torch ends the process when it writes the file itself
    torch.export.save(program, content, extra_files=facts)
    path.write_bytes(content.getbuffer())


def run_torch(path: Path) -> Run:
    """Return a function that runs a file."""
    return torch.export.load(path).module()


def torch_operators(path: Path) -> dict[str, int]:
    """Count the calls of the operators of a file."""
    return dict(
        Counter(str(node.target) for node in torch.export.load(path).graph.nodes if node.op == "call_function")
    )


def store_in_torch(path: Path, facts: dict[str, str]) -> None:
    """Write a file again, with facts in its extra files."""
    write_torch(torch.export.load(path), path, facts)
