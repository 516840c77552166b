"""Commands on models and their predictions, from train to find_best and run."""

# ruff: noqa: T201 - what a command answers is printed.

import argparse
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.cli_arguments import (
    add_command,
    cpu_budget_arguments,
    dataset_argument,
    fold,
    model_arguments,
    planning_arguments,
    positive,
    positive_float,
    run_settings_arguments,
    whole_number,
    workspace_argument,
)
from nnmosaic.pipeline.defaults import DEFAULT_PLANS, DEFAULT_TRAINER
from nnmosaic.pipeline.exit_codes import DONE, SOME_CASES_FAILED
from nnmosaic.pipeline.workspace import open_workspace
from nnmosaic.planners import NUM_FOLDS
from nnmosaic.trainers.clustering_propagation.sweeps import SWEEPS


def add_train(commands: Any) -> None:
    """Add ``train``."""
    parser = add_command(commands, "train", "train one fold", _do_train)
    workspace_argument(parser)
    parser.add_argument("d", metavar="ID", help="dataset id or name")
    parser.add_argument("c", metavar="CONFIGURATION", help="2d, 3d_fullres, 3d_lowres, ...")
    parser.add_argument("f", metavar="FOLD", type=fold, help="0 to 4, or all")
    model_arguments(parser)
    run_settings_arguments(parser)
    parser.add_argument("--c", action="store_true", dest="resume", help="continue this training")
    parser.add_argument("--val", action="store_true", help="only the final validation")
    parser.add_argument(
        "--npz", action="store_true", help="store probabilities of the validation cases"
    )
    parser.add_argument("-pretrained_weights", metavar="FILE", type=Path, help="nnU-Net checkpoint")
    parser.add_argument(
        "--stage1",
        metavar="FILE",
        type=Path,
        help="checkpoint that a second stage starts from (default: of the same fold)",
    )
    parser.add_argument("-num_gpus", "--num_gpus", type=positive, default=1, metavar="N")


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
        stage1=options.stage1,
        num_gpus=options.num_gpus,
        device=options.device,
    )


def add_predict(commands: Any) -> None:
    """Add ``predict``."""
    parser = add_command(commands, "predict", "predict a folder of images", _do_predict)
    workspace_argument(parser)
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER", help="images, CASE_XXXX")
    parser.add_argument(
        "-o", type=Path, required=True, metavar="FOLDER", help="where label maps go"
    )
    parser.add_argument(
        "-m", type=Path, metavar="FOLDER", help="trained model, instead of -d -c -tr -p"
    )
    parser.add_argument("-d", metavar="ID", help="dataset id or name")
    parser.add_argument("-c", metavar="CONFIGURATION")
    model_arguments(parser)
    parser.add_argument(
        "-f", nargs="+", type=fold, metavar="FOLD", help="default: all trained folds"
    )
    parser.add_argument(
        "-chk", default="checkpoint_final.pth", metavar="FILE", help="default: %(default)s"
    )
    parser.add_argument("-step_size", type=positive_float, default=0.5, help="default: %(default)s")
    parser.add_argument(
        "-prev_stage_predictions", type=Path, metavar="FOLDER", help="for a cascade"
    )
    parser.add_argument(
        "-np", type=positive, metavar="N", help="workers for preprocessing and export"
    )
    parser.add_argument(
        "--disable_tta", action="store_true", help="no mirroring: faster, less accurate"
    )
    parser.add_argument("--save_probabilities", action="store_true", help="needed for ensemble")
    parser.add_argument(
        "--continue_prediction", action="store_true", help="skip cases that are done"
    )
    raters = parser.add_argument_group("models for several raters")
    raters.add_argument(
        "--raters", nargs="+", default=(), metavar="RATER", help="their own masks; all for all"
    )
    raters.add_argument(
        "--samples", type=whole_number, default=0, metavar="N", help="plausible masks"
    )
    raters.add_argument(
        "--uncertainty", action="store_true", help="entropy, mutual information and variance maps"
    )
    raters.add_argument(
        "--seed", type=whole_number, default=0, metavar="N", help="of the samples (default: 0)"
    )
    slices = parser.add_argument_group("models of clustering propagation")
    slices.add_argument("--sweep", choices=SWEEPS, help="way through the slices (default: both)")
    slices.add_argument(
        "--prompts", type=Path, metavar="FOLDER", help="what was marked: CASE.json, CASE.mrk.json"
    )


def _do_predict(options: argparse.Namespace) -> int:
    from nnmosaic.pipeline.few_shot import folds_to_predict
    from nnmosaic.pipeline.predict import predict
    from nnmosaic.pipeline.train import model_folder

    if not options.m and not (options.d and options.c):
        raise InputError("predict needs -d and -c, or the model folder with -m.")
    model, folds = options.m, options.f
    if not model:
        workspace = open_workspace(options.workspace)
        model = model_folder(workspace, options.d, options.c, options.tr, options.p)
        folds = folds or folds_to_predict(workspace, options.d, model, options.chk)
    failures = predict(
        options.i,
        options.o,
        model,
        folds=folds,
        checkpoint=options.chk,
        step_size=options.step_size,
        mirroring=not options.disable_tta,
        save_probabilities=options.save_probabilities,
        skip_existing=options.continue_prediction,
        previous_stage=options.prev_stage_predictions,
        masks=_wanted_masks(options),
        sweep=options.sweep,
        prompts=options.prompts,
        device=options.device,
        workers=options.np,
    )
    return SOME_CASES_FAILED if failures else DONE


