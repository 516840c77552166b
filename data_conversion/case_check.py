"""Reading one case and saying what is wrong with it.

Merging, planning, prediction and ``doctor`` all meet broken files; they all ask here, so that the
same fault has the same words everywhere.
"""

import os
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_dataset_json

from nnmosaic.data_conversion.dataset_json import DatasetJson
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import Case

GEOMETRY_TOLERANCE = 1e-3
"""Absolute tolerance for spacing, origin (both mm) and direction: headers store rounded numbers."""


@lru_cache(maxsize=8)
def _reader_for(ending: str, named: str | None) -> BaseReaderWriter:
    content = {"file_ending": ending}
    if named is not None:
        content["overwrite_image_reader_writer"] = named
    try:
        return determine_reader_writer_from_dataset_json(content, verbose=False)()
    except RuntimeError:
        raise InputError(f"nnU-Net has no reader for files that end with {ending}.") from None


def reader_of(dataset: DatasetJson) -> BaseReaderWriter:
    """Return nnU-Net's reader for the files of a dataset."""
    return _reader_for(dataset.file_ending, dataset.content.get("overwrite_image_reader_writer"))


def read_image(
    case: Case, reader: BaseReaderWriter, *, num_channels: int
) -> tuple[np.ndarray, dict[str, Any]]:
    """Read all channels of a case.

    Parameters
    ----------
    num_channels : int
        As declared in dataset.json; a 2D colour file holds several.

    Returns
    -------
    image : ndarray, shape (C, Z, Y, X), float32
        In the reader's axis order; a 2D image has Z = 1.
    properties : dict
        nnU-Net's, with "spacing" in mm in the order of the array axes.

    Raises
    ------
    InputError
        If a file cannot be read, the channels do not fit together, an image is 4D, or a voxel is
        NaN or infinite.
    """
    image, properties = _read(case.images, reader)
    if image.shape[0] != num_channels:
        raise InputError(
            f"{case.images[0]} holds {image.shape[0]} images (a 4D or colour file), but "
            f"dataset.json declares {num_channels} channel(s). Save each volume to a file of its "
            "own, CASE_0000, CASE_0001, ..., or declare the channels."
        )
    if not np.isfinite(image).all():
        count = int(np.size(image) - np.isfinite(image).sum())
        raise InputError(
            f"{case.images[0]}: {count} voxels are NaN or infinite. Replace them, for example by "
            "the smallest finite value of the image."
        )
    return image, properties


def read_label(
    case: Case,
    reader: BaseReaderWriter,
    *,
    image: np.ndarray,
    properties: dict[str, Any],
    legal: Collection[int] | None,
) -> np.ndarray:
    """Read the label map of a case and hold it against its image.

    Parameters
    ----------
    image, properties
        As returned by `read_image`.
    legal : collection of int, optional
        Values that the file may hold; None: any non-negative integer.

    Returns
    -------
    ndarray, shape (1, Z, Y, X), float32
        Integer-valued.

    Raises
    ------
    InputError
        If shape, spacing, origin or direction differ from the image's, or a value is not legal.
    """
    if case.label is None:
        raise InputError(f"Case {case.identifier!r} has no label file.")
    label, label_properties = _read((case.label,), reader)
    if label.shape[0] != 1 or label.shape[1:] != image.shape[1:]:
        raise InputError(
            f"{case.label} has the shape {_shape(label)}, its image {case.images[0].name} has "
            f"{_shape(image)}. Resample the label map to the grid of the image."
        )
    _check_geometry(case.label, case.images[0], properties, label_properties)
    values = np.unique(label)
    wrong = (
        [v for v in values.tolist() if v != int(v) or v < 0]
        if np.isfinite(values).all()
        else [np.nan]
    )
    if not wrong and legal is not None:
        wrong = [v for v in values.tolist() if int(v) not in legal]
    if wrong:
        allowed = "whole numbers from 0" if legal is None else sorted(legal)
        raise InputError(
            f"{case.label} holds the label value {wrong[0]:g}, which this case may not have "
            f"(allowed: {allowed}). Correct the file, or declare the label in dataset.json."
        )
    return label


