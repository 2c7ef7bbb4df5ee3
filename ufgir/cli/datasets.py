"""`ufgir datasets`: list further fine-grained data sets and where to get them."""

import argparse
import json
from dataclasses import asdict

from ..data.catalog import FINE_GRAINED, HEADER, find_dataset, markdown_table, table_rows
from ..utils.text import align


NUMBERS = 5  # number of aligned columns; the columns after them are text


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="describe one data set [a table of all]")
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--json", action="store_true", help="print JSON instead of a table")
    shape.add_argument("--markdown", action="store_true", help="print the table of docs/datasets.md")


def run(args: argparse.Namespace) -> str:
    """Return a table, Markdown or JSON of all data sets, or a paragraph about one."""
    if args.markdown:
        if args.name is not None:
            raise ValueError(f"`--markdown` prints the table of all data sets: remove NAME ({args.name}).")
        return markdown_table()
    found = [find_dataset(args.name)] if args.name else list(FINE_GRAINED.values())
    if args.json:
        return json.dumps([asdict(row) for row in found], indent=2)
    if args.name:
        return found[0].describe()
    rows = [HEADER, *table_rows()]
    numbers = align([row[:1] + row[2:NUMBERS] for row in rows]).split("\n")
    texts = [(row[5], row[1]) for row in rows]
    width = max(len(hub) for hub, _ in texts)
    lines = [f"{line}  {hub.ljust(width)}  {title}" for line, (hub, title) in zip(numbers, texts, strict=True)]
    return "\n".join([*lines, "", "Run `ufgir datasets NAME` for the columns and other sources of a data set."])
