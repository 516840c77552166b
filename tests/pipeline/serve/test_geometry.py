"""World, array and display grid, for directions that real scans have."""

from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK

from nnmosaic.pipeline.serve.geometry import Grid, changed_box, display_nifti
from nnmosaic.pipeline.serve.marks import marks

SHAPE = (4, 5, 6)  # z, y, x
DIRECTIONS = {
    "plain": np.eye(3),
    "flipped": np.diag([-1, 1, -1]),
    "sagittal": np.array([[0, 0, 1], [1, 0, 0], [0, -1, 0]]),
    "coronal": np.array([[1, 0, 0], [0, 0, 1], [0, -1, 0]]),
}


def turned(direction: np.ndarray, degrees: float) -> np.ndarray:
    turn = np.deg2rad(degrees)
    c, s = np.cos(turn), np.sin(turn)
    x, z = (
        np.array([[1, 0, 0], [0, c, -s], [0, s, c]]),
        np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]),
    )
    return z @ x @ direction


@pytest.fixture(params=[(name, angle) for name in DIRECTIONS for angle in (0, 20, 44)], ids=str)
def image(request: Any) -> SimpleITK.Image:
    name, angle = request.param
    rng = np.random.default_rng(0)
    image = SimpleITK.GetImageFromArray(rng.permutation(120).reshape(SHAPE).astype(np.float32))
    image.SetDirection(turned(DIRECTIONS[name], angle).ravel().tolist())
    image.SetSpacing((0.7, 1.3, 4.0))
    image.SetOrigin((10.0, -20.0, 30.0))
    return image


@pytest.fixture
def grid(image: SimpleITK.Image) -> Grid:
    stuff = {
        "spacing": image.GetSpacing(),
        "origin": image.GetOrigin(),
        "direction": image.GetDirection(),
    }
    return Grid.from_properties({"sitk_stuff": stuff}, SHAPE)


def test_world_is_as_in_simpleitk(image: SimpleITK.Image, grid: Grid) -> None:
    for x, y, z in ((0.0, 0.0, 0.0), (5.0, 4.0, 3.0), (1.25, 3.5, 0.75)):
        left, back, up = image.TransformContinuousIndexToPhysicalPoint((x, y, z))
        world = np.array([[-left, -back, up]])  # LPS to RAS
        np.testing.assert_allclose(grid.world_to_array(world), [[z, y, x]], atol=1e-9)
        np.testing.assert_allclose(grid.array_to_world(np.array([[z, y, x]])), world, atol=1e-9)


def test_nibabel_readers_give_the_same_grid(
    image: SimpleITK.Image, grid: Grid, tmp_path: Any
) -> None:
    SimpleITK.WriteImage(image, str(tmp_path / "image.nii"))
    affine = nibabel.load(tmp_path / "image.nii").affine
    other = Grid.from_properties({"nibabel_stuff": {"original_affine": affine}}, SHAPE)
    np.testing.assert_allclose(other.affine, grid.affine, atol=1e-4)


def test_display_points_right_forward_and_up(image: SimpleITK.Image, grid: Grid) -> None:
    directions = grid.display_affine[:3, :3] / grid.display_spacing
    assert (np.diag(directions) > 0.4).all()
    # Every voxel keeps its place in the world, found by its value.
    display = grid.to_display(SimpleITK.GetArrayFromImage(image))
    assert display.shape == grid.display_shape
    for value in (0, 17, 119):
        (at,) = np.argwhere(display == value)
        (index,) = np.argwhere(SimpleITK.GetArrayFromImage(image) == value)
        world = image.TransformIndexToPhysicalPoint(index[::-1].tolist())
        expected = np.array(world) * (-1, -1, 1)
        np.testing.assert_allclose(grid.display_affine @ [*at, 1], [*expected, 1], atol=1e-6)
        np.testing.assert_allclose(grid.world_to_display(expected[None]), at[None], atol=1e-6)


