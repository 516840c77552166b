"""Prompts files (methods/clustering_propagation.md, 5.4 and 5.5): what is read, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nnmosaic.data_conversion import prompts as module
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.prompts import (
    Box,
    Mask,
    Point,
    Prompts,
    Scribble,
    find_prompts,
    read_prompts,
    write_prompts,
)

LABELS = {"background": 0, "liver": 1, "spleen": 2, "ignore": 3}
REGIONS = {"background": 0, "whole": (1, 2, 3), "core": [2, 3], "enhancing": [3]}
POINT = {"type": "point", "label": "liver", "coord": [12.5, -80.1, 33]}


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a prompts file with these interactions."""

    def write(*interactions: Any, **changes: Any) -> Path:
        head = {"version": 1, "space": "world", "convention": "RAS", "order": "xyz"}
        content = {**head, "interactions": list(interactions), **changes}
        path = tmp_path / "case.json"
        kept = {key: value for key, value in content.items() if value is not None}
        path.write_text(json.dumps(kept), encoding="utf-8")
        return path

    return write


def test_every_kind_is_read(written: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "masks").mkdir()
    (tmp_path / "masks" / "slice.nii.gz").touch()
    path = written(
        {**POINT, "positive": False, "round": 2},
        {"type": "scribble", "label": 2, "coords": [[1, 2, 3], [4, 5, 6]], "radius": 0},
        {"type": "box", "label": "background", "min": [0, 1, 2], "max": [3, 1, 2]},
        {"type": "mask", "label": "spleen", "file": "masks/slice.nii.gz"},
    )
    assert read_prompts(path, LABELS) == Prompts(
        "world",
        "RAS",
        "xyz",
        (
            Point(1, (12.5, -80.1, 33.0), positive=False, round=2),
            Scribble(2, ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0)), 0.0),
            Box(0, (0.0, 1.0, 2.0), (3.0, 1.0, 2.0)),
            Mask(2, (tmp_path / "masks" / "slice.nii.gz").resolve()),
        ),
    )


def test_what_is_written_is_read_back(written: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "m.nii.gz").touch()
    coords = [[1, 2, 3], [4, 5.25, 6]]
    path = written(
        POINT,
        {"type": "scribble", "label": "spleen", "coords": coords, "radius": 2.5, "round": 1},
        {"type": "box", "label": 1, "min": [0, 1, 2], "max": [3, 1, 2], "positive": False},
        {"type": "mask", "label": 2, "file": "m.nii.gz"},
    )
    prompts = read_prompts(path, LABELS)
    copy = tmp_path / "copy.json"
    write_prompts(prompts, copy, LABELS)
    assert read_prompts(copy, LABELS) == prompts
    assert json.loads(copy.read_text())["interactions"][2]["label"] == "liver"


def test_a_mask_elsewhere_is_not_written(tmp_path: Path) -> None:
    prompts = Prompts("voxel", interactions=(Mask(1, tmp_path / "m.nii.gz"),))
    with pytest.raises(InputError, match="must lie in the folder of the prompts"):
        write_prompts(prompts, tmp_path / "sub" / "case.json", LABELS)


def test_a_label_of_a_dataset_with_regions_is_an_integer_or_a_region(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    names = ("whole", "core", "enhancing", "background", 1, 3)
    path = written(*({**POINT, "label": name} for name in names))
    prompts = read_prompts(path, REGIONS)
    assert [p.label for p in prompts.interactions] == [(1, 2, 3), (2, 3), (3,), 0, 1, 3]
    write_prompts(prompts, tmp_path / "copy.json", REGIONS)
    assert read_prompts(tmp_path / "copy.json", REGIONS) == prompts
    with pytest.raises(InputError, match=r"unknown label 4.*whole \(\(1, 2, 3\)\)"):
        read_prompts(written({**POINT, "label": 4}), REGIONS)
    unknown = Prompts("voxel", interactions=(Point((1, 3), (0, 0, 0)),))
    with pytest.raises(InputError, match=r"No region of the dataset has the labels \[1, 3\]"):
        write_prompts(unknown, tmp_path / "copy.json", REGIONS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "lung"}, r"interactions\[1\] \(point\): unknown label 'lung'.*liver \(1\)"),
        ({"label": "ignore"}, "unknown label 'ignore'"),
        ({"label": 3}, "unknown label 3"),
        ({"label": True}, "unknown label True"),
        ({"label": [1]}, r"unknown label \[1\]"),
        ({"coord": [1, 2]}, r"\(point\): coord must be a list of three numbers, got \[1, 2\]"),
        ({"coord": [1, 2, 3, 4]}, "three numbers"),
        ({"coord": {"x": 1}}, "three numbers"),
        ({"coord": None}, "three numbers"),
        ({"coord": [1, 2, "3"]}, "coord: '3' is not a finite number"),
        ({"coord": [1, 2, float("nan")]}, "'nan' is not a finite number"),
        ({"coord": [1, float("-inf"), 0]}, "'-inf' is not a finite number"),
        ({"coord": [1, 10**400, 0]}, "is not a finite number"),
        ({"coord": [True, 0, 0]}, "'True' is not a finite number"),
        ({"positive": "yes"}, '"positive" must be true or false'),
        ({"round": -1}, '"round" must be 0, 1, 2'),
        ({"round": 1.5}, '"round" must be 0, 1, 2'),
        ({"postive": False}, "unknown key 'postive'"),
        ({"type": "lasso"}, "\"type\" must be point or scribble or box or mask, got 'lasso'"),
        ({"type": ["point"]}, '"type" must be point'),
    ],
)
def test_a_bad_point_is_refused(
    written: Callable[..., Path], change: dict[str, Any], message: str
) -> None:
    path = written(POINT, {**POINT, **change})
    with pytest.raises(InputError, match=message) as error:
        read_prompts(path, LABELS)
    assert str(path) in str(error.value)
    assert "interactions[1]" in str(error.value)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"type": "scribble", "coords": []}, '"coords" must be a list of positions'),
        ({"type": "scribble", "coords": [[1, 2, 3], [1, 2]]}, r"coords\[1\] must be a list of thr"),
        ({"type": "scribble", "coords": [[1, 2, 3]] * 10_001}, "10,001 positions; a scribble may"),
        ({"type": "scribble", "coords": [[1, 2, 3]], "radius": -1}, "between 0 and 100 voxels"),
        ({"type": "scribble", "coords": [[1, 2, 3]], "radius": "2"}, "radius: '2' is not a fin"),
        ({"type": "box", "min": [0, 0, 0]}, "max must be a list of three numbers, got None"),
        ({"type": "box", "min": [0, 5, 0], "max": [1, 4, 1]}, "Swap the numbers"),
        ({"type": "box", "coord": [0, 5, 0]}, "unknown key 'coord'"),
        ({"type": "mask"}, '"file" must be the name of an image file, got None'),
        ({"type": "mask", "file": "none.nii.gz"}, r"none\.nii\.gz does not exist"),
        ({"type": "mask", "file": "../m.nii.gz"}, r"\.\./m\.nii\.gz leaves the folder"),
        ({"type": "mask", "file": "/etc/passwd"}, "/etc/passwd leaves the folder"),
        ({"type": "mask", "file": "m\0"}, '"file" must be the name'),
        ({"type": "mask", "file": "."}, "does not exist"),
        (17, r"interactions\[0\] must be an object, got 17"),
    ],
)
def test_a_bad_entry_is_refused(
    written: Callable[..., Path], entry: Any, message: str, tmp_path: Path
) -> None:
    (tmp_path.parent / "m.nii.gz").touch()
    path = written({"label": 1, **entry} if isinstance(entry, dict) else entry)
    with pytest.raises(InputError, match=message) as error:
        read_prompts(path, LABELS)
    assert str(path) in str(error.value)


