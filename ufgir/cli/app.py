"""`ufgir app`: web page that shows which patches of an image a model keeps."""

import argparse
import sys
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="checkpoint: folder or Hub repository [outputs/demo, from `make demo`]",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 accepts connections from other machines [%(default)s]",
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on; 0 for any free port [%(default)s]")
    parser.add_argument("--share", action="store_true", help="create a public link through Gradio's server [off]")
    parser.add_argument(
        "--examples", metavar="FOLDER", help="example images [synthetic leaves, if the model was trained on them]"
    )


def run(args: argparse.Namespace) -> str:
    """Serve the page until Ctrl-C."""
    from ..app.page import DEMO_MODEL, import_gradio, launch_page, make_page

    import_gradio()
    if not 0 <= args.port <= 65535:
        raise ValueError(f"`--port` must be in 0 .. 65535, got {args.port}.")
    if args.model is None and not Path(DEMO_MODEL).is_dir():
        raise ValueError(
            f"`MODEL` is missing and there is no {DEMO_MODEL}. Run `make demo` to train it (about two minutes), or pass a MODEL."
        )
    local = args.host in ("127.0.0.1", "localhost", "::1") and not args.share
    page = make_page(args.model or DEMO_MODEL, args.examples, folders=local)

    def ready(address: str) -> None:
        sys.stdout.write(f"The page is at {address} until Ctrl-C.\n")
        sys.stdout.flush()

    launch_page(page, args.host, args.port, args.share, ready)
    return "The page is closed."
