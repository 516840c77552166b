"""Reading checkpoints without running what a pickle says."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.plans_section import RunSettings

EXTRA = "nnmosaic"
"""Key of nnMosaic's own entries in a checkpoint; nnU-Net ignores it."""

_NUMPY_SCALARS = [
    np.dtype,
    type(np.float64(0)),
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "b1")),
    (np.float64(0).__reduce__()[0], "numpy.core.multiarray.scalar"),
    (np.float64(0).__reduce__()[0], "numpy._core.multiarray.scalar"),
]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of nnU-Net or nnMosaic to the CPU; only tensors and plain values pass.

    Raises
    ------
    InputError
        If the file is missing, damaged, or holds anything else.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist.")
    try:
        with torch.serialization.safe_globals(_NUMPY_SCALARS):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever it meets in the file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{path} cannot be read as a checkpoint ({reason}). It may be damaged, or hold objects "
            "that would run code when loaded: use another checkpoint of this training."
        ) from None
    if not isinstance(checkpoint, dict) or "network_weights" not in checkpoint:
        raise InputError(f"{path} is no checkpoint of nnU-Net: it has no network weights.")
    return checkpoint


def stored_settings(path: Path) -> RunSettings:
    """Return the run settings that a checkpoint was trained with; empty ones for nnU-Net's own."""
    return RunSettings(**read_checkpoint(path).get(EXTRA, {}).get("run_settings", {}))
