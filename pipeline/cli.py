"""The ``nnmosaic`` command: its exit codes and messages; the commands are in ``cli_*.py``.

Work is imported inside each command, so ``nnmosaic --help`` answers at once, without torch.
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import version

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.cli_data import DATA_COMMANDS
from nnmosaic.pipeline.cli_models import MODEL_COMMANDS
from nnmosaic.pipeline.cli_plans import PLAN_COMMANDS
from nnmosaic.pipeline.cli_raters import RATER_COMMANDS
from nnmosaic.pipeline.cli_serve import SERVE_COMMANDS
from nnmosaic.pipeline.exit_codes import BAD_INPUT, DONE, FAILED

COMMANDS = (*DATA_COMMANDS, *PLAN_COMMANDS, *MODEL_COMMANDS, *RATER_COMMANDS, *SERVE_COMMANDS)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0: done. 2: bad arguments or bad data, nothing was started. 3: finished, but some cases failed
    (they are in ``failures.json``). 1: anything else.
    """
    options = _parser().parse_args(arguments)
    # nnU-Net would start 8 processes everywhere, each importing torch.
    os.environ.setdefault("nnUNet_def_n_proc", str(min(8, os.cpu_count() or 1)))
    logging.basicConfig(
        level=logging.DEBUG if options.debug else logging.INFO,
        format="%(message)s",
        stream=sys.stderr,
    )
    for noisy in ("matplotlib", "numexpr", "PIL", "torch", "blosc2"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        return int(options.command(options) or DONE)
    except Exception as error:
        if options.debug:
            traceback.print_exc()
        print(f"nnmosaic {options.name}: {_message(error)}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, InputError) else FAILED
    except KeyboardInterrupt:
        print(f"nnmosaic {options.name}: interrupted", file=sys.stderr)
        return FAILED


def _message(error: Exception) -> str:
    if isinstance(error, InputError | RuntimeError):
        return str(error)
    return f"{type(error).__name__}: {error} (run again with --debug for the traceback)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnmosaic",
        description="One nnU-Net v2 model from annotations that do not fit together.",
    )
    parser.add_argument("--version", action="version", version=f"nnmosaic {version('nnmosaic')}")
    commands = parser.add_subparsers(dest="name", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