def _wanted_masks(options: argparse.Namespace) -> Any:
    from nnmosaic.trainers.multi_rater.wanted_masks import WantedMasks

    if not (options.raters or options.samples or options.uncertainty):
        return None
    raters = tuple(options.raters)
    return WantedMasks(raters, options.samples, options.uncertainty, options.seed)


def add_context_dice(commands: Any) -> None:
    """Add ``context_dice``."""
    parser = add_command(
        commands,
        "context_dice",
        "Dice of a trained fold where the image is hidden, and at patch borders",
        _do_context_dice,
    )
    workspace_argument(parser)
    dataset_argument(parser)
    parser.add_argument("-c", required=True, metavar="CONFIGURATION")
    parser.add_argument(
        "-f", type=whole_number, default=0, metavar="FOLD", help="default: %(default)s"
    )
    model_arguments(parser)
    parser.add_argument(
        "-chk", default="checkpoint_final.pth", metavar="FILE", help="default: %(default)s"
    )


def _do_context_dice(options: argparse.Namespace) -> None:
    from nnmosaic.pipeline.context_dice import context_dice

    print(
        context_dice(
            open_workspace(options.workspace),
            options.d,
            options.c,
            options.f,
            trainer=options.tr,
            plans_name=options.p,
            checkpoint=options.chk,
            device=options.device,
        )
    )


def add_ensemble(commands: Any) -> None:
    """Add ``ensemble``."""
    parser = add_command(
        commands, "ensemble", "average predictions of several models", _do_ensemble
    )
    parser.add_argument(
        "-i", nargs="+", type=Path, required=True, metavar="FOLDER", help="predictions"
    )
    parser.add_argument("-o", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--save_npz", action="store_true", help="store the averaged probabilities")


def _do_ensemble(options: argparse.Namespace) -> None:
    from nnmosaic.pipeline.ensemble import ensemble

    ensemble(options.i, options.o, save_probabilities=options.save_npz)


def add_evaluate(commands: Any) -> None:
    """Add ``evaluate``."""
    parser = add_command(
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


def add_find_best(commands: Any) -> None:
    """Add ``find_best``."""
    parser = add_command(
        commands, "find_best", "compare trained configurations and ensembles of two", _do_find_best
    )
    workspace_argument(parser)
    dataset_argument(parser)
    parser.add_argument(
        "-c",
        nargs="+",
        default=["2d", "3d_fullres", "3d_lowres", "3d_cascade_fullres"],
        metavar="CONFIGURATION",
    )
    parser.add_argument("-tr", nargs="+", default=[DEFAULT_TRAINER], metavar="TRAINER")
    parser.add_argument("-p", nargs="+", default=[DEFAULT_PLANS], metavar="PLANS")
    parser.add_argument(
        "-f", nargs="+", type=fold, metavar="FOLD", help="default: those that all models finished"
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


def add_run(commands: Any) -> None:
    """Add ``run``."""
    parser = add_command(commands, "run", "plan, preprocess, train all folds, predict", _do_run)
    workspace_argument(parser)
    dataset_argument(parser)
    parser.add_argument("-c", required=True, metavar="CONFIGURATION")
    parser.add_argument("-f", nargs="+", type=fold, default=list(range(NUM_FOLDS)), metavar="FOLD")
    parser.add_argument("-i", type=Path, required=True, metavar="FOLDER", help="images to predict")
    parser.add_argument(
        "-o", type=Path, required=True, metavar="FOLDER", help="where label maps go"
    )
    model_arguments(parser)
    planning_arguments(parser)
    cpu_budget_arguments(parser)
    run_settings_arguments(parser)


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


def _run_settings(options: argparse.Namespace) -> Any:
    from dataclasses import fields

    from nnmosaic.planners.plans_section import RunSettings

    given = {field.name: getattr(options, field.name) for field in fields(RunSettings)}
    chosen = dict(options.options or ())
    if len(chosen) < len(options.options or ()):
        raise InputError(f"--set gives an option twice; it has {', '.join(chosen)}. Give it once.")
    return RunSettings(**{**given, "options": chosen or None})


def add_trainer_path(commands: Any) -> None:
    """Add ``trainer_path``."""
    text = "print the folder for nnUNet_extTrainer, so that nnUNetv2_train finds the trainers"
    add_command(commands, "trainer_path", text, _do_trainer_path)


def _do_trainer_path(_: argparse.Namespace) -> None:
    from importlib.util import find_spec

    spec = find_spec("nnmosaic.trainers.ext_trainer")
    if spec is None or spec.origin is None:
        raise RuntimeError(
            "The installation lacks nnmosaic.trainers.ext_trainer. Install nnmosaic again."
        )
    print(Path(spec.origin).parent)


MODEL_COMMANDS = (
    add_train,
    add_predict,
    add_ensemble,
    add_context_dice,
    add_evaluate,
    add_find_best,
    add_run,
    add_trainer_path,
)
