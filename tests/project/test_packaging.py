"""What a newcomer meets first: the README, the installation, the files of the repository."""

import configparser
import csv
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

from clca import CLCAViTConfig, CLCAViTForImageClassification, __version__
from ufgir.cli.profile import PAPER_GMACS


ROOT = Path(__file__).parents[2]
RESULTS = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODULES = ("clca", "modeling_clca", "configuration_clca", "run_ufgir", "ufgir", "dataset_scripts")


@pytest.fixture(scope="module")
def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(text):
    return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def run_python(*arguments, cwd, **environment):
    """Python in a fresh process that finds nothing of this repository by itself."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_python_blocks_of_the_readme_run(tmp_path):
    """All of them, one after the other in one program. The checkpoints they name are tiny ones in the current folder."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    size = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    stock = tmp_path / "google" / "vit-base-patch16-224"
    ViTForImageClassification(ViTConfig(**size, image_size=32, patch_size=8)).save_pretrained(stock)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(stock)
    demo = tmp_path / "outputs" / "demo"
    config = CLCAViTConfig(**size, image_size=32, patch_size=8, reduction="evit", keep_rate=0.5)
    CLCAViTForImageClassification(config).save_pretrained(demo)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(demo)
    (tmp_path / "readme.py").write_text("\n".join(blocks), encoding="utf-8")
    run_python("readme.py", cwd=tmp_path, PYTHONPATH=str(ROOT), HF_HOME=str(tmp_path / "cache"))


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_files_that_a_document_points_to_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    targets = {target for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) if "://" not in target}
    assert targets and [target for target in sorted(targets) if not (ROOT / target).exists()] == []


def test_the_readme_is_short_and_points_to_every_guide():
    assert len(README.splitlines()) <= 220
    reference = {"index", "commands"}
    guides = {path.stem for path in (ROOT / "docs").glob("*.md")} - reference
    assert [name for name in sorted(guides) if f"](docs/{name}.md" not in README] == []


def table_rows(text, first):
    """Return the cells of a table's rows, starting at the row whose first cell is `first`."""
    table = text[text.index(f"| {first} |") :].split("\n\n")[0]
    return [[cell.strip() for cell in row[1:-1].split("|")] for row in table.splitlines()]


def test_paper_table_of_the_results_is_that_of_the_command():
    rows = table_rows(RESULTS, "image")[2:]
    published = [(float(row[3].removesuffix(" ¹")), float(row[5])) for row in rows]
    assert published == list(PAPER_GMACS.values())


def test_numbers_of_the_readme_are_those_of_the_results():
    published = {row[0]: row[1:] for row in table_rows(RESULTS, "method")[2:]}
    shown = {row[0]: row[1:5] for row in table_rows(README, "model")[2:]}
    names = {
        "ViT, all tokens": "ViT",
        "DeiT3, all tokens": "DeiT3 (100 %) ¹",
        "CLCA, keep rate 0.1": "CLCA (10 %)",
        "CLCA, keep rate 0.7": "CLCA (70 %)",
    }
    assert shown == {name: published[theirs] for name, theirs in names.items()}
    rates, gmacs, *accuracies = [row[1:] for row in table_rows(README, "`keep_rate`") if "---" not in row[1]]
    counted = [f"{float(row[4]):.1f}" for row in table_rows(RESULTS, "image")[2:] if float(row[4]) > 24]
    assert gmacs == counted
    with (ROOT / "docs" / "data" / "published_accuracy_gmacs_soygene.csv").open() as file:
        found = {
            (row["variant"], float(row["keep_rate"])): row
            for row in csv.DictReader(file)
            if row["image_size"] == "448"
        }
    for method, cells in zip(("CLCA", "base"), accuracies, strict=True):
        expected = [100 * float(found[method, float(rate)]["mean"]) for rate in rates]
        assert [float(cell) for cell in cells] == pytest.approx(expected, abs=0.0501)


def test_version_is_that_of_the_installed_package():
    try:
        version = metadata.version("clca-vit")
    except metadata.PackageNotFoundError:
        pytest.skip("run from the source folder, not installed")
    assert version == __version__


def test_citation_has_the_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == __version__
    assert len(citation["preferred-citation"]["authors"]) == 6


def test_extras(setup_cfg):
    extras = setup_cfg["options.extras_require"]
    own = {"augmentation", "visualization", "analysis", "export", "openvino", "app", "peft", "quantization", "docs"}
    assert set(extras) == own | {"dev"}
    assert all(lines(extras[name]) for name in extras)
    for name in own - {"quantization", "openvino"}:
        assert set(lines(extras["dev"])) > set(lines(extras[name]))


