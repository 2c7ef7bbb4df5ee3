"""Command-line scripts that make data sets, over `ufgir.data`."""

from ufgir import _moved


_moved.install()
