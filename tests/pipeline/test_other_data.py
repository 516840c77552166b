"""The whole pipeline on what the other tests do not have: 2D, two channels, an ignore label."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from nnmosaic.pipeline.cli import main

SHORT = ("--epochs", "1", "--iterations_per_epoch", "2", "--val_iterations_per_epoch", "1")


@pytest.mark.slow
def test_two_dimensions_two_channels_and_ignored_voxels(
    workspace: Path, make_dataset: Callable[..., Path]
) -> None:
    for number, name, labels in ((21, "A", {"bright": 1}), (22, "B", {"dark": 2})):
        folder = workspace / "nnUNet_raw" / f"Dataset0{number}_{name}"
        make_dataset(folder, cases=3, labels=labels, first_seed=10 * number)
        content = json.loads((folder / "dataset.json").read_text())
        content["channel_names"] = {"0": "T1", "1": "T2"}
        content["labels"]["ignore"] = 2
        (folder / "dataset.json").write_text(json.dumps(content))
        for path in (folder / "imagesTr").iterdir():
            shutil.copy(path, path.with_name(path.name.replace("_0000", "_0001")))
        for path in (folder / "labelsTr").iterdir():
            image = SimpleITK.ReadImage(str(path))
            image[:, :, :3] = 2  # three planes were not annotated
            SimpleITK.WriteImage(image, str(path))
    assert main(["merge", "-d", "23", "-n", "AB", "--sources", "21", "22"]) == 0
    assert main(["doctor", "-d", "23"]) == 0
    assert main(["plan_and_preprocess", "-d", "23", "-c", "2d", "--device", "cpu"]) == 0
    assert main(["train", "23", "2d", "all", *SHORT]) == 0
    images = workspace / "nnUNet_raw" / "Dataset023_AB" / "imagesTr"
    output = workspace / "predicted"
    assert main(["predict", "-i", str(images), "-o", str(output), "-d", "23", "-c", "2d"]) == 0
    found: set[int] = set()
    for path in output.glob("*.nii.gz"):
        array = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
        assert array.shape == (20, 24, 22)
        found |= set(np.unique(array).tolist())
    assert len(list(output.glob("*.nii.gz"))) == 6
    assert found <= {0, 1, 2}  # never "ignore"
    model = workspace / "nnUNet_results" / "Dataset023_AB"
    summary = next(model.glob("*__2d/fold_all/validation/summary.json"))
    assert json.loads(summary.read_text())["n_cases"] == {"1": 3, "2": 3}