def test_boxes_and_slices_follow_the_display(image: SimpleITK.Image, grid: Grid) -> None:
    array = SimpleITK.GetArrayFromImage(image)
    box = ((1, 3), (0, 4), (2, 3))
    part = array[1:3, 0:4, 2:3]
    on_display = grid.to_display(array)[tuple(slice(*r) for r in grid.display_box(box))]
    np.testing.assert_array_equal(on_display, grid.to_display(part))
    for axis in range(3):
        shown = np.moveaxis(grid.to_display(array), grid.display_axis(axis), 0)
        expected = np.take(array, 1, axis)
        assert set(shown[grid.display_index(axis, 1)].ravel()) == set(expected.ravel())


def test_inside_ends_at_the_edges_of_voxels(grid: Grid) -> None:
    edges = np.array(
        [[-0.5, -0.5, -0.5], [3.5, 4.5, 5.5], [-0.51, 0, 0], [0, 4.51, 0], [0, 0, np.nan]]
    )
    assert grid.contains(edges).tolist() == [True, True, False, False, False]


def test_two_dimensions_and_photographs() -> None:
    stuff = {"spacing": (0.5, 2.0), "origin": (3.0, 4.0), "direction": (0.0, 1.0, -1.0, 0.0)}
    slice_grid = Grid.from_properties({"sitk_stuff": stuff}, (1, 5, 6))
    world = np.array([[-(3 + 2.0 * 1), -(4 - 0.5 * 2), 0.0]])  # x = 2, y = 1
    np.testing.assert_allclose(slice_grid.world_to_array(world), [[0, 1, 2]], atol=1e-9)
    photo = Grid.from_properties({"spacing": (999, 1, 1)}, (1, 5, 6))
    assert photo.display_box(((0, 1), (0, 1), (0, 1))) == ((5, 6), (4, 5), (0, 1))


def test_changed_box_is_the_smallest() -> None:
    before = np.zeros(SHAPE, np.uint8)
    after = before.copy()
    assert changed_box(before, after) is None
    after[1, 2, 3] = after[2, 2, 5] = 1
    assert changed_box(before, after) == ((1, 3), (2, 3), (3, 6))


@pytest.mark.parametrize(
    ("factor", "dtype"), [(1.0, np.int16), (0.5, np.float32), (1e6, np.float32)]
)
def test_image_for_the_page_has_no_rotation_and_loses_nothing(
    image: SimpleITK.Image, grid: Grid, factor: float, dtype: Any
) -> None:
    array = SimpleITK.GetArrayFromImage(image) * np.float32(factor)
    shown = nibabel.Nifti1Image.from_bytes(display_nifti(array, grid))
    assert shown.get_data_dtype() == dtype
    np.testing.assert_array_equal(np.asarray(shown.dataobj), grid.to_display(array))
    np.testing.assert_allclose(shown.affine[:3, :3], np.diag(grid.display_spacing), rtol=1e-6)
    middle = (np.array(grid.display_shape) - 1) / 2
    np.testing.assert_allclose(shown.affine @ [*middle, 1], [0, 0, 0, 1], atol=1e-4)


@pytest.mark.parametrize("space", ["voxel zyx", "voxel xyz", "world LPS", "world RAS"])
def test_marks_are_where_the_prompts_say(grid: Grid, space: str) -> None:
    index = np.array([[1.0, 2.0, 3.5]])  # z, y, x
    world = grid.array_to_world(index)
    kind, form = space.split()
    written = {
        "voxel zyx": index, "voxel xyz": index[:, ::-1], "world RAS": world,
        "world LPS": world * (-1, -1, 1),
    }[space].tolist()  # fmt: skip
    prompts = {
        "space": kind,
        "convention": form if kind == "world" else "LPS",
        "order": form if kind == "voxel" else "xyz",
        "interactions": [
            {"type": "point", "label": "a", "coord": written[0], "positive": False},
            {"type": "scribble", "label": 2, "coords": written * 2, "radius": 1.5},
            {"type": "box", "label": 2, "min": [0, 0, 0], "max": [1, 1, 1]},
        ],
    }
    point, scribble = marks(prompts, {"a": 1, "b": 2}, grid)
    expected = grid.world_to_display(world)
    np.testing.assert_allclose(point.pop("points"), expected, atol=1e-3)
    assert point == {"label": "a", "positive": False, "radius": 0}
    np.testing.assert_allclose(scribble.pop("points"), np.repeat(expected, 2, 0), atol=1e-3)
    assert scribble == {"label": "b", "positive": True, "radius": 1.5}
