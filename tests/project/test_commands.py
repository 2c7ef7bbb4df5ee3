"""Every command of README.md, CONTRIBUTING.md and the guides parses, and is run here or listed with a reason."""

import argparse
import importlib
import importlib.util
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

import run_ufgir
from dataset_scripts import synthetic_leaves
from tests.helpers import tiny_model
from ufgir.cli import entry
from ufgir.transforms import make_image_processor
from ufgir.utils.arguments import RecipeParser


ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# Run from the first command to the last, at the size of toys
RUN = {"beginning": ("README.md", "docs/start.md"), "training": ("docs/training.md",)}
# What is not run -> why, and what is tested instead
NOT_RUN = {
    r"make ": "takes minutes or starts these tests; test_docs.py builds the site, test_notebooks.py runs the notebooks",
    r"python -m pytest ": "starts these tests",
    r"python -m tests\.faults ": "takes an hour or more; tests/faults/test_kills.py",
    r"pip install ": "installs packages; test_packaging.py builds and installs a wheel",
    r"python train\.py ": "belongs to the original code",
    r"cp ": "copies an image",
    r"(for|done)\b": "is a line of a loop",
    r"ufgir app": "serves until it is stopped; tests/app",
    r"ufgir export outputs/mine --output mine": "needs OpenVINO, or is run by the README; tests/export",
    r"ufgir export .*--web": "needs ONNX Runtime Web, and may serve until it is stopped; tests/web",
    r"ufgir prepare ": "needs a raw download; tests/data/test_prepare.py has miniatures",
    r"ufgir (convert|pretrained) ": "needs a download, or timm's list of a user; tests/checkpoints",
    r"ufgir benchmark ": "takes minutes, or needs a GPU; tests/profiling",
    r"ufgir profile (outputs/mine --(layers|operators)|--methods)": "takes a minute, or writes a table of a guide; tests/profiling",
    r"ufgir (analyze|compare|correlate|embed|probe) ": "takes a minute with the demo model; tests/analysis",
    r"ufgir (sweep|results) ": "needs hours of training; tests/runs",
    r"ufgir visualize outputs/demo": "makes a figure of the gallery; tests/visualization",
    r"ufgir predict outputs/mine folder/of/images": "is run by the README, with another folder",
    r"python docs/study_heads\.py ": "takes hours; it is `ufgir sweep` with three heads",
    r"(torchrun|accelerate launch) ": "needs several GPUs or machines; tests/training/test_distributed.py",
    r"python run_ufgir\.py recipes/(paper/|study)": "takes hours; test_recipes.py has a miniature",
    r"python run_ufgir\.py --dataset data/": "needs Ultra-FGVC; test_recipes.py checks the options",
    r"python run_ufgir\.py recipes/demo\.yaml .*--reduction \$method": "is a line of a loop",
    r"python run_ufgir\.py --model_name_or_path outputs/elastic": "needs a model that takes an hour; tests/training",
}


class Command(NamedTuple):
    """Line of a shell."""

    document: str
    text: str  # without the folder of the environment, and without comments

    @property
    def words(self) -> list[str]:
        return shlex.split(self.text)


def commands_of(path: Path) -> list[Command]:
    """Return the commands in the blocks of a document."""
    text = path.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(?:bash|sh|shell|console)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line.strip() for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    plain = [re.sub(r"(^|\s+)#.*", "", line).replace(".venv/bin/", "") for line in lines]
    return [Command(str(path.relative_to(ROOT)), line) for line in plain if line]


COMMANDS = [command for path in DOCUMENTS for command in commands_of(path)]


def reasons(command: Command) -> list[str]:
    return [pattern for pattern in NOT_RUN if re.match(pattern, command.text)]


def run_in(guide: str) -> dict[str, list[str]]:
    """Return the commands of a guide that are run, each once, with their words."""
    return {c.text: c.words for c in COMMANDS if c.document in RUN[guide] and not reasons(c)}


