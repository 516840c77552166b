"""Synthetic raw datasets and workspaces, shared by all tests."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

# nnU-Net reads its variables once, when it is imported: all tests share one workspace.
WORKSPACE = Path(tempfile.mkdtemp(prefix="nnmosaic_tests_"))
FOLDERS = [WORKSPACE / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")]
os.environ.update({folder.name: str(folder) for folder in FOLDERS})
os.environ["nnUNet_def_n_proc"] = "2"
os.environ["nnUNet_n_proc_DA"] = "0"

SHAPE = (20, 24, 22)
SPACING = (1.0, 1.25, 0.8)


def save_image(path: Path, array: np.ndarray, **geometry: Any) -> None:
    image = SimpleITK.GetImageFromArray(array)
    if array.ndim == 3:
        image.SetSpacing(geometry.get("spacing", SPACING))
        image.SetOrigin(geometry.get("origin", (3.0, -2.0, 5.0)))
        image.SetDirection(geometry.get("direction", (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    path.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(image, str(path), True)


def synthetic_case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an image with a bright and a dark ball, and the label map 1 = bright, 2 = dark."""
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(*(np.arange(n) for n in SHAPE), indexing="ij"))
    label = np.zeros(SHAPE, np.uint8)
    for value, base in ((1, (6, 7, 6)), (2, (13, 16, 15))):
        centre = np.array(base) + rng.integers(-1, 2, 3)
        distance = np.sqrt(((grid - centre[:, None, None, None]) ** 2).sum(0))
        label[distance < 4.5] = value
    image = 100 + 10 * rng.standard_normal(SHAPE)
    image += 80 * (label == 1) - 60 * (label == 2)
    return image.astype(np.float32), label


@pytest.fixture
def save() -> Callable[..., None]:
    return save_image


@pytest.fixture
def make_dataset() -> Callable[..., Path]:
    """Return a function that writes a raw dataset; ``labels``: name -> 1 (bright) or 2."""

    def make(
        folder: Path,
        *,
        cases: int = 6,
        labels: dict[str, int] | None = None,
        first_seed: int = 0,
        **extra: Any,
    ) -> Path:
        drawn = labels if labels is not None else {"bright": 1, "dark": 2}
        integers = {name: i + 1 for i, name in enumerate(drawn)}
        for i in range(cases):
            image, full = synthetic_case(first_seed + i)
            label = np.zeros_like(full)
            for name, value in drawn.items():
                label[full == value] = integers[name]
            save_image(folder / "imagesTr" / f"case{i:02d}_0000.nii.gz", image)
            save_image(folder / "labelsTr" / f"case{i:02d}.nii.gz", label)
        content = {
            "channel_names": {"0": "T1"},
            "labels": {"background": 0, **integers},
            "numTraining": cases,
            "file_ending": ".nii.gz",
            **extra,
        }
        (folder / "dataset.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return make


@pytest.fixture
def workspace() -> Iterator[Path]:
    """Return a folder with the empty folders that nnU-Net's variables point to."""
    for folder in FOLDERS:
        folder.mkdir(parents=True)
    yield WORKSPACE
    shutil.rmtree(WORKSPACE)
