"""Writing the masks of one case, and maps of how far they differ (multi_rater spec, 5 and 7.6)."""

from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
import torch
from nnunetv2.inference.export_prediction import (
    convert_predicted_logits_to_segmentation_with_correct_shape,
)
from torch import Tensor

from nnmosaic.data_conversion.atomic_write import write_json
from nnmosaic.trainers.multi_rater.wanted_masks import LATENTS, RATERS, SAMPLES

MAPS = ("entropy", "mutual_information", "variance")
"""Of the mean prediction; the part of it on which samples differ; of the foreground classes, summed
over them. In nats, and in squares of probabilities."""


class SpreadOfMasks:
    """Mean of probabilities, and how far they differ; takes one volume at a time."""

    def __init__(self) -> None:
        self.number = 0
        self._sum: Any = 0.0
        self._squares: Any = 0.0
        self._entropies: Any = 0.0

    def add(self, probabilities: np.ndarray) -> None:
        """Take one sample, shape (K, *spatial), background first."""
        self.number += 1
        self._sum = self._sum + probabilities
        self._squares = self._squares + np.square(probabilities[1:]).sum(0)
        self._entropies = self._entropies + _entropy(probabilities)

    @property
    def mean(self) -> np.ndarray:
        """Mean probabilities, shape (K, *spatial)."""
        mean: np.ndarray = self._sum / self.number
        return mean

    def maps(self) -> dict[str, np.ndarray]:
        """Return name of `MAPS` -> float32, shape (*spatial)."""
        mean = self.mean
        entropy = _entropy(mean)
        found = (
            entropy,
            entropy - self._entropies / self.number,
            self._squares / self.number - np.square(mean[1:]).sum(0),
        )
        return {
            name: values.clip(min=0).astype(np.float32)
            for name, values in zip(MAPS, found, strict=True)
        }


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    entropy: np.ndarray = -(probabilities * np.log(probabilities.clip(1e-12))).sum(0)
    return entropy


class CaseWriter:
    """Writes what is predicted of one case: ``raters/RATER/CASE``, ``samples/000/CASE``, ``CASE``.

    Parameters
    ----------
    folder : Path
    case : str
    predictor : nnUNetPredictor
        For its managers.
    properties : dict
        Of the preprocessed image.
    """

    def __init__(self, folder: Path, case: str, predictor: Any, properties: dict[str, Any]) -> None:
        self.folder, self.case = folder, case
        self.predictor, self.properties = predictor, properties
        self.ending: str = predictor.dataset_json["file_ending"]
        self.writer = predictor.plans_manager.image_reader_writer_class()
        self.spread = {RATERS: SpreadOfMasks(), SAMPLES: SpreadOfMasks()}

    def add(self, kind: str, name: str, logits: Tensor) -> None:
        """Write one mask, on the grid of the image.

        Parameters
        ----------
        kind : {"raters", "samples"}
        logits : Tensor, shape (C, Z, Y, X)
            On the grid of the plan.
        """
        labels, probabilities = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits.float(),
            self.predictor.plans_manager,
            self.predictor.configuration_manager,
            self.predictor.label_manager,
            self.properties,
            return_probabilities=True,
            num_threads_torch=torch.get_num_threads(),
        )
        self.spread[kind].add(probabilities)
        self._write(labels, self.folder / kind / name)

    def finish(
        self, latents: Any, *, uncertainty: bool = False, save_probabilities: bool = False
    ) -> None:
        """Write the mean over the samples, or else over the raters, and what else is asked for.

        Parameters
        ----------
        latents
            Goes to ``latents/CASE.json``.
        uncertainty : bool
            Write `MAPS` of the samples.
        save_probabilities : bool
            Write ``CASE.npz`` with the mean probabilities, as nnU-Net does.
        """
        spread = self.spread[SAMPLES] if self.spread[SAMPLES].number else self.spread[RATERS]
        mean = spread.mean
        (self.folder / LATENTS).mkdir(parents=True, exist_ok=True)
        write_json(latents, self.folder / LATENTS / f"{self.case}.json")
        for name, values in spread.maps().items() if uncertainty else ():
            self._write_map(values, self.folder / name)
        if save_probabilities:
            np.savez_compressed(self.folder / f"{self.case}.npz", probabilities=mean)
        self._write(mean.argmax(0).astype(np.uint8), self.folder)

    def _write(self, labels: np.ndarray, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.writer.write_seg(labels, str(folder / f"{self.case}{self.ending}"), self.properties)

    def _write_map(self, values: np.ndarray, folder: Path) -> None:
        """Write float values, shape (Z, Y, X), with the geometry of the image.

        ``write_seg`` of nnU-Net's writers would cut them to integers. Where the images are
        photographs, which know no float, the file is a TIFF.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.case}{self.ending}"
        if "nibabel_stuff" in self.properties:
            import nibabel

            stuff = self.properties["nibabel_stuff"]
            affine = stuff.get("reoriented_affine", stuff["original_affine"])
            nibabel.save(nibabel.Nifti1Image(values.transpose(2, 1, 0), affine), path)
            return
        geometry = self.properties.get("sitk_stuff")
        if geometry is None:
            image = SimpleITK.GetImageFromArray(values[0] if len(values) == 1 else values)
            SimpleITK.WriteImage(image, str(folder / f"{self.case}.tif"))
            return
        image = SimpleITK.GetImageFromArray(values[0] if len(geometry["spacing"]) == 2 else values)
        image.SetSpacing(geometry["spacing"])
        image.SetOrigin(geometry["origin"])
        image.SetDirection(geometry["direction"])
        SimpleITK.WriteImage(image, str(path), True)
