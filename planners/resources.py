"""What preprocessing needs of disk and memory, before it starts."""

import contextlib
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnmosaic.planners.fingerprint import contents_of
from nnmosaic.planners.ledger import resolved_configuration
from nnmosaic.planners.plans_section import read_section

BYTES_PER_VALUE = 4
"""Preprocessed images are float32, not counting that they are compressed."""
WORKER_BYTES_PER_VOXEL = 110
"""Per channel, while nnU-Net preprocesses: 86 to 104 on CHAOS, see benchmarks/planning.py."""
WORKER_BYTES_PER_VOXEL_AND_RATER = 16
"""Per label map: (127 - 63) / 4 with four raters, against none, on a synthetic case."""
WORKER_BYTES = 150e6
"""What else a worker may take for itself; its libraries are shared with the other workers."""
MAX_WORKERS = 8
CGROUP = Path("/sys/fs/cgroup")
"""Limits of a container, where there is one (cgroup v2)."""


def voxels_after_resampling(
    fingerprint: Mapping[str, Any], plans: Mapping[str, Any], configuration: str
) -> dict[str, float]:
    """Return case -> voxels in a configuration."""
    target = np.asarray(resolved_configuration(plans, configuration)["spacing"], float)
    forward = plans["transpose_forward"]
    spacings = np.asarray(fingerprint["spacings"], float)[:, forward]
    shapes = np.asarray(fingerprint["shapes_after_crop"], float)[:, forward]
    # In 2D nnU-Net resamples in the plane only.
    axes = slice(-len(target), None)
    shapes[:, axes] *= spacings[:, axes] / target
    return dict(zip(contents_of(fingerprint), shapes.prod(axis=1).tolist(), strict=True))


def space_warning(
    folder: Path,
    fingerprint: Mapping[str, Any],
    plans: Mapping[str, Any],
    unfinished: Mapping[str, Collection[str]],
) -> str | None:
    """Return a warning if the preprocessed data may not fit on the disk of ``folder``.

    Parameters
    ----------
    unfinished : mapping of str to collection of str
        Configuration -> cases that are not preprocessed yet.
    """
    channels = len(fingerprint["foreground_intensity_properties_per_channel"])
    needed = 0.0
    for configuration, cases in unfinished.items():
        voxels = voxels_after_resampling(fingerprint, plans, configuration)
        needed += sum(voxels[case] for case in cases) * BYTES_PER_VALUE * (channels + 0.5)
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return None
    return (
        f"Preprocessing needs up to {needed / 1e9:.1f} GB (less, as far as the images can be "
        f"compressed), and {folder} has {free / 1e9:.1f} GB left. If the disk fills up, free some "
        "space and run the same command again: finished cases are kept."
    )


def default_workers(
    fingerprint: Mapping[str, Any], plans: Mapping[str, Any], configurations: Sequence[str]
) -> int:
    """Return one worker per core, at most 8, and no more than the free memory has room for."""
    cores = min(MAX_WORKERS, os.cpu_count() or 1)
    free = free_memory()
    if free is None:
        return cores
    channels = len(fingerprint["foreground_intensity_properties_per_channel"])
    largest = max(
        max(float(np.prod(shape)) for shape in fingerprint["shapes_after_crop"]),
        *(max(voxels_after_resampling(fingerprint, plans, c).values()) for c in configurations),
    )
    plan = read_section(plans).multirater
    per_voxel = channels * WORKER_BYTES_PER_VOXEL
    per_voxel += len(plan.raters) * WORKER_BYTES_PER_VOXEL_AND_RATER if plan else 0
    one = WORKER_BYTES + largest * per_voxel
    return max(1, min(cores, int(free // one)))


def free_memory() -> float | None:
    """Return the bytes that can be had without swapping; None where the system does not say."""
    available = None
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                available = 1024 * float(line.split()[1])
    with contextlib.suppress(OSError, ValueError):  # "max": a container without a limit
        limit = float((CGROUP / "memory.max").read_text(encoding="ascii"))
        left = limit - float((CGROUP / "memory.current").read_text(encoding="ascii"))
        available = left if available is None else min(available, left)
    return available
