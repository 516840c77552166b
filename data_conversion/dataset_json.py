"""nnMosaic's keys of ``dataset.json``, validated when read.

``partial_labels`` says what each source of a merged dataset annotates
(methods/self_disambiguation.md, 6.2); ``subjects`` maps cases to people; ``full_labels`` names the
integers of complete label maps that are kept aside for scoring. This is the only module that knows
how the keys are written down. It does not read images.
"""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.atomic_write import read_json
from nnmosaic.data_conversion.errors import InputError

BACKGROUND = "background"
IGNORE = "ignore"

IDENTITIES = ("persistent", "exchangeable")
"""Of raters: the same person in all cases, or a slot that anyone may have filled."""

LABEL_KEYS = ("annotated", "merged", "modality")
"""What an entry of ``partial_labels`` may say of a source, or of a case instead of its source."""
SOURCE_KEYS = (*LABEL_KEYS, "cases", "pattern", "sparse")
"""Of a source. "sparse" is for the reader: which voxels are unannotated, the label files say."""


@dataclass(frozen=True)
class SourceLabels:
    """What one source annotates, in label names.

    Attributes
    ----------
    source : str
        Name of the source.
    annotated : tuple of str
        Classes that the source annotates one by one, wherever they occur.
    merged : mapping of str to tuple of str
        Name of the label whose integer the files hold -> the classes whose union it means.
    modality : str
        Such as "CT" or "MR", for sampling by modality; may be empty.
    """

    source: str
    annotated: tuple[str, ...]
    merged: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    modality: str = ""

    def representatives(self, labels: Mapping[str, int]) -> tuple[int, ...]:
        """Return, for every class integer, the integer that this source stores for it.

        Index = class; 0 for the background and for every class that the source does not annotate.
        """
        stored = [0] * len(labels)
        for name in self.annotated:
            stored[labels[name]] = labels[name]
        for name, members in self.merged.items():
            for member in members:
                stored[labels[member]] = labels[name]
        return tuple(stored)


COMPLETE_SOURCE = "complete"


@dataclass(frozen=True)
class PartialLabels:
    """Which source every case belongs to, and what that source annotates."""

    sources: Mapping[str, SourceLabels]
    patterns: Mapping[str, str]
    cases: Mapping[str, str]
    overrides: Mapping[str, SourceLabels]
    unmatched_is_complete: bool = False

    def of_case(self, case: str, labels: Mapping[str, int]) -> SourceLabels:
        """Return what was annotated in ``case``: override, then case list, then pattern.

        Raises
        ------
        InputError
            If no source, or more than one, claims the case.
        """
        source = self._source_of(case)
        if case in self.overrides:
            return replace(self.overrides[case], source=source or COMPLETE_SOURCE)
        if source is not None:
            return self.sources[source]
        if self.unmatched_is_complete:
            return complete(labels)
        raise InputError(
            f"dataset.json: case {case!r} belongs to no source of partial_labels. Add it to "
            "the 'cases' or the 'pattern' of a source, or set 'unmatched' to 'complete' if all "
            "classes are annotated in it."
        )

    def _source_of(self, case: str) -> str | None:
        if case in self.cases:
            return self.cases[case]
        matches = [name for name, pattern in self.patterns.items() if re.search(pattern, case)]
        if len(matches) > 1:
            raise InputError(
                f"dataset.json: case {case!r} matches the patterns of several sources "
                f"({', '.join(matches)}). Make the patterns exclusive, or list the case."
            )
        return matches[0] if matches else None


