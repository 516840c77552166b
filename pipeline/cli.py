"""The ``nnmosaic`` command: arguments only. Work is imported inside each sub-command.

So ``nnmosaic --help`` answers at once, without torch.
"""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.workspace import open_workspace

DONE, FAILED, BAD_INPUT, SOME_CASES_FAILED = 0, 1, 2, 3

DEVICES = ("cuda", "cpu", "mps")
DEFAULT_PLANS = "nnUNetPlans"
DEFAULT_TRAINER = "nnUNetTrainerSelfDisambiguation"


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
    for add in (
        _merge,
        _hide_labels,
        _sparsify,
        _doctor,
        _plan,
        _plan_and_preprocess,
        _train,
        _predict,
        _ensemble,
        _evaluate,
        _find_best,
        _run,
        _trainer_path,
    ):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, text: str, function: Callable[[argparse.Namespace], int | None]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=function)
    parser.add_argument(
        "--debug", action="store_true", help="show tracebacks and nnU-Net's own output"
    )
    return parser


def _workspace_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workspace",
        type=Path,
        metavar="FOLDER",
        help="raw data, preprocessed data and results; goes before nnU-Net's variables",
    )


def _merge(commands: Any) -> None:
    parser = _command(
        commands, "merge", "several raw datasets with different labels into one", _do_merge
    )
    _workspace_argument(parser)
    parser.add_argument(
        "-d", type=_dataset_id, required=True, metavar="ID", help="id of the new dataset"
    )
    parser.add_argument("-n", required=True, metavar="NAME", help="name of the new dataset")
    parser.add_argument(
        "--sources", nargs="+", required=True, metavar="ID", help="datasets to merge"
    )
    parser.add_argument(
        "--rename",
        nargs="+",
        default=[],
        metavar="SOURCE:LABEL=CLASS[+CLASS]",
        help="what a source's label is called in the merged dataset; several classes: their union",
    )
    parser.add_argument(
        "--copy", action="store_true", help="copy the images instead of linking to them"
    )


def _do_merge(options: argparse.Namespace) -> None:
    from nnmosaic.pipeline.merge import merge

    print(
        merge(
            open_workspace(options.workspace),
            options.d,
            options.n,
            options.sources,
            renames=options.rename,
            copy_images=options.copy,
        )
    )


