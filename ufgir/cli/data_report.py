"""`ufgir data-report`: report the contents and problems of a data set."""

import argparse

from ..data.checks import DatasetError
from ..data.load import load_ufgir_dataset
from ..data.report import bin_name, data_report, describe, findings
from ..utils.text import align
from .outputs import check_folder, print_before_error


SHOWN = 20  # lines per list; report.json contains all
LOADING = {  # load_ufgir_dataset argument -> help of its option
    "image_column": "column with the images [detected by its type]",
    "label_column": "column with the classes [detected by its type]",
    "label_separator": "separator between the classes of an image in a text column [one class per image]",
    "csv_train": "name of the CSV file of the train split [train.csv]",
    "csv_validation": "name of the CSV file of the validation split [val.csv]",
    "csv_test": "name of the CSV file of the test split [test.csv]",
    "csv_data_folder": "folder that the `dir` column of the CSV files is relative to [detected]",
    "csv_class_names": "name of the CSV file with the class names [classid_classname.csv]",
    "config_name": "configuration of a data set on the Hub [its default]",
    "revision": "branch, tag or commit of a data set on the Hub [main]",
    "cache_dir": "cache folder of `datasets` [its default]",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("dataset", metavar="DATASET", help="synthetic_leaves, a folder, or a data set on the Hub")
    parser.add_argument("--output", metavar="FOLDER", help="folder for report.json and contact_sheet.png [print only]")
    parser.add_argument("--html", action="store_true", help="also write report.html, a single page with everything")
    parser.add_argument(
        "--validation-fraction",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="fraction of each train class, taken from its end, that is reported as validation, in [0, 1) [0: as stored]",
    )
    parser.add_argument(
        "--sheet-classes", type=int, default=24, metavar="N", help="classes (rows) in the contact sheet [24]"
    )
    parser.add_argument(
        "--sheet-images", type=int, default=8, metavar="N", help="images per row of the contact sheet [8]"
    )
    parser.add_argument("--num-workers", type=int, metavar="N", help="decoding threads [number of cores, at most 8]")
    group = parser.add_argument_group("loading")
    for name, text in LOADING.items():
        group.add_argument(f"--{name.replace('_', '-')}", metavar=name.rpartition("_")[2].upper(), help=text)


def run(args: argparse.Namespace) -> str:
    """Return tables of the splits and of the images per class, and the problems found."""
    if args.html and args.output is None:
        raise ValueError("`--html` requires `--output`, the folder for report.html.")
    if args.output is not None:
        check_folder(args.output, files=["report.json", "contact_sheet.png", *(["report.html"] if args.html else [])])
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
        parts.append(f"{split}: images per class\n{body}")
    for heading, lines in findings(numbers).items():
        if lines:
            more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
            parts.append("\n".join([f"{heading}: {len(lines)}", *(f"  {line}" for line in lines[:SHOWN]), *more]))
    if args.output is not None:
        with print_before_error(parts):
            parts.append("\n".join(f"wrote {file}" for file in report.write(args.output, args.html)))
    return "\n\n".join(parts)
