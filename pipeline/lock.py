"""Keeping two commands from writing to one folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from nnmosaic.data_conversion.errors import InputError


@contextmanager
def exclusive(lock: Path, doing: str) -> Iterator[None]:
    """Hold a lock file; a killed process releases it by itself.

    Parameters
    ----------
    doing : str
        What the holder does, for the message.

    Raises
    ------
    InputError
        If another process holds it.
    """
    try:
        with FileLock(lock, timeout=0):
            yield
    except Timeout:
        raise InputError(
            f"{lock.parent}: another process {doing}. Wait for it, or stop it first."
        ) from None
