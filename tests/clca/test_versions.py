"""Oldest supported transformers, and the error with older versions."""

import ast
import configparser
import importlib
import shutil
import sys
from pathlib import Path

import pytest
from transformers.dynamic_module_utils import get_relative_import_files, get_relative_imports

from clca.versions_clca import OLDEST_TRANSFORMERS, check_transformers
from tests.clca.shared import PACKAGE


CONFIGURATION = PACKAGE / "configuration_clca.py"


@pytest.mark.parametrize("version", ["4.57.6", "5.0.0", "5.9.0", "5.9.1.dev0"])
def test_older_versions_are_refused(version: str) -> None:
    with pytest.raises(ImportError, match=rf"transformers {OLDEST_TRANSFORMERS} or newer, but {version} ") as refused:
        check_transformers(version)
    assert "\n" not in str(refused.value) and f">={OLDEST_TRANSFORMERS}" in str(refused.value)


@pytest.mark.parametrize("version", [OLDEST_TRANSFORMERS, "5.10.0.dev0", "5.10.4", "5.100.0", "6.0.0rc1"])
def test_newer_versions_are_not(version: str) -> None:
    check_transformers(version)


def test_it_is_the_lower_bound_of_the_package() -> None:
    parser = configparser.ConfigParser()
    parser.read(PACKAGE.parent / "setup.cfg", encoding="utf-8")
    assert f"transformers>={OLDEST_TRANSFORMERS},<6" in parser["options"]["install_requires"].split()


def test_the_configuration_names_every_file_that_it_needs() -> None:
    """It also imports the files that other files need, because older transformers copies no other files from a local
    folder."""
    needed = {Path(file).stem for file in get_relative_import_files(CONFIGURATION)} - {CONFIGURATION.stem}
    named = set(get_relative_imports(CONFIGURATION))
    assert sorted(needed - named) == [], "add them below TYPE_CHECKING"
    assert sorted(named - needed) == []


def test_the_version_is_checked_before_any_other_file_is_imported() -> None:
    body = ast.parse(CONFIGURATION.read_text(encoding="utf-8")).body
    relative = [node.module for node in body if isinstance(node, ast.ImportFrom) and node.level]
    assert relative[0] == "versions_clca"


def test_old_transformers_copy_enough_to_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This copies a local folder as older transformers does: the file of the configuration and its imports."""
    folder = tmp_path / "copied_by_old_transformers"
    folder.mkdir()
    for name in (CONFIGURATION.stem, *get_relative_imports(CONFIGURATION)):
        shutil.copy(PACKAGE / f"{name}.py", folder)
    assert get_relative_import_files(folder / CONFIGURATION.name)  # reads them all
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.8.1")
    with pytest.raises(ImportError, match=r"but 5\.8\.1 is installed"):
        importlib.import_module(f"{folder.name}.{CONFIGURATION.stem}")
