"""Raw datasets of the benchmarks: links to shared data, some subjects kept aside for testing."""

from collections.abc import Mapping
from pathlib import Path

from benchmarks.grid import link
from nnmosaic.data_conversion.atomic_write import read_json, write_json

HIPPOCAMPUS = {"background": 0, "anterior": 1, "posterior": 2}
CHAOS = {"background": 0, "liver": 1, "kidney_right": 2, "kidney_left": 3, "spleen": 4}
IN_PHASE, BOTH_PHASES = {"": "_0000"}, {"": "_0000", "o": "_0001"}
"""Channels of CHAOS: what a case's name ends in -> what the image has after the name."""


def write_hippocampus(data: Path, training: Path, testing: Path) -> None:
    """Write imagesTr, ... to one folder and imagesTs, ... to another: every fourth subject."""
    source = data / "msd_task04_hippocampus"
    _write(source, training, testing, HIPPOCAMPUS, kept_aside(source, every=4), {"": ""})


def write_chaos(
    source: Path,
    training: Path,
    testing: Path,
    held_out: set[str] | None = None,
    channels: Mapping[str, str] = IN_PHASE,
) -> None:
    """Write a sequence of CHAOS; every second patient, or ``held_out``, is for testing.

    Each of the ``channels`` is a training case of its own; test cases have the first one only.
    """
    aside = kept_aside(source, every=2) if held_out is None else held_out
    _write(source, training, testing, CHAOS, aside, channels)


def subjects_of(source: Path) -> dict[str, str]:
    """Return case -> subject."""
    lines = (source / "cases.csv").read_text(encoding="utf-8").split()[1:]
    return dict(line.split(",")[:2] for line in lines)


def kept_aside(source: Path, *, every: int) -> set[str]:
    """Return every n-th subject, by name."""
    return set(sorted(set(subjects_of(source).values()))[every - 1 :: every])


def _write(
    source: Path,
    training: Path,
    testing: Path,
    labels: Mapping[str, int],
    held_out: set[str],
    channels: Mapping[str, str],
) -> None:
    """Write both folders; ``channels`` as in `write_chaos`."""
    subject_of = subjects_of(source)
    first = dict(list(channels.items())[:1])
    for folder, suffix, aside, shown in (
        (training, "Tr", False, channels), (testing, "Ts", True, first),
    ):  # fmt: skip
        subjects = {}
        for case, subject in subject_of.items():
            for end, channel in shown.items() if (subject in held_out) == aside else ():
                image = source / "imagesTr" / f"{case}{channel}.nii.gz"
                link(image, folder / f"images{suffix}" / f"{case}{end}_0000.nii.gz")
                link(source / "labelsTr" / f"{case}.nii.gz",
                     folder / f"labels{suffix}" / f"{case}{end}.nii.gz")  # fmt: skip
                subjects[case + end] = subject
        if (folder / "dataset.json").is_file():  # of another sequence
            subjects |= read_json(folder / "dataset.json")["subjects"]
        content = {
            "channel_names": {"0": "MRI"}, "labels": labels, "numTraining": len(subjects),
            "file_ending": ".nii.gz", "subjects": subjects,
        }  # fmt: skip
        write_json(content, folder / "dataset.json")
