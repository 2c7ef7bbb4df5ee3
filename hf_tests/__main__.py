"""Download and run transformers' common tests: `python -m hf_tests [options of pytest]`."""

import os
import subprocess
import sys
from pathlib import Path

from .source import prepare


def main() -> int:
    """Run the tests, and return the exit status of pytest."""
    folder = prepare()
    # transformers reads these variables when it is imported
    settings = {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",  # several threads are slower for tiny models
        "TRANSFORMERS_TINY_MODEL_PATH": str(folder / "tiny_models"),
        "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    tests = Path(__file__).resolve().parent
    command = [sys.executable, "-m", "pytest", "-n", "2", "-q", str(tests), *sys.argv[1:]]
    return subprocess.run(command, env=os.environ | settings, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
