"""Arguments that several commands share, and the types of their values.

A type refuses a value with `argparse.ArgumentTypeError`, which ends the command with code 2.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nnmosaic.pipeline.defaults import DEFAULT_PLANS, DEFAULT_TRAINER

DEVICES = ("cuda", "cpu", "mps")


def add_command(
    commands: Any, name: str, text: str, function: Callable[[argparse.Namespace], int | None]
) -> argparse.ArgumentParser:
    """Add a command that calls ``function``, and return its parser."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=function)
    parser.add_argument(
        "--debug", action="store_true", help="show tracebacks and nnU-Net's own output"
    )
    return parser


def workspace_argument(parser: argparse.ArgumentParser) -> None:
    """Add the folder that goes before nnU-Net's variables."""
    parser.add_argument(
        "--workspace",
        type=Path,
        metavar="FOLDER",
        help="raw data, preprocessed data and results; goes before nnU-Net's variables",
    )


def dataset_argument(parser: argparse.ArgumentParser) -> None:
    """Add the dataset that a command is about."""
    parser.add_argument("-d", required=True, metavar="ID", help="dataset id or name")


def model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add trainer, plans and device."""
    parser.add_argument(
        "-tr", default=DEFAULT_TRAINER, metavar="TRAINER", help="default: %(default)s"
    )
    parser.add_argument("-p", default=DEFAULT_PLANS, metavar="PLANS", help="default: %(default)s")
    parser.add_argument("--device", choices=DEVICES, help="default: cuda where there is one")


def run_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the fields of `RunSettings`."""
    group = parser.add_argument_group("run settings (default: from the plans, else nnU-Net's)")
    group.add_argument("--epochs", type=positive, metavar="N")
    group.add_argument("--iterations_per_epoch", type=positive, metavar="N")
    group.add_argument("--val_iterations_per_epoch", type=positive, metavar="N")
    group.add_argument("--batch_size", type=positive, metavar="N")
    group.add_argument("--optimizer", choices=("sgd", "adamw"))
    group.add_argument("--initial_lr", type=positive_float, metavar="LR")
    group.add_argument("--time_budget", type=positive_float, metavar="MINUTES")
    group.add_argument("--seed", type=int, metavar="N")
    group.add_argument(
        "--set",
        dest="options",
        nargs="+",
        action="extend",
        type=assignment,
        metavar="NAME=VALUE",
        help="options of the trainer; a wrong name lists them",
    )


def planning_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides about plans for a GPU."""
    parser.add_argument(
        "-pl",
        metavar="PLANNER",
        help="MosaicPlanner (default), MosaicPlannerResEncM, L, XL, or "
        "the class name of an nnU-Net planner",
    )
    parser.add_argument(
        "--memory_gb", type=positive_float, metavar="GB", help="GPU memory to plan for"
    )


def cpu_budget_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what decides about plans for some minutes on a CPU."""
    parser.add_argument(
        "--minutes",
        type=positive_float,
        metavar="N",
        help="with --device cpu: choose network and steps so that all folds train in this time",
    )
    parser.add_argument(
        "--cores", type=positive, metavar="N", help="with --minutes: threads of the training"
    )


def dataset_id(text: str) -> int:
    """Return the number of a new dataset."""
    if not text.isdecimal() or not 1 <= int(text) <= 999:
        raise argparse.ArgumentTypeError(f"a dataset id is a number from 1 to 999, got {text!r}")
    return int(text)


def fold(text: str) -> int | str:
    """Return the number of a fold, or "all"."""
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a fold is a number or 'all', got {text!r}")
    return text if text == "all" else int(text)


def assignment(text: str) -> tuple[str, str]:
    """Return name and value of ``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def whole_number(text: str) -> int:
    """Return a whole number from 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def positive(text: str) -> int:
    """Return a whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def positive_float(text: str) -> float:
    """Return a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value
