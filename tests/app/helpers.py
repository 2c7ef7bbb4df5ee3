"""A model for the page, and images that visitors may upload."""

import struct
import zlib

import pytest
import torch
from huggingface_hub.utils import httpx
from transformers import (
    ViTImageProcessorPil,
)

from clca import CLCAViTConfig, CLCAViTForImageClassification
from tests.helpers import CACHES, TINY
from ufgir.cli import entry as cli


def save_checkpoint(folder, **changes):
    """Save a model with weights of a fixed seed and the classes of the drawn leaves, and its image processor."""
    names = [f"cultivar_{label:02d}" for label in range(3)]
    options = TINY | CACHES["clca"] | {"reduction": "evit", "keep_rate": 0.5, "id2label": dict(enumerate(names))}
    torch.manual_seed(0)
    CLCAViTForImageClassification(CLCAViTConfig(**options | changes)).save_pretrained(folder)
    save_processor(folder)
    return str(folder)


def save_processor(folder):
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)


def png(width, height, rows=None):
    """Return a black image as PNG, encoded without creating the image in memory; with fewer `rows`, the file is truncated."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer, row = zlib.compressobj(1), bytes(1 + width)
    data = b"".join(packer.compress(row) for _ in range(height if rows is None else rows)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)  # 8 bits of grey
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def answer(kind, status):
    """Return an error response of the Hub."""
    return kind("no", response=httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co")))


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        cli.main(["app", *argv])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "Traceback" not in error
    return error
