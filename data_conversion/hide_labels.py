"""Hiding classes and cases of a raw dataset, to make a source of an honest experiment.

Several such sources of one fully labelled dataset, merged, are a partially labelled dataset whose
complete label maps are known.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from nnmosaic.data_conversion.dataset_json import BACKGROUND, IGNORE
from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.new_dataset import (
    Original,
    Relabelled,
    read_original,
    write_relabelled,
)
from nnmosaic.data_conversion.raw_dataset import Case


def parse_joins(arguments: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Parse ``NEWNAME=A+B`` into new label -> classes whose union it is.

    Raises
    ------
    InputError
        If an argument does not have that form, or a name is given twice.
    """
    joins: dict[str, tuple[str, ...]] = {}
    for argument in arguments:
        name, _, classes = (part.strip() for part in argument.partition("="))
        members = tuple(member.strip() for member in classes.split("+"))
        if not name or len(members) < 2 or not all(members):
            raise InputError(
                f"--join {argument!r} is not of the form NEWNAME=A+B, for example "
                "kidneys=kidney_left+kidney_right."
            )
        if name in joins:
            raise InputError(f"--join names {name!r} twice. Join all its classes at once.")
        joins[name] = members
    return joins


def parse_part(text: str) -> tuple[int, int]:
    """Parse ``K/N`` into (K, N).

    Raises
    ------
    InputError
        If it does not have that form, or K is not between 1 and N.
    """
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise InputError(f"--part {text!r} is not K/N with K from 1 to N, for example 1/3.")
    return int(part), int(parts)


def hide_labels(
    folder: Path,
    target: Path,
    *,
    keep: Sequence[str] = (),
    joins: Mapping[str, tuple[str, ...]] | None = None,
    part: tuple[int, int] | None = None,
    cases: Sequence[str] = (),
    copy_files: bool = False,
) -> Relabelled:
    """Write a raw dataset with some classes and cases of another; the rest becomes background.

    The complete label maps go to ``labelsTr_full``. An ignore label is kept.

    Parameters
    ----------
    folder, target : Path
        The dataset, and the new one, which must not exist.
    keep : sequence of str
        Classes that keep a label of their own. Default: all, or, with ``joins``, no others.
    joins : mapping of str to tuple of str, optional
        New label -> classes whose union it is.
    part : (int, int), optional
        (K, N): only the K-th (from 1) of N parts of the subjects, every N-th in sorted order.
    cases : sequence of str
        Only these cases.

    Raises
    ------
    InputError
        If a class or case is unknown or used twice, the part is empty, or a file is broken;
        nothing is written then.
    """
    original = read_original(folder)
    groups = _groups(original, keep, joins or {})
    chosen = _chosen_cases(original, part, cases)
    labels = {BACKGROUND: 0, **{name: i + 1 for i, name in enumerate(groups)}}
    table = np.zeros(len(original.dataset.labels) + 1, dtype=np.int64)
    for name, members in groups.items():
        for member in members:
            table[original.dataset.labels[member]] = labels[name]
    if original.dataset.ignore_label is not None:
        labels[IGNORE] = table[original.dataset.ignore_label] = len(labels)
    return write_relabelled(
        original,
        chosen,
        target,
        lambda _case, label, _spacing: table[label],
        labels=labels,
        copy_files=copy_files,
    )


def _groups(
    original: Original, keep: Sequence[str], joins: Mapping[str, tuple[str, ...]]
) -> dict[str, tuple[str, ...]]:
    """Return new label -> classes of the original, in the order of the original."""
    dataset, where = original.dataset, original.folder.name
    kept = keep or (() if joins else dataset.foreground)
    groups = {**{name: (name,) for name in kept}, **joins}
    for name in joins:
        if name in dataset.labels or name in dataset.full_labels or name == IGNORE:
            raise InputError(f"--join: {where} has a label {name!r} already. Choose a new name.")
    used = [member for members in groups.values() for member in members]
    for member in used:
        if member not in dataset.foreground:
            raise InputError(
                f"{where} has no class {member!r}. It has {', '.join(dataset.foreground)}."
            )
        if used.count(member) > 1:
            raise InputError(f"--keep and --join use the class {member!r} twice. Use it once.")
    first = {name: min(dataset.labels[m] for m in members) for name, members in groups.items()}
    return {name: groups[name] for name in sorted(groups, key=first.__getitem__)}


def _chosen_cases(
    original: Original, part: tuple[int, int] | None, names: Sequence[str]
) -> list[Case]:
    where = original.folder.name
    unknown = sorted(set(names) - {case.identifier for case in original.cases})
    if unknown:
        raise InputError(f"{where} has no case {unknown[0]!r}. Its files are in imagesTr.")
    chosen = [case for case in original.cases if not names or case.identifier in names]
    if part is None:
        return chosen
    subject_of = original.dataset.subject_of
    subjects = sorted({subject_of(case.identifier) for case in chosen})
    mine = set(subjects[part[0] - 1 :: part[1]])
    if not mine:
        raise InputError(
            f"--part {part[0]}/{part[1]}: {where} has only {len(subjects)} subjects. Make fewer "
            "parts."
        )
    return [case for case in chosen if subject_of(case.identifier) in mine]
