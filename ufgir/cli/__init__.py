"""The console command `ufgir`: one module per subcommand."""

from .. import _moved
from .entry import COMMANDS, main


__all__ = ["COMMANDS", "main"]

__getattr__ = _moved.names_of(__name__)
