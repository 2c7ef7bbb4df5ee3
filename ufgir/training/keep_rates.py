"""Draw the keep rate of each training step, for models with a variable keep rate."""

import random
from collections.abc import Sequence


def draw_keep_rate(rates: Sequence[float], seed: int, step: int) -> float:
    """Return the keep rate of a training step.

    Each block of `len(rates)` steps uses every rate once, in its own random order. The result depends only on the
    arguments, so that all processes of a distributed training, and resumed trainings, draw the same rates.

    Args:
        rates: keep rates to draw from, such as `config.train_keep_rates`.
        seed: seed of the training.
        step: number of the optimizer step, from 0. Accumulated batches of one step share its rate.

    Returns:
        One of `rates`, to be passed to the model's forward as `keep_rate`.

    Raises:
        ValueError: if `rates` is empty.
    """
    if not rates:
        raise ValueError("`rates` must contain at least one keep rate, got [].")
    block, position = divmod(step, len(rates))
    return random.Random(f"keep rates {seed} {block}").sample(list(rates), len(rates))[position]
