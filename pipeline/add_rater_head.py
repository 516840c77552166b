"""One more rater for a trained model, from a few cases that the rater annotated."""

import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.add_raters import refuse_unclear_raters
from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.case_check import read_image, read_label, reader_of
from nnmosaic.data_conversion.dataset_json import DatasetJson, parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import Case, find_image_cases
from nnmosaic.pipeline.progress import progress
from nnmosaic.planners.plans_section import rater_plan, read_section, write_section
from nnmosaic.trainers import FIRST_STAGE

KEPT = ("trainer_name", "init_args", "inference_allowed_mirroring_axes", "network_weights")
"""What prediction needs of a checkpoint; the optimizer's state is of another network."""


def add_rater_head(
    model: Path,
    rater: str,
    *,
    images: Path,
    labels: Path,
    output: Path,
    folds: Sequence[int | str] | None = None,
    checkpoint: str = "checkpoint_final.pth",
    steps: int = 300,
    seed: int = 0,
    device: str | None = None,
) -> str:
    """Write a model that knows one more rater, and return what was learnt.

    Parameters
    ----------
    model : Path
        nnU-Net's results folder of a personalised model. It is not changed.
    rater : str
        Name of the new rater.
    images, labels : Path
        Images named ``CASE_XXXX``, and the rater's label maps ``CASE``; images without one are
        left alone.
    output : Path
        Folder of the new model.
    folds : sequence, optional
        Default: all that are trained.
    steps : int
        Of the optimiser, for each fold.

    Raises
    ------
    InputError
        If the model, a file or a name cannot be used; then nothing is written.
    """
    if output.exists():
        raise InputError(f"{output} exists already. Remove it, or choose another folder with -o.")
    from nnmosaic.pipeline.device import choose_device
    from nnmosaic.trainers.multi_rater.new_rater import HeadLearner
    from nnmosaic.trainers.predictor import available_folds, load_predictor

    folds = folds or available_folds(model, checkpoint)
    predictor = load_predictor(
        model, folds=folds, checkpoint=checkpoint, device=choose_device(device), step_size=0.5,
        mirroring=True,
    )  # fmt: skip
    if predictor.trainer_name not in FIRST_STAGE:
        raise InputError(
            f"{model} was trained by {predictor.trainer_name}, which has no heads of raters. Name "
            f"a model of {' or '.join(FIRST_STAGE)}."
        )
    plans, dataset_json = _with_rater(model, rater)
    dataset = parse_dataset_json(dataset_json, where=str(model / "dataset.json"))
    cases = _preprocessed(predictor, dataset, _labelled_cases(images, labels, dataset))
    learner = HeadLearner(predictor, rater_plan(predictor.plans_manager.plans), cases)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    told = [f"{len(cases.identifiers)} cases of {rater}"]
    try:
        with progress("Learning", len(folds)) as advance:
            for fold, weights in zip(folds, predictor.list_of_parameters, strict=True):
                found = learner.learn(weights, steps=steps, seed=seed)
                told.append(
                    f"fold {fold}: from the head of {found.nearest}, loss {found.before:.3f} -> "
                    f"{found.after:.3f}"
                )
                where = Path(f"fold_{fold}") / checkpoint
                new = {"plans": plans, "dataset_json": dataset_json}
                _write_checkpoint(model / where, temporary / where, new, found.weights)
                advance(f"fold {fold}")
        write_json(plans, temporary / "plans.json")
        write_json(dataset_json, temporary / "dataset.json")
        temporary.rename(output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return "\n".join([*told, f"{output}: predict with -m {output} --raters {rater}"])


def _with_rater(model: Path, rater: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return plans and dataset.json that name one more rater."""
    plans, content = (read_json(model / name) for name in ("plans.json", "dataset.json"))
    section, plan = read_section(plans), rater_plan(plans)
    if rater in plan.raters:
        raise InputError(
            f"--rater: the model knows {rater} already ({', '.join(plan.raters)}). Choose a new "
            "name."
        )
    raters = (*plan.raters, rater)
    refuse_unclear_raters(raters)
    write_section(plans, replace(section, multirater=replace(plan, raters=raters)))
    return plans, {**content, "multirater": {**content["multirater"], "raters": list(raters)}}


def _labelled_cases(images: Path, labels: Path, dataset: DatasetJson) -> list[Case]:
    cases, faults = find_image_cases(
        images, file_ending=dataset.file_ending, num_channels=len(dataset.channel_names)
    )
    if faults:
        raise InputError(next(iter(faults.values())))
    named = [replace(c, label=labels / f"{c.identifier}{dataset.file_ending}") for c in cases]
    labelled = [case for case in named if case.label is not None and case.label.is_file()]
    if not labelled:
        raise InputError(
            f"{labels} holds no label map for an image in {images}: expected "
            f"{named[0].label.name if named[0].label else ''}, like CASE_0000 without its channel."
        )
    return labelled


def _preprocessed(predictor: Any, dataset: DatasetJson, cases: Sequence[Case]) -> Any:
    from nnmosaic.trainers.multi_rater.new_rater import PreprocessedCases

    reader, configuration = reader_of(dataset), predictor.configuration_manager
    preprocessor = configuration.preprocessor_class(verbose=False)
    found = {}
    with progress("Preprocessing", len(cases)) as advance:
        for case in cases:
            image, properties = read_image(case, reader, num_channels=len(dataset.channel_names))
            legal = set(dataset.labels.values())
            label = read_label(case, reader, image=image, properties=properties, legal=legal)
            found[case.identifier] = preprocessor.run_case_npy(
                image, label, properties, predictor.plans_manager, configuration,
                predictor.dataset_json,
            )  # fmt: skip
            advance(case.identifier)
    return PreprocessedCases(found)


def _write_checkpoint(
    source: Path, target: Path, arguments: dict[str, Any], weights: Mapping[str, Any]
) -> None:
    """Write what prediction needs of a checkpoint, with other weights and arguments."""
    import torch

    from nnmosaic.trainers.checkpoint import read_checkpoint

    content = read_checkpoint(source)
    kept = {key: content[key] for key in KEPT if key in content}
    kept |= {"network_weights": weights, "init_args": {**content["init_args"], **arguments}}
    target.parent.mkdir(parents=True)
    torch.save(kept, target)
