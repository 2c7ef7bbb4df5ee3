"""Command-line scripts that create data sets with `ufgir.data`."""

from ufgir import _moved


_moved.install()
