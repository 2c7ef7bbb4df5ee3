"""The console command `ufgir`: a table of subcommands, each a module of `ufgir.cli`.

ufgir profile --reduction evit --keep-rate 0.1 --image-size 448 --clca
ufgir profile outputs/demo
ufgir visualize outputs/demo leaf.png --output kept_patches.png
ufgir COMMAND --help
"""

import argparse
import difflib
import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

from ..utils.signals import Ended, ending_signals, raised_signal


# name of the subcommand -> what it does. The module of the name, `-` being `_`, is imported only when it is called.
COMMANDS = {
    "analyze": "what a model says of every image, kept patches, features: parquet files and statistics, in one pass",
    "app": "a web page that shows what a model keeps of a leaf, what it predicts and what that costs",
    "benchmark": "time and memory of models beside the dense ViT of transformers, and of the input pipeline",
    "compare": "how alike two models, or the layers of one, are: CKA, CCA, norms, kept and merged patches",
    "convert": "turn a pretrained ViT, or checkpoint files of the original code, into model folders",
    "correlate": "rank correlation of the similarity of models with the gap between their accuracies",
    "data-report": "count, measure and look through a data set: classes, sizes, copies, leaks, broken images",
    "datasets": "wider fine-grained data sets: classes, images, ids on the Hub, where they come from",
    "embed": "lay the features of images out in the plane, by t-SNE and PCA, coloured by class",
    "export": "write a model as ONNX or as a torch.export program, checked against the model",
    "pretrained": "pretrainings of timm that can be loaded, and what they become",
    "predict": "classify pictures whose classes are not known, any number of them",
    "prepare": "turn a raw download of Ultra-FGVC into checked parquet files",
    "profile": "tokens in each layer, parameters and multiply-adds of a model, beside those of the dense one",
    "results": "gather runs into tables, mean and deviation over seeds, and draw the figures of the paper",
    "sweep": "run a recipe with every combination of some options, as a queue that can be interrupted",
    "visualize": "draw what a model keeps, merges and attends to, also side by side",
}


INTERRUPTED = 130  # of commands that say themselves how to go on


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def usage() -> str:
    """The list of subcommands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ufgir COMMAND [...]",
            "",
            "Tools around CLCA ViTs.",
            "",
            *lines,
            "",
            "ufgir COMMAND --help says more.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand; 0, 1 if it says so, 2 after one sentence about a user's mistake, or 130 after Ctrl-C."""
    try:
        with ending_signals("ufgir"):  # also of the imports, which take seconds
            text, status = _run(argv)
            if status == INTERRUPTED and (number := raised_signal()) is not None:
                status = 128 + number  # of a command that has put things in order by itself
    except KeyboardInterrupt as error:
        ended = Ended.of(error)
        text, status = str(ended), ended.status
    sys.stdout.write(text + "\n")
    return status


def _run(argv: Sequence[str] | None) -> tuple[str, int]:
    """What the subcommand says, and its exit status."""
    # --keep_rate, as run_ufgir.py spells its options, is --keep-rate
    argv = [_dashes(a) if a.startswith("--") else a for a in (sys.argv[1:] if argv is None else argv)]
    if argv[:1] in (["-h"], ["--help"]):
        sys.stdout.write(usage() + "\n")
        raise SystemExit(0)
    if not argv or argv[0] not in COMMANDS:
        name = argv[0] if argv else None
        close = difflib.get_close_matches(name or "", COMMANDS, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        problem = "COMMAND is missing." if name is None else f"there is no COMMAND {name!r}.{hint}"
        _Parser(prog="ufgir").error(f"{problem} Commands: {', '.join(COMMANDS)}.")

    command = importlib.import_module(f".{argv[0].replace('-', '_')}", __package__)
    text = COMMANDS[argv[0]]
    parser = _Parser(prog=f"ufgir {argv[0]}", description=text[0].upper() + text[1:] + ".", allow_abbrev=False)
    command.configure(parser)
    args = parser.parse_args(argv[1:])

    import transformers  # here, so that help and mistakes do not wait for it

    from ..utils.text import one_sentence
    from .outputs import NotWritten

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        result = command.run(args)
    except (ValueError, OSError, ImportError) as error:  # the last: a package of an extra that is not installed
        if isinstance(error, NotWritten):
            sys.stdout.write(error.done + "\n")
            sys.stdout.flush()
        parser.error(one_sentence(error))
    return result if isinstance(result, tuple) else (result, 0)


def _dashes(option: str) -> str:
    name, equals, value = option.partition("=")
    return name.replace("_", "-") + equals + value


if __name__ == "__main__":
    sys.exit(main())
