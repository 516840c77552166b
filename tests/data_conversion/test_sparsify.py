import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from scipy import ndimage

from nnmosaic.data_conversion.dataset_json import read_dataset_json
from nnmosaic.data_conversion.sparsify import Annotation, Cubes, Planes, Scribbles, sparsify

SPACING = (0.8, 1.25, 1.0)  # z, y, x; axis 1 is the default
IGNORE = 3


def array(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def masked(annotation: Annotation, label: np.ndarray, case: str = "a") -> np.ndarray:
    return annotation.mask(label, SPACING, ignore=IGNORE, case=case)


@pytest.fixture
def original(tmp_path: Path, make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(tmp_path / "Dataset011_Full", cases=2, subjects={"case00": "anna"})


@pytest.fixture
def label(original: Path) -> np.ndarray:
    return array(original / "labelsTr" / "case00.nii.gz").astype(np.int64)


def test_every_fifth_plane_of_the_coarse_axis_the_rest_is_ignored(original: Path) -> None:
    target = original.with_name("Dataset012_Planes")
    written = sparsify(original, target, Planes(5))
    dataset = read_dataset_json(target)
    assert dataset == written.dataset
    assert dataset.content["labels"] == {"background": 0, "bright": 1, "dark": 2, "ignore": 3}
    assert dataset.full_labels == {"background": 0, "bright": 1, "dark": 2}
    assert dict(dataset.subjects) == {"case00": "anna"}
    full = array(original / "labelsTr" / "case01.nii.gz")
    expected = np.full_like(full, 3)
    for plane in (5, 10, 15, 20):  # of 24
        expected[:, plane] = full[:, plane]
    assert np.array_equal(array(target / "labelsTr" / "case01.nii.gz"), expected)
    assert written.annotated == pytest.approx(4 / 24)
    assert written.cases == 2
    link = target / "labelsTr_full" / "case01.nii.gz"
    assert link.readlink() == original / "labelsTr" / "case01.nii.gz"


def test_planes_of_several_axes_are_united() -> None:
    mask = masked(Planes(2, axes=(0, 2)), np.zeros((5, 3, 4), int))
    expected = np.zeros((5, 3, 4), bool)
    expected[2] = expected[4] = expected[:, :, 2] = True
    assert np.array_equal(mask, expected)


@pytest.mark.parametrize(
    ("length", "planes"), [(1, [0]), (4, [2]), (5, [2]), (6, [5]), (11, [5, 10])]
)
def test_a_short_axis_has_its_middle_plane(length: int, planes: list[int]) -> None:
    mask = masked(Planes(5, axes=(0,)), np.zeros((length, 2, 2), int))
    assert np.flatnonzero(mask.all(axis=(1, 2))).tolist() == planes
    assert mask.sum() == 4 * len(planes)


def test_the_first_of_equal_spacings_is_the_default_axis() -> None:
    mask = Planes(2).mask(np.zeros((3, 3, 3), int), (0.7, 1.2, np.float32(1.2)), ignore=1, case="a")
    assert mask[:, 2].all()
    assert mask.sum() == 9


def test_a_2d_image_has_rows_or_scribbles_not_all_of_its_pixels() -> None:
    label = np.zeros((1, 11, 12), int)
    label[0, 3:6, 3:6] = 1
    rows = Planes(5).mask(label, (999, 1, 1), ignore=IGNORE, case="a")
    assert sorted(set(np.nonzero(rows)[1])) == [5, 10]
    assert rows.sum() == 2 * 12
    assert Planes(5, axes=(2,)).mask(label, (999, 1, 1), ignore=IGNORE, case="a").sum() == 2 * 11
    assert 0 < Scribbles().mask(label, (999, 1, 1), ignore=IGNORE, case="a").mean() < 0.5


def test_an_ignore_label_of_the_original_is_extended(
    original: Path, save: Callable[..., None]
) -> None:
    path = original / "dataset.json"
    content = json.loads(path.read_text())
    content["labels"]["ignore"] = 3
    path.write_text(json.dumps(content))
    full = array(original / "labelsTr" / "case00.nii.gz")
    full[:10] = 3
    save(original / "labelsTr" / "case00.nii.gz", full)
    target = original.with_name("Dataset012_Planes")
    sparsify(original, target, Planes(4))
    sparse = array(target / "labelsTr" / "case00.nii.gz")
    assert np.array_equal(sparse[10:, 4], full[10:, 4])
    assert (sparse[:10] == 3).all()
    assert (sparse[:, 5] == 3).all()
    assert read_dataset_json(target).content["labels"] == content["labels"]


def test_scribbles_touch_every_part_of_every_class_in_every_plane(label: np.ndarray) -> None:
    mask = masked(Scribbles(), label)
    assert mask.mean() < 0.15
    for plane, drawn in zip(np.moveaxis(label, 1, 0), np.moveaxis(mask, 1, 0), strict=True):
        for value in np.unique(plane):
            parts, count = ndimage.label(plane == value, np.ones((3, 3)))
            assert set(range(1, count + 1)) == set(np.unique(parts[drawn & (plane == value)]))
            if value:
                assert (drawn & (plane == value)).sum() < max(3, 0.3 * (plane == value).sum())


def test_the_background_scribble_keeps_its_distance_from_the_foreground() -> None:
    label = np.zeros((1, 21, 21), int)
    label[0, 10, 10] = 1
    drawn = Scribbles().mask(label, (5, 1, 1), ignore=2, case="a")[0]
    rows, columns = np.nonzero(drawn & (label[0] == 0))
    assert set(np.abs(rows - 10) + np.abs(columns - 10)) == {3}
    assert len(rows) == 12  # the whole city-block circle
    assert drawn[10, 10]


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 3, 40), (1, 1, 1)])
def test_pure_background_has_a_thin_scribble(shape: tuple[int, int, int]) -> None:
    drawn = Scribbles().mask(np.zeros(shape, int), (5, 1, 1), ignore=1, case="a")
    assert drawn.any()
    if shape[1] == 16:  # a square of side 10, halfway to the centre
        assert drawn.sum() == 36