def test_a_link_does_not_lead_out_of_the_folder(
    written: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "link.nii.gz").symlink_to("/etc/passwd")
    with pytest.raises(InputError, match="leaves the folder"):
        read_prompts(written({"type": "mask", "label": 1, "file": "link.nii.gz"}), LABELS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": None}, '"version" must be 1, got None'),
        ({"version": 2}, '"version" must be 1, got 2'),
        ({"version": True}, '"version" must be 1, got True'),
        ({"space": None}, '"space" must be world or voxel, got None'),
        ({"convention": None}, 'world coordinates need "convention"'),
        ({"convention": "LAS"}, '"convention" must be LPS or RAS'),
        ({"space": "voxel", "order": None}, 'voxel coordinates need "order"'),
        ({"order": "xzy"}, '"order" must be xyz or zyx'),
        ({"interactions": {}}, '"interactions" must be a list'),
        ({"intractions": []}, "unknown key 'intractions'"),
    ],
)
def test_a_bad_head_is_refused(
    written: Callable[..., Path], changes: dict[str, Any], message: str
) -> None:
    path = written(POINT, **changes)
    with pytest.raises(InputError, match=message) as error:
        read_prompts(path, LABELS)
    assert str(path) in str(error.value)


def test_an_empty_list_and_what_a_space_does_not_use_may_be_left_out(
    written: Callable[..., Path],
) -> None:
    assert read_prompts(written(order=None), LABELS).interactions == ()
    voxel = read_prompts(written(space="voxel", order="zyx", convention=None), LABELS)
    assert (voxel.space, voxel.order) == ("voxel", "zyx")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"version": 1', "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b'{"version": ' + b"1" * 5000 + b"}", "is not valid JSON"),
        (b"[]", "must hold a JSON object, got list"),
        (b"", "is not valid JSON"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "case.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_prompts(path, LABELS)
    assert str(path) in str(error.value)


def test_an_oversized_or_missing_file_is_refused_unread(
    written: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = written(POINT)
    assert path.stat().st_size < module.MAX_BYTES
    monkeypatch.setattr(module, "MAX_BYTES", 100)
    with pytest.raises(InputError, match=r"bytes; a prompts file may have 100.*\"mask\""):
        read_prompts(path, LABELS)
    with pytest.raises(InputError, match=r"absent\.json cannot be opened"):
        read_prompts(tmp_path / "absent.json", LABELS)


def test_challenge_files_are_refused_because_they_are_pickles(tmp_path: Path) -> None:
    path = tmp_path / "case.npz"
    clicks = np.array([{"fg": [[1, 2, 3]], "bg": []}], dtype=object)
    np.savez(path, imgs=np.zeros((2, 2, 2)), clicks=clicks)
    with pytest.raises(ValueError, match="allow_pickle"):
        np.load(path)["clicks"]  # why
    for read in (lambda: read_prompts(path, LABELS), lambda: find_prompts(tmp_path, "case")):
        with pytest.raises(InputError, match=r"case\.npz is not read.*pickles.*to case\.json"):
            read()


def test_the_file_of_a_case_is_found(tmp_path: Path) -> None:
    assert find_prompts(tmp_path, "case") is None
    (tmp_path / "case.mrk.json").touch()
    assert find_prompts(tmp_path, "case") == tmp_path / "case.mrk.json"
    (tmp_path / "case.json").touch()
    with pytest.raises(InputError, match=r"case\.json, case\.mrk\.json\. Keep one"):
        find_prompts(tmp_path, "case")
