"""The raw datasets of the CHAOS settings, of two patients with synthetic images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK

from benchmarks import grid, self_disambiguation_data
from benchmarks.grid import preprocess_with_one_plan
from benchmarks.raw_data import BOTH_PHASES, CHAOS, write_chaos
from benchmarks.self_disambiguation import SETTINGS
from benchmarks.self_disambiguation_data import CORPORA, dataset_folder, prepare
from nnmosaic.data_conversion.atomic_write import read_json, write_json
from nnmosaic.data_conversion.dataset_json import read_dataset_json
from nnmosaic.pipeline.cli import main

PATIENTS = ("001", "002")
"""The second one is kept aside."""


def array(path: Path) -> np.ndarray:
    return SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))


def value_of(sequence: str, patient: str, channel: int) -> int:
    """Return what all voxels of an image hold, which says whose it is."""
    return 100 * int(sequence == "T2") + 10 * int(patient) + channel


@pytest.fixture
def data(tmp_path: Path, save: Callable[..., None]) -> Path:
    """Return a folder as /work/shared/data: T1 with two phases, T2 with one channel."""
    for sequence, folder, channels in (
        ("T1", "chaos_mr_t1dual", 2), ("T2", "chaos_mr_t2spir", 1),
    ):  # fmt: skip
        source = tmp_path / "data" / folder
        lines = ["case,subject"]
        for patient in PATIENTS:
            case = f"chaos{sequence}_{patient}"
            lines.append(f"{case},chaos_mr_{patient}")
            label = np.zeros((4, 6, 6), np.uint8)
            label[1, :5, 1] = range(5)  # every class
            label[2, 0, 0] = int(patient)
            save(source / "labelsTr" / f"{case}.nii.gz", label)
            for channel in range(channels):
                image = np.full(label.shape, value_of(sequence, patient, channel), np.int16)
                save(source / "imagesTr" / f"{case}_000{channel}.nii.gz", image)
        (source / "cases.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path / "data"


def run_here(*arguments: str) -> None:
    assert main(list(arguments)) == 0


def values(folder: Path) -> dict[str, int]:
    """Return file name -> the value of the image."""
    return {path.name: int(array(path).max()) for path in folder.iterdir()}


def test_training_images_come_in_both_phases_and_test_images_in_phase(
    data: Path, tmp_path: Path
) -> None:
    source, training, testing = data / "chaos_mr_t1dual", tmp_path / "train", tmp_path / "test"
    write_chaos(source, training, testing, channels=BOTH_PHASES)
    assert values(training / "imagesTr") == {
        "chaosT1_001_0000.nii.gz": value_of("T1", "001", 0),
        "chaosT1_001o_0000.nii.gz": value_of("T1", "001", 1),
    }
    assert values(testing / "imagesTs") == {"chaosT1_002_0000.nii.gz": value_of("T1", "002", 0)}
    for case in ("chaosT1_001", "chaosT1_001o"):
        label = array(training / "labelsTr" / f"{case}.nii.gz")
        assert np.array_equal(label, array(source / "labelsTr" / "chaosT1_001.nii.gz"))
    of_training, of_test = (read_json(f / "dataset.json") for f in (training, testing))
    assert of_training["subjects"] == {
        "chaosT1_001": "chaos_mr_001", "chaosT1_001o": "chaos_mr_001",
    }  # fmt: skip
    assert of_training["numTraining"] == 2
    assert of_training["labels"] == CHAOS
    assert of_test["subjects"] == {"chaosT1_002": "chaos_mr_002"}


def test_one_phase_is_the_default(data: Path, tmp_path: Path) -> None:
    write_chaos(data / "chaos_mr_t1dual", tmp_path / "train", tmp_path / "test")
    found = values(tmp_path / "train" / "imagesTr")
    assert found == {"chaosT1_001_0000.nii.gz": value_of("T1", "001", 0)}


@pytest.mark.parametrize(("corpus", "further"), [("chaos_sequences", ()), ("chaos_phases", ("o",))])
def test_the_datasets_of_a_corpus(
    corpus: str, further: tuple[str, ...], data: Path, workspace: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(self_disambiguation_data, "command", run_here)
    self_disambiguation_data.PREPARE[corpus](data, workspace)
    complete, partial = (workspace / "nnUNet_raw" / dataset_folder(n) for n in CORPORA[corpus])
    shown = {"T1": {"liver", "spleen"}, "T2": {"kidney_right", "kidney_left"}}
    for folder in (complete, partial):
        dataset = read_dataset_json(folder)
        assert len(dataset.sources()) == 2
        expected: dict[str, Any] = {}
        for path in (folder / "imagesTr").iterdir():
            case = path.name.removesuffix("_0000.nii.gz")
            assert dataset.subject_of(case) == "chaos_mr_001"
            expected[case.split("_", 1)[1]] = int(array(path).max())
            source = dataset.source_of(case)
            sequence = "T1" if "chaosT1" in case else "T2"
            classes = set(CHAOS) - {"background"}
            if folder == partial:
                classes = shown[sequence]
            assert set(source.annotated) == classes
            label = array(folder / "labelsTr" / f"{case}.nii.gz")
            assert set(label.ravel()) == {0, *(dataset.labels[name] for name in classes)}
        assert expected == {
            "chaosT1_001": value_of("T1", "001", 0),
            **{f"chaosT1_001{letter}": value_of("T1", "001", 1) for letter in further},
            "chaosT2_001": value_of("T2", "001", 0),
        }
    assert values(workspace / f"{corpus}_test" / "imagesTs") == {
        "chaosT1_002_0000.nii.gz": value_of("T1", "002", 0),
        "chaosT2_002_0000.nii.gz": value_of("T2", "002", 0),
    }


def test_both_phases_have_the_plan_of_one(
    data: Path, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preprocess(preprocessed: Path, folders: list[str], _: str, plans: Any = None) -> None:
        made.append((folders, plans))
        (preprocessed / folders[0]).mkdir(parents=True)
        write_json({"planned": folders[0]}, preprocessed / folders[0] / "nnUNetPlans.json")

    made: list[tuple[list[str], Any]] = []
    monkeypatch.setattr(self_disambiguation_data, "command", run_here)
    monkeypatch.setattr(self_disambiguation_data, "preprocess_with_one_plan", preprocess)
    for corpora in (["chaos_phases"], ["chaos_sequences", "chaos_phases"]):
        prepare(data, workspace, dict.fromkeys(corpora, "3d_lowres"))
    of_one, of_both = (
        [dataset_folder(n) for n in CORPORA[c]] for c in ("chaos_sequences", "chaos_phases")
    )
    assert made == [(of_one, None), (of_both, {"planned": of_one[0]})]


def test_a_given_plan_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[str, ...]] = []
    monkeypatch.setattr(grid, "command", lambda *words: commands.append(words))
    folders = ["Dataset001_A", "Dataset002_B"]
    plans = {"dataset_name": "Dataset003_C", "patch": 8}
    preprocess_with_one_plan(tmp_path, folders, "2d", plans)
    for name, words in zip(folders, commands, strict=True):
        assert words == ("plan_and_preprocess", "-d", name, "-c", "2d", "--keep_plans")
        of_it = read_json(tmp_path / name / "nnUNetPlans.json")
        assert of_it == {"dataset_name": name, "patch": 8}


def test_a_setting_trains_on_datasets_of_its_corpus() -> None:
    for setting in SETTINGS.values():
        for row in setting.rows.values():
            assert set(row.datasets) <= set(CORPORA[setting.corpus])