def test_background_close_to_foreground_or_cut_off_by_ignored_voxels_has_a_scribble() -> None:
    label = np.full((1, 12, 12), IGNORE)
    label[0, 0, :3] = 1, 0, IGNORE
    label[0, 11, 11] = 0
    drawn = Scribbles().mask(label, (5, 1, 1), ignore=IGNORE, case="a")[0]
    assert sorted(zip(*np.nonzero(drawn), strict=True)) == [(0, 0), (0, 1)]


def test_a_cube_in_two_is_centred_on_foreground() -> None:
    label = np.zeros((30, 30, 30), int)
    label[20, 5, 6] = 1
    label[2] = IGNORE
    assert np.argwhere(masked(Cubes(1, 3), label)).tolist() == [
        [z, y, x] for z in (19, 20, 21) for y in (4, 5, 6) for x in (5, 6, 7)
    ]
    both = [masked(Cubes(2, 3, seed), label) for seed in range(5)]
    assert all(mask[20, 5, 6] and 27 < mask.sum() <= 54 for mask in both)


def test_cubes_are_cut_off_at_the_border_and_need_no_foreground() -> None:
    mask = masked(Cubes(3, 50), np.zeros((6, 7, 8), int))
    assert mask.all()
    assert masked(Cubes(1, 1), np.zeros((6, 7, 8), int)).sum() == 1


def test_cubes_depend_on_seed_and_case_only(label: np.ndarray) -> None:
    first = masked(Cubes(4, 5, seed=7), label)
    assert np.array_equal(first, masked(Cubes(4, 5, seed=7), label))
    assert not np.array_equal(first, masked(Cubes(4, 5, seed=8), label))
    assert not np.array_equal(first, masked(Cubes(4, 5, seed=7), label, case="b"))


@pytest.mark.parametrize("annotation", [Scribbles(), Cubes(2, 5)])
def test_annotated_voxels_keep_their_label(original: Path, annotation: Annotation) -> None:
    target = original.with_name("Dataset012_Sparse")
    written = sparsify(original, target, annotation)
    sparse, full = (
        np.stack([array(path) for path in sorted((folder / "labelsTr").iterdir())])
        for folder in (target, original)
    )
    annotated = sparse != 3
    assert written.annotated == annotated.mean()
    assert 0 < annotated.mean() < 0.2
    assert np.array_equal(sparse[annotated], full[annotated])
    assert set(np.unique(sparse)) == {0, 1, 2, 3}
