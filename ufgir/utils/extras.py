"""Optional packages: the command that installs them."""

import shlex
import sys
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement


PACKAGE = "clca-vit"


def install_command(extra: str) -> str:
    """Return the command that installs the packages of one of our extras into the running Python.

    It names the packages instead of the extra, so it also works if this project was installed from a folder.
    """
    try:
        found = [Requirement(text) for text in requires(PACKAGE) or ()]
    except PackageNotFoundError:  # the code is used without being installed
        found = []
    packages = [
        f"{item.name}{item.specifier}"
        for item in found
        if item.marker and item.marker.evaluate({"extra": extra}) and not item.marker.evaluate({"extra": ""})
    ]
    return shlex.join([sys.executable, "-m", "pip", "install", *(packages or [f"{PACKAGE}[{extra}]"])])
