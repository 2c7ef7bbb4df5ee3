"""Records of runs, tables of runs, sweeps and their queue, and the figures of the paper."""

from .records import read_run_records


__all__ = ["read_run_records"]
