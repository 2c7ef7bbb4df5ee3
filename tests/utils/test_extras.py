"""`ufgir.utils.extras`: the command that installs optional packages."""

import shlex
import sys
from importlib.metadata import PackageNotFoundError

import pytest

from ufgir.utils import extras


REQUIREMENTS = [
    "torch>=2",
    'gradio<7,>=6; extra == "app"',
    'scipy>=1; extra == "analysis"',
    'pot; extra == "analysis"',
]


@pytest.mark.parametrize(
    ("extra", "packages"), [("app", ["gradio<7,>=6"]), ("analysis", ["scipy>=1", "pot"]), ("no", ["clca-vit[no]"])]
)
def test_the_command_names_the_packages(extra, packages, monkeypatch):
    monkeypatch.setattr(extras, "requires", lambda name: REQUIREMENTS)
    assert shlex.split(extras.install_command(extra)) == [sys.executable, "-m", "pip", "install", *packages]


def test_without_metadata_it_names_the_extra(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "requires", missing)
    assert shlex.split(extras.install_command("app"))[-1] == "clca-vit[app]"
