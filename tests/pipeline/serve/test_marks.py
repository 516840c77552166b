"""Where the page draws clicks, with readers that turn images round (geometry: test_geometry.py)."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient

from nnmosaic.pipeline.serve.geometry import Grid
from nnmosaic.pipeline.serve.marks import marks

SHAPE = (4, 5, 6)  # z, y, x of the file
VOXEL = (1, 3, 4)
READERS = [NibabelIO, NibabelIOWithReorient, SimpleITKIO, SimpleITKIOWithReorient]
ORIENTATIONS = ["LPS", "RAS", "LAI", "PIR", "ASL", "SLA"]


@pytest.fixture(params=ORIENTATIONS)
def file(request: Any, tmp_path: Path) -> Path:
    """Write an image with one bright voxel, its axes turned and a little tilted."""
    array = np.zeros(SHAPE, np.float32)
    array[VOXEL] = 1
    image = SimpleITK.GetImageFromArray(array)
    cosines = SimpleITK.DICOMOrientImageFilter.GetDirectionCosinesFromOrientation(request.param)
    angle = np.deg2rad(11)
    tilt = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    image.SetDirection((tilt @ np.reshape(cosines, (3, 3))).ravel().tolist())
    image.SetSpacing((0.7, 1.3, 4.0))
    image.SetOrigin((10.0, -20.0, 30.0))
    SimpleITK.WriteImage(image, str(tmp_path / "new_0000.nii.gz"))
    return tmp_path / "new_0000.nii.gz"


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
def test_a_click_is_drawn_on_the_voxel_that_it_is_on(file: Path, reader: type) -> None:
    array, properties = reader().read_images((str(file),))
    grid = Grid.from_properties(properties, array.shape[1:])
    z, y, x = VOXEL
    world = np.array(SimpleITK.ReadImage(str(file)).TransformIndexToPhysicalPoint((x, y, z)))
    for space, convention, order, place in (
        ("voxel", "LPS", "zyx", VOXEL),
        ("voxel", "LPS", "xyz", VOXEL[::-1]),
        ("world", "LPS", "xyz", world),
        ("world", "RAS", "xyz", world * (-1, -1, 1)),
        ("world", "LPS", "zyx", world[::-1]),
    ):
        point = {"type": "point", "label": "a", "coord": [float(c) for c in place]}
        line = {"type": "scribble", "label": "a", "coords": [point["coord"]], "radius": 1}
        prompts = {
            "space": space,
            "convention": convention,
            "order": order,
            "interactions": [point, line],
        }
        for mark in marks(prompts, {"a": 1}, grid):
            (drawn,) = mark["points"]
            at = np.rint(drawn).astype(int)
            np.testing.assert_allclose(drawn, at, atol=2e-3)
            assert grid.to_display(array[0])[tuple(at)] == 1, (space, convention, order)
