"""Points, scribbles, boxes and masks, slice by slice (spec 1.6 and 5.4)."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.prompts import Box, Interaction, Mask, Point, Prompts, Scribble
from nnmosaic.trainers.clustering_propagation.coordinates import CaseCoordinates
from nnmosaic.trainers.clustering_propagation.slice_prompts import SlicePrompt, slice_prompts

SHAPE = (8, 20, 24)
GEOMETRY: dict[str, Any] = {
    "spacing": (1.0, 2.0, 5.0),
    "origin": (10.0, -20.0, 30.0),
    "direction": (0.0, -1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0),
}


def case(network: tuple[int, int, int] = SHAPE, *, world: bool = True) -> CaseCoordinates:
    properties = {
        "shape_before_cropping": SHAPE,
        "bbox_used_for_cropping": [[0, n] for n in SHAPE],
        **({"sitk_stuff": GEOMETRY} if world else {}),
    }
    return CaseCoordinates.of_case(properties, transpose_forward=(0, 1, 2), network_shape=network)


def voxel_prompts(*interactions: Interaction) -> Prompts:
    return Prompts("voxel", "LPS", "zyx", interactions)


def no_mask(path: Path) -> Any:
    raise NotImplementedError(path)


def convert(*interactions: Interaction, network: Any = SHAPE) -> tuple[SlicePrompt, ...]:
    return slice_prompts(voxel_prompts(*interactions), case(network), read_mask=no_mask)


def pixels(prompt: SlicePrompt) -> set[tuple[float, float]]:
    return set(zip(prompt.rows.tolist(), prompt.columns.tolist(), strict=True))


def test_a_point_is_one_sub_pixel_in_the_nearest_slice() -> None:
    (found,) = convert(Point(2, (2.6, 3.25, 7.5), positive=False, round=4))
    assert (found.label, found.slice_index, found.positive, found.round) == (2, 3, False, 4)
    assert found.exact
    assert (found.rows.tolist(), found.columns.tolist()) == ([3.25], [7.5])
    weights = found.weight_map((20, 24))
    assert weights[3:5, 7:9].tolist() == [[0.375, 0.375], [0.125, 0.125]]
    assert weights.sum() == 1


def test_a_weight_map_gives_the_mean_of_bilinear_samples() -> None:
    from scipy.ndimage import map_coordinates

    rng = np.random.default_rng(0)
    features = rng.standard_normal((20, 24))
    rows, columns, weights = rng.uniform(0, (19, 23, 5), (50, 3)).T
    rows[0], columns[0] = 19, 23  # the last pixel
    prompt = SlicePrompt(1, 0, rows, columns, weights)
    expected = (weights * map_coordinates(features, [rows, columns], order=1)).sum()
    assert (prompt.weight_map((20, 24)) * features).sum() == pytest.approx(expected, rel=1e-5)


def test_points_at_the_rim_stay_in_the_slice() -> None:
    found = convert(Point(1, (-0.5, -0.5, 23.5)), Point(1, (7.5, 19.5, -0.5)))
    assert [p.slice_index for p in found] == [0, 7]
    assert [pixels(p) for p in found] == [{(0.0, 23.0)}, {(19.0, 0.0)}]


def test_a_point_is_sure_of_all_pixels_that_decide_its_voxel() -> None:
    # Two rows per voxel: the centre of voxel 19 is at 38.5. Two voxels per column: that of voxel 0
    # is at -0.25, in the first column, and that of voxel 9 at 4.25.
    rim, inside = convert(Point(1, (2, 19.5, -0.5)), Point(1, (2, 4.4, 8.6)), network=(8, 40, 12))
    for prompt, sure, nearest in (
        (rim, [[38, 0], [39, 0]], [[39, 0]]),
        (inside, [[8, 4], [8, 5], [9, 4], [9, 5]], [[9, 4]]),
    ):
        assert np.argwhere(prompt.sure_pixels((40, 12))).tolist() == sure
        assert np.argwhere(prompt.pixels((40, 12))).tolist() == nearest
    (line,) = convert(Scribble(1, ((2, 4, 8),), radius=0), network=(8, 40, 12))
    np.testing.assert_array_equal(line.sure_pixels((40, 12)), line.pixels((40, 12)))


def test_a_scribble_across_slices_is_split() -> None:
    found = convert(Scribble(1, ((1, 4, 2), (3, 4, 14)), radius=0))
    assert [p.slice_index for p in found] == [1, 2, 3]
    assert set.union(*map(pixels, found)) == {(4.0, float(c)) for c in range(2, 15)}
    shared = [pixels(a) & pixels(b) for a, b in pairwise(found)]
    assert all(len(s) <= 1 for s in shared)  # the pixel in which the slice changes


def test_a_scribble_has_a_width_in_voxels_of_the_image() -> None:
    line = Scribble(1, ((2, 10, 10), (2, 10, 12)), radius=2)
    (found,) = convert(line)
    expected = {
        (float(r), float(c))
        for r in range(20)
        for c in range(24)
        if min((r - 10) ** 2 + (c - x) ** 2 for x in (10, 11, 12)) <= 4
    }
    assert pixels(found) == expected
    assert (found.weights == 1).all()
    (fine,) = convert(line, network=(8, 40, 24))  # twice as many rows
    assert fine.rows.max() - fine.rows.min() == pytest.approx(2 * 4, abs=1)
    assert fine.columns.max() - fine.columns.min() == 6


def test_a_scribble_at_the_rim_is_cut_there_and_one_position_is_enough() -> None:
    (found,) = convert(Scribble(1, ((0, 0, 0),), radius=1))
    assert pixels(found) == {(0, 0), (0, 1), (1, 0)}


def test_a_box_has_a_heavy_middle_and_a_ring_where_the_label_is_not() -> None:
    found = convert(Box(3, (2, 6, 8), (3, 10, 14), round=1))
    assert [(p.slice_index, p.positive) for p in found] == [
        (2, True), (2, False), (3, True), (3, False),
    ]  # fmt: skip
    assert {(p.label, p.exact, p.round) for p in found} == {(3, False, 1)}
    inside, ring = found[:2]
    assert pixels(inside) == {(float(r), float(c)) for r in range(6, 11) for c in range(8, 15)}
    heaviest = inside.weights.argmax()
    assert (inside.rows[heaviest], inside.columns[heaviest]) == (8, 11)
    assert 0 < inside.weights.min() < 0.1 < inside.weights.max() == 1
    far = [max(6 - r, r - 10, 8 - c, c - 14) for r, c in pixels(ring)]
    assert set(far) == {2, 3}
    assert len(far) == (5 + 6) * (7 + 6) - (5 + 2) * (7 + 2)


def test_the_outermost_voxels_of_a_box_belong_to_it_as_a_whole() -> None:
    inside, _ = convert(Box(3, (2, 6, 8), (2, 10, 14)), network=(8, 80, 24))
    # Four rows for each of the voxels 6 to 10.
    assert (inside.rows.min(), inside.rows.max()) == (6 * 4, 10 * 4 + 3)


def test_a_negative_box_has_no_ring_and_a_tiny_one_has_a_pixel() -> None:
    (negative,) = convert(Box(3, (2, 6, 8), (2, 10, 14), positive=False))
    assert not negative.positive
    (tiny, _) = convert(Box(3, (2, 6, 8), (2, 6, 8)), network=(8, 5, 6))
    assert len(tiny.weights) == 1
    assert tiny.weights[0] > 0


def test_a_box_in_the_world_turns_with_the_image() -> None:
    # x of the world runs against the rows (2 mm), y along the columns (1 mm).
    box = Box(1, (-6.0, -12.0, 40.0), (2.0, -6.0, 40.0))
    prompts = Prompts("world", "LPS", "xyz", (box,))
    found = slice_prompts(prompts, case(), read_mask=no_mask)
    assert [p.slice_index for p in found] == [2, 2]
    assert (found[0].rows.min(), found[0].rows.max()) == (4, 8)
    assert (found[0].columns.min(), found[0].columns.max()) == (8, 14)


def save_mask(path: Path, array: np.ndarray, first_slice: int = 0) -> None:
    image = SimpleITK.GetImageFromArray(array)
    image.SetSpacing(GEOMETRY["spacing"])
    image.SetDirection(GEOMETRY["direction"])
    x, y, z = GEOMETRY["origin"]
    image.SetOrigin((x, y, z + 5 * first_slice))
    SimpleITK.WriteImage(image, str(path))


def read_mask(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    array, properties = SimpleITKIO().read_seg(str(path))
    return array, properties


def test_a_mask_covers_the_volume_or_one_slice(tmp_path: Path) -> None:
    drawn = np.zeros(SHAPE, np.uint8)
    drawn[5, 3:6, 7:9], drawn[6, 0, 0] = 1, 4
    save_mask(tmp_path / "all.nii.gz", drawn)
    save_mask(tmp_path / "one.nii.gz", drawn[5:6], first_slice=5)
    whole, single = (
        slice_prompts(
            voxel_prompts(Mask(1, tmp_path / name)), case(network=(8, 40, 24)), read_mask=read_mask
        )
        for name in ("all.nii.gz", "one.nii.gz")
    )
    assert [p.slice_index for p in whole] == [5, 6]
    assert [p.slice_index for p in single] == [5]
    for found in (whole[0], single[0]):
        # A voxel is two pixels high.
        assert np.allclose(np.unique(found.rows.round(4)), [6, 7, 8, 9, 10, 11], atol=1e-4)
        assert np.allclose(np.unique(found.columns.round(4)), [7, 8])
        assert found.weights.tolist() == [1.0] * 12


def test_a_mask_that_is_empty_or_elsewhere_is_an_error(tmp_path: Path) -> None:
    save_mask(tmp_path / "empty.nii.gz", np.zeros(SHAPE, np.uint8))
    save_mask(tmp_path / "far.nii.gz", np.ones((1, 20, 24), np.uint8), first_slice=8)
    save_mask(tmp_path / "small.nii.gz", np.ones((1, 20, 24), np.uint8))
    for name, coordinates, message in (
        ("empty.nii.gz", case(), "no voxel is above 0"),
        ("far.nii.gz", case(), "is not in the image"),
        ("small.nii.gz", case(world=False), r"shape is \[1, 20, 24\], that of the image \[8, 20"),
    ):
        prompts = voxel_prompts(Mask(1, tmp_path / name))
        with pytest.raises(InputError, match=message) as error:
            slice_prompts(prompts, coordinates, read_mask=read_mask, where="case.json")
        assert "case.json: interactions[0] (mask)" in str(error.value)
        assert name in str(error.value)


def test_an_error_names_the_interaction() -> None:
    prompts = voxel_prompts(Point(1, (0, 0, 0)), Scribble(1, ((0, 0, 0), (0, 30, 0))))
    with pytest.raises(InputError, match=r"case\.json: interactions\[1\] \(scribble\)"):
        slice_prompts(prompts, case(), read_mask=no_mask, where="case.json")
    with pytest.raises(InputError, match=r"interactions\[0\] \(box\).*not in the image"):
        convert(Box(1, (0, 0, 0), (0, 0, 24)))


def test_nothing_marked_gives_nothing() -> None:
    assert convert() == ()
