"""Averaging two models, against nnU-Net's own ensembling."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from nnunetv2.ensembling.ensemble import ensemble_folders

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.pipeline.ensemble import ensemble

CONTENT = {"channel_names": {"0": "T1"}, "labels": {"background": 0, "a": 1, "b": 2}}


@pytest.fixture
def folders(
    tmp_path: Path,
    save: Callable[..., None],
    plans_of: Callable[..., dict[str, object]],
    prepared: Path,
) -> list[Path]:
    """Two folders as predict writes them, with random probabilities of 2 cases."""
    rng = np.random.default_rng(0)
    made = [tmp_path / "one", tmp_path / "two"]
    for folder in made:
        for case in ("x", "y"):
            probabilities = rng.dirichlet(np.ones(3), (5, 6, 7)).transpose(3, 0, 1, 2)
            save(folder / f"{case}.nii.gz", probabilities.argmax(0).astype(np.uint8))
            np.savez(folder / f"{case}.npz", probabilities=probabilities.astype(np.float16))
            properties = {
                "sitk_stuff": {
                    "spacing": (1.0, 1.25, 0.8),
                    "origin": (3.0, -2.0, 5.0),
                    "direction": (1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0),
                },
                "spacing": [0.8, 1.25, 1.0],
            }
            (folder / f"{case}.pkl").write_bytes(__import__("pickle").dumps(properties))
        (folder / "dataset.json").write_text(json.dumps({**CONTENT, "file_ending": ".nii.gz"}))
        (folder / "plans.json").write_text(json.dumps(plans_of("Dataset004_Balls")))
    return made


def test_the_average_is_nnunets(folders: list[Path], tmp_path: Path) -> None:
    for folder in folders:  # ours reads no pickle
        shutil.copytree(folder, tmp_path / "with_pickles" / folder.name)
        for path in folder.glob("*.pkl"):
            path.unlink()
    ensemble(folders, tmp_path / "ours", save_probabilities=True)
    stock = [str(tmp_path / "with_pickles" / folder.name) for folder in folders]
    ensemble_folders(stock, str(tmp_path / "theirs"), num_processes=1)
    for case in ("x", "y"):
        ours, theirs = (
            SimpleITK.ReadImage(str(tmp_path / who / f"{case}.nii.gz"))
            for who in ("ours", "theirs")
        )
        a, b = SimpleITK.GetArrayFromImage(ours), SimpleITK.GetArrayFromImage(theirs)
        assert np.array_equal(a, b)
        assert ours.GetOrigin() == theirs.GetOrigin()
        stored = [np.load(folder / f"{case}.npz")["probabilities"] for folder in folders]
        kept = np.load(tmp_path / "ours" / f"{case}.npz")["probabilities"]
        np.testing.assert_allclose(kept, np.mean(np.float32(stored), 0), rtol=1e-6)


def test_folders_that_do_not_fit_are_refused(folders: list[Path], tmp_path: Path) -> None:
    output = tmp_path / "out"
    (folders[1] / "y.npz").rename(tmp_path / "y.npz")
    with pytest.raises(InputError, match=r"two lacks y\.npz \(1 missing\)"):
        ensemble(folders, output)
    np.savez(folders[1] / "y.npz", probabilities=np.array([object()], dtype=object))
    with pytest.raises(InputError, match=r"y\.npz holds no probabilities"):
        ensemble(folders, output)
    np.savez(folders[1] / "y.npz", probabilities=np.zeros((3, 5, 6, 8), np.float16))
    with pytest.raises(InputError, match=r"y\.npz has the shape"):
        ensemble(folders, output)
    other = {**CONTENT, "file_ending": ".nii.gz", "labels": {"background": 0, "b": 1, "a": 2}}
    (folders[1] / "dataset.json").write_text(json.dumps(other))
    with pytest.raises(InputError, match="predicted with different labels"):
        ensemble(folders, output)
    for path in folders[1].glob("*.npz"):
        path.unlink()
    with pytest.raises(InputError, match="Predict with --save_probabilities"):
        ensemble(folders, output)
