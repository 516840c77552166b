"""What has been preprocessed: one line per finished case, so that a killed run can go on.

The file lies beside the data folder, because nnU-Net allows no foreign file within it. Its first
line says what the arrays depend on and which cases belong to it.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.atomic_write import replacing
from nnmosaic.data_conversion.raw_dataset import Case


def ledger_path(data_folder: Path) -> Path:
    """Return the ledger of a folder of preprocessed cases."""
    return data_folder.with_name(f"{data_folder.name}_ledger.jsonl")


ARRAYS_DEPEND_ON = (
    "preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm",
    "resampling_fn_data", "resampling_fn_data_kwargs",
    "resampling_fn_seg", "resampling_fn_seg_kwargs",
)  # fmt: skip
"""Entries of a configuration; patch, batch and network may change without new arrays."""

NORMALISATIONS_OF_ONE_IMAGE = {
    "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization"
}  # fmt: skip
"""nnU-Net's schemes that look at the image alone: a new case then leaves the others as they are."""


def resolved_configuration(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """Return a configuration with the entries that it inherits."""
    own: dict[str, Any] = plans["configurations"][configuration]
    parent = own.get("inherits_from")
    return {**resolved_configuration(plans, parent), **own} if parent else dict(own)


def configuration_digest(
    plans: Mapping[str, Any], configuration: str, declared: Mapping[str, Any]
) -> str:
    """Return a digest of everything in the plans that preprocessed arrays depend on.

    Parameters
    ----------
    declared : mapping
        The content of dataset.json, whose labels and raters count as well.
    """
    resolved = resolved_configuration(plans, configuration)
    relevant = {
        "configuration": {key: resolved.get(key) for key in ARRAYS_DEPEND_ON},
        "intensities": None
        if set(resolved.get("normalization_schemes", ("?",))) <= NORMALISATIONS_OF_ONE_IMAGE
        else plans["foreground_intensity_properties_per_channel"],
        "transpose": plans["transpose_forward"],
        "reader": plans["image_reader_writer"],
        "labels": declared["labels"],
    }
    if "multirater" in declared:
        relevant["raters"] = declared["multirater"]["raters"]
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def file_times(case: Case) -> list[list[int]]:
    """Return size (bytes) and time of change (ns) of each file of a case."""
    stats = [path.stat() for path in _files(case)]
    return [[stat.st_size, stat.st_mtime_ns] for stat in stats]


def content_digest(case: Case) -> str:
    """Return a digest of the bytes of all files of a case; names and times do not enter."""
    digest = hashlib.sha256(" ".join(rater for rater, _ in case.raters).encode())
    for path in _files(case):
        digest.update(f"{path.stat().st_size} bytes:".encode())
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    return digest.hexdigest()


def _files(case: Case) -> list[Path]:
    label = [case.label] if case.label else []
    return [*case.images, *label, *(path for _, path in case.raters)]


class Ledger:
    """Record of the finished cases of one preprocessed configuration."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def finished(self, digest: str) -> dict[str, str]:
        """Return finished case -> digest of its files; none if the configuration has changed."""
        header, cases = self._read()
        return cases if header.get("digest") == digest else {}

    def fits(self, digest: str) -> bool:
        """Return whether the arrays were made for this digest; True where there is no ledger."""
        return bool(self._read()[0].get("digest", digest) == digest)

    def missing(self) -> list[str]:
        """Return the cases that were announced but not finished; none where there is no ledger."""
        header, cases = self._read()
        return sorted(set(header.get("cases", ())) - set(cases))

    def begin(self, digest: str, cases: Sequence[str], finished: Mapping[str, str]) -> None:
        """Announce ``cases`` and keep the ``finished`` ones."""
        with replacing(self.path) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"digest": digest, "cases": sorted(cases)}) + "\n")
            for case, content in finished.items():
                file.write(json.dumps({"case": case, "content": content}) + "\n")

    def add(self, case: str, content: str) -> None:
        """Record that all files of a case are in place."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"case": case, "content": content}) + "\n")

    def _read(self) -> tuple[dict[str, Any], dict[str, str]]:
        if not self.path.is_file():
            return {}, {}
        header: dict[str, Any] = {}
        cases: dict[str, str] = {}
        for number, line in enumerate(self.path.read_text(encoding="utf-8").splitlines()):
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line that a kill cut off
                continue
            if number == 0:
                header = entry
            else:
                cases[entry["case"]] = entry.get("content", "")
        return header, cases
