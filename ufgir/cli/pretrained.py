"""`ufgir pretrained`: list the pretrained timm models that can be loaded."""

import argparse
import json

from ..checkpoints.timm_architectures import select_architectures
from ..utils.text import align


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("pattern", nargs="?", metavar="PATTERN", help="part of a name, or a glob [all]")
    parser.add_argument("--json", action="store_true", help="print JSON with the complete configurations")


def run(args: argparse.Namespace) -> str:
    """Return a table, or JSON."""
    found = select_architectures(args.pattern)
    if args.json:
        return json.dumps([vars(a) | {"fields": dict(a.fields)} for a in found], indent=2)
    rows = [["name", "image", "patch", "layers", "width", "heads", "MLP", "mean", "std", "license"]]
    networks = ["network, method"]
    for architecture in found:
        sizes = ("num_hidden_layers", "hidden_size", "num_attention_heads", "intermediate_size")
        row = [architecture.name, architecture.image_size, architecture.patch_size]
        row += [architecture.fields[name] for name in sizes]
        row += [" ".join(f"{n:.3f}" for n in numbers) for numbers in (architecture.mean, architecture.std)]
        rows.append([str(cell) for cell in [*row, architecture.licence]])
        own = ", ".join(f"{name}={value}" for name, value in architecture.own_fields.items())
        networks.append(f"{own or 'plain'}; {architecture.description}")
    lines = align(rows).split("\n")
    return "\n".join(f"{line}  {network}" for line, network in zip(lines, networks, strict=True))
