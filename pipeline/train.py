"""Training one fold: what can be wrong is found before any data is loaded."""

import logging
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nnmosaic.data_conversion.atomic_write import read_json
from nnmosaic.data_conversion.dataset_json import DatasetJson, read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.lock import exclusive
from nnmosaic.pipeline.workspace import Workspace
from nnmosaic.planners.ledger import Ledger, configuration_digest, ledger_path
from nnmosaic.planners.plans_section import RunSettings
from nnmosaic.planners.preprocessing import data_identifier
from nnmosaic.trainers import FIRST_STAGE, RATER_TRAINERS, TRAINERS

logger = logging.getLogger(__name__)

FINAL, LATEST, BEST = "checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth"


def model_folder(
    workspace: Workspace, identifier: str, configuration: str, trainer: str, plans_name: str
) -> Path:
    """Return nnU-Net's results folder of a model."""
    dataset = workspace.dataset(identifier)
    return workspace.results / dataset / f"{trainer}__{plans_name}__{configuration}"


def train(
    workspace: Workspace,
    identifier: str,
    configuration: str,
    fold: int | str,
    *,
    trainer: str,
    plans_name: str,
    settings: RunSettings,
    resume: bool = False,
    only_validate: bool = False,
    save_probabilities: bool = False,
    pretrained_weights: Path | None = None,
    stage1: Path | None = None,
    num_gpus: int = 1,
    device: str | None = None,
) -> None:
    """Train and validate one fold.

    Parameters
    ----------
    identifier : str
        Dataset id or name.
    fold : int or "all"
    trainer : str
        Class name.
    settings : RunSettings
        Go before those of the plans.
    resume : bool
        Refuse to begin anew; an interrupted training goes on in any case.
    only_validate : bool
        Only the final validation of a finished training.
    stage1 : Path, optional
        Checkpoint that a second stage starts from. Default: same plans and fold.

    Raises
    ------
    InputError
        If something is missing or contradictory; nothing was changed then.
    """
    if resume and (only_validate or pretrained_weights):
        raise InputError("--c continues a training: it cannot be combined with --val or weights.")
    if stage1 is not None and trainer not in FIRST_STAGE:
        raise InputError(f"--stage1: {trainer} has no first stage. Leave it out.")
    if pretrained_weights is not None and trainer in FIRST_STAGE:
        raise InputError(
            f"-pretrained_weights: {trainer} starts from its first stage. Give the weights to "
            f"{FIRST_STAGE[trainer]}."
        )
    dataset = workspace.dataset(identifier)
    preprocessed, raw = workspace.preprocessed / dataset, workspace.raw / dataset
    _check_preprocessed(preprocessed, raw, plans_name, configuration, identifier)
    model = model_folder(workspace, identifier, configuration, trainer, plans_name)
    folder = model / f"fold_{fold}"
    chosen = _check_request(trainer, settings, device, num_gpus)
    checkpoint = _checkpoint(
        folder,
        resume=resume,
        only_validate=only_validate,
        finished=is_finished(folder, trainer, read_dataset_json(preprocessed)),
    )
    _refuse_weights_over(checkpoint, pretrained_weights, "-pretrained_weights begins a training")
    _refuse_weights_over(checkpoint, stage1, "--stage1 begins a training")
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (
        preprocessed, configuration, fold, trainer, plans_name, settings, checkpoint,
        only_validate, save_probabilities, pretrained_weights, stage1,
    )  # fmt: skip
    with exclusive(folder / ".training.lock", "trains this fold"):
        _train_on(chosen, num_gpus, arguments)


def is_finished(fold_folder: Path, trainer: str, dataset: DatasetJson) -> bool:
    """Return whether a fold is trained and its final validation is complete.

    Where labels are partial, nnU-Net's own summary is replaced by the masked one at the very end.
    """
    written = ["summary.json"]
    if dataset.partial_labels is not None and trainer in TRAINERS:
        written.append("summary_raw.json")
    if trainer in RATER_TRAINERS:
        written.append("summary_raters.json")
    return all((fold_folder / "validation" / name).is_file() for name in written)


