"""Train, evaluate and predict with a CLCA ViT on ultra-fine-grained images.

    python run_ufgir.py recipes/demo.yaml
    python run_ufgir.py recipes/demo.yaml --learning_rate 1e-3 --reduction topk
    python run_ufgir.py recipes/image_folder.yaml --dataset path/to/images --output_dir outputs/mine
    python run_ufgir.py --model_name_or_path outputs/mine --dataset path/to/images --do_predict

A recipe is a YAML or JSON file of `option: value` lines. Options on the command line override the recipe.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Collection
from pathlib import Path

from ufgir.utils.signals import Ended, end_quietly, ending_signals, raised_signal


if __name__ == "__main__":
    end_quietly("run_ufgir.py")  # the imports below take seconds

import torch
from transformers import set_seed

from ufgir.checkpoints.loading import warn_fields_without_effect
from ufgir.data.checks import DatasetError
from ufgir.evaluation.prediction import file_names, predict_to_file
from ufgir.runs.records import RECORD, mark_pushed
from ufgir.runs.report import (
    describe_end,
    describe_start,
    draw_kept_patches,
    remove_earlier,
    write_card,
    write_record,
)
from ufgir.training.adapters import merge
from ufgir.training.arguments import (  # noqa: F401 (re-exported for scripts that import this one)
    GROUPS,
    LOCAL,
    DataArguments,
    ModelArguments,
    Options,
    TrainingArguments,
)
from ufgir.training.checkpoint_files import ADAPTER_FOLDER
from ufgir.training.checkpointing import (
    CheckpointError,
    check_fits,
    check_output_paths,
    drop_metrics,
    find_checkpoint,
    resume_hint,
)
from ufgir.training.distributed import is_lost_process
from ufgir.training.optimization import set_precision
from ufgir.training.option_checks import OF_CLASSES, REQUIREMENTS, check_smoothing, evaluated_data
from ufgir.training.setup import (
    Run,
    class_names_of,
    count_costs,
    load_data,
    make_config,
    make_distillation,
    make_images,
    make_model,
    make_processor,
    make_trainer,
    match_classes,
    set_budget,
    set_classes,
)
from ufgir.utils.arguments import RecipeParser
from ufgir.utils.files import DiskFull, remove_leftovers
from ufgir.utils.locks import exclusive_lock
from ufgir.utils.metric_names import METRIC_NAMES
from ufgir.utils.options import check_options, collected, warn_without_effect
from ufgir.utils.text import one_sentence


logger = logging.getLogger("run_ufgir")


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    """Run the script and return split -> metrics.

    On errors it exits with a one-sentence message: status 2 for a mistake in the options, 1 if it cannot continue,
    e.g. because the disk is full, and 128 + the number of a signal, e.g. 130 after Ctrl-C and 143 after SIGTERM.
    """
    start = time.perf_counter()
    parser = RecipeParser(GROUPS, prog="run_ufgir.py", description=__doc__)
    with contextlib.ExitStack() as stack:
        stack.enter_context(ending_signals(parser.prog))
        args = None  # of a run that has begun
        try:
            run, options = _set_up(parser, argv, stack)
            args = options.training
            return execute_run(run, options, parser, start)
        except (KeyboardInterrupt, Exception) as error:
            hint = "" if args is None else f". {resume_hint(args)}"
            # a signal may have been raised where exceptions are converted, or have ended a process that this one waits for
            number = Ended.of(error).number if isinstance(error, KeyboardInterrupt) else raised_signal()
            if number is not None:
                parser.exit(128 + number, f"{parser.prog}: {Ended(number)}{hint}\n")
            if is_lost_process(error):
                parser.exit(1, f"{parser.prog}: another process of this run has ended{hint}\n")
            if isinstance(error, CheckpointError):
                parser.error(one_sentence(error))
            # a full disk, the NaN guard, or images that changed after they were verified: the checkpoints are valid
            if isinstance(error, DiskFull | FloatingPointError | DatasetError):
                parser.exit(1, f"{parser.prog}: error: {one_sentence(error).rstrip('.')}{hint}\n")
            raise


def _set_up(parser: RecipeParser, argv: list[str] | None, stack: contextlib.ExitStack) -> tuple[Run, Options]:
    """Parse the options, lock `output_dir` until `stack` is closed, and prepare the run. Exit with status 2 for a mistake."""
    with collected() as without_effect:
        options = Options(*parser.parse(sys.argv[1:] if argv is None else argv))  # waits for the other processes
        args = options.training
        logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stdout)
        logger.setLevel(logging.INFO if args.should_log else logging.WARNING)
        try:
            if args.process_index == 0:
                refusal = (
                    f"`output_dir` {args.output_dir} is in use by another run. Wait for it to finish or choose another "
                    "folder"
                )
                stack.enter_context(exclusive_lock(Path(args.output_dir), refusal))
            run = prepare(options, parser.given)
        except (ValueError, OSError) as error:
            if raised_signal() is not None:
                raise
            parser.error(one_sentence(error))
    if args.process_index == 0:
        warn_without_effect(without_effect)
    return run, options


def prepare(options: Options, given: Collection[str] = ()) -> Run:
    """Load data, processor and model and create the trainer. Detects mistakes before anything is trained or written.

    Args:
        options: all groups.
        given: names of the options that were given.

    Raises:
        ValueError: if the options, the data or the checkpoint are invalid.
        OSError: if a file could not be read.
    """
    args = options.training
    if not (args.do_train or args.do_eval or args.do_predict):
        raise ValueError("nothing to do: set `do_train`, `do_eval` or `do_predict`")
    set_precision(args, options.optimization.mixed_precision)
    check_options(options, given, REQUIREMENTS)
    check_output_paths(args.output_dir, (RECORD, options.data.predictions_file))
    checkpoint = find_checkpoint(args) if args.do_train else None
    options.augmentation.check(args)
    config = make_config(options.model)
    warn_fields_without_effect({name: value for name, value in vars(options.model).items() if name in given}, [config])
    check_smoothing(options, config)

    # a trained model's classes; the data may have fewer, in another order
    known = class_names_of(config) if options.model.model_name_or_path else None
    image_processor = make_processor(options, config)
    data = load_data(options, image_processor.resize_size[0], None if args.do_train else known)
    new_head = False
    if known and args.do_train:
        data, new_head = match_classes(data, known, options)
    set_classes(config, data)
    set_budget(config, options.model)
    check_options(config, given, OF_CLASSES)

    distillation = make_distillation(options, config, image_processor, given)
    set_seed(args.seed)
    model = make_model(options, config, new_head)
    if checkpoint:
        check_fits(checkpoint, model)
    images = make_images(data, config, image_processor)
    costs = count_costs(config)
    trainer = make_trainer(options, model, config, image_processor, images, distillation, checkpoint, given)
    names, about = class_names_of(config), evaluated_data(options)
    return Run(checkpoint, config, image_processor, data, images, names, trainer, *costs, about)


def execute_run(run: Run, options: Options, parser: RecipeParser, start: float) -> dict[str, dict[str, float]]:
    """Train, evaluate and predict as requested, write the results, and return split -> metrics.

    Args:
        run: returned by `prepare`.
        options: all groups.
        parser: the parser of the options.
        start: start time of the script, from `time.perf_counter`, in seconds.
    """
    args, trainer = options.training, run.trainer
    logger.info("%s", describe_start(run, options))
    if args.process_index == 0:
        remove_leftovers(args.output_dir)
    if args.do_train:
        train(run, options)
    if args.do_eval and "validation" in run.images:
        evaluate(run, "validation")
    if args.do_predict:
        predict(run, options)

    settings = parser.settings(*vars(options).values(), leave_out=LOCAL)
    if trainer.is_world_process_zero():
        if args.do_train or args.push_to_hub:
            write_card(run, options, settings)
        write_record(run, options, settings)  # the last result before the upload
    if args.push_to_hub:
        trainer.push_to_hub()
        if trainer.is_world_process_zero():
            mark_pushed(args.output_dir)
    logger.info("%s", describe_end(run, options, time.perf_counter() - start))
    return run.metrics


def train(run: Run, options: Options) -> None:
    """Train and save the model."""
    trainer, args = run.trainer, options.training
    if trainer.is_world_process_zero():
        remove_earlier(run, options)
    metrics = trainer.train(resume_from_checkpoint=run.checkpoint).metrics
    if hasattr(trainer.model, "peft_config"):  # save the adapter in its own folder, then merge it into the model
        trainer.save_model(str(Path(args.output_dir) / ADAPTER_FOLDER))
        trainer.model = trainer.model_wrapped = merge(trainer.model)
    trainer.save_model()
    trainer.save_state()
    run.rows.append({"split": "train", "images": len(run.images["train"]), "seconds": metrics["train_runtime"]})
    if run.checkpoint is not None:  # loss and speed only cover the steps since then
        metrics = {name: value for name, value in metrics.items() if not name.startswith("train_")}
        if trainer.is_world_process_zero():
            drop_metrics(args.output_dir, "train")
    trainer.save_metrics("train", metrics)


def evaluate(run: Run, split: str) -> None:
    """Compute and save the metrics of all images of a split."""
    output = run.trainer.predict(run.images[split], metric_key_prefix=split)
    run.trainer.save_metrics(split, output.metrics)
    metrics = {name: output.metrics.get(f"{split}_{name}") for name in METRIC_NAMES}
    run.keep_metrics(split, metrics, output.metrics[f"{split}_runtime"], len(run.images[split]))


def predict(run: Run, options: Options) -> None:
    """Save metrics and predictions of the test images, and a figure of the patches kept in some of them."""
    data_args, args, trainer = options.data, options.training, run.trainer
    path = Path(args.output_dir) / data_args.predictions_file
    outcome = predict_to_file(
        trainer.model,
        run.images["test"],
        path,
        run.class_names,
        files=file_names(run.data["test"]),
        batch_size=args.per_device_eval_batch_size,
        num_workers=args.dataloader_num_workers,
        precision=torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None,
        progress=not args.disable_tqdm,
        data={"dataset": data_args.dataset, "split": "test", **run.evaluated["source"], **run.evaluated["test"]},
    )
    logger.info("Predictions: %s", path)
    trainer.save_metrics("test", {f"test_{name}": value for name, value in outcome.metrics.items()})
    run.keep_metrics("test", outcome.metrics, outcome.seconds, outcome.predicted)
    if averaged := trainer.evaluate_average(run.images["test"], "test"):
        trainer.save_metrics("test_ema", averaged)
        shown = {name: averaged[f"test_ema_{name}"] for name in METRIC_NAMES if f"test_ema_{name}" in averaged}
        text = ", ".join(f"{METRIC_NAMES[name][1]} {100 * value:.2f} %" for name, value in shown.items())
        logger.info("Averaged weights (EMA), test: %s", text)
    if trainer.is_world_process_zero() and run.config.reduction is not None and data_args.num_pictures > 0:
        logger.info("Kept patches: %s", draw_kept_patches(run, path, data_args.num_pictures))


if __name__ == "__main__":
    main()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
