"""Everything in order: plan, preprocess, train the folds, predict. Skips what is finished."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nnmosaic.data_conversion.atomic_write import read_json
from nnmosaic.data_conversion.dataset_json import read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.device import choose_device
from nnmosaic.pipeline.plan_and_preprocess import plan_and_preprocess
from nnmosaic.pipeline.plan_request import PlanRequest
from nnmosaic.pipeline.predict import predict
from nnmosaic.pipeline.train import FINAL, is_finished, model_folder, train
from nnmosaic.pipeline.workspace import Workspace
from nnmosaic.planners.plans_section import RunSettings, read_section
from nnmosaic.trainers import FIRST_STAGE, WARM_START
from nnmosaic.trainers.checkpoint import stored_settings
from nnmosaic.trainers.lookup import trainer_class
from nnmosaic.trainers.multi_rater.wanted_masks import masks_of_a_run
from nnmosaic.trainers.options import option_types

logger = logging.getLogger(__name__)


def run(
    workspace: Workspace,
    identifier: str,
    configuration: str,
    *,
    folds: Sequence[int | str],
    images: Path,
    output: Path,
    trainer: str,
    plans_name: str,
    planner: str | None = None,
    memory_gb: float | None = None,
    minutes: float | None = None,
    cores: int | None = None,
    settings: RunSettings,
    device: str | None = None,
) -> dict[str, str]:
    """Run the whole pipeline and return the cases that could not be predicted, with the reason.

    Called again after an interruption it goes on where it was. Parameters are those of the
    commands.
    """
    if minutes is not None and trainer in WARM_START:
        raise InputError(
            f"--minutes cannot plan for {trainer}, which run trains after {WARM_START[trainer]}. "
            "Leave it out, and give --epochs."
        )
    if "cascade" in configuration:
        raise InputError("run cannot do a cascade: train and predict its stages one by one.")
    device = device or choose_device(None).type
    planned_for_cpu = device == "cpu" and planner is None and memory_gb is None
    model = model_folder(workspace, identifier, configuration, trainer, plans_name)
    request = PlanRequest(
        planner=planner,
        plans_name=plans_name,
        memory_gb=memory_gb,
        trainer=trainer,
        device="cpu" if planned_for_cpu else None,
        minutes=minutes,
        cores=cores,
        folds=len(folds),
    )
    stages = _stages(trainer, settings)
    models = {
        stage: model_folder(workspace, identifier, configuration, stage, plans_name)
        for stage in stages
    }
    if any(any(folder.glob("fold_*/checkpoint_*.pth")) for folder in models.values()):
        logger.info("Folds are trained already: their plans are kept")
        _refuse_other_minutes(workspace.preprocessed / model.parent.name, plans_name, minutes)
        request = PlanRequest(plans_name=plans_name, trainer=trainer, keep_plans=True)
    plan_and_preprocess(workspace, identifier, [configuration], request)
    dataset = read_dataset_json(workspace.preprocessed / workspace.dataset(identifier))
    for fold in folds:
        folders = {stage: models[stage] / f"fold_{fold}" for stage in stages}
        begun = [stage for stage in stages if any(folders[stage].glob("checkpoint_*.pth"))]
        for number, (stage, own) in enumerate(stages.items()):
            if is_finished(folders[stage], stage, dataset):
                _refuse_other_settings(folders[stage] / FINAL, own)
                logger.info("%s: fold %s is finished", stage, fold)
                continue
            if set(begun) & set(list(stages)[number + 1 :]):
                continue  # a later stage has begun without it
            warm = WARM_START.get(stage) if stage not in begun else None
            train(
                workspace,
                identifier,
                configuration,
                fold,
                trainer=stage,
                plans_name=plans_name,
                settings=own,
                pretrained_weights=models[warm] / f"fold_{fold}" / FINAL if warm else None,
                device=device,
            )
    return predict(
        images,
        output,
        model,
        folds=folds,
        skip_existing=True,
        masks=masks_of_a_run(trainer),
        device=device,
    )


def _stages(trainer: str, settings: RunSettings) -> dict[str, RunSettings]:
    """Return what is trained in turn, each with the options that it has."""
    names = [trainer]
    while before := {**FIRST_STAGE, **WARM_START}.get(names[0]):
        names.insert(0, before)
    if len(names) == 1:
        return {trainer: settings}
    known = {name: option_types(trainer_class(name)) for name in names}
    given = settings.options or {}
    for option in given:
        if not any(option in options for options in known.values()):
            raise InputError(
                f"--set: none of {', '.join(names)} has an option {option!r}. They have "
                f"{', '.join(option for options in known.values() for option in options)}."
            )
    return {
        name: replace(settings, options={o: given[o] for o in given if o in known[name]} or None)
        for name in names
    }


def _refuse_other_settings(checkpoint: Path, settings: RunSettings) -> None:
    settings.refuse_other(stored_settings(checkpoint), str(checkpoint))


def _refuse_other_minutes(folder: Path, plans_name: str, minutes: float | None) -> None:
    path = folder / f"{plans_name}.json"
    planned = read_section(read_json(path)).budget.get("minutes") if path.is_file() else None
    if minutes is not None and minutes != planned:
        raise InputError(
            f"--minutes {minutes:g}: folds are trained with {path}, which was planned for "
            f"{'no minutes' if planned is None else f'{planned:g}'}. Leave the flag out to go on, "
            "or name other plans with -p."
        )
