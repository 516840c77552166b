"""Build partly labelled sources and a test set from the fully labelled MSD hippocampus data.

Two raw datasets come out, one in which only the anterior part is labelled and one in which only the
posterior part is, and a test set with both labels, all split by subject. The embedded example was
made with ``python examples/hippocampus/make_example.py --data MSD_FOLDER --output
examples/hippocampus --training 42 --test 16``.
"""

import argparse
import csv
import json
import shutil
from pathlib import Path

import SimpleITK

LABELS = {"anterior": 1, "posterior": 2}
SOURCES = {"Dataset011_Anterior": "anterior", "Dataset012_Posterior": "posterior"}


def build(data: Path, output: Path, *, training: int | None, test: int) -> None:
    """Write the two sources and the test set.

    Parameters
    ----------
    data : Path
        Folder with imagesTr, labelsTr and cases.csv (case, subject).
    training : int, optional
        Cases per source; default: all that are left after the test set.
    test : int
        Least number of test cases.
    """
    with (data / "cases.csv").open(encoding="utf-8") as file:
        subjects = {row["case"]: row["subject"] for row in csv.DictReader(file)}
    by_subject: dict[str, list[str]] = {}
    for case, subject in sorted(subjects.items()):
        by_subject.setdefault(subject, []).append(case)
    # Every fourth subject is for testing; the others go to the two sources in turn.
    names = sorted(by_subject)
    pools = {"test": names[3::4]}
    rest = [name for i, name in enumerate(names) if i % 4 != 3]
    pools["Dataset011_Anterior"], pools["Dataset012_Posterior"] = rest[::2], rest[1::2]
    for name, label in SOURCES.items():
        cases = [case for subject in pools[name] for case in by_subject[subject]][:training]
        _write(data, output / name, ("imagesTr", "labelsTr"), cases, subjects, {label: 1})
    cases = [case for subject in pools["test"] for case in by_subject[subject]][:test]
    _write(data, output / "test", ("images", "labels"), cases, subjects, LABELS)


def _write(
    data: Path,
    target: Path,
    folders: tuple[str, str],
    cases: list[str],
    subjects: dict[str, str],
    labels: dict[str, int],
) -> None:
    for folder in folders:
        (target / folder).mkdir(parents=True, exist_ok=True)
    for case in cases:
        shutil.copyfile(
            data / "imagesTr" / f"{case}.nii.gz", target / folders[0] / f"{case}_0000.nii.gz"
        )
        full = SimpleITK.ReadImage(str(data / "labelsTr" / f"{case}.nii.gz"), SimpleITK.sitkUInt8)
        kept = SimpleITK.Image(full.GetSize(), SimpleITK.sitkUInt8)
        kept.CopyInformation(full)
        for name, value in labels.items():
            kept += SimpleITK.Cast(full == LABELS[name], SimpleITK.sitkUInt8) * value
        SimpleITK.WriteImage(kept, str(target / folders[1] / f"{case}.nii.gz"), useCompression=True)
    content = {
        "channel_names": {"0": "T1"},
        "labels": {"background": 0, **labels},
        "numTraining": len(cases),
        "file_ending": ".nii.gz",
        "subjects": {case: subjects[case] for case in cases},
        "licence": "CC BY-SA 4.0",
        "reference": "Medical Segmentation Decathlon, Task04 Hippocampus (arXiv:1902.09063)",
    }
    (target / "dataset.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--training", type=int)
    parser.add_argument("--test", type=int, default=1000)
    options = parser.parse_args()
    build(options.data, options.output, training=options.training, test=options.test)
