"""The configuration of CLCA ViTs, importable from the top level."""

from clca.configuration_clca import CLCAViTConfig  # noqa: F401
