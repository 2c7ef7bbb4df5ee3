"""`ufgir benchmark`: measure speed and memory next to transformers' dense ViT, and the input pipeline."""

import argparse
import difflib
import logging
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from clca import REDUCTIONS, CLCAViTConfig

from ..checkpoints.config_options import layer
from ..checkpoints.loading import read_config
from ..profiling.agreement import Images, cases_at_cost, places
from ..profiling.backends import why_not
from ..profiling.benchmark import Benchmark, Report
from ..profiling.benchmark_cases import (
    BACKENDS,
    DTYPES,
    MODEL_SIZES,
    MODES,
    PRESETS,
    VARIANTS,
    Case,
    Preset,
    Setting,
    cross,
    quarters,
)
from ..profiling.benchmark_report import (
    check_place,
    draw,
    fill_in,
    markdown,
    provenance,
    tables,
    unfinished,
    write_report,
)
from ..profiling.macs import dense_config
from ..profiling.scaling import DEPTHS, SIZES, Scaling, draw_scaling, scaling_markdown, scaling_tables, write_scaling
from ..profiling.targets import changed, training_free_options
from ..profiling.timing import IDLE, check_idle
from ..runs.tables import variant_of
from ..utils.options import Requirement, check_options
from ..utils.text import align, one_sentence
from .common import FREE, check_rates, classes_of, config_values, image_batches, is_installed, require, some_images
from .outputs import check_document, check_folder, print_before_error


logger = logging.getLogger(__name__)

# Files in the output folder, by what is measured.
FILES = {
    "cases": [
        "benchmark.csv",
        "benchmark.json",
        "benchmark.md",
        "benchmark_agreement.png",
        "benchmark_latency.png",
        "benchmark_throughput.png",
    ],
    "scaling": ["scaling.csv", "scaling.json", "scaling.md", "scaling.png"],
    "input-pipeline": ["pipeline.csv", "pipeline.json", "pipeline.md"],
}

