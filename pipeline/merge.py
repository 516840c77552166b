"""The merge command: from dataset ids to a merged raw dataset and a printed matrix."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.merge import (
    matrix_warnings,
    merge_sources,
    parse_renames,
    read_sources,
)
from nnmosaic.data_conversion.new_dataset import new_dataset_folder
from nnmosaic.pipeline.text_table import as_text
from nnmosaic.pipeline.workspace import Workspace

logger = logging.getLogger(__name__)


def merge(
    workspace: Workspace,
    identifier: int,
    name: str,
    sources: Sequence[str],
    *,
    renames: Sequence[str] = (),
    copy_images: bool = False,
) -> str:
    """Merge raw datasets into ``Dataset<identifier>_<name>`` and return the matrix as a table.

    Parameters
    ----------
    sources : sequence of str
        Dataset ids or names.
    renames : sequence of str
        See `nnmosaic.data_conversion.merge.parse_renames`.

    Raises
    ------
    InputError
        If the id is taken, a source is listed twice or broken, or a class cannot be learnt.
    """
    target = new_dataset_folder(workspace.raw, identifier, name)
    folders = {source: workspace.raw_dataset(source) for source in sources}
    if len({*folders.values()}) < len(sources):
        raise InputError(f"--sources lists a dataset twice: {', '.join(sources)}.")
    matrix = merge_sources(
        read_sources(folders, parse_renames(renames)), target, copy_images=copy_images
    )
    for warning in matrix_warnings(matrix):
        logger.warning("Warning: %s", warning)
    return f"{target}\n{_table(matrix)}"


def _table(matrix: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    from rich.table import Table

    table = Table("class", title="cases that show it / cases, voxels (- : not annotated)")
    for source in next(iter(matrix.values())):
        table.add_column(source, justify="right")
    for name, row in matrix.items():
        table.add_row(name, *(_cell(cell) for cell in row.values()))
    return as_text(table)


def _cell(cell: Mapping[str, Any]) -> str:
    if cell["annotated"] == "no":
        return "-"
    merged = " (merged)" if cell["annotated"] == "merged" else ""
    return f"{cell['present']} / {cell['cases']}, {cell['voxels']}{merged}"
