from pathlib import Path
from typing import Any

import pytest

from nnmosaic.planners import resources

FINGERPRINT: dict[str, Any] = {
    "spacings": [[2.0, 1.0, 1.0], [1.0, 1.0, 1.0]],
    "shapes_after_crop": [[10, 20, 30], [10, 20, 30]],
    "foreground_intensity_properties_per_channel": {"0": {}, "1": {}},
    "nnmosaic": {"inputs": {"cases": {"a": {"content": "1"}, "b": {"content": "2"}}}},
}
PLANS: dict[str, Any] = {
    "transpose_forward": [1, 0, 2],
    "configurations": {"3d": {"spacing": [1.0, 1.0, 0.5]}, "2d": {"spacing": [1.0, 0.5]}},
}


def test_voxels_after_resampling_follow_spacing_and_transpose() -> None:
    voxels = resources.voxels_after_resampling(FINGERPRINT, PLANS, "3d")
    assert voxels == {"a": 20 * 20 * 60, "b": 20 * 10 * 60}
    # In 2D the first axis, here the second one of the image, keeps its 20 slices.
    assert resources.voxels_after_resampling(FINGERPRINT, PLANS, "2d") == voxels


@pytest.mark.parametrize(
    ("unfinished", "voxels"),
    [
        ({"3d": ["a", "b"]}, 36_000),
        ({"3d": ["b"]}, 12_000),
        ({"3d": ["b"], "2d": ["a", "b"]}, 48_000),
        ({"3d": []}, 0),
    ],
)
def test_the_disk_is_looked_at_for_what_is_left_to_do(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    unfinished: dict[str, list[str]],
    voxels: int,
) -> None:
    for free, warns in ((voxels * 4 * 2.5 - 1, voxels > 0), (voxels * 4 * 2.5, False)):
        usage = type("Usage", (), {"free": max(0, free)})
        monkeypatch.setattr(resources.shutil, "disk_usage", lambda _, usage=usage: usage)
        warning = resources.space_warning(tmp_path, FINGERPRINT, PLANS, unfinished)
        assert (warning is not None) == warns


def test_fewer_workers_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Case a has 24000 voxels after resampling, four times as many as before, in 2 channels."""
    monkeypatch.setattr(resources.os, "cpu_count", lambda: 4)
    for free, expected in ((None, 4), (1e9, 4), (0.48e9, 3), (0.32e9, 2), (0.1e9, 1)):
        monkeypatch.setattr(resources, "free_memory", lambda free=free: free)
        assert resources.default_workers(FINGERPRINT, PLANS, ["3d"]) == expected


def test_free_memory_heeds_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "CGROUP", tmp_path)
    whole = resources.free_memory()
    (tmp_path / "memory.current").write_text("600\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert whole is None or resources.free_memory() == pytest.approx(whole, rel=0.5)
    (tmp_path / "memory.max").write_text("1000\n")
    assert resources.free_memory() == 400