def _check_request(trainer: str, settings: RunSettings, device: str | None, num_gpus: int) -> Any:
    """Return the device, after refusing what cannot be trained."""
    from nnmosaic.pipeline.device import choose_device
    from nnmosaic.trainers.base import nnUNetTrainerMosaic
    from nnmosaic.trainers.lookup import trainer_class
    from nnmosaic.trainers.options import parse_options

    if not issubclass(trainer_class(trainer), nnUNetTrainerMosaic) and settings.given():
        raise InputError(f"{trainer} is not nnMosaic's: it takes none of {settings.given()}.")
    parse_options(trainer_class(trainer), settings.options or {})
    if num_gpus > 1 and (settings.time_budget or device not in (None, "cuda")):
        raise InputError("--num_gpus above 1 works with --device cuda and without --time_budget.")
    return choose_device("cuda" if num_gpus > 1 else device)


def _check_preprocessed(
    folder: Path, raw: Path, plans_name: str, configuration: str, identifier: str
) -> None:
    cure = f"Run: nnmosaic plan_and_preprocess -d {identifier} -c {configuration}"
    plans_file = folder / f"{plans_name}.json"
    if not plans_file.is_file():
        raise InputError(f"{plans_file} does not exist. {cure}")
    plans = read_json(plans_file)
    if configuration not in plans["configurations"]:
        known = ", ".join(plans["configurations"])
        raise InputError(f"{plans_file} has no configuration {configuration!r}. It has {known}.")
    data = folder / data_identifier(plans, configuration)
    if not data.is_dir() or not any(data.iterdir()):
        raise InputError(f"{data} holds no preprocessed data. {cure}")
    declared = read_json(folder / "dataset.json")
    raw_file = raw / "dataset.json"
    for key in ("labels", "partial_labels", "multirater") if raw_file.is_file() else ():
        if read_json(raw_file).get(key) != declared.get(key):
            raise InputError(f"{raw_file}: {key} changed after preprocessing. {cure}")
    ledger = Ledger(ledger_path(data))
    if not ledger.fits(configuration_digest(plans, configuration, declared)):
        raise InputError(f"{data} was preprocessed for other plans or labels. {cure}")
    missing = ledger.missing()
    if missing:
        raise InputError(
            f"{data}: preprocessing is not finished, {len(missing)} cases are missing (first: "
            f"{missing[0]}). {cure}"
        )


def _checkpoint(folder: Path, *, resume: bool, only_validate: bool, finished: bool) -> Path | None:
    """Return the checkpoint to load, or None to begin anew.

    An interrupted training goes on also without --c, so that nothing is lost; nnU-Net would begin
    anew and overwrite it.
    """
    final = folder / FINAL
    if only_validate:
        if not final.is_file():
            raise InputError(f"{final} does not exist: there is no finished training to validate.")
        return final
    found = [path for path in (folder / LATEST, folder / BEST) if path.is_file()]
    newest = max(found, key=lambda path: path.stat().st_mtime_ns, default=None)
    newest = final if final.is_file() else newest
    if resume and newest is None:
        raise InputError(f"--c: {folder} holds no checkpoint to continue from. Leave --c out.")
    if finished and not resume:
        raise InputError(
            f"{folder} holds a finished training, which training anew would overwrite. Move the "
            "folder away, or validate again with --val."
        )
    if newest is not None:
        logger.info("Continuing from %s", newest)
    return newest


def _refuse_weights_over(checkpoint: Path | None, weights: Path | None, why: str) -> None:
    if checkpoint is not None and weights is not None:
        raise InputError(
            f"{why}, but {checkpoint} exists. Leave them out to go on with it, or move "
            f"{checkpoint.parent} away."
        )


