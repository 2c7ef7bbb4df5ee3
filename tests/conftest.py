"""Settings and fixtures of the whole suite: offline, seeded, one thread per worker."""

import gc
import os


os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# Before anything imports torch: MKL's exponential differs in the last float32 bit between processors unless it is told to
# be the same everywhere, and DynamicViT's training softmax is float32 in a float64 model.
os.environ["MKL_CBWR"] = "COMPATIBLE"
# On a GPU some versions of torch refuse deterministic algorithms without it.
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"

from pathlib import Path

import pytest
import torch


GOLDENS = ("goldens", "goldens_lab")  # of the original code, and of its later tree


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--goldens",
        type=Path,
        help=f"folder of golden .safetensors files to run (default: {', '.join(GOLDENS)} of tests)",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "golden_file" in metafunc.fixturenames:
        chosen = metafunc.config.getoption("goldens")
        folders = [Path(__file__).parent / name for name in GOLDENS] if chosen is None else [chosen]
        files = [file for folder in folders for file in sorted(folder.glob("*.safetensors"))]
        if not files:
            raise pytest.UsageError(f"--goldens {chosen}: no .safetensors files there")
        metafunc.parametrize("golden_file", files, ids=[f.stem for f in files])


@pytest.fixture(autouse=True)
def idle_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `ufgir benchmark` run while others compute: tests measure no speed."""
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0), raising=False)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def threads() -> None:
    torch.set_num_threads(1)  # tiny models: more threads only wait for each other


@pytest.fixture(autouse=True, scope="module")
def few_objects() -> None:
    """Freeze existing objects, because accelerate collects garbage before each training, which takes half a second otherwise."""
    gc.collect()
    gc.freeze()
