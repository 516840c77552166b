"""Commands on models for several raters: evaluate_raters, add_rater_head."""

# ruff: noqa: T201 - what a command answers is printed.

import argparse
from pathlib import Path
from typing import Any

from nnmosaic.pipeline.cli_arguments import DEVICES, add_command, fold, positive, whole_number


def add_evaluate_raters(commands: Any) -> None:
    """Add ``evaluate_raters``."""
    text = "Dice per rater, and how well masks or samples match a set of raters"
    parser = add_command(commands, "evaluate_raters", text, _do_evaluate_raters)
    parser.add_argument("gt_folder", type=Path, help="a folder per rater, such as labelsTr_raters")
    parser.add_argument("pred_folder", type=Path, help="what predict wrote")
    parser.add_argument("-djfile", type=Path, required=True, metavar="FILE", help="dataset.json")
    parser.add_argument(
        "-o", type=Path, metavar="FILE", help="default: pred_folder/summary_raters.json"
    )


def _do_evaluate_raters(options: argparse.Namespace) -> None:
    from nnmosaic.pipeline.evaluate_raters import evaluate_raters

    print(evaluate_raters(options.gt_folder, options.pred_folder, options.djfile, output=options.o))


def add_add_rater_head(commands: Any) -> None:
    """Add ``add_rater_head``."""
    text = "teach a trained model one more rater, from a few cases"
    parser = add_command(commands, "add_rater_head", text, _do_add_rater_head)
    parser.add_argument(
        "-m", type=Path, required=True, metavar="FOLDER", help="trained personalised model"
    )
    parser.add_argument("--rater", required=True, metavar="NAME", help="of the new rater")
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER", help="images, CASE_XXXX")
    parser.add_argument(
        "-l", type=Path, required=True, metavar="FOLDER", help="the rater's label maps, CASE"
    )
    parser.add_argument(
        "-o", type=Path, required=True, metavar="FOLDER", help="where the new model goes"
    )
    parser.add_argument(
        "-f", nargs="+", type=fold, metavar="FOLD", help="default: all trained folds"
    )
    parser.add_argument(
        "-chk", default="checkpoint_final.pth", metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument("--steps", type=positive, default=300, help="default: %(default)s")
    parser.add_argument("--seed", type=whole_number, default=0, help="default: %(default)s")
    parser.add_argument("--device", choices=DEVICES, help="default: cuda where there is one")


def _do_add_rater_head(options: argparse.Namespace) -> None:
    from nnmosaic.pipeline.add_rater_head import add_rater_head

    print(
        add_rater_head(
            options.m,
            options.rater,
            images=options.i,
            labels=options.l,
            output=options.o,
            folds=options.f,
            checkpoint=options.chk,
            steps=options.steps,
            seed=options.seed,
            device=options.device,
        )
    )


RATER_COMMANDS = (add_evaluate_raters, add_add_rater_head)
