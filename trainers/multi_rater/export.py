"""Writing the masks of one case, and maps of how far they differ (multi_rater spec, 5 and 7.6)."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from acvl_utils.cropping_and_padding.bounding_boxes import insert_crop_into_image
from torch import Tensor

from nnmosaic.data_conversion.atomic_write import write_json
from nnmosaic.trainers.multi_rater.wanted_masks import LATENTS, MAPS

VALUES_AT_ONCE = 2**16
"""Probabilities that are made together, of whole slices: of thin ones, each costs a call."""


class SpreadOfMasks:
    """Mean of probabilities, and how far they differ; takes one volume at a time, by slices.

    Parameters
    ----------
    with_maps : bool
        Whether `maps` will be asked for.
    """

    def __init__(self, *, with_maps: bool) -> None:
        self.with_maps = with_maps
        self.number = 0
        self._sum: list[np.ndarray] = []
        self._squares: list[np.ndarray] = []
        self._entropies: list[np.ndarray] = []

    def add(self, slices: Iterable[np.ndarray]) -> None:
        """Take one sample, as slices of shape (K, Y, X), background first."""
        self.number += 1
        for z, probabilities in enumerate(slices):
            _add(self._sum, z, probabilities)
            if self.with_maps:
                _add(self._squares, z, np.square(probabilities[1:]).sum(0))
                _add(self._entropies, z, _entropy(probabilities))

    @property
    def mean(self) -> np.ndarray:
        """Mean probabilities, shape (K, Z, Y, X)."""
        mean = np.stack(self._sum, 1)
        mean /= self.number
        return mean

    def maps(self) -> dict[str, np.ndarray]:
        """Return name of `MAPS` -> float32, shape (Z, Y, X)."""
        found = {name: np.empty(self._shape, np.float32) for name in MAPS}
        for z, part in enumerate(self._sum):
            mean = part / self.number
            entropy = _entropy(mean)
            values = (
                entropy,
                entropy - self._entropies[z] / self.number,
                self._squares[z] / self.number - np.square(mean[1:]).sum(0),
            )
            for name, value in zip(MAPS, values, strict=True):
                found[name][z] = value.clip(min=0)
        return found

    @property
    def _shape(self) -> tuple[int, ...]:
        return (len(self._sum), *self._sum[0].shape[1:])


def _add(sums: list[np.ndarray], z: int, values: np.ndarray) -> None:
    """Add values to the sum of a slice, in place; the first become the sum."""
    if z == len(sums):
        sums.append(values.copy())
    else:
        sums[z] += values


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
            On the grid of the plan, on the CPU.
        """
        on_grid = self._resampled(logits)
        labels = np.empty(on_grid.shape[1:], np.uint8 if len(on_grid) < 256 else np.uint16)
        if kind == self.mean_of:
            self.spread.add(self._probabilities(on_grid, labels))
        else:
            for z, part in enumerate(labels):
                part[:] = on_grid[:, z].argmax(0)
        self._write(self._uncropped(labels), self.folder / kind / name)

    def _resampled(self, logits: Tensor) -> np.ndarray:
        """Return logits on the grid of the cropped image; half precision if it is the plan's.

        As nnU-Net's export does, which makes probabilities and labels of the whole at once: several
        times the memory of the logits.
        """
        plans, properties = self.predictor.plans_manager, self.properties
        configuration = self.predictor.configuration_manager
        spacing = [properties["spacing"][i] for i in plans.transpose_forward]
        shape = properties["shape_after_cropping_and_before_resampling"]
        current = configuration.spacing
        if len(current) < len(shape):
            current = [spacing[0], *current]
        found = configuration.resampling_fn_probabilities(logits.numpy(), shape, current, spacing)
        return np.asarray(found)

    def _probabilities(self, logits: np.ndarray, labels: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the probabilities of each slice, (K, Y, X), and write what wins to ``labels``."""
        at_once = max(1, VALUES_AT_ONCE // logits[:, 0].size)
        for first in range(0, len(labels), at_once):
            some = np.ascontiguousarray(logits[:, first : first + at_once])
            found = self.predictor.label_manager.apply_inference_nonlin(some).numpy()
            labels[first : first + at_once] = found.argmax(0)
            yield from found.swapaxes(0, 1)

    def _uncropped(self, values: np.ndarray) -> np.ndarray:
        """Return values, shape (Z, Y, X), in the whole image and its axes; 0 where it was cut."""
        whole = np.zeros(self.properties["shape_before_cropping"], values.dtype)
        insert_crop_into_image(whole, values, self.properties["bbox_used_for_cropping"])
        turned: np.ndarray = whole.transpose(self.predictor.plans_manager.transpose_backward)
        return turned

    def finish(self, latents: Any, *, save_probabilities: bool = False) -> None:
        """Write the mean, and what else is asked for.

        Parameters
        ----------
        latents
            Goes to ``latents/CASE.json``.
        save_probabilities : bool
            Write ``CASE.npz`` with the mean probabilities, under nnU-Net's name for them.
        """
        (self.folder / LATENTS).mkdir(parents=True, exist_ok=True)
        write_json(latents, self.folder / LATENTS / f"{self.case}.json")
        for name, values in self.spread.maps().items() if self.spread.with_maps else ():
            self._write_map(self._uncropped(values), self.folder / name)
        mean = self.spread.mean
        if save_probabilities:
            whole = self.predictor.label_manager.revert_cropping_on_probabilities(
                mean,
                self.properties["bbox_used_for_cropping"],
                self.properties["shape_before_cropping"],
            )
            axes = [0, *(1 + axis for axis in self.predictor.plans_manager.transpose_backward)]
            np.savez_compressed(
                self.folder / f"{self.case}.npz", probabilities=whole.transpose(axes)
            )
        labels = mean.argmax(0).astype(np.uint8 if len(mean) < 256 else np.uint16)
        self._write(self._uncropped(labels), self.folder)

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