def _hide_labels(commands: Any) -> None:
    parser = _command(
        commands, "hide_labels", "a dataset with some classes and cases of another", _do_hide_labels
    )
    _conversion_arguments(parser)
    parser.add_argument(
        "--keep",
        nargs="+",
        default=[],
        metavar="CLASS",
        help="default: all classes, or with --join only the joined ones",
    )
    parser.add_argument(
        "--join",
        nargs="+",
        default=[],
        metavar="NEWNAME=A+B",
        help="one label for the union of classes",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--part", metavar="K/N", help="the K-th of N parts of the subjects")
    chosen.add_argument("--cases", nargs="+", default=[], metavar="CASE", help="default: all")


def _do_hide_labels(options: argparse.Namespace) -> None:
    from nnmosaic.pipeline.convert import hide_labels

    print(
        hide_labels(
            open_workspace(options.workspace),
            options.d,
            options.output_id,
            options.n,
            keep=options.keep,
            joins=options.join,
            part=options.part,
            cases=options.cases,
            copy_files=options.copy,
        )
    )


def _sparsify(commands: Any) -> None:
    parser = _command(
        commands, "sparsify", "a dataset that is only annotated in places", _do_sparsify
    )
    _conversion_arguments(parser)
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--planes", type=_positive, metavar="K", help="every K-th plane")
    kind.add_argument(
        "--scribbles", action="store_true", help="a thin curve per class and plane, 2D"
    )
    kind.add_argument(
        "--cubes", type=_positive, metavar="N", help="N cubes, half of them on foreground"
    )
    parser.add_argument(
        "--axes",
        nargs="+",
        type=int,
        choices=(0, 1, 2),
        metavar="AXIS",
        help="of --planes, as nnU-Net reads the array: 0 1 2 are z y x for NIfTI "
        "(default: the one with the largest spacing)",
    )
    parser.add_argument(
        "--size", type=_positive, metavar="VOXELS", help="side of --cubes, which need it"
    )
    parser.add_argument("--seed", type=_seed, metavar="N", help="of --cubes (default: 0)")


def _do_sparsify(options: argparse.Namespace) -> None:
    for flag, value, kind, wanted in (
        ("--axes", options.axes, "--planes", options.planes),
        ("--size", options.size, "--cubes", options.cubes),
        ("--seed", options.seed, "--cubes", options.cubes),
    ):
        if value is not None and wanted is None:
            raise InputError(f"{flag} says something about {kind} only. Leave it out.")
    if options.cubes is not None and options.size is None:
        raise InputError("--cubes needs the side of a cube in voxels, for example --size 16.")
    from nnmosaic.data_conversion.sparsify import Cubes, Planes, Scribbles
    from nnmosaic.pipeline.convert import sparsify

    annotation: Planes | Scribbles | Cubes = Scribbles()
    if options.planes is not None:
        annotation = Planes(options.planes, tuple(options.axes or ()))
    elif options.cubes is not None:
        annotation = Cubes(options.cubes, options.size, options.seed or 0)
    print(
        sparsify(
            open_workspace(options.workspace),
            options.d,
            options.output_id,
            options.n,
            annotation,
            copy_files=options.copy,
        )
    )


def _conversion_arguments(parser: argparse.ArgumentParser) -> None:
    _workspace_argument(parser)
    parser.add_argument("-d", required=True, metavar="ID", help="dataset id or name")
    parser.add_argument(
        "--output_id", type=_dataset_id, required=True, metavar="ID", help="id of the new dataset"
    )
    parser.add_argument("-n", required=True, metavar="NAME", help="name of the new dataset")
    parser.add_argument(
        "--copy", action="store_true", help="copy the files instead of linking to them"
    )


def _doctor(commands: Any) -> None:
    parser = _command(
        commands, "doctor", "check a raw dataset, with a cure for each finding", _do_doctor
    )
    _workspace_argument(parser)
    parser.add_argument("-d", required=True, metavar="ID", help="dataset id or name")


def _do_doctor(options: argparse.Namespace) -> int:
    from nnmosaic.data_conversion.doctor import examine

    workspace = open_workspace(options.workspace)
    folder = workspace.raw_dataset(options.d)
    findings = examine(
        folder, splits_file=workspace.preprocessed / folder.name / "splits_final.json"
    )
    for finding in sorted(findings, key=lambda f: not f.is_error):
        print(("ERROR    " if finding.is_error else "warning  ") + finding.text)
    errors = sum(finding.is_error for finding in findings)
    print(f"{folder.name}: {errors} errors, {len(findings) - errors} warnings")
    return BAD_INPUT if errors else DONE


def _plan(commands: Any) -> None:
    parser = _command(commands, "plan", "fingerprint and plans, and why they are so", _do_plan)
    _workspace_argument(parser)
    _planning_arguments(parser)
    _plan_command_arguments(parser)


def _plan_and_preprocess(commands: Any) -> None:
    parser = _command(
        commands, "plan_and_preprocess", "fingerprint, plans, folds, preprocessing", _do_plan
    )
    _workspace_argument(parser)
    _planning_arguments(parser)
    _cpu_budget_arguments(parser)
    _plan_command_arguments(parser)
    parser.add_argument(
        "-c", nargs="+", default=["2d", "3d_fullres", "3d_lowres"], metavar="CONFIGURATION"
    )
    parser.add_argument(
        "-np",
        type=_positive,
        metavar="N",
        help="processes (default: cores, at most 8, as many as the free memory has room for)",
    )
    parser.add_argument(
        "--folds",
        type=_positive,
        default=5,
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
    parser.add_argument("-d", required=True, metavar="ID", help="dataset id or name")
    parser.add_argument("-overwrite_plans_name", metavar="NAME", help=f"default: {DEFAULT_PLANS}")
    parser.add_argument(
        "-tr", metavar="TRAINER", help="whose steps are measured and whose memory is planned for"
    )
    parser.add_argument("--device", choices=("cpu",), help="plan for a machine without a GPU")
    parser.add_argument(
        "--explain", action="store_true", help="show the numbers behind each decision"
    )


def _planning_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-pl",
        metavar="PLANNER",
        help="MosaicPlanner (default), MosaicPlannerResEncM, L, XL, or "
        "the class name of an nnU-Net planner",
    )
    parser.add_argument(
        "--memory_gb", type=_positive_float, metavar="GB", help="GPU memory to plan for"
    )


def _cpu_budget_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--minutes",
        type=_positive_float,
        metavar="N",
        help="with --device cpu: choose network and steps so that all folds train in this time",
    )
    parser.add_argument(
        "--cores", type=_positive, metavar="N", help="with --minutes: threads of the training"
    )


