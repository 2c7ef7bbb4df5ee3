"""`ufgir app`: a web page that shows what a model keeps of a leaf."""

import argparse
import sys
from pathlib import Path


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="checkpoint: folder or Hub repository [outputs/demo, of make demo]"
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to listen at; 0.0.0.0: for all who reach this machine [%(default)s]",
    )
    parser.add_argument("--port", type=int, default=7860, help="0: any free one [%(default)s]")
    parser.add_argument(
        "--share", action="store_true", help="also under a public link, through a server of Gradio's makers [off]"
    )
    parser.add_argument(
        "--examples", metavar="FOLDER", help="pictures to choose from [drawn leaves, if the model knows them]"
    )


def run(args: argparse.Namespace) -> str:
    """Serves the page until Ctrl-C."""
    from ..app.page import DEMO_MODEL, import_gradio, launch_page, make_page

    import_gradio()
    if not 0 <= args.port <= 65535:
        raise ValueError(f"`--port` must be in 0 .. 65535, got {args.port}.")
    if args.model is None and not Path(DEMO_MODEL).is_dir():
        raise ValueError(
            f"there is no model in {DEMO_MODEL}: run `make demo`, which trains one in about two minutes, or name a MODEL."
        )
    local = args.host in ("127.0.0.1", "localhost", "::1") and not args.share
    page = make_page(args.model or DEMO_MODEL, args.examples, folders=local)

    def ready(address: str) -> None:
        sys.stdout.write(f"The page is at {address} until Ctrl-C.\n")
        sys.stdout.flush()

    launch_page(page, args.host, args.port, args.share, ready)
    return "The page is closed."