def parse(command: Command) -> None:
    """Parse a command with the program's own parser; its mistakes end the process."""
    first, *rest = command.words
    if "run_ufgir.py" in rest:
        options = ["recipes/demo.yaml" if word == "recipe.yaml" else word for word in rest]
        options = options[options.index("run_ufgir.py") + 1 :]
        if options != ["--help"]:
            RecipeParser(run_ufgir.GROUPS, prog="run_ufgir.py").parse(options)
    elif first == "ufgir":
        parser = argparse.ArgumentParser(allow_abbrev=False)
        importlib.import_module(f"ufgir.cli.{rest[0].replace('-', '_')}").configure(parser)
        dashes = [re.sub(r"(?<=\w)_", "-", word) if re.fullmatch(r"--\w+", word) else word for word in rest[1:]]
        parser.parse_args(dashes)
    elif first == "make":
        targets = [word for word in rest if "=" not in word]
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in targets)
    elif [first, *rest[:1]] == ["python", "-m"]:
        assert importlib.util.find_spec(rest[1]) is not None
    else:
        script = first == "python" and (ROOT / rest[0]).is_file()
        assert script or first in ("pip", "cp", "for", "done") or rest[0] == "train.py", command.text


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.document}: {command.text}"[:100])
def test_every_command_parses(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """The repository files in it exist."""
    monkeypatch.chdir(ROOT)
    parse(command)
    if "train.py" not in command.words:
        named = re.findall(r"(?:recipes|tests|docs|dataset_scripts)/[\w/.-]+|\w+\.py\b", command.text)
        assert [name for name in named if not (ROOT / name).exists()] == []


def test_every_command_is_run_or_listed() -> None:
    assert len(COMMANDS) > 80
    run = {text for guide in RUN for text in run_in(guide)}
    unknown = [command for command in COMMANDS if command.text not in run and not reasons(command)]
    assert unknown == [], "run it in this file, or say in NOT_RUN why not and what is tested instead"
    unused = [pattern for pattern in NOT_RUN if not any(re.match(pattern, command.text) for command in COMMANDS)]
    assert unused == [], "no document has such a command"


def small(words: list[str]) -> list[str]:
    """Return options for a tiny training."""
    options = ["--use_cpu", "true", "--disable_tqdm", "true", "--dataloader_num_workers", "0"]
    if "recipes/demo.yaml" in words:
        options += ["--hidden_size", "24", "--num_train_epochs", "2", "--per_device_train_batch_size", "4"]
        options += [] if "--dataset" in words else ["--synthetic_images_per_class", "2", "1", "1"]
    if "recipes/image_folder.yaml" in words:
        options += ["--num_train_epochs", "1", "--per_device_train_batch_size", "4"]
    return options


def run_script(words: list[str]) -> None:
    if words == ["--help"]:
        with pytest.raises(SystemExit) as caught:
            run_ufgir.main(words)
        assert caught.value.code == 0
    else:
        run_ufgir.main([*words, *small(words)])


def run_command(words: list[str]) -> None:
    assert entry.main(words) == 0


def run_module(words: list[str]) -> None:
    assert words[0] == "dataset_scripts.synthetic_leaves"
    few = [] if "--images_per_class" in words else ["--images_per_class", "1", "1", "1"]
    synthetic_leaves.main([*words[1:], *few])


PROGRAMS: dict[tuple[str, ...], Callable[[list[str]], None]] = {
    ("python", "run_ufgir.py"): run_script,
    ("python", "-m"): run_module,
    ("ufgir",): run_command,
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Create the files that the documents assume: recipes, a checkpoint of the Hub, images and the model of the demo."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 16}
    for name in ("vit-base-patch16-224-in21k", "vit-base-patch16-224"):
        stock = tmp_path / "google" / name
        ViTForImageClassification(ViTConfig(**size)).save_pretrained(stock)
        ViTImageProcessorPil().save_pretrained(stock)
    words = "--output path/to/leaves --num_classes 2 --images_per_class 4 2 2 --image_size 32"
    synthetic_leaves.main(shlex.split(words))
    (tmp_path / "path" / "to" / "unsorted" / "images").mkdir(parents=True)
    for file in ("path/to/unsorted/images/1.png", "leaf.png"):
        Image.new("RGB", (40, 40), "green").save(tmp_path / file)
    return tmp_path


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks for it
@pytest.mark.parametrize("guide", ["beginning", pytest.param("training", marks=pytest.mark.slow)])
def test_commands_run(guide: str, folder: Path) -> None:
    """All commands that are not listed run in order, as a reader would run them."""
    commands = run_in(guide)
    assert len(commands) > 10
    if guide == "training":  # begins after `make demo`
        run_script(["recipes/demo.yaml"])
    for words in commands.values():
        program = next(start for start in PROGRAMS if tuple(words[: len(start)]) == start)
        PROGRAMS[program](words[len(program) :])
    outputs = re.findall(r"--output(?:_dir)? (\S+)", "\n".join(commands))
    assert outputs and [name for name in outputs if not (folder / name).exists()] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "guide, word, package",
    [
        ("training.md", "imagefolder", "datasets"),
        ("methods.md", "set_keep_rate", "torch"),
        ("checkpoints.md", "PeftModel", "peft"),
        ("export.md", "custom_metadata_map", "onnxruntime"),
    ],
)
@pytest.mark.filterwarnings("ignore:'pin_memory'")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21 asks for it
def test_code_of_guides_runs(guide: str, word: str, package: str, folder: Path) -> None:
    """A reader can copy these blocks; they use the folders and files that the guide names."""
    pytest.importorskip(package)
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / guide).read_text(encoding="utf-8"), re.M | re.S)
    (code,) = [block for block in blocks if word in block]
    if guide == "training.md":
        (folder / "leaves").symlink_to(folder / "path" / "to" / "leaves")
    if guide == "export.md":
        model = tiny_model()
        model.save_pretrained("mine")
        make_image_processor(model.config.image_size).save_pretrained("mine")
        run_command(["export", "mine", "--output", "mine.onnx"])
    exec(code, {})
