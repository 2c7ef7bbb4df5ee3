"""Download the tests of the installed transformers with pip, and make them importable.

The source distribution contains the common tests, but not all files that they import. Replacements of the others are defined here.
"""

import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from importlib import metadata
from pathlib import Path, PurePosixPath

import transformers


CACHE = Path(__file__).resolve().parents[1] / ".hf_tests"
PACKAGE = "transformers_tests"  # import name, because our own tests are called `tests`

# Modules that the common tests import, but the source distribution does not contain.
STUBS = {
    # Tests of transformers.exporters are not published.
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    # Our models do not generate text.
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    # Arguments that every configuration must store, with values that differ from their defaults.
    "utils/test_configuration_utils.py": """config_common_kwargs = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "chunk_size_feed_forward": 7,
    "architectures": ["SomeModel"],
    "id2label": {0: "the only one"},
    "label2id": {"the only one": 0},
    "problem_type": "regression",
}
""",
}


def prepare() -> Path:
    """Download and unpack the tests, unless this was done before.

    Returns:
        Folder for the import path, which contains the package `transformers_tests`.

    Raises:
        SystemExit: if pip cannot download them.
    """
    version = metadata.version("transformers")
    folder = CACHE / version
    if not (folder / ".ready").exists():
        CACHE.mkdir(exist_ok=True)
        (CACHE / ".gitignore").write_text("*\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        _unpack(_download(version), folder / PACKAGE)
        _complete(folder)
        (folder / ".ready").touch()
    # The tests expect the package next to them. The link is updated because the environment may have moved.
    link = folder / "src" / "transformers"
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path(transformers.__file__).parent, target_is_directory=True)
    return folder


def _download(version: str) -> Path:
    archive = CACHE / f"transformers-{version}.tar.gz"
    if not archive.exists():
        with tempfile.TemporaryDirectory(dir=CACHE) as partial:
            # pip reads the metadata of a source distribution with setuptools; without isolation it uses the installed one
            options = ["--no-deps", "--no-build-isolation", "--no-binary", "transformers"]
            command = [sys.executable, "-m", "pip", "download", *options, f"transformers=={version}"]
            if subprocess.run(command, cwd=partial, check=False).returncode:
                raise SystemExit(f"pip could not download the source distribution of transformers {version}.")
            (Path(partial) / archive.name).replace(archive)
    return archive


def _unpack(archive: Path, target: Path) -> None:
    """Extract only the folder tests/ of the archive."""
    with tarfile.open(archive) as tar, tempfile.TemporaryDirectory(dir=target.parent) as unpacked:
        members = [m for m in tar.getmembers() if PurePosixPath(m.name).parts[1:2] == ("tests",)]
        tar.extractall(unpacked, members=members, filter="data")
        (tests,) = Path(unpacked).glob("*/tests")
        tests.replace(target)


def _complete(folder: Path) -> None:
    package = folder / PACKAGE
    for name, text in STUBS.items():
        file = package / name
        if file.exists():
            raise FileExistsError(f"transformers' source distribution now contains {file}: remove it from STUBS.")
        file.parent.mkdir(exist_ok=True)
        file.write_text(text, encoding="utf-8")
    for place in (package, *(file.parent for file in map(package.joinpath, STUBS))):
        (place / "__init__.py").touch()
    # The pipeline tests read the properties of tiny models on the Hub from this file. Ours are created when needed.
    summary = {
        name: {"tokenizer_classes": [], "processor_classes": ["ViTImageProcessorPil"]}
        for name in ("CLCAViTModel", "CLCAViTForImageClassification")
    }
    reports = folder / "tiny_models" / "reports"
    reports.mkdir(parents=True)
    (reports / "tiny_model_summary.json").write_text(json.dumps(summary), encoding="utf-8")
