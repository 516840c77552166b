"""Choosing the device, with nnU-Net's thread settings."""

import os

import torch

from nnmosaic.data_conversion.errors import InputError


def choose_device(name: str | None) -> torch.device:
    """Return the device of a command; CUDA where there is one, unless told otherwise.

    Raises
    ------
    InputError
        If the machine has no such device.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch finds no CUDA device here. Use --device cpu.")
    if name == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps: torch finds no Apple GPU here. Use --device cpu.")
    torch.set_num_threads((os.cpu_count() or 1) if name == "cpu" else 1)
    return torch.device(name)