@dataclass(frozen=True)
class DatasetJson:
    """The part of ``dataset.json`` that nnMosaic acts on.

    Attributes
    ----------
    labels : dict of str to int
        Name -> integer of background and classes, consecutive from 0; empty with ``has_regions``.
    ignore_label : int or None
        Integer of unannotated voxels.
    has_regions : bool
        Whether nnU-Net's overlapping regions are declared instead of exclusive classes.
    subjects : dict of str to str
        Case -> person. A case that is not listed is a person of its own.
    raters : tuple of str
        Names of ``multirater`` (methods/multi_rater_personalization.md, 7.1); folders of that name
        hold their label maps.
    full_labels : dict of str to int
        As ``labels``, for the label maps in ``labelsTr_full``: the same unless declared. The next
        integer stands for voxels that are unannotated even there.
    """

    channel_names: Mapping[str, str]
    labels: Mapping[str, int]
    ignore_label: int | None
    file_ending: str
    has_regions: bool
    subjects: Mapping[str, str]
    partial_labels: PartialLabels | None
    content: Mapping[str, Any]
    raters: tuple[str, ...] = ()
    full_labels: Mapping[str, int] = field(default_factory=dict)

    @property
    def rater_identity(self) -> str:
        """One of `IDENTITIES`."""
        return str(self.content.get("multirater", {}).get("identity", IDENTITIES[0]))

    @property
    def foreground(self) -> tuple[str, ...]:
        """Names of the classes, without the background, in the order of their integers."""
        return tuple(
            sorted((n for n in self.labels if n != BACKGROUND), key=self.labels.__getitem__)
        )

    def source_of(self, case: str) -> SourceLabels:
        """Return the source of ``case``; everything is annotated when nothing is declared."""
        if self.partial_labels is None:
            return complete(self.labels)
        return self.partial_labels.of_case(case, self.labels)

    def sources(self) -> tuple[SourceLabels, ...]:
        """Return the declared sources, or one complete source."""
        if self.partial_labels is None:
            return (complete(self.labels),)
        return tuple(self.partial_labels.sources.values())

    def legal_values(self, case: str) -> frozenset[int] | None:
        """Return the integers that the label file of ``case`` may hold; None: not restricted."""
        if self.has_regions:
            return None
        values = set(self.source_of(case).representatives(self.labels)) | {0}
        return frozenset(values if self.ignore_label is None else values | {self.ignore_label})

    def subject_of(self, case: str) -> str:
        """Return the person that ``case`` shows."""
        return self.subjects.get(case, case)


def complete(labels: Mapping[str, int]) -> SourceLabels:
    """Return a source that annotates every class."""
    return SourceLabels(COMPLETE_SOURCE, tuple(name for name in labels if name != BACKGROUND))


def read_dataset_json(folder: Path) -> DatasetJson:
    """Read and validate ``folder / "dataset.json"``."""
    path = folder / "dataset.json"
    return parse_dataset_json(read_json(path), where=str(path))


def parse_dataset_json(content: Any, *, where: str = "dataset.json") -> DatasetJson:
    """Validate the content of a ``dataset.json``.

    Parameters
    ----------
    content : dict
        As read from the file; kept, not changed.
    where : str
        What error messages call the file.

    Raises
    ------
    InputError
        If a key is missing, or what it says cannot be meant.
    """
    if not isinstance(content, dict):
        raise InputError(f"{where} must hold a JSON object, got {type(content).__name__}.")
    channels = content.get("channel_names", content.get("modality"))
    if not isinstance(channels, dict) or not channels:
        raise InputError(f'{where} has no "channel_names", for example {{"0": "T1"}}. Add them.')
    ending = content.get("file_ending")
    if not isinstance(ending, str) or not ending.startswith("."):
        raise InputError(f'{where} has no "file_ending", for example ".nii.gz". Add it.')
    labels, ignore_label, has_regions = _parse_labels(content.get("labels"), where)
    declared = content.get("partial_labels")
    if declared is not None and has_regions:
        raise InputError(
            f"{where}: partial_labels needs exclusive classes, but labels hold overlapping "
            "regions. Say what a source merges in its 'merged' entry instead."
        )
    return DatasetJson(
        channel_names={str(k): str(v) for k, v in channels.items()},
        labels=labels,
        ignore_label=ignore_label,
        file_ending=ending,
        has_regions=has_regions,
        subjects=_parse_subjects(content.get("subjects"), where),
        partial_labels=None if declared is None else _parse_partial(declared, labels, where),
        content=content,
        raters=_parse_raters(content.get("multirater"), where),
        full_labels=_parse_full_labels(content.get("full_labels"), labels, where),
    )


def relabelled_content(
    original: DatasetJson, labels: Mapping[str, int], cases: Collection[str]
) -> dict[str, Any]:
    """Return the content of ``dataset.json`` for other label maps of some cases of a dataset.

    The classes of the original are declared as ``full_labels``.

    Parameters
    ----------
    labels : mapping of str to int
        Of the new label maps, background and, if there is one, ignore included.
    """
    content: dict[str, Any] = {
        "channel_names": dict(original.channel_names),
        "labels": dict(labels),
        "full_labels": dict(original.full_labels),
        "numTraining": len(cases),
        "file_ending": original.file_ending,
    }
    reader = original.content.get("overwrite_image_reader_writer")
    if reader is not None:
        content["overwrite_image_reader_writer"] = reader
    subjects = {case: original.subjects[case] for case in cases if case in original.subjects}
    if subjects:
        content["subjects"] = subjects
    return content


