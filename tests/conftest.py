"""Synthetic raw datasets and workspaces, shared by all tests."""

import json
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

from nnmosaic.pipeline.cli import main
from nnmosaic.planners.worker_pool import start_server

# nnU-Net reads its variables once, when it is imported: all tests share one workspace.
WORKSPACE = Path(tempfile.mkdtemp(prefix="nnmosaic_tests_"))
FOLDERS = [WORKSPACE / name for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")]
os.environ.update({folder.name: str(folder) for folder in FOLDERS})
os.environ["nnUNet_def_n_proc"] = "1"  # each is a process that imports torch
os.environ["nnUNet_n_proc_DA"] = "0"
os.environ["MATPLOTLIBRC"] = str(Path(__file__).parent / "matplotlibrc")

SHAPE = (20, 24, 22)
SPACING = (1.0, 1.25, 0.8)


@pytest.fixture(autouse=True, scope="session")
def _workers_that_start_at_once() -> Iterator[None]:
    """Fork nnU-Net's workers from a server that has torch imported; it spawns two per training.

    The tests that start commands in processes of their own leave nnU-Net as it is.
    """
    get_context = multiprocessing.get_context

    def forked(method: str | None = None) -> BaseContext:
        if method == "spawn" and "forkserver" in multiprocessing.get_all_start_methods():
            return start_server()
        return get_context(method)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing, "get_context", forked)
        yield


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
    shutil.rmtree(WORKSPACE, ignore_errors=True)
    for folder in FOLDERS:
        folder.mkdir(parents=True)
    yield WORKSPACE
    shutil.rmtree(WORKSPACE)


COMPLETE, PARTIAL, RATERS = "Dataset004_Balls", "Dataset007_Merged", "Dataset008_Raters"


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that keeps the `prepared` workspace, which takes seconds to make."""
    return tmp_path_factory.mktemp("cache") / "prepared"


def _add_raters(raw: Path) -> None:
    """Write the dataset of three raters from the cases of `COMPLETE`."""
    scratch = raw.parent / "raters"
    for path in sorted((raw / COMPLETE / "labelsTr").iterdir()):
        image = SimpleITK.ReadImage(str(path))
        for rater, change in (
            ("small", SimpleITK.BinaryErode), ("exact", None), ("large", SimpleITK.BinaryDilate),
        ):  # fmt: skip
            if (rater, path.name) == ("large", "case01.nii.gz"):
                continue
            drawn = image if change is None else 0 * image
            for value in (1, 2) if change is not None else ():
                drawn = drawn + value * change(image == value, [1, 1, 1])
            (scratch / rater).mkdir(parents=True, exist_ok=True)
            SimpleITK.WriteImage(drawn, str(scratch / rater / path.name))
    names = [f"{rater}={scratch / rater}" for rater in ("small", "exact", "large")]
    command = [
        "add_raters",
        "-d",
        "8",
        "-n",
        "Raters",
        "--images",
        str(raw / COMPLETE / "imagesTr"),
    ]
    arguments = ["--channels", "T1", "--labels", "bright", "dark", "--copy", "--raters", *names]
    assert main([*command, *arguments]) == 0
    shutil.rmtree(scratch)


@pytest.fixture
def prepared(workspace: Path, cache: Path, make_dataset: Callable[..., Path]) -> Path:
    """Return a workspace with three datasets, planned for a CPU and preprocessed.

    4: both balls are labelled in all 5 cases. 7: merged from a source that labels bright balls
    and one that labels dark balls, 5 cases each. 8: as 4, drawn by three raters, too small, exactly
    and too large; the last one has not annotated case01.
    """
    if cache.is_dir():
        shutil.copytree(cache, workspace, symlinks=True, dirs_exist_ok=True)
        return workspace
    raw = workspace / "nnUNet_raw"
    make_dataset(raw / COMPLETE, cases=5)
    make_dataset(raw / "Dataset005_Bright", cases=5, labels={"bright": 1}, first_seed=10)
    make_dataset(raw / "Dataset006_Dark", cases=5, labels={"dark": 2}, first_seed=20)
    assert main(["merge", "-d", "7", "-n", "Merged", "--sources", "5", "6"]) == 0
    _add_raters(raw)
    for identifier in ("4", "7", "8"):
        command = ["plan_and_preprocess", "-d", identifier, "-c", "3d_fullres", "2d"]
        assert main([*command, "--device", "cpu"]) == 0
    shutil.copytree(workspace, cache, symlinks=True)
    return workspace


@pytest.fixture
def plans_of() -> Callable[..., dict[str, Any]]:
    """Return a function that reads the plans of a dataset.

    ``plain``: without nnMosaic's section, but for the raters, which a network is built from.
    """

    def read(dataset: str, *, plain: bool = False) -> dict[str, Any]:
        path = WORKSPACE / "nnUNet_preprocessed" / dataset / "nnUNetPlans.json"
        plans: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if plain:
            section = plans.pop("nnmosaic")
            if "multirater" in section:
                plans["nnmosaic"] = {"multirater": section["multirater"]}
        return {**plans, "continue_training": False}

    return read


@pytest.fixture
def make_trainer(prepared: Path, plans_of: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that makes a trainer for 3 short epochs on the CPU."""

    def make(
        cls: type, dataset: str = COMPLETE, configuration: str = "3d_fullres", **settings: Any
    ) -> Any:
        import torch

        from nnmosaic.planners.plans_section import RunSettings

        folder = prepared / "nnUNet_preprocessed" / dataset
        content = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        plans = plans_of(dataset, plain=True)
        trainer = cls(plans, configuration, 0, content, torch.device("cpu"))
        if hasattr(trainer, "request_settings"):
            short = {"epochs": 3, "iterations_per_epoch": 3, "val_iterations_per_epoch": 2}
            trainer.request_settings(RunSettings(**{**short, **settings}))
        else:
            trainer.num_epochs, trainer.num_iterations_per_epoch = 3, 3
            trainer.num_val_iterations_per_epoch = 2
        return trainer

    return make


