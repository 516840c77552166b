"""Commands on plans and folds: plan, plan_and_preprocess, few_shot."""

# ruff: noqa: T201 - what a command answers is printed.

import argparse
from typing import Any

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.cli_arguments import (
    add_command,
    cpu_budget_arguments,
    dataset_argument,
    planning_arguments,
    positive,
    workspace_argument,
)
from nnmosaic.pipeline.defaults import DEFAULT_PLANS, DEFAULT_TRAINER
from nnmosaic.pipeline.workspace import open_workspace
from nnmosaic.planners import NUM_FOLDS


def add_plan(commands: Any) -> None:
    """Add ``plan``."""
    parser = add_command(commands, "plan", "fingerprint and plans, and why they are so", _do_plan)
    workspace_argument(parser)
    planning_arguments(parser)
    _plan_command_arguments(parser)


def add_plan_and_preprocess(commands: Any) -> None:
    """Add ``plan_and_preprocess``."""
    parser = add_command(
        commands, "plan_and_preprocess", "fingerprint, plans, folds, preprocessing", _do_plan
    )
    workspace_argument(parser)
    planning_arguments(parser)
    cpu_budget_arguments(parser)
    _plan_command_arguments(parser)
    parser.add_argument(
        "-c", nargs="+", default=["2d", "3d_fullres", "3d_lowres"], metavar="CONFIGURATION"
    )
    parser.add_argument(
        "-np",
        type=positive,
        metavar="N",
        help="processes (default: cores, at most 8, as many as the free memory has room for)",
    )
    parser.add_argument(
        "--folds",
        type=positive,
        default=NUM_FOLDS,
        metavar="N",
        help="folds that are trained in --minutes (default: %(default)s)",
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="train some steps of each configuration: memory and time per epoch on this machine",
    )
    parser.add_argument(
        "--keep_plans", action="store_true", help="preprocess for the plans file as it is"
    )


def _plan_command_arguments(parser: argparse.ArgumentParser) -> None:
    dataset_argument(parser)
    parser.add_argument("-overwrite_plans_name", metavar="NAME", help=f"default: {DEFAULT_PLANS}")
    parser.add_argument(
        "-tr", metavar="TRAINER", help="whose steps are measured and whose memory is planned for"
    )
    parser.add_argument("--device", choices=("cpu",), help="plan for a machine without a GPU")
    parser.add_argument(
        "--explain", action="store_true", help="show the numbers behind each decision"
    )


def _do_plan(options: argparse.Namespace) -> None:
    from nnmosaic.planners.worker_pool import start_server

    workspace = open_workspace(options.workspace)
    start_server()  # before the other imports, which take a second
    from dataclasses import replace

    from nnmosaic.pipeline.plan_and_preprocess import plan, plan_and_preprocess
    from nnmosaic.pipeline.plan_report import plan_report, print_report
    from nnmosaic.pipeline.plan_request import PlanRequest

    request = PlanRequest(
        planner=options.pl,
        plans_name=options.overwrite_plans_name,
        memory_gb=options.memory_gb,
        trainer=options.tr,
        device=options.device,
    )
    if options.name == "plan":
        result = plan(workspace, options.d, request)
    else:
        request = replace(
            request,
            minutes=options.minutes,
            cores=options.cores,
            folds=options.folds,
            keep_plans=options.keep_plans,
            measure=options.measure,
        )
        result = plan_and_preprocess(workspace, options.d, options.c, request, workers=options.np)
    report = plan_report(result.plans, result.sizes, result.decisions, explain=options.explain)
    print_report(report)


def add_few_shot(commands: Any) -> None:
    """Add ``few_shot``."""
    parser = add_command(
        commands, "few_shot", "folds with few training cases, and their results", _do_few_shot
    )
    workspace_argument(parser)
    dataset_argument(parser)
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument(
        "--cases", nargs="+", type=positive, metavar="N", help="training cases of the new folds"
    )
    wanted.add_argument(
        "--report", action="store_true", help="mean Dice of the trained ones, over draws"
    )
    parser.add_argument(
        "--draws", type=positive, metavar="N", help="with --cases: sets of each size (default: 3)"
    )
    parser.add_argument("-c", metavar="CONFIGURATION", help="with --report")
    parser.add_argument("-tr", nargs="+", metavar="TRAINER", help="with --report")
    parser.add_argument("-p", metavar="PLANS", help=f"with --report (default: {DEFAULT_PLANS})")


def _do_few_shot(options: argparse.Namespace) -> None:
    from nnmosaic.pipeline.few_shot import few_shot, few_shot_report

    workspace = open_workspace(options.workspace)
    if options.report:
        if options.draws or not options.c:
            raise InputError("few_shot --report needs -c, and takes no --draws.")
        print(
            few_shot_report(
                workspace,
                options.d,
                options.c,
                trainers=options.tr or [DEFAULT_TRAINER],
                plans_name=options.p or DEFAULT_PLANS,
            )
        )
        return
    if options.c or options.tr or options.p:
        raise InputError("-c, -tr and -p say something about few_shot --report only.")
    print(few_shot(workspace, options.d, numbers=options.cases, draws=options.draws or 3))


PLAN_COMMANDS = (add_plan, add_plan_and_preprocess, add_few_shot)