def partial_labels_content(
    cases: Mapping[str, Iterable[str]], sources: Iterable[SourceLabels]
) -> Any:
    """Return the JSON value of ``partial_labels`` for sources with explicit case lists."""
    content: dict[str, Any] = {}
    for source in sources:
        content[source.source] = {
            "cases": sorted(cases[source.source]),
            "annotated": list(source.annotated),
        }
        if source.merged:
            content[source.source]["merged"] = {k: list(v) for k, v in source.merged.items()}
        if source.modality:
            content[source.source]["modality"] = source.modality
    return {"sources": content, "unmatched": "error"}


def multirater_content(raters: Iterable[str], identity: str) -> dict[str, Any]:
    """Return the JSON value of ``multirater``."""
    return {"raters": list(raters), "identity": identity}


def _parse_labels(
    labels: Any, where: str, key: str = "labels"
) -> tuple[dict[str, int], int | None, bool]:
    if not isinstance(labels, dict) or labels.get(BACKGROUND) != 0:
        raise InputError(f'{where}: "{key}" must map names to integers, with "background": 0.')
    classes = {str(name): value for name, value in labels.items() if name != IGNORE}
    if len(classes) < 2:
        raise InputError(
            f"{where}: {key} name no class besides the background. Nothing can be learnt."
        )
    if any(isinstance(value, list) for value in classes.values()):
        return {}, labels.get(IGNORE), True
    if not all(type(value) is int for value in labels.values()):
        raise InputError(f"{where}: every label must be an integer, got {labels}.")
    if sorted(labels.values()) != list(range(len(labels))):
        raise InputError(
            f"{where}: label integers must be 0, 1, 2, ... without gaps or repeats, got "
            f"{sorted(labels.values())}."
        )
    if IGNORE in labels and labels[IGNORE] != len(labels) - 1:
        raise InputError(f'{where}: "ignore" must be the highest label ({len(labels) - 1}).')
    return classes, labels.get(IGNORE), False


def _parse_full_labels(declared: Any, labels: Mapping[str, int], where: str) -> Mapping[str, int]:
    if declared is None:
        return labels
    classes, ignore_label, has_regions = _parse_labels(declared, where, "full_labels")
    if has_regions or ignore_label is not None:
        raise InputError(
            f"{where}: full_labels must be exclusive classes with one integer each, without "
            f'"ignore", got {declared}.'
        )
    return classes


def _parse_subjects(subjects: Any, where: str) -> dict[str, str]:
    if subjects is None:
        return {}
    if not isinstance(subjects, dict):
        raise InputError(f'{where}: "subjects" must map case names to subject names.')
    return {str(case): str(subject) for case, subject in subjects.items()}


def _parse_raters(multirater: Any, where: str) -> tuple[str, ...]:
    if multirater is None:
        return ()
    raters = multirater.get("raters") if isinstance(multirater, dict) else None
    if (
        not isinstance(raters, list)
        or len(raters) < 2
        or not all(isinstance(r, str) and re.fullmatch(r"[^./\\][^/\\]*", r) for r in raters)
        or len(set(raters)) < len(raters)
    ):
        raise InputError(
            f'{where}: "multirater" must list at least two different "raters", whose names can be '
            f"folders, got {raters}."
        )
    if multirater.get("order", "as_is") != "as_is":
        raise InputError(
            f'{where}: "order" of multirater can only be as_is, got {multirater["order"]!r}. Make '
            "the dataset with nnmosaic add_raters --order area, which sorts the files."
        )
    if multirater.get("identity", IDENTITIES[0]) not in IDENTITIES:
        raise InputError(
            f'{where}: "identity" of multirater must be {" or ".join(IDENTITIES)}, got '
            f"{multirater['identity']!r}."
        )
    return tuple(raters)


