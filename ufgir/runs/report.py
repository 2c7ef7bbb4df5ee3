"""Model card, record, figure of kept patches and summary of a run of `run_ufgir.py`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.model_card import write_model_card
from ..data.catalog import FINE_GRAINED
from ..data.load import SYNTHETIC_LEAVES
from ..evaluation.prediction import read_predictions
from ..profiling.macs import cost_in_words
from ..training.arguments import Options
from ..training.checkpoint_files import KEPT_PATCHES_FILE
from ..training.checkpointing import remove_checkpoints, remove_results
from ..training.setup import Run
from ..transforms.images import to_rgb
from ..utils.provenance import source_commit
from ..visualization.kinds import kept_patches_image
from ..visualization.sheet import save_image
from .records import prediction_files, remove_run_record, write_run_record
from .tables import summary_table


def remove_earlier(run: Run, options: Options) -> None:
    """Delete the record of an earlier run in `output_dir` and, with `overwrite_output_dir`, all its results."""
    args = options.training
    earlier = prediction_files(args.output_dir)
    remove_run_record(args.output_dir)
    if args.overwrite_output_dir:
        remove_checkpoints(args.output_dir, after=run.checkpoint)
        if run.checkpoint is None:
            remove_results(args.output_dir, earlier)


def describe_start(run: Run, options: Options) -> str:
    """Return a line with the data set, its sizes and the cost of the model."""
    source_commit()  # for the record, before the code changes
    sizes = ", ".join(f"{len(images)} {split}" for split, images in run.data.items())
    cost = cost_in_words(run.macs, run.dense_macs)
    return f"{options.data.dataset}: {len(run.class_names)} classes, {sizes} images; {cost}"


def draw_kept_patches(run: Run, predictions: Path, num_pictures: int) -> Path:
    """Draw the patches that the model keeps in some test images; save the figure next to the predictions.

    Args:
        run: with a model that reduces tokens.
        predictions: file with the predictions of the test images.
        num_pictures: number of images to draw, evenly spaced.

    Returns:
        the path of the figure.
    """
    count = len(run.images["test"])
    chosen = np.linspace(0, count - 1, min(num_pictures, count)).astype(int).tolist()
    rows = read_predictions(predictions, chosen)
    titles = [f"{rows[i]['label']} -> {rows[i]['prediction']}" for i in chosen]
    images = [to_rgb(run.data["test"][i]["image"]) for i in chosen]
    figure = kept_patches_image(run.trainer.model, run.image_processor, images, titles)
    return save_image(figure, predictions.parent / KEPT_PATCHES_FILE)


def write_card(run: Run, options: Options, settings: Mapping[str, Any]) -> None:
    """Write the model card, `README.md`.

    Args:
        run: with its metrics.
        options: all groups.
        settings: options that were given, except those that only matter locally.
    """
    data, args = options.data, options.training
    known = FINE_GRAINED.get(data.dataset)
    on_hub = data.dataset != SYNTHETIC_LEAVES and not Path(data.dataset).exists()
    write_model_card(
        Path(args.output_dir),
        config=run.config,
        dataset_name=Path(data.dataset).name,
        dataset_id=(known.hub_id if known else data.dataset) if on_hub else None,
        dataset_config=data.dataset_config_name,
        dataset_revision=data.dataset_revision,
        revision=args.hub_revision,
        class_names=run.class_names,
        split_sizes={split: len(images) for split, images in run.images.items()},
        metrics=run.metrics,
        settings=settings,
        macs=run.macs,
        dense_macs=run.dense_macs,
        num_parameters=run.trainer.model.num_parameters(),
        model_id=getattr(run.trainer, "hub_model_id", None) or args.hub_model_id,
        base_model=options.model.model_name_or_path,
        image_processor=run.image_processor,
    )


def write_record(run: Run, options: Options, settings: Mapping[str, Any]) -> None:
    """Write `run.json`, after all other results: a run with this file is finished. Arguments as in `write_card`."""
    args = options.training
    write_run_record(
        args.output_dir,
        settings=settings,
        dataset=options.data.dataset,
        split_sizes={split: len(images) for split, images in run.images.items()},
        config=run.config,
        metrics=run.metrics,
        macs=run.macs,
        dense_macs=run.dense_macs,
        num_parameters=run.trainer.model.num_parameters(),
        seed=args.seed,
        train_seconds=next((row["seconds"] for row in run.rows if row["split"] == "train"), None),
        images_per_second=run.images_per_second,
        resumed_from=run.checkpoint,
        data=run.evaluated,
        pushed=False if args.push_to_hub else None,
    )


def describe_end(run: Run, options: Options, seconds: float) -> str:
    """Return the table of metrics, the cost of the model, and the folder of the results."""
    cost = f"{cost_in_words(run.macs, run.dense_macs)}, {run.trainer.model.num_parameters():,} parameters"
    where = f"{seconds:.0f} seconds in total; see {Path(options.training.output_dir)}"
    return f"Results\n{summary_table(run.rows)}\n{cost}\n{where}"
