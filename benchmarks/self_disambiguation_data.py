"""Datasets of the benchmark of self-disambiguation: what is hidden, merged and kept aside."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from benchmarks.grid import command, preprocess_with_one_plan
from benchmarks.raw_data import (
    BOTH_PHASES,
    HIPPOCAMPUS,
    IN_PHASE,
    kept_aside,
    subjects_of,
    write_chaos,
    write_hippocampus,
)
from nnmosaic.data_conversion.atomic_write import read_json, write_json

NUMBERS = {
    "Full": "611", "Anterior": "612", "Posterior": "613", "Tenth": "614", "Rest": "615",
    "Half": "616", "Whole": "617", "EveryFifth": "618", "Disjoint": "601", "TenPercent": "602",
    "Merged": "603", "Sparse": "604", "ZerosIgnored": "605", "SparseZeros": "606",
    "T1": "631", "T2": "632", "T1Part": "633", "T2Part": "634", "Sequences": "635",
    "Organs": "636", "T1Phases": "641", "T2Phases": "642", "T1PartPhases": "643",
    "T2PartPhases": "644", "SequencesPhases": "645", "OrgansPhases": "646",
}  # fmt: skip
CORPORA = {
    "hippocampus": (
        "Full", "Anterior", "Posterior", "Disjoint", "TenPercent", "Merged", "Sparse",
        "ZerosIgnored", "SparseZeros",
    ),
    "chaos_sequences": ("Sequences", "Organs"),
    "chaos_phases": ("SequencesPhases", "OrgansPhases"),
}  # fmt: skip
"""Datasets that are trained on; the first is complete, and its plan is that of all."""
PLANNED_AS = {"chaos_phases": "chaos_sequences"}
"""Corpus -> another one that it shares the plan of, so that their settings can be compared."""


def dataset_folder(name: str) -> str:
    """Return nnU-Net's name of a dataset."""
    return f"Dataset{NUMBERS[name]}_{name}"


def prepare_hippocampus(data: Path, work: Path) -> None:
    """Make the raw datasets of all hippocampus settings; every fourth subject is for testing."""
    source, raw = data / "msd_task04_hippocampus", work / "nnUNet_raw"
    full = raw / dataset_folder(CORPORA["hippocampus"][0])
    write_hippocampus(data, full, work / "hippocampus_test")
    subject_of, held_out = subjects_of(source), kept_aside(source, every=4)
    subjects, labels = sorted(set(subject_of.values())), dict(HIPPOCAMPUS)
    training = [case for case, subject in subject_of.items() if subject not in held_out]
    tenth = sorted(set(subjects) - held_out)[::10]
    rest = [case for case in training if subject_of[case] not in tenth]
    _hide("Full", "Anterior", "--part", "1/2", "--keep", "anterior")
    _hide("Full", "Posterior", "--part", "2/2", "--keep", "posterior")
    _hide("Full", "Tenth", "--part", "1/10")
    _hide("Full", "Rest", "--cases", *rest, "--keep", "anterior")
    _hide("Full", "Half", "--part", "1/2")
    _hide("Full", "Whole", "--part", "2/2", "--join", "whole=anterior+posterior")
    new = ("--output_id", NUMBERS["EveryFifth"], "-n", "EveryFifth")
    command("sparsify", "-d", NUMBERS["Full"], *new, "--planes", "5")
    _merge("Disjoint", "Anterior", "Posterior")
    _merge("TenPercent", "Tenth", "Rest")
    rename = f"{NUMBERS['Whole']}:whole=anterior+posterior"
    _merge("Merged", "Half", "Whole", "--rename", rename)
    _merge("Sparse", "EveryFifth")
    _relabel(raw, "Disjoint", "ZerosIgnored", {0: 3}, {**labels, "ignore": 3})
    _relabel(raw, "Sparse", "SparseZeros", {3: 0}, labels)


def prepare_chaos(data: Path, work: Path) -> None:
    """Make the raw datasets of two sequences; every second patient is for testing, in both."""
    _prepare_chaos(data, work, "chaos_sequences", "", IN_PHASE)


def prepare_chaos_phases(data: Path, work: Path) -> None:
    """Make the same with both phases of T1 in training; test images stay as they are."""
    _prepare_chaos(data, work, "chaos_phases", "Phases", BOTH_PHASES)


def _prepare_chaos(
    data: Path, work: Path, corpus: str, end: str, t1_channels: Mapping[str, str]
) -> None:
    """Write the datasets of a corpus, whose names have an ``end``."""
    raw, test = work / "nnUNet_raw", work / f"{corpus}_test"
    t1, t2 = data / "chaos_mr_t1dual", data / "chaos_mr_t2spir"
    held_out = kept_aside(t2, every=2)
    write_chaos(t1, raw / dataset_folder(f"T1{end}"), test, held_out, t1_channels)
    write_chaos(t2, raw / dataset_folder(f"T2{end}"), test, held_out)
    _hide(f"T1{end}", f"T1Part{end}", "--keep", "liver", "spleen")
    _hide(f"T2{end}", f"T2Part{end}", "--keep", "kidney_right", "kidney_left")
    _merge(f"Sequences{end}", f"T1{end}", f"T2{end}")
    _merge(f"Organs{end}", f"T1Part{end}", f"T2Part{end}")


def _hide(original: str, name: str, *flags: str) -> None:
    new = ("--output_id", NUMBERS[name], "-n", name)
    command("hide_labels", "-d", NUMBERS[original], *new, *flags)


def _merge(name: str, *sources_and_flags: str) -> None:
    sources = [NUMBERS.get(word, word) for word in sources_and_flags]
    command("merge", "-d", NUMBERS[name], "-n", name, "--sources", *sources)


def _relabel(
    raw: Path, original: str, name: str, table: Mapping[int, int], labels: Mapping[str, int]
) -> None:
    """Write a dataset for a peer that takes labels at face value."""
    import SimpleITK

    old, new = raw / dataset_folder(original), raw / dataset_folder(name)
    shutil.copytree(old / "imagesTr", new / "imagesTr", symlinks=True)
    (new / "labelsTr").mkdir()
    for path in (old / "labelsTr").iterdir():
        image = SimpleITK.ReadImage(str(path))
        array = SimpleITK.GetArrayFromImage(image)
        changed = array.copy()
        for before, after in table.items():
            changed[array == before] = after
        result = SimpleITK.GetImageFromArray(changed)
        result.CopyInformation(image)
        SimpleITK.WriteImage(result, str(new / "labelsTr" / path.name), True)
    content = read_json(old / "dataset.json")
    del content["partial_labels"]
    write_json({**content, "labels": dict(labels)}, new / "dataset.json")


def prepare(data: Path, work: Path, corpora: Mapping[str, str]) -> None:
    """Make raw and preprocessed data, unless they are there: corpus -> configuration."""
    for corpus, configuration in corpora.items():
        done, preprocessed = work / f"{corpus}_prepared", work / "nnUNet_preprocessed"
        if done.is_file():
            continue
        plans = None
        if corpus in PLANNED_AS:
            other = PLANNED_AS[corpus]
            prepare(data, work, {other: configuration})
            plans = read_json(preprocessed / dataset_folder(CORPORA[other][0]) / "nnUNetPlans.json")
        PREPARE[corpus](data, work)
        folders = [dataset_folder(name) for name in CORPORA[corpus]]
        preprocess_with_one_plan(preprocessed, folders, configuration, plans)
        done.touch()


PREPARE = {
    "hippocampus": prepare_hippocampus, "chaos_sequences": prepare_chaos,
    "chaos_phases": prepare_chaos_phases,
}  # fmt: skip