# Options whose combinations are measured: name -> (type, default, help).
PLAN: dict[str, tuple[Callable[[str], Any], list[Any], str]] = {
    "methods": (str, ["none", "evit"], "of token reduction: none, all, training-free, or names"),
    "variants": (str, ["CLCA"], f"{', '.join(VARIANTS)}, in any case"),
    "keep_rates": (float, [0.1], "shares of tokens kept, in (0, 1]"),
    "image_sizes": (int, [224], "sides of the images, pixels"),
    "batch_sizes": (int, [4], "batch sizes; --scaling: 1"),
    "dtypes": (str, ["float32"], f"{', '.join(DTYPES)} (onnx and openvino only); in training of autocast"),
    "backends": (
        str,
        ["eager"],
        "eager, compiled (torch.compile; CUDA graphs on a GPU), aoti (AOTInductor), onnx (ONNX Runtime), openvino",
    ),
    "modes": (str, ["inference"], "inference, training (forward, backward and AdamW)"),
}
SCALING: dict[str, tuple[Callable[[str], Any], Any, str]] = {
    "depths": (int, list(DEPTHS), "numbers of layers"),
    "limit": (float, 180.0, "seconds; a point that should take longer to measure is only counted"),
}
PIPELINE: dict[str, tuple[Callable[[str], Any], Any, str]] = {
    "workers": (int, [0, 1, 2], "numbers of processes of the DataLoader"),
    "count": (int, 64, "images used; --images: 500"),
}
LARGEST_SEED = 2**63 - 1  # of torch's generators
INTERRUPTED = 130  # exit status, as shells have it
IMAGES = 500  # compared of `--images`


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint: folder or Hub repository [random weights]"
    )
    what = parser.add_argument_group("what to measure (one of these, or every combination of the next group)")
    one = what.add_mutually_exclusive_group()
    one.add_argument(
        "--preset", metavar="NAME", help=f"a table of docs/performance-tables.md, with goals: {', '.join(PRESETS)}"
    )
    one.add_argument(
        "--quick", action="store_true", help="measure a little of everything within three minutes: `--preset quick`"
    )
    one.add_argument(
        "--scaling", action="store_true", help="measure how time and memory scale with image size and depth"
    )
    one.add_argument("--growth", action="store_true", dest="scaling", help=argparse.SUPPRESS)  # its name in 0.1.0
    one.add_argument(
        "--input-pipeline",
        metavar="DATASET",
        help="reading and transforming the images of synthetic_leaves, a folder or a dataset on the Hub",
    )
    _add(parser.add_argument_group("combinations; each takes one or more values"), PLAN)
    _add(parser.add_argument_group("--scaling, which takes image sizes and the first of the other options"), SCALING)
    _add(parser.add_argument_group("--input-pipeline, which takes the same options"), PIPELINE)

    free = parser.add_argument_group("methods off the shelf: on a trained MODEL, without any training")
    free.add_argument(
        "--target-gmacs",
        type=float,
        nargs="+",
        metavar="X",
        help="instead of --keep-rates: for each method and each of these costs the largest that costs no more, at three stages "
        "and in every layer",
    )
    free.add_argument(
        "--images",
        nargs="+",
        metavar="PATH",
        help="images or folders of images on which to compare features and predictions with the dense model, and to measure "
        "accuracy if their folders are named after the classes [none]",
    )

    network = parser.add_argument_group("network (default: that of the checkpoint, or ViT-B/16)")
    network.add_argument("--model-size", choices=MODEL_SIZES, help="width, layers and heads [base; --quick: tiny]")
    for name in ("hidden-size", "num-hidden-layers", "num-attention-heads", "intermediate-size"):
        network.add_argument(f"--{name}", type=int, metavar="N")
    network.add_argument("--patch-size", type=int, metavar="N", help="pixels")
    network.add_argument("--num-labels", type=int, metavar="N")
    network.add_argument(
        "--reduction-layers",
        type=layer,
        nargs="+",
        metavar="LAYER",
        help="counted from 0, or all [after a quarter, half and three quarters of them]",
    )

    how = parser.add_argument_group("how")
    how.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), help="auto: a GPU if there is one [auto; a preset's own]"
    )
    how.add_argument(
        "--dense-backends",
        nargs="+",
        metavar="NAME",
        help="in inference, backends on which to measure the dense model besides those of the cases, or none [eager, and onnx and openvino "
        "if installed, on a CPU; a preset's own]",
    )
    how.add_argument(
        "--force", action="store_true", help=f"measure on a busy machine, too: one whose load is above {IDLE} [refuse]"
    )
    how.add_argument("--threads", type=int, metavar="N", help="on a CPU [torch's default; presets for a CPU: 2]")
    how.add_argument(
        "--repetitions",
        type=int,
        metavar="N",
        help="timings of each case; 0: measure no times, and with --images no memory [7; a preset's own]",
    )
    how.add_argument("--seed", type=int, default=0, help="of weights, images and the order of cases [%(default)s]")
    how.add_argument(
        "--output", metavar="FOLDER", help="write tables (CSV, Markdown, JSON) and figures there [nothing]"
    )
    how.add_argument(
        "--into",
        metavar="FILE",
        help="insert the table of the preset, scaling or input-pipeline into a document; figures go to `figures` next to it",
    )


def _add(group: Any, options: dict[str, tuple[Callable[[str], Any], Any, str]]) -> None:
    for name, (kind, default, text) in options.items():
        several = isinstance(default, list)
        shown = " ".join(map(str, default)) if several else default
        more = {"nargs": "+"} if several else {}
        metavar = "N" if kind is int else "X" if kind is float else "NAME"
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar=metavar, help=f"{text} [{shown}]", **more)


