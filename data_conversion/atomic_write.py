"""Writing files so that a reader never meets half of one."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnmosaic.data_conversion.errors import InputError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``target``; on success it takes the target's place.

    On an exception (a kill included) ``target`` keeps its old content.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(content: Any, target: Path) -> None:
    """Write ``content`` as indented JSON, in one step."""
    with replacing(target) as temporary:
        temporary.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    InputError
        If the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    # ValueError: no JSON, no UTF-8, or a number of thousands of digits. RecursionError: too deep.
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}). Mend or restore the file.") from None
