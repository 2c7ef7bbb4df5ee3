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


# Subcommand -> description. The module of the same name (with `_` for `-`) is imported only when the command runs.
COMMANDS = {
    "analyze": "write predictions, kept patches and features of every image to parquet files, with statistics",
    "app": "serve a web page that shows kept patches, predictions and cost of a model for an image",
    "benchmark": "measure time and memory of models and the dense ViT of transformers, and the input pipeline",
    "compare": "measure how similar two models, or the layers of one, are: CKA, CCA, norms, kept and merged patches",
    "convert": "convert a pretrained ViT, or checkpoint files of the original code, to model folders",
    "correlate": "correlate the similarity of models with the gap between their accuracies (rank correlation)",
    "data-report": "check a data set: classes, image sizes, duplicates, leaks between splits, broken images",
    "datasets": "list further fine-grained data sets: classes, images, Hub ids, sources",
    "embed": "embed the features of images in two dimensions by t-SNE and PCA, colored by class",
    "export": "export a model to ONNX, OpenVINO or torch.export, checked against the model, or to a web page",
    "pretrained": "list the pretrained timm models that can be loaded",
    "predict": "classify image files and write a table of predictions",
    "prepare": "convert a raw download of Ultra-FGVC to checked parquet files",
    "probe": "fit a linear classifier on the frozen features of a model, and save the model with it",
    "profile": "count tokens per layer, parameters and multiply-adds of a model and its dense counterpart",
    "results": "collect runs in tables (mean and std over seeds) and draw the figures of the paper",
    "sweep": "run a recipe with every combination of given options, as a queue that can be resumed",
    "visualize": "draw what a model keeps, merges and attends to, for one model or several side by side",
}


INTERRUPTED = 130  # status of commands that print how to continue


class _Parser(argparse.ArgumentParser):
    """Argument parser that prints errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def usage() -> str:
    """Return the list of subcommands."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name.ljust(width)}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: ufgir COMMAND [...]",
            "",
            "Tools for CLCA ViTs.",
            "",
            *lines,
            "",
            "Run `ufgir COMMAND --help` for the options of a command.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run a subcommand. Return 0, the status of the command, 2 after a user error, or 130 after Ctrl-C."""
    try:
        with ending_signals("ufgir"):  # includes the imports, which take seconds
            text, status = _run(argv)
            if status == INTERRUPTED and (number := raised_signal()) is not None:
                status = 128 + number  # the command has cleaned up by itself
    except KeyboardInterrupt as error:
        ended = Ended.of(error)
        text, status = str(ended), ended.status
    sys.stdout.write(text + "\n")
    return status


def _run(argv: Sequence[str] | None) -> tuple[str, int]:
    """Return the output of the subcommand and its exit status."""
    # accept --keep_rate, the spelling of run_ufgir.py, for --keep-rate
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

    import transformers  # here, so that help and usage errors do not wait for it

    from ..utils.text import one_sentence
    from .outputs import NotWritten

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        result = command.run(args)
    except (ValueError, OSError, ImportError) as error:  # ImportError: a package of an extra is not installed
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