@pytest.fixture
def propagation_model(make_trainer: Callable[..., Any], tmp_path: Path) -> Path:
    """Return a 2D model of dataset 4, untrained, in which nothing is zero that begins at zero."""
    from nnmosaic.trainers.clustering_propagation.trainer import (
        nnUNetTrainerClusteringPropagation,
    )

    return untrained_propagation_model(
        make_trainer(nnUNetTrainerClusteringPropagation, "Dataset004_Balls", "2d"),
        tmp_path / "model",
    )


@pytest.fixture
def region_propagation_model(make_trainer: Callable[..., Any], tmp_path: Path) -> Path:
    """Return such a model of two regions, "both" and in it "dark"."""
    from nnmosaic.trainers.clustering_propagation.trainer import (
        nnUNetTrainerClusteringPropagation as Trainer,
    )

    known = make_trainer(Trainer, "Dataset004_Balls", "2d")
    labels = {"background": 0, "both": [1, 2], "dark": 2}
    content = {**known.dataset_json, "labels": labels, "regions_class_order": [1, 2]}
    plans = {**known.plans_manager.plans, "continue_training": False}
    return untrained_propagation_model(
        Trainer(plans, "2d", 0, content, known.device), tmp_path / "model"
    )


def untrained_propagation_model(trainer: Any, folder: Path) -> Path:
    """Write the model of a trainer of clustering propagation, and return its folder."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    trainer.initialize()
    head = trainer.network.head
    for parameter in head.parameters():
        if not parameter.detach().any():
            nn.init.normal_(parameter, std=0.3)
    nn.init.constant_(head.presence[-1].bias, 2.0)
    (folder / "fold_0").mkdir(parents=True)
    plans = {k: v for k, v in trainer.plans_manager.plans.items() if k != "continue_training"}
    for name, content in (("plans", plans), ("dataset", trainer.dataset_json)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    trainer.save_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))
    return folder


@pytest.fixture
def trained(prepared: Path, model_cache: Path) -> Path:
    """Return a prepared workspace with two trained folds of dataset 7, and 3 images to predict.

    Fold 0 has learnt both classes; fold 1 has made three steps.
    """
    if model_cache.is_dir():
        shutil.copytree(model_cache, prepared, symlinks=True, dirs_exist_ok=True)
        return prepared
    short = ["--epochs", "1", "--val_iterations_per_epoch", "1", "--npz", "--iterations_per_epoch"]
    for fold, steps in (("0", "30"), ("1", "3")):
        assert main(["train", "7", "3d_fullres", fold, "--seed", fold, *short, steps]) == 0
    for i in range(3):
        image, _ = synthetic_case(100 + i)
        save_image(prepared / "images" / f"new{i}_0000.nii.gz", image)
    for folder in ("images", "nnUNet_results"):
        shutil.copytree(prepared / folder, model_cache / folder)
    return prepared


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that keeps what `trained` adds."""
    return tmp_path_factory.mktemp("cache") / "trained"
