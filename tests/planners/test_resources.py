from pathlib import Path
from typing import Any

import pytest

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners import resources

FINGERPRINT: dict[str, Any] = {
    "spacings": [[2.0, 1.0, 1.0], [1.0, 1.0, 1.0]],
    "shapes_after_crop": [[10, 20, 30], [10, 20, 30]],
    "foreground_intensity_properties_per_channel": {"0": {}, "1": {}},
}
PLANS: dict[str, Any] = {
    "transpose_forward": [1, 0, 2],
    "configurations": {"3d": {"spacing": [1.0, 1.0, 0.5]}, "2d": {"spacing": [1.0, 0.5]}},
}


def test_voxels_after_resampling_follow_spacing_and_transpose() -> None:
    voxels = resources.voxels_after_resampling(FINGERPRINT, PLANS, "3d")
    assert voxels.tolist() == [20 * 20 * 60, 20 * 10 * 60]
    # In 2D the first axis, here the second one of the image, keeps its 20 slices.
    assert resources.voxels_after_resampling(FINGERPRINT, PLANS, "2d").tolist() == voxels.tolist()


@pytest.mark.parametrize(("free_part", "outcome"), [(1.1, None), (0.7, "warns"), (0.4, "refuses")])
def test_free_space_is_looked_at_before_preprocessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free_part: float, outcome: str | None
) -> None:
    needed = (24_000 + 12_000) * 4 * 2.5
    usage = type("Usage", (), {"free": free_part * needed})
    monkeypatch.setattr(resources.shutil, "disk_usage", lambda _: usage)
    if outcome == "refuses":
        with pytest.raises(InputError, match="Free some space"):
            resources.check_free_space(tmp_path, FINGERPRINT, PLANS, "3d")
        return
    warning = resources.check_free_space(tmp_path, FINGERPRINT, PLANS, "3d")
    assert (warning is None) == (outcome is None)


def test_fewer_workers_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.os, "cpu_count", lambda: 4)
    one = resources.WORKER_BYTES + 6000 * 2 * resources.WORKER_BYTES_PER_VOXEL
    for free, expected in ((None, 4), (100 * one, 4), (2.5 * one, 2), (0.1 * one, 1)):
        monkeypatch.setattr(resources, "free_memory", lambda free=free: free)
        assert resources.default_workers(FINGERPRINT) == expected


def test_free_memory_is_some_bytes() -> None:
    free = resources.free_memory()
    assert free is None or 1e6 < free < 1e15