class Outcome(NamedTuple):
    """Results of a measurement: text for the terminal, Markdown for a document, and further files.

    Attributes:
        draw: (folder, beginning of file names) -> figures.
        write: folder -> files.
        status: 0; 1 if nothing could be measured; 130 if it was interrupted.
        missing: settings that the time limit left out or cut short.
        finish: called after all files are written.
    """

    text: str
    markdown: str
    draw: Callable[[Path, str], list[Path]]
    write: Callable[[Path], list[Path]]
    status: int
    missing: Sequence[str] = ()
    finish: Callable[[], Any] | None = None


def run(args: argparse.Namespace) -> tuple[str, int]:
    """Measure, write the files, and return the tables and the exit status."""
    args.preset = "quick" if args.quick else args.preset
    name = args.preset or ("scaling" if args.scaling else "input-pipeline" if args.input_pipeline else None)
    _check(args, name)
    measure = {"scaling": _scaling, "input-pipeline": _pipeline}.get(name, _cases)
    outcome = measure(args)
    status = outcome.status
    said = [outcome.text]
    with print_before_error(said):
        if args.output is not None:
            said.append("\n".join(f"wrote {file}" for file in outcome.write(Path(args.output))))
        if args.into is not None and status:
            said.append(f"{args.into} was not changed, because the results are incomplete.")
        elif args.into is not None and outcome.missing:
            status = 1
            more = "" if args.output else " With `--output`, the same command continues."
            said.append(f"{args.into} was not changed: the time limit came before its table was whole.{more}")
        elif args.into is not None:
            document = Path(args.into)
            figures = outcome.draw(document.parent / "figures", f"benchmark_{name}")
            fill_in(document, name, outcome.markdown, figures)
            said.append(f"filled in {name} of {document}")
        if outcome.finish is not None:
            outcome.finish()
    return "\n\n".join(said), status


def _status(interrupted: bool, measured: bool = True) -> int:
    return INTERRUPTED if interrupted else 0 if measured else 1


def _check(args: argparse.Namespace, name: str | None) -> None:
    """Check all arguments before anything is measured."""
    if args.preset is not None and args.preset not in PRESETS:
        raise ValueError(_unknown("preset", args.preset, PRESETS))
    given = [option for option in (*PLAN, *SCALING, *PIPELINE) if getattr(args, option) is not None]
    allowed = set(PLAN)
    if name == "scaling":
        allowed |= set(SCALING)
    elif name == "input-pipeline":
        allowed |= set(PIPELINE)
    elif args.preset is not None:
        allowed = set()
    elif args.images is not None:
        allowed |= {"count"}
    if refused := [option for option in given if option not in allowed]:
        mode = f"`--preset {args.preset}`" if args.preset else f"`--{name}`" if name else "a table of combinations"
        raise ValueError(f"`--{refused[0].replace('_', '-')}` does not go with {mode}.")
    for option, least in (
        ("repetitions", int(name in ("scaling", "input-pipeline"))),
        ("threads", 1),
        ("seed", 0),
        ("count", 2),
        ("limit", 0),
    ):
        value = getattr(args, option)
        if value is not None and value < least:
            raise ValueError(f"`--{option}` must be at least {least}, got {value}.")
    for option, least in (("image_sizes", 1), ("batch_sizes", 1), ("depths", 4), ("workers", 0)):
        if wrong := [value for value in getattr(args, option) or () if value < least]:
            raise ValueError(f"`--{option.replace('_', '-')}` must be at least {least}, got {wrong[0]}.")
    check_rates(args.keep_rates, "--keep-rates")
    _check_free(args, name)
    args.variants = args.variants and [_named("variants", value, VARIANTS) for value in args.variants]
    args.methods = args.methods and _methods(args.methods)
    if args.keep_rates is not None and check_options(args, ["--keep-rates"], [REDUCES]):
        args.keep_rates = None
    for option, known in (("dtypes", DTYPES), ("backends", BACKENDS), ("modes", MODES)):
        values = getattr(args, option)
        setattr(args, option, values and [_named(option, value, known) for value in values])
    if args.model is not None and args.model_size is not None:
        raise ValueError("`--model-size` does not go with a MODEL, which has a size.")
    if args.seed > LARGEST_SEED:
        raise ValueError(f"`--seed` must be at most {LARGEST_SEED}, got {args.seed}.")
    if args.output is not None:
        check_folder(args.output, files=FILES[name if name in FILES else "cases"])
    if args.into is not None:
        if name is None:
            raise ValueError(
                "`--into` needs `--preset`, `--scaling` or `--input-pipeline`: other tables have no place."
            )
        check_place(Path(args.into), name)
        check_document(args.into)
    if args.output is not None or args.into is not None:
        require("matplotlib", extra="visualization")
    if args.dense_backends is not None and name in ("scaling", "input-pipeline"):
        raise ValueError(f"`--dense-backends` does not go with `--{name}`.")
    if args.dense_backends == ["none"]:
        args.dense_backends = []
    args.dense_backends = args.dense_backends and [
        _named("dense_backends", value, BACKENDS) for value in args.dense_backends
    ]
    preset = PRESETS.get(args.preset)
    untimed = (preset.repetitions if preset and args.repetitions is None else args.repetitions) == 0
    args.load = check_idle(args.force or untimed)


