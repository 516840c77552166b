from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from nnmosaic.data_conversion.case_check import read_image, read_label, reader_of
from nnmosaic.data_conversion.dataset_json import read_dataset_json
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import training_cases

IMAGE, LABEL = "imagesTr/case00_0000.nii.gz", "labelsTr/case00.nii.gz"
ONES = np.ones((20, 24, 22), np.float32)


def check(folder: Path) -> np.ndarray:
    dataset = read_dataset_json(folder)
    case = training_cases(folder, dataset)[0]
    reader = reader_of(dataset)
    image, properties = read_image(case, reader, num_channels=len(dataset.channel_names))
    legal = dataset.legal_values(case.identifier)
    return read_label(case, reader, image=image, properties=properties, legal=legal)


@pytest.fixture
def folder(tmp_path: Path, make_dataset: Callable[..., Path]) -> Path:
    return make_dataset(tmp_path / "raw", cases=1)


def test_a_sound_case_is_returned_as_stored(folder: Path) -> None:
    assert np.unique(check(folder)).tolist() == [0, 1, 2]


def test_truncated_and_empty_files(folder: Path) -> None:
    for name in (IMAGE, LABEL):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(InputError, match=f"{Path(name).name} cannot be read"):
            check(folder)
        (folder / name).write_bytes(b"")
        with pytest.raises(InputError, match=f"{Path(name).name} is empty"):
            check(folder)
        (folder / name).write_bytes(whole)
    check(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_and_infinite_voxels(folder: Path, save: Callable[..., None], value: float) -> None:
    image = ONES.copy()
    image[1, 2, 3] = value
    save(folder / IMAGE, image)
    with pytest.raises(InputError, match="1 voxels are NaN or infinite"):
        check(folder)


@pytest.mark.parametrize(
    ("geometry", "what"),
    [
        ({"spacing": (1.0, 1.0, 1.0)}, "spacing"),
        ({"origin": (0.0, 0.0, 0.0)}, "origin"),
        ({"direction": (-1, 0, 0, 0, -1, 0, 0, 0, 1)}, "direction"),
    ],
)
def test_label_on_another_grid(
    folder: Path, save: Callable[..., None], geometry: dict[str, tuple[float, ...]], what: str
) -> None:
    save(folder / LABEL, ONES.astype(np.uint8), **geometry)
    with pytest.raises(InputError, match=f"has another {what} than case00_0000"):
        check(folder)


def test_label_of_another_shape(folder: Path, save: Callable[..., None]) -> None:
    save(folder / LABEL, ONES[1:].astype(np.uint8))
    with pytest.raises(InputError, match="has the shape 19 x 24 x 22, its image"):
        check(folder)


@pytest.mark.parametrize("value", [3.0, 1.5, -1.0, np.nan])
def test_illegal_label_values(folder: Path, save: Callable[..., None], value: float) -> None:
    label = np.zeros_like(ONES)
    label[0, 0, 0] = value
    save(folder / LABEL, label)
    with pytest.raises(InputError, match=f"label value {value:g}|NaN or infinite"):
        check(folder)


def test_four_dimensional_image(folder: Path) -> None:
    import SimpleITK

    volumes = [SimpleITK.GetImageFromArray(ONES) for _ in range(2)]
    SimpleITK.WriteImage(SimpleITK.JoinSeries(volumes), str(folder / IMAGE))
    with pytest.raises(InputError, match="holds 2 images"):
        check(folder)


def test_channels_on_different_grids(
    tmp_path: Path, make_dataset: Callable[..., Path], save: Callable[..., None]
) -> None:
    folder = make_dataset(tmp_path / "two", cases=1, channel_names={"0": "T1", "1": "T2"})
    second = folder / "imagesTr" / "case00_0001.nii.gz"
    save(second, ONES[:-1])
    with pytest.raises(InputError, match=r"case00_0001\.nii\.gz has the shape"):
        check(folder)
    save(second, ONES, spacing=(2.0, 2.0, 2.0))
    with pytest.raises(InputError, match=r"case00_0001\.nii\.gz has another spacing"):
        check(folder)
    save(second, ONES)
    check(folder)
