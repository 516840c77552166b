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
from nnmosaic.trainers.multi_rater.wanted_masks import LATENTS, MAPS


class SpreadOfMasks:
    """Mean of probabilities, and how far they differ; takes one volume at a time.

    Parameters
    ----------
    with_maps : bool
        Whether `maps` will be asked for.
    """

    def __init__(self, *, with_maps: bool) -> None:
        self.with_maps = with_maps
        self.number = 0
        self._sum: Any = 0.0
        self._squares: Any = 0.0
        self._entropies: Any = 0.0

    def add(self, probabilities: np.ndarray) -> None:
        """Take one sample, shape (K, *spatial), background first."""
        self.number += 1
        self._sum = self._sum + probabilities
        if self.with_maps:
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
    mean_of : {"samples", "raters"}, optional
        The masks whose mean is ``CASE``.
    uncertainty : bool
        Whether `MAPS` of these masks are written.
    """

    def __init__(
        self,
        folder: Path,
        case: str,
        predictor: Any,
        properties: dict[str, Any],
        *,
        mean_of: str | None = None,
        uncertainty: bool = False,
    ) -> None:
        self.folder, self.case = folder, case
        self.predictor, self.properties = predictor, properties
        self.ending: str = predictor.dataset_json["file_ending"]
        self.writer = predictor.plans_manager.image_reader_writer_class()
        self.mean_of = mean_of
        self.spread = SpreadOfMasks(with_maps=uncertainty)

    def add(self, kind: str, name: str, logits: Tensor) -> None:
        """Write one mask, on the grid of the image.

        Parameters
        ----------
        kind : {"raters", "samples"}
        logits : Tensor, shape (C, Z, Y, X)
            On the grid of the plan.
        """
        counts = kind == self.mean_of
        found = convert_predicted_logits_to_segmentation_with_correct_shape(
            logits.float(),
            self.predictor.plans_manager,
            self.predictor.configuration_manager,
            self.predictor.label_manager,
            self.properties,
            return_probabilities=counts,
            num_threads_torch=torch.get_num_threads(),
        )
        labels = found[0] if counts else found
        if counts:
            self.spread.add(found[1])
        self._write(labels, self.folder / kind / name)

    def finish(self, latents: Any, *, save_probabilities: bool = False) -> None:
        """Write the mean, and what else is asked for.

        Parameters
        ----------
        latents
            Goes to ``latents/CASE.json``.
        save_probabilities : bool
            Write ``CASE.npz`` with the mean probabilities, under nnU-Net's name for them.
        """
        mean = self.spread.mean
        (self.folder / LATENTS).mkdir(parents=True, exist_ok=True)
        write_json(latents, self.folder / LATENTS / f"{self.case}.json")
        for name, values in self.spread.maps().items() if self.spread.with_maps else ():
            self._write_map(values, self.folder / name)
        if save_probabilities:
            np.savez_compressed(self.folder / f"{self.case}.npz", probabilities=mean)
        labels = mean.argmax(0)
        self._write(labels.astype(np.uint8 if len(mean) < 256 else np.uint16), self.folder)

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
            _write_nifti(values, path, self.properties["nibabel_stuff"])
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
        if "original_orientation" in geometry:  # nnU-Net's reader had turned the image
            image = SimpleITK.DICOMOrient(image, geometry["original_orientation"])
        SimpleITK.WriteImage(image, str(path), True)


def _write_nifti(values: np.ndarray, path: Path, geometry: dict[str, Any]) -> None:
    import nibabel
    from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

    original = geometry["original_affine"]
    image = nibabel.Nifti1Image(
        values.transpose(2, 1, 0), geometry.get("reoriented_affine", original)
    )
    if "reoriented_affine" in geometry:  # to RAS by nnU-Net's reader, and now back
        image = image.as_reoriented(ornt_transform(axcodes2ornt("RAS"), io_orientation(original)))
    nibabel.save(image, path)
