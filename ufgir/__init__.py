"""Data, training and analysis around the CLCA ViT. Not shipped to the Hub with a model."""

from . import _moved


_moved.install()
