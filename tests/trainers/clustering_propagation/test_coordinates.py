"""Positions in the world, in files and in the network's array (spec 5.4, invariant 12)."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from scipy.spatial.transform import Rotation

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers.clustering_propagation.coordinates import (
    CaseCoordinates,
    ImageGeometry,
    filled,
)

SHAPE = (9, 26, 22)  # z, y, x
READERS = (SimpleITKIO, SimpleITKIOWithReorient, NibabelIO, NibabelIOWithReorient)


def random_geometry(
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Return an ITK geometry: any permutation and flips of the axes, then a rotation."""
    axes = np.eye(3)[rng.permutation(3)] * rng.choice([-1, 1], 3)
    rotation = Rotation.from_rotvec(rng.uniform(-0.4, 0.4, 3)).as_matrix()
    return {
        "spacing": rng.uniform(0.5, 6, 3).tolist(),
        "origin": rng.uniform(-200, 200, 3).tolist(),
        "direction": (rotation @ axes).ravel().tolist(),
    }


def random_case(
    rng: np.random.Generator,
) -> tuple[CaseCoordinates, dict[str, Any], tuple[int, ...]]:
    transpose = tuple(int(i) for i in rng.permutation(3))
    shape = [SHAPE[i] for i in transpose]
    lower = [int(rng.integers(0, n // 3)) for n in shape]
    upper = [int(rng.integers(2 * n // 3, n + 1)) for n in shape]
    kept = np.array(upper) - lower
    in_plane = rng.integers(4, 60, 2).tolist()
    properties = {
        "sitk_stuff": random_geometry(rng),
        "shape_before_cropping": shape,
        "bbox_used_for_cropping": [list(b) for b in zip(lower, upper, strict=True)],
    }
    case = CaseCoordinates.of_case(
        properties, transpose_forward=transpose, network_shape=(kept[0], *in_plane)
    )
    return case, properties, transpose


def kept_voxels(properties: dict[str, Any], transpose: tuple[int, ...]) -> np.ndarray:
    """Return the lower and upper corner (z, y, x) of what was not cropped, inclusive."""
    bounds = np.empty((3, 2), int)
    bounds[list(transpose)] = properties["bbox_used_for_cropping"]
    return np.stack((bounds[:, 0], bounds[:, 1] - 1))


def slow_network_position(
    array: np.ndarray, properties: dict[str, Any], transpose: tuple[int, ...], shape: Any
) -> list[float]:
    """Return the position of one voxel (z, y, x), step by step."""
    result = []
    for axis in range(3):
        low, high = properties["bbox_used_for_cropping"][axis]
        position = array[transpose[axis]] - low
        result.append((position + 0.5) * shape[axis] / (high - low) - 0.5)
    return result


@pytest.mark.parametrize("seed", range(20))
def test_world_voxel_and_network_agree_with_the_steps_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    case, properties, transpose = random_case(rng)
    image = SimpleITK.Image(*SHAPE[::-1], SimpleITK.sitkUInt8)
    image.SetSpacing(properties["sitk_stuff"]["spacing"])
    image.SetOrigin(properties["sitk_stuff"]["origin"])
    image.SetDirection(properties["sitk_stuff"]["direction"])
    low, high = kept_voxels(properties, transpose)
    for array in rng.uniform(low, high, (10, 3)):
        xyz = array[::-1]
        world = np.array(image.TransformContinuousIndexToPhysicalPoint(xyz.tolist()))
        expected = slow_network_position(array, properties, transpose, case.network_shape)
        ras = world * (-1, -1, 1)
        for point, space, convention, order in (
            (world, "world", "LPS", "xyz"),
            (ras, "world", "RAS", "xyz"),
            (ras[::-1], "world", "RAS", "zyx"),
            (xyz, "voxel", "LPS", "xyz"),
            (array, "voxel", "RAS", "zyx"),
        ):
            frame = {"space": space, "convention": convention, "order": order}
            found = case.to_network(point[None], **frame)[0]
            assert np.allclose(found, expected, atol=1e-6)
            assert np.allclose(case.from_network(found[None], **frame)[0], point, atol=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_a_round_trip_over_the_nearest_slice_is_within_half_a_voxel(seed: int) -> None:
    rng = np.random.default_rng(seed)
    case, properties, transpose = random_case(rng)
    low, high = kept_voxels(properties, transpose)
    array = rng.uniform(low - 0.5, high + 0.5, (200, 3))
    world = (np.c_[array, np.ones(200)] @ case.geometry.array_to_world.T)[:, :3]
    network = case.to_network(world, space="world")
    network[:, 0] = np.clip(np.floor(network[:, 0] + 0.5), 0, case.network_shape[0] - 1)
    back = case.to_network(case.from_network(network, space="world"), space="world")
    assert np.allclose(back, network, atol=1e-6)
    voxel = case.from_network(network, space="voxel", order="zyx")
    assert np.abs(voxel - array).max() <= 0.5 + 1e-6
    assert np.abs(voxel - array).max() > 0.4  # the nearest slice was not always hit exactly


def test_a_position_outside_of_the_image_is_an_error() -> None:
    case, *_ = random_case(np.random.default_rng(3))
    rim = np.array(SHAPE) - 0.5
    case.to_network(np.stack((rim, [-0.5] * 3)), space="voxel", order="zyx")
    for axis in range(3):
        for value in (-0.6, SHAPE[axis] - 0.4):
            point = np.array([4.0, 4.0, 4.0])
            point[axis] = value
            points = np.stack(([4.0] * 3, point))
            with pytest.raises(InputError, match=r"case\.json: the position .* not in the image"):
                case.to_network(points, space="voxel", order="zyx", where="case.json")


def test_a_position_in_the_crop_moves_to_the_nearest_voxel_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rng = np.random.default_rng(5)
    case, properties, transpose = random_case(rng)
    low, high = kept_voxels(properties, transpose)
    assert (low > 0).any()
    inside = (low + high) / 2
    with caplog.at_level(logging.WARNING):
        case.to_network(np.stack((low - 0.49, high + 0.49)), space="voxel", order="zyx")
    assert caplog.messages == []
    moved = np.stack((inside, np.where(low > 0, 0, inside)))
    network = case.to_network(moved, space="voxel", order="zyx", where="case.json")
    voxel = case.from_network(network, space="voxel", order="zyx")
    assert np.allclose(voxel[0], inside)
    assert np.allclose(voxel[1], np.where(low > 0, low, inside))
    assert len(caplog.messages) == 1
    assert "case.json: 1 of 2 positions are where the image is 0" in caplog.text
    assert f"at most by {low.max():.0f} voxels" in caplog.text


def test_an_image_without_world_has_voxels_only(tmp_path: Path) -> None:
    import tifffile
    from skimage import io

    io.imsave(tmp_path / "a_0000.png", np.ones((6, 7), np.uint8), check_contrast=False)
    tifffile.imwrite(tmp_path / "a_0000.tif", np.ones((5, 6, 7), np.uint8))
    for reader, name in ((NaturalImage2DIO, "a_0000.png"), (Tiff3DIO, "a_0000.tif")):
        image, properties = reader().read_images((str(tmp_path / name),))
        shape = image.shape[1:]
        properties["shape_before_cropping"] = shape
        properties["bbox_used_for_cropping"] = [[0, n] for n in shape]
        case = CaseCoordinates.of_case(properties, transpose_forward=(0, 1, 2), network_shape=shape)
        assert case.to_network([[6, 5, 0]], space="voxel").tolist() == [[0, 5, 6]]
        with pytest.raises(InputError, match=r'no place in the world.*"space": "voxel"'):
            case.to_network([[6, 5, 0]], space="world")


def test_two_and_four_dimensional_images_have_a_place_too(tmp_path: Path) -> None:
    plane = SimpleITK.GetImageFromArray(np.ones((6, 7), np.float32))
    plane.SetSpacing((2, 3))
    plane.SetOrigin((10, 20))
    series = SimpleITK.JoinSeries([SimpleITK.Image(4, 5, 6, SimpleITK.sitkFloat32)] * 2)
    series.SetSpacing((2, 3, 4, 1))
    series.SetOrigin((10, 20, 30, 0))
    for image, shape, corner in (
        (plane, (1, 6, 7), [22, 35, 0]), (series, (6, 5, 4), [16, 32, 50]),
    ):  # fmt: skip
        SimpleITK.WriteImage(image, str(tmp_path / "a.mha"))
        array, properties = SimpleITKIO().read_images((str(tmp_path / "a.mha"),))
        assert array.shape[1:] == shape
        geometry = ImageGeometry.from_reader(properties, shape)
        last = np.array([*shape, 2.0]) - 1
        assert np.allclose((geometry.array_to_world @ last)[:3], corner)


def plans(transpose: tuple[int, ...], spacing: list[float]) -> PlansManager:
    resample = "resample_data_or_seg_to_shape"
    options = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    configuration = {
        "spacing": spacing,
        "normalization_schemes": ["NoNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": resample,
        "resampling_fn_seg": resample,
        "resampling_fn_data_kwargs": options,
        "resampling_fn_seg_kwargs": {**options, "is_seg": True},
        "architecture": {},
    }
    return PlansManager(
        {
            "transpose_forward": list(transpose),
            "foreground_intensity_properties_per_channel": {"0": {}},
            "configurations": {"2d": configuration},
        }
    )


@pytest.mark.parametrize("reader", READERS, ids=lambda r: r.__name__)
@pytest.mark.parametrize("seed", range(4))
def test_a_bright_voxel_is_hit_by_its_own_click(tmp_path: Path, reader: type, seed: int) -> None:
    rng = np.random.default_rng(seed)
    transpose = ((0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 2, 1))[seed]
    voxel = np.array([6, 14, 9])  # z, y, x
    array = np.zeros(SHAPE, np.float32)
    array[2:8, 5:24, 3:20] = 1  # the rest is cropped
    array[tuple(voxel)] = 1000
    image = SimpleITK.GetImageFromArray(array)
    geometry = random_geometry(rng)
    image.SetSpacing(geometry["spacing"])
    image.SetOrigin(geometry["origin"])
    image.SetDirection(geometry["direction"])
    path = tmp_path / "case_0000.nii.gz"
    SimpleITK.WriteImage(image, str(path))
    data, properties = reader().read_images((str(path),))
    native = [properties["spacing"][i] for i in transpose]
    manager = plans(transpose, [native[1] * 0.6, native[2] * 0.45])
    configuration = manager.get_configuration("2d")
    data, _, properties = DefaultPreprocessor(verbose=False).run_case_npy(
        data, None, properties, manager, configuration, {}
    )
    case = CaseCoordinates.of_case(
        properties, transpose_forward=transpose, network_shape=data.shape[1:]
    )
    assert properties["bbox_used_for_cropping"][0][1] < properties["shape_before_cropping"][0]
    brightest = np.unravel_index(data[0].argmax(), data.shape[1:])
    world = image.TransformIndexToPhysicalPoint(voxel[::-1].tolist())
    for point, frame in (
        (world, {"space": "world"}),
        (np.array(world) * (-1, -1, 1), {"space": "world", "convention": "RAS"}),
        (voxel[::-1], {"space": "voxel"}),  # as the file counts, whatever the reader turns
        (voxel, {"space": "voxel", "order": "zyx"}),
    ):
        hit = case.to_network(np.array(point)[None], **frame)[0]
        assert np.abs(hit - brightest).max() <= 1, frame
        assert data[(0, *np.floor(hit + 0.5).astype(int))] > 300


def test_filled_voxels_leave_no_pixel_between_them() -> None:
    voxels = np.argwhere(np.ones((1, 3, 4)))
    to_network = np.diag([1.0, 2.3, 0.6, 1.0])
    points = filled(voxels, to_network)
    assert (np.abs(points[:, None] - voxels[None]).max(2).min(1) < 0.5).all()
    pixels = {tuple(p) for p in np.floor(points @ to_network[:3, :3].T + 0.5).astype(int).tolist()}
    inside = [
        (0, row, column)
        for row in range(-1, 9)
        for column in range(-1, 4)
        if -0.5 < row / 2.3 < 2.5 and -0.5 < column / 0.6 < 3.5
    ]
    assert set(inside) <= pixels
