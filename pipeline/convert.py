"""The commands that make a dataset for an experiment: from a dataset id to a line about the new."""

from collections.abc import Sequence
from pathlib import Path

from nnmosaic.data_conversion import add_raters as raters_of_cases
from nnmosaic.data_conversion import hide_labels as hiding
from nnmosaic.data_conversion import sparsify as sparsifying
from nnmosaic.data_conversion.new_dataset import Relabelled, new_dataset_folder
from nnmosaic.pipeline.workspace import Workspace


def hide_labels(
    workspace: Workspace,
    original: str,
    identifier: int,
    name: str,
    *,
    keep: Sequence[str] = (),
    joins: Sequence[str] = (),
    part: str | None = None,
    cases: Sequence[str] = (),
    copy_files: bool = False,
) -> str:
    """Write ``Dataset<identifier>_<name>`` with some classes and cases; return a summary line.

    Parameters
    ----------
    original : str
        Id or name of the dataset.
    joins, part
        See `nnmosaic.data_conversion.hide_labels.parse_joins` and ``parse_part``.

    Raises
    ------
    InputError
        If the id is taken, or what is asked for cannot be done.
    """
    target = new_dataset_folder(workspace.raw, identifier, name)
    written = hiding.hide_labels(
        workspace.raw_dataset(original),
        target,
        keep=keep,
        joins=hiding.parse_joins(joins),
        part=None if part is None else hiding.parse_part(part),
        cases=cases,
        copy_files=copy_files,
    )
    return _summary(target, written)


def sparsify(
    workspace: Workspace,
    original: str,
    identifier: int,
    name: str,
    annotation: sparsifying.Annotation,
    *,
    copy_files: bool = False,
) -> str:
    """Write ``Dataset<identifier>_<name>`` with sparse label maps; return a summary line.

    Parameters
    ----------
    original : str
        Id or name of the dataset.

    Raises
    ------
    InputError
        If the id is taken, or the dataset cannot be converted.
    """
    target = new_dataset_folder(workspace.raw, identifier, name)
    written = sparsifying.sparsify(
        workspace.raw_dataset(original), target, annotation, copy_files=copy_files
    )
    return _summary(target, written)


def add_raters(
    workspace: Workspace,
    identifier: int,
    name: str,
    images: Path,
    raters: Sequence[str],
    what: raters_of_cases.RaterDataset,
    *,
    subjects: Path | None = None,
    copy_files: bool = False,
) -> str:
    """Write ``Dataset<identifier>_<name>`` with several annotations per case; return a summary.

    Parameters
    ----------
    raters : sequence of str
        ``RATER=FOLDER``.

    Raises
    ------
    InputError
        If the id is taken, or a file cannot be used.
    """
    target = new_dataset_folder(workspace.raw, identifier, name)
    cases = raters_of_cases.add_raters(
        images,
        raters_of_cases.parse_raters(raters),
        target,
        what,
        subjects=subjects,
        copy_files=copy_files,
    )
    counts = ", ".join(f"{rater} {number}" for rater, number in cases.items())
    return f"{target}: reference by {what.fusion}; cases of each rater: {counts}"


def _summary(target: Path, written: Relabelled) -> str:
    classes = ", ".join(written.dataset.foreground)
    return (
        f"{target}: {written.cases} cases with {classes}; "
        f"{100 * written.annotated:.1f} % of the voxels annotated"
    )
