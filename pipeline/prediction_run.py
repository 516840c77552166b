"""One case after another: reading, predicting and writing overlap."""

import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.case_check import read_image, reader_of
from nnmosaic.data_conversion.dataset_json import DatasetJson
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.interactions import Prompts
from nnmosaic.data_conversion.raw_dataset import Case
from nnmosaic.pipeline.progress import progress
from nnmosaic.trainers.multi_rater.wanted_masks import RATERS, SAMPLES, WantedMasks

logger = logging.getLogger(__name__)

PARTIAL = ".nnmosaic_partial"


class PredictionRun:
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


class RaterRun(PredictionRun):
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


class PropagationRun(PredictionRun):
    """The same with centres that travel from slice to slice, and what people marked.

    Parameters
    ----------
    sweep : str, optional
        See `PropagationPredictor`; default: both ways.
    prompts : mapping of str to Prompts
        Case -> what was marked in it.
    """

    def __init__(self, *what: Any, sweep: str | None, prompts: Mapping[str, Prompts]) -> None:
        super().__init__(*what)
        self.prompts = prompts
        if sweep is not None:
            self.predictor.sweep = sweep

    def predicted(self, case: Case, data: Any, properties: dict[str, Any]) -> Callable[[], None]:
        """Predict one case with its prompts, and return what writes the result."""
        from nnmosaic.trainers.clustering_propagation.coordinates import CaseCoordinates
        from nnmosaic.trainers.clustering_propagation.slice_prompts import slice_prompts

        reader = reader_of(self.dataset)
        coordinates = CaseCoordinates.of_case(
            properties,
            transpose_forward=self.predictor.plans_manager.transpose_forward,
            network_shape=data.shape[1:],
        )
        marked = slice_prompts(
            self.prompts.get(case.identifier, Prompts("voxel")),
            coordinates,
            read_mask=lambda path: reader.read_seg(str(path)),
            where=f"prompts of {case.identifier}",
        )
        self.predictor.set_case(properties, marked)
        return super().predicted(case, data, properties)


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
