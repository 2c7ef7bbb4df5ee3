"""Makes a folder of `tests/fixtures/`: a model and a checkpoint as a release writes them, for `test_old_release.py`.

Not run by the tests. Run it once for a release, in a checkout of it, with the versions of `constraints.txt`:

python tests/make_release_fixture.py tests/fixtures/release_0_1_0

The folder holds a `recipe.yaml` that saves one checkpoint on its way. What is added:

model/                 the `output_dir`, without its checkpoints and averaged weights
checkpoint-<step>/     the checkpoint, complete
expected.safetensors   `model.*` and `ema.*`: the last weights, and their average; `pictures`, and the `pixels` that the
                       image processor makes of them; `logits.<folder>` of those pixels

Where model and checkpoint are there already, `expected.safetensors` alone is written again: for other versions of the
libraries.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors.torch import load_file, save_file


ROOT = Path(__file__).parents[1]
# not beside tests/clca, which would hide `clca` from it
PROCESS = Path(__file__).with_name("project") / "old_release_process.py"
# The same bits on every x86 processor. Without these, libraries choose their instructions by the processor, and the weights
# differ after a few steps.
PINNED = {
    "ATEN_CPU_CAPABILITY": "default",  # torch
    "MKL_CBWR": "COMPATIBLE",  # its matrix products
    "DNNL_MAX_CPU_ISA": "SSE41",  # its convolutions
    "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR",  # numpy, which draws the leaves
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-FMA,-FMA4",  # sine and logarithm of the C library
    "OMP_NUM_THREADS": "1",
}
VERSIONS = ("torch", "transformers", "accelerate", "numpy", "pillow", "datasets", "safetensors")


def run_pinned(*arguments: object, cwd: Path, home: Path, package: Path | None = ROOT) -> str:
    """Run Python in a new process with `PINNED` and without network, and return its output; raise an error if it fails.

    Args:
        home: for what HuggingFace's libraries keep.
        package: where this package is found; None: nowhere.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules"), **PINNED}
    if package is not None:
        environment["PYTHONPATH"] = str(package)
    command = [sys.executable, *([] if package else ["-P"]), *map(str, arguments)]
    process = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, (process.stdout + process.stderr)[-4000:]
    return process.stdout


def make_pictures() -> torch.Tensor:
    """Return four images of colored squares, (4, 40, 40, 3), uint8."""
    squares = np.random.default_rng(0).integers(0, 256, (4, 5, 5, 3))
    return torch.from_numpy(squares.repeat(8, axis=1).repeat(8, axis=2).astype(np.uint8))


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def main(folder: Path) -> None:
    if changed := git("status", "--porcelain", "--untracked-files=no"):
        raise SystemExit(f"this is no commit, there are changes:\n{changed}")
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
    output = ROOT / recipe["output_dir"]
    name = f"checkpoint-{recipe['save_steps']}"
    if output.exists():
        raise SystemExit(f"{output} is there already: delete it first")
    options = ("--resume_from_checkpoint", folder / name) if (folder / name).exists() else ()

    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        run_pinned("run_ufgir.py", (folder / "recipe.yaml").relative_to(ROOT), *options, cwd=ROOT, home=home)
        expected = {f"model.{key}": value for key, value in load_file(output / "model.safetensors").items()}
        expected |= {f"ema.{key}": value for key, value in load_file(output / "ema" / "model.safetensors").items()}
        if not options:
            shutil.copytree(output / name, folder / name)
            shutil.copytree(output, folder / "model", ignore=shutil.ignore_patterns("checkpoint-*", "ema"))

        expected["pictures"] = make_pictures()
        save_file({"pictures": expected["pictures"]}, home / "pictures.safetensors")
        run_pinned(PROCESS, "package", home, folder / "model", folder / name, cwd=home, home=home)
        expected |= load_file(home / "package.safetensors")

    about = {"commit": git("rev-parse", "HEAD"), "python": platform.python_version(), **PINNED}
    about |= {package: importlib.metadata.version(package) for package in VERSIONS}
    save_file({key: expected[key].contiguous() for key in sorted(expected)}, folder / "expected.safetensors", about)
    shutil.rmtree(output)
    sys.stdout.write(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
