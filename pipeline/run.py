"""Everything in order: plan, preprocess, train the folds, predict. Skips what is finished."""

import logging
from collections.abc import Sequence
from pathlib import Path

from nnmosaic.pipeline.plan_and_preprocess import plan_and_preprocess
from nnmosaic.pipeline.predict import predict
from nnmosaic.pipeline.train import model_folder, train
from nnmosaic.pipeline.workspace import Workspace
from nnmosaic.planners.plans_section import RunSettings

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
    settings: RunSettings,
    device: str | None = None,
) -> dict[str, str]:
    """Run the whole pipeline and return the cases that could not be predicted, with the reason.

    Called again after an interruption it goes on where it was. Parameters are those of the
    commands.
    """
    plan_and_preprocess(
        workspace,
        identifier,
        [configuration],
        planner=planner,
        plans_name=plans_name,
        memory_gb=memory_gb,
        device=device,
    )
    model = model_folder(workspace, identifier, configuration, trainer, plans_name)
    for fold in folds:
        folder = model / f"fold_{fold}"
        if (folder / "validation" / "summary.json").is_file():
            logger.info("Fold %s is finished", fold)
            continue
        train(
            workspace,
            identifier,
            configuration,
            fold,
            trainer=trainer,
            plans_name=plans_name,
            settings=settings,
            device=device,
        )
    return predict(images, output, model, folds=folds, skip_existing=True, device=device)
