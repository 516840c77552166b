"""Preprocessed cases with the label maps of all raters."""

from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.preprocessing import rater_folder


class RaterDataset(nnUNetDatasetBlosc2):
    """nnU-Net's dataset, whose segmentation has channels: fused reference, then each rater.

    The voxels around which nnU-Net draws patches are those of a class in any rater, so that none of
    them counts twice (multi_rater spec, 7.2).
    """

    def load_case(self, identifier: str) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Return what nnU-Net's method does; the segmentation has shape (1 + R, *spatial)."""
        data, _, previous, properties = super().load_case(identifier)
        labels = blosc2.open(
            urlpath=str(self._file(identifier, ".b2nd")),
            mode="r",
            dparams={"nthreads": 1},
            **self.mmap_kwargs,
        )
        with np.load(self._file(identifier, ".npz")) as found:
            properties["class_locations"] = {
                int(name): found[name] for name in found.files if name != "available"
            }
        return data, labels, previous, properties

    def available(self, identifier: str) -> np.ndarray:
        """Return who annotated a case, bool, shape (R,).

        Raises
        ------
        InputError
            If the case was preprocessed without raters.
        """
        path = self._file(identifier, ".npz")
        if not path.is_file():
            raise InputError(
                f"{path} does not exist: the label maps of the raters were not preprocessed. Run "
                "nnmosaic plan_and_preprocess again."
            )
        with np.load(path) as found:
            available: np.ndarray = found["available"]
        return available

    def _file(self, identifier: str, suffix: str) -> Path:
        return rater_folder(self.source_folder) / f"{identifier}{suffix}"
