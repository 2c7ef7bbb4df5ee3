"""Draw the keep rate of each training step, for a model that is trained at several."""

import random
from collections.abc import Sequence


def draw_keep_rate(rates: Sequence[float], seed: int, step: int) -> float:
    """The keep rate of a training step, for `config.train_keep_rates` or a part of them.

    Every run of as many steps as there are rates has each of them once, in an order of its own. The draw depends on nothing
    but the arguments: all processes of a distributed training, and one that resumes, draw the same.

    Args:
        rates: keep rates to draw from.
        seed: of the training.
        step: number of the optimizer step, from 0. Batches that are accumulated for one step share its rate.

    Returns:
        One of `rates`, to be given to the model's forward as `keep_rate`.

    Raises:
        ValueError: no rates.
    """
    if not rates:
        raise ValueError("`rates` must hold at least one keep rate, got [].")
    turn, place = divmod(step, len(rates))
    return random.Random(f"keep rates {seed} {turn}").sample(list(rates), len(rates))[place]