def _read(files: tuple[Path, ...], reader: BaseReaderWriter) -> tuple[np.ndarray, dict[str, Any]]:
    """Read the channels one by one, so that a fault is found in the file that has it."""
    channels, all_properties = zip(*(_read_file(path, reader) for path in files), strict=True)
    for path, image, properties in zip(files[1:], channels[1:], all_properties[1:], strict=True):
        if image.shape != channels[0].shape:
            raise InputError(
                f"{path} has the shape {_shape(image)}, channel {files[0].name} has "
                f"{_shape(channels[0])}. Resample all channels of a case to one grid."
            )
        _check_geometry(path, files[0], all_properties[0], properties)
    return np.concatenate(channels), all_properties[0]


def _read_file(path: Path, reader: BaseReaderWriter) -> tuple[np.ndarray, dict[str, Any]]:
    if not path.is_file():
        raise InputError(f"{path} does not exist.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty (0 bytes). Restore it or remove the case.")
    try:
        if path.name.endswith((".nii", ".nii.gz")):
            _check_nifti(path)
        image, properties = reader.read_images([str(path)])
    except InputError:
        raise
    except Exception as error:  # readers raise whatever their library raises
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
        raise InputError(
            f"{path} cannot be read as an image ({reason}). The file may be cut off or be of "
            "another type: restore it or remove the case."
        ) from None
    return image, properties


def _check_nifti(path: Path) -> None:
    """Find what ITK hides: it reads NaN and infinity as 0, and fills cut-off files with zeros."""
    image: Any = nibabel.load(path)
    dtype = image.get_data_dtype()
    if np.issubdtype(dtype, np.integer) and _has_expected_size(path, image):
        return
    voxels = image.dataobj.get_unscaled()  # raises if the file is cut off
    if not np.isfinite(voxels).all():
        raise InputError(
            f"{path}: {int((~np.isfinite(voxels)).sum())} voxels are NaN or infinite. "
            "Replace them, for example by the smallest finite value of the image."
        )


def _has_expected_size(path: Path, image: Any) -> bool:
    """Return whether the uncompressed size is right; gzip files end with it (RFC 1952).

    False also for files packed in several parts; these must be read to know.
    """
    values = int(np.prod(image.shape)) * image.get_data_dtype().itemsize
    expected = int(image.dataobj.offset) + values
    if path.suffix != ".gz":
        return bool(path.stat().st_size >= expected)
    with path.open("rb") as file:
        file.seek(-4, os.SEEK_END)
        return bool(int.from_bytes(file.read(4), "little") == expected % 2**32)


def _check_geometry(
    path: Path, reference: Path, expected: dict[str, Any], got: dict[str, Any]
) -> None:
    """Compare spacing, and origin and direction where the reader knows them."""
    pairs = [("spacing", expected["spacing"], got["spacing"])]
    if "sitk_stuff" in expected:
        pairs += [
            (k, expected["sitk_stuff"][k], got["sitk_stuff"][k]) for k in ("origin", "direction")
        ]
    if "nibabel_stuff" in expected:
        key = "original_affine"
        pairs.append(("affine", expected["nibabel_stuff"][key], got["nibabel_stuff"][key]))
    for what, wanted, found in pairs:
        same_shape = np.shape(wanted) == np.shape(found)
        if not same_shape or not np.allclose(wanted, found, atol=GEOMETRY_TOLERANCE):
            raise InputError(
                f"{path} has another {what} than {reference.name}: {_numbers(found)} against "
                f"{_numbers(wanted)}. If the two do lie on each other, copy the header of "
                f"{reference.name}; if not, resample {path.name} to its grid."
            )


def _shape(array: np.ndarray) -> str:
    return " x ".join(str(n) for n in array.shape[1:])


def _numbers(values: Any) -> str:
    return "(" + ", ".join(f"{v:.4g}" for v in np.ravel(values)) + ")"
