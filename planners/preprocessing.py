"""Preprocessing as a whole: what is left to do, and what is finished. Runs without torch.

The work on one case is in `nnmosaic.planners.planning_worker`.
"""

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.atomic_write import read_json, replacing
from nnmosaic.data_conversion.dataset_json import DatasetJson
from nnmosaic.data_conversion.raw_dataset import Case
from nnmosaic.planners.ledger import (
    Ledger,
    configuration_digest,
    ledger_path,
    resolved_configuration,
)
from nnmosaic.planners.worker_pool import call, run_cases

SUFFIXES = (".b2nd", "_seg.b2nd", ".pkl")
"""Files of one preprocessed case."""

RATER_SUFFIXES = (".b2nd", ".npz")
"""Files of one case with what the raters drew, in a folder of their own."""

FULL_REFERENCES_FOLDER = "gt_full_segmentations"
"""Complete label maps beside ``gt_segmentations``, as the raw dataset's ``labelsTr_full``."""

RATER_REFERENCES_FOLDER = "gt_segmentations_raters"
"""Label maps of raters beside ``gt_segmentations``: RATER/CASE."""


def rater_folder(folder: str | Path) -> Path:
    """Return where the label maps of raters lie, for a folder of preprocessed data."""
    return Path(f"{folder}_raters")


def _folders(folder: Path, dataset: DatasetJson) -> dict[Path, tuple[str, ...]]:
    """Return folder -> suffixes of the files that each case has in it."""
    return {folder: SUFFIXES, **({rater_folder(folder): RATER_SUFFIXES} if dataset.raters else {})}


def case_file(scratch: str | Path, process: int) -> Path:
    """Return the file in which a worker process notes the case it is working on."""
    return Path(scratch) / f"{process}.case"


def data_identifier(plans: Mapping[str, Any], configuration: str) -> str:
    """Return the name of the folder with the preprocessed data of a configuration."""
    return str(resolved_configuration(plans, configuration)["data_identifier"])


def preprocess_configuration(
    cases: Sequence[Case],
    dataset: DatasetJson,
    plans_file: Path,
    configuration: str,
    pool: Executor,
    *,
    contents: Mapping[str, str],
    on_case: Callable[[str], None],
) -> int:
    """Preprocess the cases that are not yet done and return their number.

    Arrays equal those of ``nnUNetv2_preprocess`` bit for bit. Each case appears in the data folder
    when all its files are written, and only then enters the ledger.

    Parameters
    ----------
    plans_file : Path
        In the dataset's folder of ``nnUNet_preprocessed``; the data folder lies beside it.
    contents : mapping of str to str
        Case -> digest of its files (`nnmosaic.planners.ledger.content_digest`).
    on_case : callable
        Called with the name of each finished case.
    """
    plans = read_json(plans_file)
    identifier = data_identifier(plans, configuration)
    folder = plans_file.parent / identifier
    ledger = Ledger(ledger_path(folder))
    digest = configuration_digest(plans, configuration, dataset.content)
    finished = finished_cases(plans_file, plans, configuration, dataset, contents)
    # Half a case, or a case that left the dataset: the ledger does not vouch for it.
    for place, suffixes in _folders(folder, dataset).items():
        place.mkdir(parents=True, exist_ok=True)
        _remove_all_but(place, {f"{name}{suffix}" for name in finished for suffix in suffixes})
    ledger.begin(digest, list(contents), finished)
    scratch = folder.with_name(f".{identifier}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    todo = {c.identifier: c for c in cases if c.identifier not in finished}
    arguments = {
        name: (case, str(plans_file), configuration, dataset.content, str(scratch), str(folder))
        for name, case in todo.items()
    }
    try:
        work = partial(call, "preprocess_case")
        for name, _ in run_cases(pool, work, arguments, case_of=partial(_noted_case, scratch)):
            ledger.add(name, contents[name])
            on_case(name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return len(todo)


def _noted_case(scratch: Path, process: int) -> str | None:
    note = case_file(scratch, process)
    return note.read_text(encoding="utf-8") if note.is_file() else None


def finished_cases(
    plans_file: Path,
    plans: Mapping[str, Any],
    configuration: str,
    dataset: DatasetJson,
    contents: Mapping[str, str],
) -> dict[str, str]:
    """Return case -> digest of its files, for those that are preprocessed and unchanged."""
    folder = plans_file.parent / data_identifier(plans, configuration)
    digest = configuration_digest(plans, configuration, dataset.content)
    folders = _folders(folder, dataset)
    return {
        name: content
        for name, content in Ledger(ledger_path(folder)).finished(digest).items()
        if contents.get(name) == content
        and all((at / f"{name}{end}").is_file() for at, ends in folders.items() for end in ends)
    }


def copy_references(labels: Mapping[str, Path], folder: Path, file_ending: str) -> None:
    """Copy new or changed label files to ``folder``, for validation.

    In ``gt_segmentations``, files of other cases stay, because nnU-Net fails where an old
    prediction has no reference. Elsewhere they are deleted: validation would go on scoring them.

    Parameters
    ----------
    labels : mapping of str to Path
        Case -> label file.
    """
    files = {f"{case}{file_ending}": label for case, label in labels.items()}
    if files:
        folder.mkdir(parents=True, exist_ok=True)
    if folder.name != "gt_segmentations" and folder.is_dir():
        _remove_all_but(folder, files)
    for name, label in files.items():
        target = folder / name
        if not target.is_file() or target.stat().st_mtime_ns != label.stat().st_mtime_ns:
            with replacing(target) as temporary:
                shutil.copy2(label, temporary)


def _remove_all_but(folder: Path, keep: Collection[str]) -> None:
    for path in folder.iterdir():
        if path.name not in keep:
            path.unlink()
