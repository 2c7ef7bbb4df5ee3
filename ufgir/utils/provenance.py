"""Provenance of a result: time, machine, memory and package versions."""

import functools
import json
import os
import platform
import subprocess
import sys
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import xxhash


PREDICTIONS_FILE = "predictions.csv"  # unless `predictions_file` says otherwise
PACKAGES = ("clca-vit", "torch", "transformers", "accelerate", "datasets")
# fields of a configuration that do not describe the model: class names, and where and how it was saved
NOT_STORED = {"id2label", "label2id", "architectures", "auto_map", "dtype", "_name_or_path"}


def as_read(value: Any) -> Any:
    """Return a value as it would be read back from a JSON file."""
    return json.loads(json.dumps(value, default=str))


def now() -> str:
    """Return date and time with the UTC offset, to the second."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


def describe_host() -> str:
    """Return a short description of the machine: accelerators, cores, processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    parts = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    return ", ".join([*parts, f"{os.cpu_count()} CPU cores ({processor})", platform.system()])


def peak_memory() -> dict[str, int]:
    """Return peak memory in bytes: `host`, the resident size of this process; `gpu`, memory allocated by torch, the maximum over GPUs."""
    memory = {}
    try:
        import resource  # not on Windows
    except ImportError:
        pass
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        memory["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        memory["gpu"] = max(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return memory


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout, not installed
        return None


@functools.cache
def source_checksum() -> str:
    """Return a checksum of the Python files of both packages; like `source_commit`, it is determined by the first call."""
    hashed = xxhash.xxh3_128()
    for package in ("clca", "ufgir"):
        place = find_spec(package)
        if place is None or place.origin is None:
            continue
        folder = Path(place.origin).resolve().parent
        for file in sorted(folder.rglob("*.py")):
            hashed.update(f"{package}/{file.relative_to(folder).as_posix()}\0".encode() + file.read_bytes())
    return hashed.hexdigest()


@functools.cache
def source_commit() -> str | None:
    """Return the git commit of this code, with `+changes` if tracked files differ from it; None outside a git checkout.

    It is determined by the first call: call this early, since the files may change while a process runs.
    """
    here = Path(__file__).resolve()
    root = next((folder for folder in here.parents if (folder / ".git").exists()), None)
    if root is None or not here.is_relative_to(root / "ufgir"):  # e.g. installed into an environment inside a checkout
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, timeout=10, check=True).stdout
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+changes" if changes.strip() else "")
