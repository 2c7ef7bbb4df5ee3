"""Training with transformers' Trainer.

The modules cover arguments, complete checkpoints, optimizer and learning rate schedules, freezing, EMA, distillation,
adapters, gradient records and variable keep rates.
"""

from .. import _moved
from ..checkpoints.loading import load_pretrained
from .adapters import adapt, merge
from .callbacks import SingleImageGuard
from .gradients import read_gradients
from .keep_rates import draw_keep_rate
from .trainer import UFGIRTrainer


__all__ = ["SingleImageGuard", "UFGIRTrainer", "adapt", "draw_keep_rate", "load_pretrained", "merge", "read_gradients"]

__getattr__ = _moved.names_of(__name__)
