"""Trained models that several test files of the pipeline start from."""

import shutil
from pathlib import Path

import pytest

from nnmosaic.pipeline.cli import main

STAGES = {"nnUNetTrainerMultiRaterDiversified": "40", "nnUNetTrainerMultiRaterPersonalized": "10"}
"""Trainer -> steps."""


@pytest.fixture(scope="session")
def rater_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache") / "raters"


@pytest.fixture
def both_stages(prepared: Path, rater_cache: Path) -> Path:
    """Return a workspace with both stages of fold 0, and two images to predict."""
    if not rater_cache.is_dir():
        for trainer, steps in STAGES.items():
            length = ["--epochs", "1", "--val_iterations_per_epoch", "1", "--seed", "0"]
            length += ["--iterations_per_epoch", steps]
            assert main(["train", "8", "3d_fullres", "0", "-tr", trainer, *length]) == 0
        for number in ("00", "03"):
            source = prepared / "nnUNet_raw" / "Dataset008_Raters" / "imagesTr"
            (prepared / "images").mkdir(exist_ok=True)
            name = f"case{number}_0000.nii.gz"
            shutil.copy(source / name, prepared / "images" / name)
        for folder in ("images", "nnUNet_results"):
            shutil.copytree(prepared / folder, rater_cache / folder)
    shutil.copytree(rater_cache, prepared, dirs_exist_ok=True)
    return prepared
