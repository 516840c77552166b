"""What preprocessing needs of disk and memory, before it starts."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.ledger import resolved_configuration

BYTES_PER_VALUE = 4
"""Preprocessed images are float32; label maps take a quarter to a half of that."""
COMPRESSED = 0.5
"""Blosc leaves at least about this part of noisy images."""
WORKER_BYTES_PER_VOXEL = 110
"""Per channel, while nnU-Net preprocesses: 98 to 106 on CHAOS, see benchmarks/planning.py."""
WORKER_BYTES = 150e6
"""What else a worker may take for itself; its libraries are shared with the other workers."""
MAX_WORKERS = 8


def voxels_after_resampling(
    fingerprint: Mapping[str, Any], plans: Mapping[str, Any], configuration: str
) -> np.ndarray:
    """Return the voxels of each case in a configuration, in the order of the fingerprint."""
    target = np.asarray(resolved_configuration(plans, configuration)["spacing"], float)
    forward = plans["transpose_forward"]
    spacings = np.asarray(fingerprint["spacings"], float)[:, forward]
    shapes = np.asarray(fingerprint["shapes_after_crop"], float)[:, forward]
    # In 2D nnU-Net resamples in the plane only.
    axes = slice(-len(target), None)
    shapes[:, axes] *= spacings[:, axes] / target
    voxels: np.ndarray = shapes.prod(axis=1)
    return voxels


def check_free_space(
    folder: Path, fingerprint: Mapping[str, Any], plans: Mapping[str, Any], configuration: str
) -> str | None:
    """Return a warning if the preprocessed data may not fit on the disk of ``folder``.

    Raises
    ------
    InputError
        If they cannot, even well compressed.
    """
    channels = len(fingerprint["foreground_intensity_properties_per_channel"])
    voxels = voxels_after_resampling(fingerprint, plans, configuration).sum()
    needed = voxels * BYTES_PER_VALUE * (channels + 0.5)
    free = shutil.disk_usage(folder).free
    sizes = f"needs up to {needed / 1e9:.1f} GB, and {folder} has {free / 1e9:.1f} GB left"
    if free < COMPRESSED * needed:
        raise InputError(
            f"Preprocessing {configuration} {sizes}. Free some space, or choose another place with "
            "--workspace or nnUNet_preprocessed."
        )
    return f"Preprocessing {configuration} {sizes}." if free < needed else None


def default_workers(fingerprint: Mapping[str, Any]) -> int:
    """Return one worker per core, at most 8, and no more than the free memory has room for."""
    cores = min(MAX_WORKERS, os.cpu_count() or 1)
    free = free_memory()
    if free is None:
        return cores
    channels = len(fingerprint["foreground_intensity_properties_per_channel"])
    largest = max(float(np.prod(shape)) for shape in fingerprint["shapes_after_crop"])
    one = WORKER_BYTES + largest * channels * WORKER_BYTES_PER_VOXEL
    return max(1, min(cores, int(free // one)))


def free_memory() -> float | None:
    """Return the bytes that can be had without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    kilobytes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return 1024 * float(kilobytes[0]) if kilobytes else None
