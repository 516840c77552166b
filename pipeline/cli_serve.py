"""The command that opens a model for correction in the browser."""

# ruff: noqa: T201 - what a command answers is printed.

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.cli_arguments import DEVICES, add_command, whole_number


def add_serve(commands: Any) -> None:
    """Add ``serve``."""
    text = "correct label maps with clicks, on a page in the browser of this machine"
    parser = add_command(commands, "serve", text, _do_serve)
    parser.add_argument(
        "-m", type=Path, required=True, metavar="FOLDER", help="trained clustering propagation"
    )
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER", help="images, CASE_XXXX")
    parser.add_argument(
        "-o", type=Path, metavar="FOLDER", help="where results go (default: IMAGES_corrected)"
    )
    parser.add_argument(
        "-chk", default="checkpoint_final.pth", metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument(
        "--port", type=whole_number, default=0, metavar="N", help="default: any that is free"
    )
    parser.add_argument("--device", choices=DEVICES, help="default: cuda where there is one")


def _do_serve(options: argparse.Namespace) -> None:
    missing = [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]
    if missing:
        raise InputError(
            f"The page needs {' and '.join(missing)}. Install with: pip install 'nnmosaic[serve]'"
        )
    from nnmosaic.pipeline.serve.command import serve

    serve(
        options.m,
        options.i,
        options.o,
        port=options.port,
        checkpoint=options.chk,
        device=options.device,
        announce=_announce,
    )


def _announce(address: str) -> None:
    print(f"Open this address in a browser on this machine (Ctrl+C ends):\n{address}", flush=True)


SERVE_COMMANDS = (add_serve,)