def _train(
    preprocessed: Path,
    configuration: str,
    fold: int | str,
    trainer_name: str,
    plans_name: str,
    settings: RunSettings,
    checkpoint: Path | None,
    only_validate: bool,
    save_probabilities: bool,
    pretrained_weights: Path | None,
    stage1: Path | None,
    *,
    device: Any,
) -> None:
    import torch

    from nnmosaic.trainers.base import nnUNetTrainerMosaic
    from nnmosaic.trainers.lookup import trainer_class

    plans = read_json(preprocessed / f"{plans_name}.json")
    plans["continue_training"] = checkpoint is not None and not only_validate
    trainer = trainer_class(trainer_name)(
        plans, configuration, fold, read_json(preprocessed / "dataset.json"), device
    )
    if isinstance(trainer, nnUNetTrainerMosaic):
        trainer.request_settings(settings)
    if pretrained_weights is not None:
        load_pretrained(trainer, pretrained_weights)
    if stage1 is not None:
        trainer.stage1_file = stage1
    if checkpoint is not None:
        trainer.load_checkpoint(str(checkpoint))
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    if not only_validate:
        trainer.run_training()
    trainer.perform_actual_validation(save_probabilities)


def load_pretrained(trainer: Any, path: Path) -> None:
    """Initialise a trainer, and begin with the weights of another model, but for its output layers.

    Raises
    ------
    InputError
        If the file is no checkpoint of nnU-Net, or of another network.
    """
    import torch
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    from nnmosaic.trainers.base import nnUNetTrainerMosaic
    from nnmosaic.trainers.checkpoint import read_checkpoint

    checkpoint = read_checkpoint(path)
    trainer.pretrained = checkpoint
    trainer.initialize()
    made_with = checkpoint.get("init_args", {})
    same_data = made_with.get("plans", {}).get("dataset_name") == trainer.plans_manager.dataset_name
    if same_data and made_with["fold"] != trainer.fold:
        trainer.print_to_log_file(
            f"Warning: {path} was trained on fold {made_with['fold']}, not {trainer.fold}: the "
            "validation is not on unseen cases."
        )
    with TemporaryDirectory() as folder:
        # nnU-Net's function would run what a pickle says, and put tensors on the GPU they are from.
        copy = Path(folder) / "weights.pth"
        torch.save({"network_weights": checkpoint["network_weights"]}, copy)
        try:
            load_pretrained_weights(getattr(trainer, "pretrainable", trainer.network), str(copy))
            if isinstance(trainer, nnUNetTrainerMosaic):
                trainer.take_pretrained(checkpoint)
        except (AssertionError, KeyError) as error:  # KeyError: it has other output layers
            raise InputError(f"{path} does not fit this network: {error}") from None
    trainer.pretrained = None  # as large as a second model


def _train_on(device: Any, num_gpus: int, arguments: tuple[Any, ...]) -> None:
    if num_gpus == 1:
        _train(*arguments, device=device)
        return
    import torch
    from nnunetv2.run.run_training import find_free_network_port

    if torch.cuda.device_count() < num_gpus:
        raise InputError(
            f"--num_gpus {num_gpus}: torch finds {torch.cuda.device_count()} CUDA devices here."
        )
    os.environ["MASTER_ADDR"] = "localhost"
    os.environ.setdefault("MASTER_PORT", str(find_free_network_port()))
    torch.multiprocessing.spawn(_train_rank, args=(num_gpus, arguments), nprocs=num_gpus)


def _train_rank(rank: int, num_gpus: int, arguments: tuple[Any, ...]) -> None:
    import torch
    from nnunetv2.run.run_training import cleanup_ddp, setup_ddp

    setup_ddp(rank, num_gpus)
    torch.cuda.set_device(rank)
    _train(*arguments, device=torch.device("cuda", rank))
    cleanup_ddp()