def _do_plan(options: argparse.Namespace) -> None:
    from nnmosaic.planners.worker_pool import start_server

    workspace = open_workspace(options.workspace)
    start_server()  # before the other imports, which take a second
    from dataclasses import replace

    from nnmosaic.pipeline.plan_and_preprocess import PlanRequest, plan, plan_and_preprocess
    from nnmosaic.pipeline.plan_report import plan_report, print_report

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


def _train(commands: Any) -> None:
    parser = _command(commands, "train", "train one fold", _do_train)
    _workspace_argument(parser)
    parser.add_argument("d", metavar="ID", help="dataset id or name")
    parser.add_argument("c", metavar="CONFIGURATION", help="2d, 3d_fullres, 3d_lowres, ...")
    parser.add_argument("f", metavar="FOLD", type=_fold, help="0 to 4, or all")
    _model_arguments(parser)
    _run_settings_arguments(parser)
    parser.add_argument("--c", action="store_true", dest="resume", help="continue this training")
    parser.add_argument("--val", action="store_true", help="only the final validation")
    parser.add_argument(
        "--npz", action="store_true", help="store probabilities of the validation cases"
    )
    parser.add_argument("-pretrained_weights", metavar="FILE", type=Path, help="nnU-Net checkpoint")
    parser.add_argument("-num_gpus", "--num_gpus", type=_positive, default=1, metavar="N")


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-tr", default=DEFAULT_TRAINER, metavar="TRAINER", help="default: %(default)s"
    )
    parser.add_argument("-p", default=DEFAULT_PLANS, metavar="PLANS", help="default: %(default)s")
    parser.add_argument("--device", choices=DEVICES, help="default: cuda where there is one")


