"""A stand-in for the model: it grows regions around clicks. And cases with tilted axes."""

import threading
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK
from scipy import ndimage

from nnmosaic.data_conversion.dataset_json import parse_dataset_json
from nnmosaic.pipeline.serve.cases import Workspace

SHAPE = (20, 132, 150)  # z, y, x
SPACING = (2.0, 1.75, 4.0)
ORIGIN = (-31.0, 17.0, 240.0)
LIVER, SPLEEN, KIDNEY = 140.0, 160.0, 190.0

Zyx = tuple[float, float, float]


def direction_of(flips: tuple[int, int, int], *, degrees: float = 14.0) -> tuple[float, ...]:
    """Return a direction matrix: flipped axes, then turned about two axes."""
    turn = np.deg2rad(degrees)
    c, s = np.cos(turn), np.sin(turn)
    about_x = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    about_z = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])
    return tuple((about_z @ about_x @ np.diag(flips)).ravel())


@cache
def phantom() -> np.ndarray:
    """Return a body with three organs, as (z, y, x), float."""
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in SHAPE), indexing="ij")

    def ellipsoid(centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
        parts = [((axis - c) / r) ** 2 for axis, c, r in zip((z, y, x), centre, radii, strict=True)]
        return np.asarray(sum(parts) < 1)

    image = np.zeros(SHAPE)
    image[(y / 0.78) ** 2 + (x / 0.92) ** 2 < 1] = 60
    image[(y / 0.7) ** 2 + (x / 0.84) ** 2 < 1] = 95
    image[((y - 0.42) / 0.16) ** 2 + (x / 0.15) ** 2 < 1] = 240  # spine
    image[((y - 0.16) / 0.09) ** 2 + ((x - 0.08) / 0.07) ** 2 < 1] = 210  # aorta
    image[ellipsoid((0.1, -0.16, -0.42), (0.75, 0.36, 0.36))] = LIVER
    image[ellipsoid((0.2, 0.1, 0.58), (0.5, 0.26, 0.14))] = SPLEEN
    image[ellipsoid((-0.1, 0.42, 0.36), (0.6, 0.13, 0.12))] = KIDNEY
    image[ellipsoid((-0.1, 0.42, -0.36), (0.6, 0.13, 0.12))] = KIDNEY
    noise = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(SHAPE), (0, 1, 1))
    return (ndimage.gaussian_filter(image, (0, 0.9, 0.9)) + 14 * noise).round()


class RegionGrowing:
    """A session that gives the class of a click to its connected region of similar voxels."""

    def __init__(self) -> None:
        self.labels = {"liver": 1, "spleen": 2, "kidney": 3}
        self.slice_axis = 0
        self.may_open = threading.Event()
        self.may_open.set()
        self.error: Exception | None = None
        self.calls: list[tuple[Any, ...]] = []
        self.opened: list[Path] = []

    def open(self, image_files: list[Path]) -> None:
        self.may_open.wait(20)
        self._raise()
        self.opened = image_files
        self.image = SimpleITK.ReadImage(str(image_files[0]))
        self.array = SimpleITK.GetArrayFromImage(self.image)
        self.result = np.zeros(self.array.shape, np.uint8)
        self._grow((11.0, 55.0, 43.0), 1)  # the liver is found without help
        self.automatic = self.result.copy()
        self.before: list[np.ndarray] = []
        self.interactions: list[dict[str, Any]] = []

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error

    def _grow(self, index: Zyx, value: int) -> None:
        z, y, x = (round(v) for v in index)
        smooth = ndimage.gaussian_filter(self.array.astype(float), (0, 1, 1))
        similar, _ = ndimage.label(abs(smooth - smooth[z, y, x]) < 14)
        region = ndimage.binary_dilation(similar == similar[z, y, x], np.ones((1, 3, 3)))
        self.result[region] = value

    def _begin(self) -> None:
        self._raise()
        self.before.append(self.result.copy())

    def label_map(self) -> np.ndarray:
        return self.result

    def save(self, path: Path) -> None:
        self._raise()
        image = SimpleITK.GetImageFromArray(self.result)
        image.CopyInformation(self.image)
        SimpleITK.WriteImage(image, str(path), True)

    def add_point(self, coordinates_zyx: Zyx, label: str, positive: bool) -> None:
        self._begin()
        self.calls.append(("point", coordinates_zyx, label, positive))
        self._grow(coordinates_zyx, self.labels[label] if positive else 0)
        entry = {"type": "point", "label": label, "coord": coordinates_zyx, "positive": positive}
        self.interactions.append(entry)

    def add_scribble(
        self, coordinates_zyx: Sequence[Zyx], label: str, positive: bool, radius: float
    ) -> None:
        self._begin()
        self.calls.append(("scribble", coordinates_zyx, label, positive, radius))
        seeds = np.ones(self.result.shape, bool)
        for z, y, x in coordinates_zyx:
            seeds[round(z), round(y), round(x)] = False
        near = ndimage.distance_transform_edt(seeds, sampling=(100, 1, 1)) <= radius
        self.result[near] = self.labels[label] if positive else 0
        self.interactions.append(
            {
                "type": "scribble",
                "label": self.labels[label],
                "coords": coordinates_zyx,
                "radius": radius,
                "positive": positive,
            }
        )

    def undo(self) -> bool:
        self._raise()
        if not self.before:
            return False
        self.result = self.before.pop()
        self.interactions.pop()
        return True

    def reset(self) -> None:
        self._raise()
        self.result = self.automatic.copy()
        self.before, self.interactions = [], []

    def prompts(self) -> dict[str, Any]:
        form = {"version": 1, "space": "voxel", "convention": "LPS", "order": "zyx"}
        return {**form, "interactions": self.interactions}

    def suggest_slice(self) -> int | None:
        self._raise()
        return 4 if self.interactions else None


@pytest.fixture
def tilted() -> Callable[..., tuple[float, ...]]:
    return direction_of


@pytest.fixture
def session() -> RegionGrowing:
    return RegionGrowing()


@pytest.fixture
def make_workspace(tmp_path: Path, save: Callable[..., None]) -> Callable[..., Workspace]:
    """Return a function that writes cases with these directions, and opens the folder."""

    def make(**directions: tuple[float, ...]) -> Workspace:
        geometry = {"spacing": SPACING, "origin": ORIGIN}
        array = phantom().astype(np.int16)
        for name, direction in directions.items():
            path = tmp_path / "images" / f"{name}_0000.nii.gz"
            save(path, array, direction=direction, **geometry)
        content = {
            "channel_names": {"0": "CT"},
            "labels": {"background": 0, "liver": 1, "spleen": 2, "kidney": 3},
            "numTraining": 1,
            "file_ending": ".nii.gz",
        }
        return Workspace.of(
            tmp_path / "images", tmp_path / "corrected", parse_dataset_json(content)
        )

    return make


@pytest.fixture
def workspace_of_two(make_workspace: Callable[..., Workspace]) -> Workspace:
    """Return a folder with a case as scanners write them, and one with tilted, flipped axes."""
    return make_workspace(
        abdomen_01=direction_of((1, 1, 1), degrees=0), abdomen_02=direction_of((-1, 1, -1))
    )