def test_versions_of_development_lie_in_the_ranges(setup_cfg):
    """Those of the requirements and of the dev extra, which holds all but quantization and openvino. Extras start at them: no older ones were tried."""
    pinned = dict(line.split("==") for line in lines((ROOT / "constraints.txt").read_text(encoding="utf-8")))
    pinned = {name.lower().replace("_", "-"): version for name, version in pinned.items()}
    assert pinned["torch"] == "2.13.0" and not any("+" in version for version in pinned.values())
    for text in lines(setup_cfg["options"]["install_requires"]):
        required = Requirement(text)
        assert {bound.operator for bound in required.specifier} == {">=", "<"}, text
        assert pinned[required.name] in required.specifier, text
    for text in lines(setup_cfg["options.extras_require"]["dev"]):
        name, bound = re.match(r"([\w-]+)[>=]=([\d.]+)", text).groups()
        if name != "setuptools":
            assert f"{pinned[name]}.".startswith(f"{bound}."), text


def test_rows_of_the_compatibility_page_lie_in_the_ranges(setup_cfg):
    """What was tested, and passed; `oldest` rows have the lower bounds."""
    bounds = {
        required.name: required for required in map(Requirement, lines(setup_cfg["options"]["install_requires"]))
    }
    table = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8").split("<!-- compat: begin -->")[1]
    heads, _, *rows = [
        [c.strip(" `") for c in r.strip("|").split("|")] for r in table.split("<!--")[0].split("\n") if r
    ]
    tested = [row for row in (dict(zip(heads, row, strict=True)) for row in rows) if row["passed"].isdigit()]
    assert {row["row"].rpartition("-")[2] for row in tested} >= {"oldest", "newest"}
    for row in tested:
        assert int(row["passed"]) > 200 and row["failed"] == "0", row
        for name in set(row) & set(bounds):
            version = row[name].partition("+")[0]
            assert version in bounds[name].specifier, (row["row"], name)
            (lowest,) = (spec.version for spec in bounds[name].specifier if spec.operator == ">=")
            if row["row"].endswith("-oldest"):
                assert f"{version}.".startswith(f"{lowest}."), (row["row"], name)


def test_every_module_is_packaged(setup_cfg):
    packages, modules = (set(lines(setup_cfg["options"][key])) for key in ("packages", "py_modules"))
    folders = {folder.parent.relative_to(ROOT) for name in packages for folder in (ROOT / name).rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} == packages
    assert {file.stem for file in ROOT.glob("*.py")} == modules
    assert {*(name.partition(".")[0] for name in packages), *modules} == set(MODULES)


def test_ci_runs_the_test_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and "make test" in script.read_text(encoding="utf-8") and "make test" in README
    subprocess.run(["bash", "-n", script], check=True)


def test_build_backend_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["build-system"]["build-backend"] == "setuptools.build_meta"


def test_wheel_works_from_another_folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", *(f"{name}.py" for name in MODULES)):
        if (ROOT / file).is_file():
            (source / file).write_bytes((ROOT / file).read_bytes())
    for folder in ("clca", "ufgir", "dataset_scripts"):  # a build leaves its traces in a copy
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))

    pip = ("-m", "pip", "--disable-pip-version-check", "--quiet")
    options = ("--no-deps", "--no-build-isolation", "--no-index")
    run_python(*pip, "wheel", *options, "--wheel-dir", tmp_path, source, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"clca_vit-{__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = archive.read(f"clca_vit-{__version__}.dist-info/METADATA").decode()
        commands = archive.read(f"clca_vit-{__version__}.dist-info/entry_points.txt").decode()
    assert {f"clca/{file.name}" for file in (ROOT / "clca").glob("*.py")} <= names
    assert {"clca/py.typed", "ufgir/py.typed"} <= names  # type checkers read our annotations
    assert {f"ufgir/web/page/{file.name}" for file in (ROOT / "ufgir/web/page").iterdir()} <= names
    assert "ufgir = ufgir.cli:main" in commands
    assert f"Version: {__version__}\n" in info and "Provides-Extra: peft" in info

    run_python(*pip, "install", "--no-deps", "--no-index", "--target", tmp_path / "target", wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    program = f"import {', '.join(MODULES)}\nfor m in ({', '.join(MODULES)}): assert {str(tmp_path)!r} in m.__file__"
    run_python("-c", program, cwd=elsewhere, PYTHONPATH=str(tmp_path / "target"))
