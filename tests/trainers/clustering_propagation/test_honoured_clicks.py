"""A clicked voxel of the image file has its label, whatever the network says (invariant 10)."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import SimpleITK
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import Tensor

from nnmosaic.data_conversion.prompts import Point, Prompts, write_prompts
from nnmosaic.pipeline.cli import main
from nnmosaic.trainers.clustering_propagation.coordinates import CaseCoordinates
from nnmosaic.trainers.clustering_propagation.label_map import write_labels
from nnmosaic.trainers.clustering_propagation.marks import marks_of
from nnmosaic.trainers.clustering_propagation.nearby import told
from nnmosaic.trainers.clustering_propagation.session import ClusteringPropagationSession
from nnmosaic.trainers.clustering_propagation.slice_prompts import slice_prompts
from nnmosaic.trainers.clustering_propagation.volume_features import VolumeFeatures

CPU = torch.device("cpu")
TRANSPOSE = (1, 2, 0)
SHAPE = np.array([6, 27, 35])
"""Of the image, with the axes of the network; its array is (columns, slices, rows)."""
CROP = np.array([[1, 5], [2, 25], [4, 33]])
SPACING = np.array([5.0, 0.8, 1.0])
"""Of the image, with the axes of the network."""
FINER, COARSER, EQUAL = (0.31, 0.5), (2.0, 2.7), (0.8, 1.0)
MIXED = (0.4, 1.3)
RESAMPLING = ("resample_data_or_seg_to_shape", "resample_torch_fornnunet")
SURE = 60.0
"""Of the network, of something else."""

LABELS = {
    "plain": LabelManager({"background": 0, "bright": 1, "dark": 2}, None),
    "regions": LabelManager({"background": 0, "both": (1, 2), "dark": 2}, (1, 2)),
}


def predictor_of(labels: LabelManager, spacing: tuple[float, float], resampling: str) -> Any:
    options = {"is_seg": False, "force_separate_z": None}
    if resampling == RESAMPLING[0]:
        options |= {"order": 1, "order_z": 0}  # nnU-Net's own choice for logits
    configuration = {
        "spacing": list(spacing),
        "resampling_fn_probabilities": resampling,
        "resampling_fn_probabilities_kwargs": options,
        "architecture": {},
    }
    plans = PlansManager(
        {"transpose_forward": list(TRANSPOSE), "configurations": {"2d": configuration}}
    )
    return SimpleNamespace(
        plans_manager=plans, configuration_manager=plans.get_configuration("2d"),
        label_manager=labels,
    )  # fmt: skip


def image_order(values: np.ndarray) -> np.ndarray:
    """Return values per axis of the network in the order of the image's array."""
    turned = np.empty_like(values)
    turned[list(TRANSPOSE)] = values
    return turned