def _parse_partial(declared: Any, labels: Mapping[str, int], where: str) -> PartialLabels:
    if not isinstance(declared, dict) or not isinstance(declared.get("sources"), dict):
        raise InputError(f'{where}: "partial_labels" must be an object with "sources".')
    _refuse_unknown_keys(declared, ("sources", "cases", "unmatched"), f"{where}: partial_labels")
    if declared.get("unmatched", "error") not in ("error", "complete"):
        raise InputError(f'{where}: "unmatched" must be "error" or "complete".')
    overrides = declared.get("cases", {})
    if not isinstance(overrides, dict):
        raise InputError(
            f'{where}: "cases" of partial_labels must map case names to what is annotated in them. '
            'Lists of cases belong into the "cases" of a source.'
        )
    sources: dict[str, SourceLabels] = {}
    patterns: dict[str, str] = {}
    cases: dict[str, str] = {}
    for name, entry in declared["sources"].items():
        here = f"{where}: source {name!r}"
        sources[name] = _parse_source(name, entry, labels, here, known=SOURCE_KEYS)
        if "pattern" not in entry and "cases" not in entry:
            raise InputError(f'{here} says neither by "cases" nor by "pattern" which cases it has.')
        if "pattern" in entry:
            patterns[name] = _checked_pattern(entry["pattern"], here)
        for case in _names(entry.get("cases", []), f'{here}: "cases"'):
            if case in cases:
                raise InputError(f"{here} and source {cases[case]!r} both list case {case!r}.")
            cases[case] = name
    result = PartialLabels(
        sources=sources,
        patterns=patterns,
        cases=cases,
        overrides={
            case: _parse_source(case, entry, labels, f"{where}: case {case!r}")
            for case, entry in overrides.items()
        },
        unmatched_is_complete=declared.get("unmatched") == "complete",
    )
    _refuse_unlearnable(result, labels, where)
    return result


def _refuse_unknown_keys(entry: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    unknown = [key for key in entry if key not in known]
    if unknown:
        raise InputError(
            f"{where} has the unknown key {unknown[0]!r}. Known are {', '.join(known)}: correct "
            "or remove it."
        )


def _names(value: Any, where: str) -> tuple[str, ...]:
    """Return a list of names; a string would be read as its letters."""
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise InputError(f'{where} must be a list of names, such as ["A", "B"], got {value!r}.')
    return tuple(value)


def _checked_pattern(pattern: Any, where: str) -> str:
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise InputError(
            f"{where}: pattern {pattern!r} is no regular expression ({error})."
        ) from None
    return str(pattern)


def _parse_source(
    name: str,
    entry: Any,
    labels: Mapping[str, int],
    where: str,
    *,
    known: Sequence[str] = LABEL_KEYS,
) -> SourceLabels:
    if not isinstance(entry, dict) or "annotated" not in entry:
        raise InputError(f'{where} must say what is "annotated": "all" or a list of class names.')
    _refuse_unknown_keys(entry, known, where)
    merged = _parse_merged(entry.get("merged", {}), where)
    in_groups = [member for members in merged.values() for member in members]
    if entry["annotated"] == "all":
        annotated = tuple(n for n in labels if n != BACKGROUND and n not in in_groups)
    else:
        annotated = _names(entry["annotated"], f'{where}: "annotated", if not "all",')
    for label in (*annotated, *in_groups, *merged):
        if label not in labels or label == BACKGROUND:
            raise InputError(
                f"{where} names the unknown class {label!r}. Known: {', '.join(labels)}."
            )
    claimed = [*annotated, *in_groups]
    twice = sorted({label for label in claimed if claimed.count(label) > 1})
    if twice:
        raise InputError(
            f"{where} has the class {twice[0]!r} in two groups. A class belongs to one."
        )
    modality = entry.get("modality", "")
    if not isinstance(modality, str):
        raise InputError(f'{where}: "modality" must be a word, such as "MR", got {modality!r}.')
    return SourceLabels(name, annotated, merged, modality)


def _parse_merged(declared: Any, where: str) -> dict[str, tuple[str, ...]]:
    if not isinstance(declared, dict):
        raise InputError(
            f'{where}: "merged" must map the label that the files hold to the classes it means, '
            f'such as {{"A": ["A", "B"]}}, got {declared!r}.'
        )
    merged = {key: _names(value, f"{where}: merged {key!r}") for key, value in declared.items()}
    for key, members in merged.items():
        if key not in members or len(members) < 2:
            raise InputError(
                f"{where}: merged label {key!r} must be one of at least two members, got "
                f"{list(members)}."
            )
    return merged


def _refuse_unlearnable(partial: PartialLabels, labels: Mapping[str, int], where: str) -> None:
    """Refuse two classes (background included) that no source tells apart (6.5, pitfall 2)."""
    sources = [*partial.sources.values(), *partial.overrides.values()]
    if partial.unmatched_is_complete or not sources:
        return
    tables = [source.representatives(labels) for source in sources]
    names = sorted(labels, key=labels.__getitem__)
    for j, name in enumerate(names):
        for i, other in enumerate(names[:j]):
            if all(table[i] == table[j] for table in tables):
                raise InputError(
                    f"{where}: no source tells {name!r} from {other!r}, so it cannot be learnt. "
                    "Remove the class, or add a source that annotates it."
                )
