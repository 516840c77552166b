"""Where raw data, preprocessed data and results live: nnU-Net's three variables, or one folder."""

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.data_conversion.raw_dataset import find_dataset

logger = logging.getLogger(__name__)

VARIABLES = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
DEFAULT = "nnmosaic_data"


_opened: dict[str, "Workspace"] = {}


@dataclass(frozen=True)
class Workspace:
    """The three folders of nnU-Net."""

    raw: Path
    preprocessed: Path
    results: Path

    def dataset(self, identifier: str) -> str:
        """Return the full name of a dataset from its id or name; see `find_dataset`."""
        return find_dataset((self.raw, self.preprocessed, self.results), identifier)

    def raw_dataset(self, identifier: str) -> Path:
        """Return the folder of a raw dataset from its id or name."""
        return self.raw / find_dataset((self.raw,), identifier)


def open_workspace(folder: Path | None = None) -> Workspace:
    """Return the workspace and set nnU-Net's variables to it, for this process and its children.

    Parameters
    ----------
    folder : Path, optional
        Overrides the variables. Without both, ``./nnmosaic_data`` is used, and the user is told so.

    Raises
    ------
    InputError
        If a folder cannot be created or written to.
    RuntimeError
        If this process has opened another workspace: nnU-Net reads the variables only once.
    """
    if folder is None and not all(os.environ.get(name) for name in VARIABLES):
        unset = [name for name in VARIABLES if not os.environ.get(name)]
        folder = Path.cwd() / DEFAULT
        logger.info("%s not set: everything is kept in %s", ", ".join(unset), folder)
        paths = [Path(os.environ.get(name) or folder / name) for name in VARIABLES]
    elif folder is not None:
        paths = [folder.absolute() / name for name in VARIABLES]
    else:
        paths = [Path(os.environ[name]) for name in VARIABLES]
    for name, path in zip(VARIABLES, paths, strict=True):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"{path} cannot be created ({error.strerror}). Give a folder that you can write "
                f"to: --workspace FOLDER, or the variable {name}."
            ) from None
        if not os.access(path, os.W_OK):
            raise InputError(f"{path} is read-only. Choose another folder with --workspace FOLDER.")
    for name, path in zip(VARIABLES, paths, strict=True):
        os.environ[name] = str(path)
    workspace = Workspace(*paths)
    if _opened.setdefault("workspace", workspace) != workspace:
        raise RuntimeError(
            f"This process uses {_opened['workspace'].raw}; start another one for {workspace.raw}."
        )
    return workspace
