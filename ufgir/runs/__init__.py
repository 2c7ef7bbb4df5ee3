"""What comes of trainings: records of runs, tables over many of them, sweeps and the queue that runs them, and the figures of the paper."""

from .records import read_run_records


__all__ = ["read_run_records"]
