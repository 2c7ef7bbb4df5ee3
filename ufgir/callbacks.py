"""What watches a training: gradient records, a guard against NaN, averaged weights (EMA), early stopping."""

from dataclasses import dataclass

from .arguments import option


@dataclass
class CallbackArguments:
    """What watches the training, and the average of its weights."""

    _argument_group_name = "monitoring and averaging"

    record_gradients: bool = option("write the size of the gradients at each step to output_dir/gradients.csv", False)
    nan_guard: bool = option("stop when the loss, a gradient or a weight is not finite, and name it", True)
    ema_decay: float = option(
        "decay a step of an average of the weights (EMA), in [0, 1), e.g. 0.9999; 0: no average", 0.0
    )
    ema_warmup: bool = option("EMA: the decay of step n is at most (1 + n) / (10 + n), for short trainings", False)
    ema_as_final: bool = option(
        "EMA: the average is the model that is saved and predicts; otherwise it is saved in output_dir/ema", False
    )
    early_stopping_patience: int | None = option(
        "stop after so many evaluations without a better metric_for_best_model [never]"
    )
    early_stopping_threshold: float = option("what counts as better: by more than this, in the metric's unit", 0.0)
    save_last_model: bool = option(
        "with load_best_model_at_end, save the last weights, too, as a model in output_dir/last", False
    )
