"""Label maps of several raters beside nnU-Net's preprocessed data (multi_rater spec, 7.2).

nnU-Net's own files hold the fused reference as without raters: every other trainer works on them.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.training.dataloading.nnunet_dataset import comp_blosc2_params, nnUNetDatasetBlosc2

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import Case

ABSENT = -2
"""Every voxel of a rater who did not annotate the case. nnU-Net pads with -1."""


def rater_preprocessor(preprocessor: type, case: Case, raters: Sequence[str]) -> Any:
    """Return one of nnU-Net's preprocessors, made for the case of several raters.

    Raises
    ------
    InputError
        If nobody annotated the case.
    """
    if not case.raters:
        raise InputError(
            f"Case {case.identifier!r} has a label map of none of {', '.join(raters)} in "
            "labelsTr_raters. Add one, or move the case away."
        )
    made = type(f"Rater{preprocessor.__name__}", (RaterMixin, preprocessor), {})(verbose=False)
    made.drawn, made.raters = dict(case.raters), raters
    return made


class RaterMixin:
    """Also preprocesses the label map of each rater.

    Attributes
    ----------
    drawn : dict of str to Path
        Rater -> label file of the case.
    raters : sequence of str
        All raters.
    """

    drawn: dict[str, Path]
    raters: Sequence[str]
    _labels: np.ndarray
    _locations: dict[int, np.ndarray]

    def run_case(
        self,
        image_files: list[str],
        seg_file: str,
        plans_manager: Any,
        configuration_manager: Any,
        dataset_json: dict[str, Any],
    ) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Return what nnU-Net's class does; parameters are its own."""
        reader = plans_manager.image_reader_writer_class()
        image, properties = reader.read_images(image_files)
        fused = reader.read_seg(seg_file)[0]
        maps = [
            reader.read_seg(str(self.drawn[rater]))[0]
            if rater in self.drawn
            else np.full_like(fused, ABSENT)
            for rater in self.raters
        ]
        drawn = np.vstack([fused, *maps])
        del fused, maps
        image, labels, properties = self.run_case_npy(  # type: ignore[attr-defined]
            image, drawn, properties, plans_manager, configuration_manager, dataset_json
        )
        sample = self._sample_foreground_locations  # type: ignore[attr-defined]
        classes = plans_manager.get_label_manager(dataset_json).foreground_labels
        self._labels, self._locations = labels.astype(np.int16), {}
        for value in classes:
            in_any = (labels[1:] == value).any(0, keepdims=True)
            self._locations |= sample(np.where(in_any, value, 0), [value])
        properties["class_locations"] = sample(labels[:1], classes)
        return image, labels[:1], properties

    def save_raters(self, path: Path, patch_size: Sequence[int]) -> None:
        """Write what `run_case` found besides.

        ``path.b2nd`` holds fused reference and raters, int16, shape (1 + raters, *spatial), and
        ``path.npz`` who annotated the case ("available") and, as nnU-Net's ``class_locations``,
        voxels of each class in any rater ("1", "2", ...).
        """
        blocks, chunks = comp_blosc2_params(self._labels.shape, tuple(patch_size), 2)
        nnUNetDatasetBlosc2.save_seg(self._labels, str(path), chunks_seg=chunks, blocks_seg=blocks)
        arrays: dict[str, Any] = {str(value): found for value, found in self._locations.items()}
        arrays["available"] = np.array([rater in self.drawn for rater in self.raters])
        np.savez(path.with_name(f"{path.name}.npz"), **arrays)
