"""`ufgir data-report`: what is in a data set, and what is wrong with it."""

import argparse

from ..data.checks import DatasetError
from ..data.load import load_ufgir_dataset
from ..data.report import bin_name, data_report, describe, findings
from ..utils.text import align
from .outputs import check_folder, told_first


SHOWN = 20  # lines of a list; report.json has all
LOADING = {  # arguments of load_ufgir_dataset that are options here
    "image_column": "column with the images [found by its type]",
    "label_column": "column with the classes [found by its type]",
    "label_separator": "what stands between the classes of an image that has several, in a text [one class each]",
    "csv_train": "name of the CSV file of train [train.csv]",
    "csv_validation": "name of the CSV file of validation [val.csv]",
    "csv_test": "name of the CSV file of test [test.csv]",
    "csv_data_folder": "what the CSV's `dir` is relative to [found]",
    "csv_class_names": "name of the CSV file with the class names [classid_classname.csv]",
    "config_name": "of a dataset on the Hub [its default]",
    "revision": "of a dataset on the Hub [main]",
    "cache_dir": "where `datasets` keeps what it converts [its own cache]",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("dataset", metavar="DATASET", help="synthetic_leaves, a folder, or a dataset on the Hub")
    parser.add_argument("--output", metavar="FOLDER", help="write report.json and contact_sheet.png there [nothing]")
    parser.add_argument("--html", action="store_true", help="write report.html there, too: one page with everything")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="last part of each class of train that is shown as validation, in [0, 1) [0: as stored]",
    )
    parser.add_argument("--sheet-classes", type=int, default=24, metavar="N", help="rows of the contact sheet [24]")
    parser.add_argument("--sheet-images", type=int, default=8, metavar="N", help="images of each of them [8]")
    parser.add_argument(
        "--num-workers", type=int, metavar="N", help="threads that decode [number of cores, at most 8]"
    )
    group = parser.add_argument_group("loading")
    for name, text in LOADING.items():
        group.add_argument(f"--{name.replace('_', '-')}", metavar=name.rpartition("_")[2].upper(), help=text)


def run(args: argparse.Namespace) -> str:
    """A table of the splits, the images of a class, and what is wrong."""
    if args.html and args.output is None:
        raise ValueError("`--html` writes into a folder: name it in `--output`.")
    if args.output is not None:
        check_folder(args.output)
    for name in ("sheet_classes", "sheet_images", "num_workers"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"`--{name.replace('_', '-')}` must be at least 1, got {value}.")
    loading = {name: getattr(args, name) for name in LOADING}
    try:
        dataset = load_ufgir_dataset(
            args.dataset, verify=False, validation_fraction=args.validation_fraction, **loading
        )
    except ValueError as error:
        raise DatasetError(str(error).replace("`name_or_path`", "`DATASET`")) from error
    report = data_report(dataset, args.dataset, args.num_workers, args.sheet_classes, args.sheet_images)
    numbers = report.numbers
    parts = [f"{args.dataset}: {numbers['images']} images of {numbers['classes']} classes", align(describe(numbers))]
    for split, s in numbers["splits"].items():
        bins = s["images_per_class"]["histogram"]
        most = max(b["classes"] for b in bins)
        rows = [[bin_name(b), str(b["classes"])] for b in bins]
        lines = align([["images", "classes"], *rows]).split("\n")
        bars = ["", *("#" * round(40 * b["classes"] / most) for b in bins)]
        body = "\n".join(f"{line}  {bar}".rstrip() for line, bar in zip(lines, bars, strict=True))
        parts.append(f"{split}: images of a class\n{body}")
    for heading, lines in findings(numbers).items():
        if lines:
            more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
            parts.append("\n".join([f"{heading}: {len(lines)}", *(f"  {line}" for line in lines[:SHOWN]), *more]))
    if args.output is not None:
        with told_first(parts):
            parts.append("\n".join(f"wrote {file}" for file in report.write(args.output, args.html)))
    return "\n\n".join(parts)
