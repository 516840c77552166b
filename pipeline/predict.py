"""Predicting a folder of images. A broken case is put on a list; the others are finished."""

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.dataset_json import DatasetJson, parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import Case, find_image_cases
from nnmosaic.pipeline.prediction_run import PredictionRun, PropagationRun, RaterRun
from nnmosaic.pipeline.propagation import propagates, read_all_prompts, state_of
from nnmosaic.trainers.multi_rater.wanted_masks import (
    LATENTS,
    MAPS,
    RATERS,
    SAMPLES,
    WantedMasks,
)

logger = logging.getLogger(__name__)

FAILURES = "failures.json"
MADE_WITH = "prediction.json"
"""In the output folder: the model of the label maps, so that no other model's are kept."""


def predict(
    images: Path,
    output: Path,
    model: Path,
    *,
    folds: Sequence[int | str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    step_size: float = 0.5,
    mirroring: bool = True,
    save_probabilities: bool = False,
    skip_existing: bool = False,
    previous_stage: Path | None = None,
    masks: WantedMasks | None = None,
    sweep: str | None = None,
    prompts: Path | None = None,
    device: str | None = None,
    workers: int | None = None,
) -> dict[str, str]:
    """Predict every case of a folder with the ensemble of all folds.

    Parameters
    ----------
    images, output : Path
        Images named ``CASE_XXXX``; label maps ``CASE`` appear when they are complete.
    model : Path
        nnU-Net's results folder ``TRAINER__PLANS__CONFIGURATION``.
    folds : sequence, optional
        Default: all that are trained.
    save_probabilities : bool
        Also write nnU-Net's ``.npz`` for `ensemble`.
    skip_existing : bool
        Leave cases alone whose results are there, if the same model made them.
    previous_stage : Path, optional
        Label maps of the previous stage, for a cascade.
    masks : WantedMasks, optional
        Of a model for several raters: ``raters/RATER/CASE`` and ``samples/000/CASE``, ...; maps
        ``entropy/CASE``, ``mutual_information/CASE`` and ``variance/CASE``; then ``CASE`` is the
        mean of the samples, or else of the raters. Default: the most likely mask only.
    sweep : str, optional
        How a model of clustering propagation goes through the slices; default: both ways.
    prompts : Path, optional
        Folder of what was marked for such a model, ``CASE.json`` or ``CASE.mrk.json``.
    workers : int, optional
        Threads that read and preprocess, and as many that write. Default: one per core, at most 4.

    Returns
    -------
    dict
        Failed case -> reason; also written to ``failures.json``.

    Raises
    ------
    InputError
        If the folder or the model cannot be used at all.
    """
    dataset = dataset_of(model)
    cases, failures = find_image_cases(
        images, file_ending=dataset.file_ending, num_channels=len(dataset.channel_names)
    )
    from nnmosaic.pipeline.device import choose_device
    from nnmosaic.trainers.predictor import available_folds, load_predictor

    folds = folds or available_folds(model, checkpoint)
    made_with = _made_with(model, folds, checkpoint, step_size=step_size, mirroring=mirroring)
    if masks is not None:
        made_with["masks"] = {**asdict(masks), "raters": list(masks.raters)}
    marked = {} if prompts is None else read_all_prompts(prompts, cases, dataset)
    if sweep is not None or prompts is not None:
        states = {case: state_of(found) for case, found in marked.items()}
        made_with |= {"sweep": sweep, "prompts": states}
    if skip_existing and _was_made_with(made_with, output):
        suffixes = (dataset.file_ending, ".npz") if save_probabilities else (dataset.file_ending,)
        cases = [case for case in cases if not _is_predicted(case, output, suffixes)]
    if cases:
        predictor = load_predictor(
            model,
            folds=folds,
            checkpoint=checkpoint,
            device=choose_device(device),
            step_size=step_size,
            mirroring=mirroring,
        )
        what = (dataset, predictor, output, save_probabilities, previous_stage)
        run: PredictionRun
        if propagates(predictor, sweep=sweep, prompts=prompts) and masks is None:
            run = PropagationRun(*what, sweep=sweep, prompts=marked)
        elif masks is not None:
            run = RaterRun(*what, masks=masks)
        else:
            run = PredictionRun(*what)
        _begin_output(output, model, made_with, cases, dataset.file_ending)
        failures.update(run.all_cases(cases, workers or min(4, os.cpu_count() or 1)))
    _write_failures(failures, output)
    return failures


def dataset_of(model: Path) -> DatasetJson:
    """Return what a model was trained on.

    Raises
    ------
    InputError
        If the folder is no model.
    """
    path = model / "dataset.json"
    if not path.is_file():
        raise InputError(f"{model} is no trained model: it has no dataset.json. Train first.")
    return parse_dataset_json(read_json(path), where=str(path))


def _made_with(
    model: Path, folds: Sequence[int | str], checkpoint: str, **options: Any
) -> dict[str, Any]:
    """Return what decides about the label maps, besides the images."""
    files = {str(fold): model / f"fold_{fold}" / checkpoint for fold in folds}
    written = {fold: path.stat().st_mtime for fold, path in files.items() if path.is_file()}
    return {"model": str(model.absolute()), "checkpoint": checkpoint, "folds": written, **options}


def _was_made_with(made_with: dict[str, Any], output: Path) -> bool:
    path = output / MADE_WITH
    same = path.is_file() and read_json(path) == made_with
    if path.is_file() and not same:
        logger.info("%s holds predictions of another model; all are made anew", output)
    return same


def _is_predicted(case: Case, output: Path, suffixes: Sequence[str]) -> bool:
    return all((output / f"{case.identifier}{suffix}").is_file() for suffix in suffixes)


def _begin_output(
    output: Path, model: Path, made_with: dict[str, Any], cases: Sequence[Case], ending: str
) -> None:
    """Make the folder say what its files are made with, after removing those made otherwise."""
    output.mkdir(parents=True, exist_ok=True)
    if not _was_made_with(made_with, output):
        suffixes = {output: (ending, ".npz", ".pkl"), output / LATENTS: (".json",)}
        suffixes |= {output / name: (ending, ".tif") for name in MAPS}
        for kind in (RATERS, SAMPLES):
            suffixes |= dict.fromkeys((output / kind).glob("*/"), (ending,))
        for case in cases:
            for folder, ends in suffixes.items():
                for end in ends:
                    (folder / f"{case.identifier}{end}").unlink(missing_ok=True)
    write_json(made_with, output / MADE_WITH)
    for name in ("dataset.json", "plans.json"):  # for ensemble, and nnU-Net's own tools
        shutil.copyfile(model / name, output / name)


def _write_failures(failures: dict[str, str], output: Path) -> None:
    path = output / FAILURES
    if failures:
        output.mkdir(parents=True, exist_ok=True)
        write_json(failures, path)
        logger.error("%d case(s) failed; the reasons are in %s", len(failures), path)
    else:
        path.unlink(missing_ok=True)