def _run_settings_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run settings (default: from the plans, else nnU-Net's)")
    group.add_argument("--epochs", type=_positive, metavar="N")
    group.add_argument("--iterations_per_epoch", type=_positive, metavar="N")
    group.add_argument("--val_iterations_per_epoch", type=_positive, metavar="N")
    group.add_argument("--batch_size", type=_positive, metavar="N")
    group.add_argument("--optimizer", choices=("sgd", "adamw"))
    group.add_argument("--initial_lr", type=_positive_float, metavar="LR")
    group.add_argument("--time_budget", type=_positive_float, metavar="MINUTES")
    group.add_argument("--seed", type=int, metavar="N")
    group.add_argument(
        "--set",
        dest="options",
        nargs="+",
        type=_assignment,
        metavar="NAME=VALUE",
        help="options of the trainer; a wrong name lists them",
    )


def _run_settings(options: argparse.Namespace) -> Any:
    from dataclasses import fields

    from nnmosaic.planners.plans_section import RunSettings

    given = {field.name: getattr(options, field.name) for field in fields(RunSettings)}
    return RunSettings(**{**given, "options": dict(options.options) if options.options else None})


def _do_train(options: argparse.Namespace) -> None:
    from nnmosaic.pipeline.train import train

    train(
        open_workspace(options.workspace),
        options.d,
        options.c,
        options.f,
        trainer=options.tr,
        plans_name=options.p,
        settings=_run_settings(options),
        resume=options.resume,
        only_validate=options.val,
        save_probabilities=options.npz,
        pretrained_weights=options.pretrained_weights,
        num_gpus=options.num_gpus,
        device=options.device,
    )


def _predict(commands: Any) -> None:
    parser = _command(commands, "predict", "predict a folder of images", _do_predict)
    _workspace_argument(parser)
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER", help="images, CASE_XXXX")
    parser.add_argument(
        "-o", type=Path, required=True, metavar="FOLDER", help="where label maps go"
    )
    parser.add_argument(
        "-m", type=Path, metavar="FOLDER", help="trained model, instead of -d -c -tr -p"
    )
    parser.add_argument("-d", metavar="ID", help="dataset id or name")
    parser.add_argument("-c", metavar="CONFIGURATION")
    _model_arguments(parser)
    parser.add_argument(
        "-f", nargs="+", type=_fold, metavar="FOLD", help="default: all trained folds"
    )
    parser.add_argument(
        "-chk", default="checkpoint_final.pth", metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument(
        "-step_size", type=_positive_float, default=0.5, help="default: %(default)s"
    )
    parser.add_argument(
        "-prev_stage_predictions", type=Path, metavar="FOLDER", help="for a cascade"
    )
    parser.add_argument(
        "-np", type=_positive, metavar="N", help="workers for preprocessing and export"
    )
    parser.add_argument(
        "--disable_tta", action="store_true", help="no mirroring: faster, less accurate"
    )
    parser.add_argument("--save_probabilities", action="store_true", help="needed for ensemble")
    parser.add_argument(
        "--continue_prediction", action="store_true", help="skip cases that are done"
    )


def _do_predict(options: argparse.Namespace) -> int:
    from nnmosaic.pipeline.predict import predict
    from nnmosaic.pipeline.train import model_folder

    if not options.m and not (options.d and options.c):
        raise InputError("predict needs -d and -c, or the model folder with -m.")
    model = options.m or model_folder(
        open_workspace(options.workspace), options.d, options.c, options.tr, options.p
    )
    failures = predict(
        options.i,
        options.o,
        model,
        folds=options.f,
        checkpoint=options.chk,
        step_size=options.step_size,
        mirroring=not options.disable_tta,
        save_probabilities=options.save_probabilities,
        skip_existing=options.continue_prediction,
        previous_stage=options.prev_stage_predictions,
        device=options.device,
        workers=options.np,
    )
    return SOME_CASES_FAILED if failures else DONE


def _ensemble(commands: Any) -> None:
    parser = _command(commands, "ensemble", "average predictions of several models", _do_ensemble)
    parser.add_argument(
        "-i", nargs="+", type=Path, required=True, metavar="FOLDER", help="predictions"
    )
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--save_npz", action="store_true", help="store the averaged probabilities")


def _do_ensemble(options: argparse.Namespace) -> None:
    from nnmosaic.pipeline.ensemble import ensemble

    ensemble(options.i, options.o, save_probabilities=options.save_npz)


def _evaluate(commands: Any) -> None:
    parser = _command(
        commands, "evaluate", "Dice per class and source, where annotated", _do_evaluate
    )
    parser.add_argument("gt_folder", type=Path, help="reference label maps")
    parser.add_argument("pred_folder", type=Path, help="predicted label maps")
    parser.add_argument("-djfile", type=Path, required=True, metavar="FILE", help="dataset.json")
    parser.add_argument(
        "--full",
        type=Path,
        metavar="FOLDER",
        help="complete label maps (labelsTr_full), to score what a source did not annotate",
    )
    parser.add_argument("-o", type=Path, metavar="FILE", help="default: pred_folder/summary.json")
    parser.add_argument(
        "--chill", action="store_true", help="allow references without a prediction"
    )


def _do_evaluate(options: argparse.Namespace) -> None:
    from nnmosaic.pipeline.evaluate import evaluate

    print(
        evaluate(
            options.gt_folder,
            options.pred_folder,
            options.djfile,
            full_references=options.full,
            output=options.o,
            allow_missing=options.chill,
        )
    )


def _find_best(commands: Any) -> None:
    parser = _command(
        commands, "find_best", "compare trained configurations and ensembles of two", _do_find_best
    )
    _workspace_argument(parser)
    parser.add_argument("-d", required=True, metavar="ID", help="dataset id or name")
    parser.add_argument(
        "-c",
        nargs="+",
        default=["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"],
        metavar="CONFIGURATION",
    )
    parser.add_argument("-tr", nargs="+", default=[DEFAULT_TRAINER], metavar="TRAINER")
    parser.add_argument("-p", nargs="+", default=[DEFAULT_PLANS], metavar="PLANS")
    parser.add_argument(
        "-f", nargs="+", type=_fold, metavar="FOLD", help="default: those that all models finished"
    )
    parser.add_argument("--disable_ensembling", action="store_true", help="single models only")


def _do_find_best(options: argparse.Namespace) -> None:
    from nnmosaic.pipeline.find_best import find_best

    print(
        find_best(
            open_workspace(options.workspace),
            options.d,
            configurations=options.c,
            trainers=options.tr,
            plans_names=options.p,
            folds=options.f,
            allow_ensembling=not options.disable_ensembling,
        )
    )


def _run(commands: Any) -> None:
    parser = _command(commands, "run", "plan, preprocess, train all folds, predict", _do_run)
    _workspace_argument(parser)
    parser.add_argument("-d", required=True, metavar="ID", help="dataset id or name")
    parser.add_argument("-c", required=True, metavar="CONFIGURATION")
    parser.add_argument("-f", nargs="+", type=_fold, default=[0, 1, 2, 3, 4], metavar="FOLD")
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER", help="images to predict")
    parser.add_argument(
        "-o", type=Path, required=True, metavar="FOLDER", help="where label maps go"
    )
    _model_arguments(parser)
    _planning_arguments(parser)
    _cpu_budget_arguments(parser)
    _run_settings_arguments(parser)


def _do_run(options: argparse.Namespace) -> int:
    from nnmosaic.pipeline.run import run

    failures = run(
        open_workspace(options.workspace),
        options.d,
        options.c,
        folds=options.f,
        images=options.i,
        output=options.o,
        trainer=options.tr,
        plans_name=options.p,
        planner=options.pl,
        memory_gb=options.memory_gb,
        minutes=options.minutes,
        cores=options.cores,
        settings=_run_settings(options),
        device=options.device,
    )
    return SOME_CASES_FAILED if failures else DONE


def _trainer_path(commands: Any) -> None:
    text = "print the folder for nnUNet_extTrainer, so that nnUNetv2_train finds the trainers"
    _command(commands, "trainer_path", text, _do_trainer_path)


def _do_trainer_path(_: argparse.Namespace) -> None:
    from importlib.util import find_spec

    spec = find_spec("nnmosaic.trainers.ext_trainer")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "The installation lacks nnmosaic.trainers.ext_trainer. Install nnmosaic again."
        )
    print(Path(spec.origin).parent)


def _dataset_id(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 999:
        raise argparse.ArgumentTypeError(f"a dataset id is a number from 1 to 999, got {text!r}")
    return int(text)


def _fold(text: str) -> int | str:
    if text != "all" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"a fold is a number or 'all', got {text!r}")
    return text if text == "all" else int(text)


def _assignment(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"expected NAME=VALUE, got {text!r}")
    return name, value


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number from 0, got {text!r}")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