REDUCES = Requirement(("--keep-rates",), "a method in `--methods`", lambda args: args.methods != ["none"])


def _named(option: str, value: str, known: Sequence[str] | dict[str, Any]) -> str:
    """Return the known name that equals `value` in any case of its letters."""
    for name in known:
        if name.lower() == value.lower():
            return name
    raise ValueError(_unknown(option, value, known))


def _unknown(option: str, value: str, known: Sequence[str] | dict[str, Any]) -> str:
    close = difflib.get_close_matches(value, list(known), n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"`--{option.replace('_', '-')}` must be among {', '.join(known)}, got {value!r}.{hint}"


def _methods(values: Sequence[str]) -> list[str]:
    if "all" in values:
        return ["none", *sorted(REDUCTIONS)]
    if FREE in values and len(values) > 1:
        raise ValueError(f"`--methods` {FREE} stands for names: give it alone.")
    return [_named("methods", value, ["none", *sorted(REDUCTIONS), FREE]) for value in values]


def _check_free(args: argparse.Namespace, name: str | None) -> None:
    """Check the options for methods off the shelf, which are compared without cache and aggregation head."""
    for option in ("target_gmacs", "images"):
        if getattr(args, option) is not None and name is not None:
            raise ValueError(f"`--{option.replace('_', '-')}` goes with a table of combinations.")
    if name is None and args.methods is None and (args.target_gmacs is not None or args.images is not None):
        args.methods = [FREE]
    if args.target_gmacs is not None:
        if args.keep_rates is not None:
            raise ValueError(
                "`--target-gmacs` sets the keep rates, so that `--keep-rates` contradicts it: give one of them."
            )
        args.target_gmacs = list(dict.fromkeys(args.target_gmacs))
        for target in args.target_gmacs:
            if not target > 0:
                raise ValueError(f"`--target-gmacs` must be above 0, got {target:g}.")
    if args.images is not None and args.model is None:
        raise ValueError("`--images` needs a MODEL: random weights have nothing to say of them.")
    if _is_free(args):
        if {v.lower() for v in args.variants or ()} - {"base"}:
            raise ValueError("`--variants` but base are trained: they do not go with methods off the shelf.")
        args.variants = ["base"]


def _is_free(args: argparse.Namespace) -> bool:
    """Return whether methods are used with weights that were trained without them."""
    return args.target_gmacs is not None or args.images is not None or FREE in (args.methods or ())


def _device(name: str | None) -> torch.device:
    there = torch.cuda.is_available()
    if name == "cuda" and not there:
        raise ValueError("`--device` cuda, or a preset for it, needs a GPU: torch finds none here.")
    return torch.device("cuda" if there and name in (None, "auto", "cuda") else "cpu")


def _plan(args: argparse.Namespace, option: str) -> Any:
    """Return the value of an option, or its default."""
    value = getattr(args, option)
    return (PLAN | SCALING | PIPELINE)[option][1] if value is None else value


def _network(args: argparse.Namespace, size: str = "base", preset: dict[str, Any] | None = None) -> CLCAViTConfig:
    """Return the network to measure; settings of a checkpoint become the defaults of the plan.

    Args:
        size: a key of `MODEL_SIZES`, unless one was given.
        preset: fields that differ from it, unless they were given.
    """
    values = config_values(args)
    if args.model is None:
        width, layers, heads = MODEL_SIZES[args.model_size or size]
        values = (
            {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads} | (preset or {}) | values
        )
        values = {"reduction_layers": quarters(values["num_hidden_layers"])} | values
        values["image_size"] = 28 * values.get("patch_size", 16)  # any: the sizes of the plan take its place
        return read_config(None, values)
    config = read_config(args.model, values)
    if args.image_sizes is None and isinstance(config.image_size, int):
        args.image_sizes = [config.image_size]
    if args.variants is None and variant_of(config.to_dict()) in VARIANTS:
        args.variants = [variant_of(config.to_dict())]
    if config.reduction is not None and args.methods is None:
        args.methods = ["none", config.reduction]
        if args.keep_rates is None:
            if config.keep_tokens is not None or len(set(config.keep_rate)) > 1:
                raise ValueError(f"{args.model} keeps another share at each stage: give one in `--keep-rates`.")
            args.keep_rates = config.keep_rate[:1]
    return config


def _check_sizes(sizes: Sequence[int], config: CLCAViTConfig) -> None:
    patch = config.patch_size if isinstance(config.patch_size, int) else config.patch_size[0]
    if wrong := [size for size in sizes if size % patch]:
        raise ValueError(f"`--image-sizes` must be multiples of the patch size, {patch} pixels, got {wrong[0]}.")


def _progress() -> Any:
    return tqdm(disable=None, leave=False, unit="timing")  # on a terminal only


def _own_network(args: argparse.Namespace) -> bool:
    """Return whether the network differs from the one that the goals apply to."""
    options = ("model", "model_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    options += ("patch_size", "num_labels", "reduction_layers")
    return any(getattr(args, option) is not None for option in options)


def _free_cases(
    args: argparse.Namespace, config: CLCAViTConfig, settings: Sequence[Setting]
) -> tuple[list[Case], list[str]]:
    """Methods with the options under which they need no training, and why some are left out.

    Raises:
        ValueError: a method that was named needs training, or nothing is left.
    """
    given = _plan(args, "methods")
    every_free = FREE in given
    names = sorted(REDUCTIONS) if every_free else [method for method in given if method != "none"]
    dense = dense_config(config)
    layers = [list(config.reduction_layers)] if args.reduction_layers else places(config)
    layers = layers if args.target_gmacs is not None else layers[:1]
    found = {}
    for method in names:
        values = {"reduction": method, "reduction_layers": layers[0]}
        found[method] = training_free_options(changed(dense, **values))
    trained = [method for method, options in found.items() if options is None]
    if trained and args.model is not None and not every_free:
        raise ValueError(
            f"`--methods`: {', '.join(trained)} would bring parameters, which {args.model} does not have: they would be random."
        )
    methods = {method: found[method] or {} for method in names if not (every_free and method in trained)}
    notes = (
        [f"Left out, as they have parameters to be trained: {', '.join(trained)}."] if trained and every_free else []
    )
    cases = [Case(setting, None) for setting in settings if "none" in given]
    if args.target_gmacs is not None:
        more, why = cases_at_cost(dense, methods, layers, args.target_gmacs, settings)
        cases, notes = cases + more, notes + why
    else:
        for setting, method, rate in product(settings, methods, _plan(args, "keep_rates")):
            options = {"layers": tuple(layers[0]), "options": tuple(methods[method].items())}
            cases.append(Case(setting, method, "base", rate, **options))
    if not cases:
        raise ValueError(f"no method is left to compare: {notes[-1]}")
    return cases, notes


def _images(args: argparse.Namespace, config: CLCAViTConfig) -> tuple[Images | None, list[int] | None]:
    """Return a function that yields batches of the images at a size, preprocessed for the model, and their classes if known."""
    if args.images is None:
        return None, None
    images = some_images(args.images, args.count or IMAGES, args.seed)
    return image_batches(images, args.model, config), classes_of(images["path"], config.label2id)


def _dense_backends(args: argparse.Namespace, preset: Preset | None) -> Sequence[str]:
    """Return the backends of the dense model besides those of the cases."""
    if args.dense_backends is not None:
        return args.dense_backends
    if preset is not None and preset.dense_backends is not None:
        return preset.dense_backends
    packages = {"onnx": "onnxscript", "openvino": "openvino"}
    on_cpu = _device(args.device or (preset.device if preset else None)).type == "cpu"
    return ["eager", *(name for name, package in packages.items() if on_cpu and is_installed(package))]


def _cases(args: argparse.Namespace) -> Outcome:
    """Measure a preset, or every combination of the options."""
    preset: Preset | None = PRESETS.get(args.preset)
    config = _network(args, preset.model_size if preset else "base", dict(preset.network) if preset else {})
    notes: list[str] = []
    if preset is not None:
        cases = [case._replace(goals=()) for case in preset.cases] if _own_network(args) else preset.cases
        title = f"{args.model or 'Another network'}: {args.preset}" if _own_network(args) else preset.title
    else:
        settings = [
            Setting(size, batch, dtype, backend, mode)
            for mode in _plan(args, "modes")
            for backend in _plan(args, "backends")
            for dtype in _plan(args, "dtypes")
            for size in _plan(args, "image_sizes")
            for batch in _plan(args, "batch_sizes")
        ]
        settings = [setting for setting in settings if why_not(setting) is None] or settings
        if _is_free(args):
            _check_sizes([setting.image_size for setting in settings], config)
            cases, notes = _free_cases(args, config, settings)
        else:
            methods = [None if method == "none" else method for method in _plan(args, "methods")]
            cases = cross(methods, _plan(args, "variants"), _plan(args, "keep_rates"), settings)
        title = f"{args.model or 'Random weights'}: {config.num_hidden_layers} layers, width {config.hidden_size}"
    _check_sizes([case.setting.image_size for case in cases], config)
    images, labels = _images(args, config)
    default = preset.repetitions if preset else 7
    repetitions = default if args.repetitions is None else args.repetitions
    threads = args.threads or (preset.threads if preset else None)
    network = {name: getattr(config, name) for name in SHAPE} | {"checkpoint": args.model}
    network |= {"images": args.images, "target_gmacs": args.target_gmacs}
    facts, folder, earlier = provenance(), args.output and Path(args.output), None
    if folder is not None:
        about = {"network": network, "repetitions": repetitions, "threads": threads or torch.get_num_threads()}
        earlier = unfinished(folder, facts, about)
    if earlier is not None:
        notes.append(f"Continued: the run of {earlier['date']} had measured a part.")
        args.load = max((load for load in (args.load, earlier["load"]) if load is not None), default=None)

    def save(report: Report, figures: bool = False) -> list[Path]:
        report.load = args.load
        report.notes[:0] = [note for note in notes if note not in report.notes]
        return [] if folder is None else write_report(folder, report, facts, network, figures)

    def save_part(report: Report) -> None:
        try:
            save(report)
        except OSError as error:  # the results are in memory, and are written again at the end
            logger.warning("could not write into %s: %s; measuring continues", folder, one_sentence(error))

    def finish() -> None:
        report.complete = not report.missing and not report.interrupted
        if report.complete:
            save(report)

    with _progress() as progress:
        benchmark = Benchmark(
            config,
            _device(args.device or (preset.device if preset else None)),
            checkpoint=args.model,
            threads=threads,
            repetitions=repetitions,
            seed=args.seed,
            time_limit=preset.time_limit if preset else None,
            progress=progress,
            images=images,
            labels=labels,
            dense_backends=_dense_backends(args, preset),
        )
        report = benchmark.run(cases, save_part, earlier)
    parts = [title, *(f"{name}\n{align(rows)}" for name, rows in tables(report)), *report.warnings]
    if report.missing and folder is not None:
        parts.append("The same command continues with what is missing.")
    return Outcome(
        "\n\n".join(parts),
        markdown(report, facts),
        lambda folder, prefix: draw(report, folder, prefix),
        lambda folder: save(report, figures=True),
        _status(report.interrupted, any(result.error is None for result in report.results if result.case)),
        report.missing,
        finish,
    )


# What a record says about the network.
SHAPE = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "patch_size", "num_labels")
SHAPE += ("reduction_layers",)


def _first_case(args: argparse.Namespace, size: int) -> Case:
    """Return the case with the first value of each option, and the first method other than none."""
    method = next((m for m in _plan(args, "methods") if m != "none"), None)
    first = [_plan(args, option)[0] for option in ("batch_sizes", "dtypes", "backends", "modes")]
    rate = _plan(args, "keep_rates")[0] if method else 1.0
    return Case(Setting(size, *first), method, _plan(args, "variants")[0], rate)


def _scaling(args: argparse.Namespace) -> Outcome:
    """Measure time and memory as functions of image size and depth."""
    if args.model is not None:
        raise ValueError("`--scaling` changes size and depth, so it does not accept a MODEL.")
    if (args.modes or ["inference"])[0] != "inference" or (args.backends or ["eager"])[0] != "eager":
        raise ValueError("`--scaling` measures eager inference and the memory of training only.")
    config = _network(args)
    args.batch_sizes = args.batch_sizes or [1]
    sizes = args.image_sizes or list(SIZES)
    _check_sizes(sizes, config)
    with _progress() as progress:
        scaling = Scaling(
            config,
            _first_case(args, sizes[0]),
            _device(args.device),
            threads=args.threads,
            repetitions=args.repetitions or 3,
            seed=args.seed,
            limit=_plan(args, "limit"),
            progress=progress,
        )
        facts, folder = provenance(), args.output and Path(args.output)
        save = None if folder is None else lambda: write_scaling(folder, scaling, facts, figures=False)
        scaling.run(sizes, _plan(args, "depths"), save)
    parts = [*map(align, scaling_tables(scaling)), *scaling.remarks()]
    return Outcome(
        "\n\n".join(parts),
        scaling_markdown(scaling, facts),
        lambda folder, prefix: [draw_scaling(scaling.points, folder / f"{prefix}.png")] if scaling.points else [],
        lambda folder: write_scaling(folder, scaling, facts),
        _status(scaling.report.interrupted),
    )


def _pipeline(args: argparse.Namespace) -> Outcome:
    """Measure the input pipeline, and the speed of the model for comparison."""
    import datasets  # here, as it takes seconds

    from ..profiling import input_pipeline as pipeline

    config = _network(args)
    sizes = args.image_sizes or [224, 448]
    _check_sizes(sizes, config)
    device = _device(args.device)
    datasets.disable_progress_bars()
    try:
        found = pipeline.measure_pipeline(
            args.input_pipeline,
            sizes,
            workers=_plan(args, "workers"),
            count=_plan(args, "count"),
            repetitions=args.repetitions or 3,
            seed=args.seed,
        )
    finally:
        datasets.enable_progress_bars()
    if not found.interrupted:
        with _progress() as progress:
            benchmark = Benchmark(config, device, args.model, args.threads, 3, args.seed, progress=progress)
            report = benchmark.run([_first_case(args, size) for size in sizes])
        found.add_models(report)
    facts = provenance()
    parts = [align(pipeline.stage_table(found)), align(pipeline.loader_table(found)), *pipeline.remarks(found)]
    return Outcome(
        "\n\n".join(parts),
        pipeline.pipeline_markdown(found, facts),
        lambda folder, prefix: [],
        lambda folder: pipeline.write_pipeline(folder, found, facts),
        _status(found.interrupted),
    )
