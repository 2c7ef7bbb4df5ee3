"""transformers' two examples of image classification, on a model that run_ufgir.py could have saved.

The scripts are not part of this repository: `EXAMPLES` is a folder with `run_image_classification.py` and
`run_image_classification_no_trainer.py`. Offline, replace their `evaluate.load("accuracy")` with a local metric.
"""

import os
import subprocess
import sys
from pathlib import Path

from PIL import Image

from tests.clients.common import NAMES, main, save


SCRIPTS = ("run_image_classification.py", "run_image_classification_no_trainer.py")


def check(folder: Path) -> str:
    save(folder / "model")
    for split in ("train", "validation"):
        for seed, name in enumerate(NAMES.values()):
            (folder / split / name).mkdir(parents=True)
            for index in range(4):
                picture = Image.effect_noise((60, 50), 40 + 30 * seed + index).convert("RGB")
                picture.save(folder / split / name / f"{index}.png")
    shared = ["--model_name_or_path", folder / "model", "--trust_remote_code", "True", "--ignore_mismatched_sizes"]
    shared += ["--train_dir", folder / "train", "--validation_dir", folder / "validation"]
    shared += ["--per_device_train_batch_size", "4", "--learning_rate", "1e-3"]
    own = (
        ["--do_train", "--do_eval", "--max_steps", "2", "--report_to", "none", "--remove_unused_columns", "False"],
        ["--max_train_steps", "2"],
    )
    for script, options in zip(SCRIPTS, own, strict=True):
        output = folder / script.removesuffix(".py")
        command = [sys.executable, Path(os.environ["EXAMPLES"]) / script, *shared, *options, "--output_dir", output]
        process = subprocess.run([*map(str, command)], cwd=folder, capture_output=True, text=True, check=False)
        assert process.returncode == 0, f"{script}: {process.stderr[-200:]}"
        assert (output / "model.safetensors").exists(), f"{script} saved no model"
    return "both scripts train, evaluate and save"


if __name__ == "__main__":
    main(check)