def against(labels: LabelManager, label: int, shape: Any, rng: np.random.Generator) -> Tensor:
    """Return logits (K, H, W) that are sure of anything else than a label, at every pixel."""
    logits = rng.normal(0, 3, (labels.num_segmentation_heads, *shape))
    if labels.has_regions:
        holding = [
            label in (r if isinstance(r, tuple) else (r,)) for r in labels.foreground_regions
        ]
        logits += SURE * np.where(holding, -1, 1)[:, None, None]
    else:
        others = np.array([k for k in range(len(logits)) if k != label])
        wrong = rng.choice(others, shape)
        logits += SURE * (np.arange(len(logits))[:, None, None] == wrong)
    return torch.from_numpy(logits).half()


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("spacing", [FINER, COARSER, MIXED, EQUAL], ids=str)
@pytest.mark.parametrize("resampling", RESAMPLING)
def test_a_click_is_honoured_on_the_images_own_grid(
    kind: str, spacing: tuple[float, float], resampling: str
) -> None:
    labels, rng = LABELS[kind], np.random.default_rng(0)
    predictor = predictor_of(labels, spacing, resampling)
    sizes = CROP[:, 1] - CROP[:, 0]
    network = (int(sizes[0]), *np.rint(sizes[1:] * SPACING[1:] / spacing).astype(int))
    properties = {
        "spacing": image_order(SPACING).tolist(),
        "shape_before_cropping": tuple(SHAPE),
        "bbox_used_for_cropping": CROP.tolist(),
        "shape_after_cropping_and_before_resampling": tuple(sizes),
    }
    coordinates = CaseCoordinates.of_case(
        properties, transpose_forward=TRANSPOSE, network_shape=network
    )
    corners = [[low, high - 1] for low, high in CROP]
    voxels = [np.array([s, r, c]) for s in corners[0] for r in corners[1] for c in corners[2]]
    voxels += list(rng.integers(CROP[:, 0], CROP[:, 1], (60, 3)))
    for number, voxel in enumerate(voxels):
        place = image_order(voxel + rng.uniform(-0.49, 0.49, 3))
        wanted, positive = [(2, True), (1, True), (0, True), (2, False)][number % 4]
        click = Point(wanted, tuple(place), positive)
        (prompt,) = slice_prompts(
            Prompts("voxel", "LPS", "zyx", (click,)), coordinates,
            read_mask=lambda path: (np.zeros(0), {}),
        )  # fmt: skip
        label = wanted if positive else 0
        logits = against(labels, label, network[1:], rng)
        ((index, marks),) = marks_of([prompt], labels, lambda _, found=logits: found).items()
        found = told(logits, marks.on.float(), marks.off.float(), regions=labels.has_regions)
        shown = np.full(image_order(SHAPE), 9, np.uint8)
        write_labels(shown, found[:, None], index, properties=properties, predictor=predictor)
        assert shown[tuple(image_order(voxel))] == label, (voxel, place)
        # No more is forced than must be, and what was clicked speaks for what is around it.
        told_pixels = (marks.on | marks.off).any(0)
        assert told_pixels.sum() <= (1 if spacing == EQUAL else 4)
        assert marks.clicked.sum() == 1
        assert (told_pixels | ~marks.clicked).all()


@pytest.fixture
def sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every network sure of all but the last class, everywhere."""
    merged = VolumeFeatures.merged

    def wrong(features: VolumeFeatures, logits: Tensor) -> Tensor:
        shown = merged(features, logits)
        shown[-1] -= SURE
        return shown

    monkeypatch.setattr(VolumeFeatures, "merged", wrong)


@pytest.mark.usefixtures("sure")
@pytest.mark.parametrize("model", ["propagation_model", "region_propagation_model"])
@pytest.mark.parametrize("spacing", [(0.45, 0.6, 2.0), (2.3, 1.7, 2.0)], ids=["fine", "coarse"])
def test_session_and_predict_honour_clicks(
    model: str, spacing: Any, request: Any, tmp_path: Path, save: Callable[..., None]
) -> None:
    folder = request.getfixturevalue(model)
    array = np.random.default_rng(0).normal(100, 20, (4, 26, 22)).astype(np.float32)
    save(tmp_path / "images" / "new_0000.nii.gz", array, spacing=spacing)
    session = ClusteringPropagationSession(CPU)
    session.initialize_from_trained_model_folder(folder)
    session.set_image(array[None], {"spacing": spacing[::-1]})
    assert not (session.label_map == 2).any()
    clicks = [(1, 4, 5), (1, 21, 6), (2, 11, 15)]
    for click in clicks:
        session.add_point_interaction(np.array(click) + 0.4, True, label="dark")
        assert session.label_map[click] == 2
    (tmp_path / "prompts").mkdir()
    labels = json.loads((folder / "dataset.json").read_text())["labels"]
    write_prompts(session.prompts, tmp_path / "prompts" / "new.json", labels)
    folders = ["-i", str(tmp_path / "images"), "-o", str(tmp_path / "out")]
    prompts = ["--prompts", str(tmp_path / "prompts")]
    assert main(["predict", "-m", str(folder), *folders, "--disable_tta", *prompts]) == 0
    written = SimpleITK.ReadImage(str(tmp_path / "out" / "new.nii.gz"))
    predicted = SimpleITK.GetArrayFromImage(written)
    assert [predicted[click] for click in clicks] == [2, 2, 2]
