"""Predicting a folder of images. A broken case is put on a list; the others are finished."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.case_check import read_image, reader_of
from nnmosaic.data_conversion.dataset_json import DatasetJson, parse_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import Case, find_image_cases
from nnmosaic.pipeline.progress import progress
from nnmosaic.trainers.multi_rater.wanted_masks import (
    LATENTS,
    MAPS,
    RATERS,
    SAMPLES,
    WantedMasks,
)

logger = logging.getLogger(__name__)

FAILURES = "failures.json"
PARTIAL = ".nnmosaic_partial"
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
        run = _Run(*what) if masks is None else _RaterRun(*what, masks=masks)
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


class _Run:
    """One prediction run: reading, predicting and writing overlap, case by case."""

    def __init__(
        self,
        dataset: DatasetJson,
        predictor: Any,
        output: Path,
        save_probabilities: bool,
        previous_stage: Path | None,
    ) -> None:
        if predictor.configuration_manager.previous_stage_name and previous_stage is None:
            raise InputError("This is the second stage of a cascade: give -prev_stage_predictions.")
        self.dataset, self.predictor, self.output = dataset, predictor, output
        self.save_probabilities, self.previous_stage = save_probabilities, previous_stage
        self.partial = output / f"{PARTIAL}_{os.getpid()}"

    def all_cases(self, cases: Sequence[Case], workers: int) -> dict[str, str]:
        """Predict the cases and return those that failed, with the reason."""
        failures: dict[str, str] = {}
        self.partial.mkdir(exist_ok=True)
        try:
            with (
                ThreadPoolExecutor(workers) as readers,
                ThreadPoolExecutor(workers) as writers,
                progress("Predicting", len(cases)) as advance,
            ):
                written: list[tuple[Case, Future[None]]] = []
                for case, prepared in _ahead(readers, self.prepare, cases, workers + 1):
                    try:
                        write = self.predicted(case, *prepared.result())
                        written.append((case, writers.submit(write)))
                        if len(written) > 2 * workers:  # logits must not pile up
                            written[-2 * workers][1].exception()
                    except Exception as error:
                        self._fail(case, error, failures)
                    advance(case.identifier)
                for case, future in written:
                    reason = future.exception()
                    if reason is not None:
                        self._fail(case, reason, failures)
        finally:
            shutil.rmtree(self.partial, ignore_errors=True)
        return failures

    def prepare(self, case: Case) -> tuple[Any, dict[str, Any]]:
        """Read and preprocess one case; shape (C, Z, Y, X), float32."""
        import numpy as np
        import torch
        from nnunetv2.utilities.label_handling.label_handling import convert_labelmap_to_one_hot

        reader = reader_of(self.dataset)
        image, properties = read_image(case, reader, num_channels=len(self.dataset.channel_names))
        previous = None
        if self.previous_stage is not None:
            path = self.previous_stage / f"{case.identifier}{self.dataset.file_ending}"
            if not path.is_file():
                raise InputError(f"{path} does not exist. Predict the previous stage first.")
            previous, _ = reader.read_seg(str(path))
        configuration = self.predictor.configuration_manager
        data, segmentation, properties = configuration.preprocessor_class(
            verbose=False
        ).run_case_npy(
            image,
            previous,
            properties,
            self.predictor.plans_manager,
            configuration,
            self.predictor.dataset_json,
        )
        if previous is not None:
            labels = self.predictor.label_manager.foreground_labels
            data = np.vstack(
                (data, convert_labelmap_to_one_hot(segmentation[0], labels, data.dtype))
            )
        return torch.from_numpy(data), properties

    def predicted(self, case: Case, data: Any, properties: dict[str, Any]) -> Callable[[], None]:
        """Predict one preprocessed case, and return what writes the result."""
        logits = self.predictor.predict_logits_from_preprocessed_data(data).numpy()
        return partial(self.write, case, logits, properties)

    def write(self, case: Case, logits: Any, properties: dict[str, Any]) -> None:
        """Resample to the image's grid, write under a temporary name, and move into place."""
        import torch
        from nnunetv2.inference.export_prediction import export_prediction_from_logits

        export_prediction_from_logits(
            logits,
            properties,
            self.predictor.configuration_manager,
            self.predictor.plans_manager,
            self.predictor.dataset_json,
            str(self.partial / case.identifier),
            self.save_probabilities,
            num_threads_torch=torch.get_num_threads(),
        )
        for suffix in (".npz", ".pkl", self.dataset.file_ending):
            path = self.partial / f"{case.identifier}{suffix}"
            if path.is_file():
                path.replace(self.output / path.name)

    def _fail(self, case: Case, error: BaseException, failures: dict[str, str]) -> None:
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        logger.error("%s failed: %s", case.identifier, reason)
        failures[case.identifier] = reason


class _RaterRun(_Run):
    """The same for masks of raters, and samples."""

    def __init__(self, *what: Any, masks: WantedMasks) -> None:
        from nnmosaic.trainers.multi_rater.prediction import RaterPredictor

        super().__init__(*what)
        self.masks, self.raters = masks, RaterPredictor(self.predictor, masks)

    def predicted(self, case: Case, data: Any, properties: dict[str, Any]) -> Callable[[], None]:
        """Predict and write all masks of one case, and return what moves them into place."""
        from nnmosaic.trainers.multi_rater.export import CaseWriter

        folder = self.partial / case.identifier
        writer = CaseWriter(
            folder,
            case.identifier,
            self.predictor,
            properties,
            mean_of=SAMPLES if self.masks.samples else RATERS,
            uncertainty=self.masks.uncertainty,
        )
        for kind, name, logits in self.raters.logits(data, case.identifier):
            writer.add(kind, name, logits)
        writer.finish(self.raters.latents, save_probabilities=self.save_probabilities)
        return partial(self.publish, folder)

    def publish(self, folder: Path) -> None:
        """Move the files of a case into place; ``CASE`` itself, which says "done", is the last."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.parent == folder):
            target = self.output / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.replace(target)


def _ahead(
    pool: ThreadPoolExecutor, function: Any, cases: Sequence[Case], number: int
) -> Iterator[tuple[Case, Future[Any]]]:
    """Yield cases in order with the futures of ``function``, ``number`` of them started ahead."""
    futures: dict[int, Future[Any]] = {}
    for i, case in enumerate(cases):
        for j in range(i, min(i + number, len(cases))):
            if j not in futures:
                futures[j] = pool.submit(function, cases[j])
        yield case, futures[i]
        futures[i] = Future()  # lets go of the image


def _write_failures(failures: dict[str, str], output: Path) -> None:
    path = output / FAILURES
    if failures:
        output.mkdir(parents=True, exist_ok=True)
        write_json(failures, path)
        logger.error("%d case(s) failed; the reasons are in %s", len(failures), path)
    else:
        path.unlink(missing_ok=True)
