"""Choosing the device, with nnU-Net's thread settings."""

import os

import torch

from nnmosaic.data_conversion.errors import InputError

FEW_CORES = 4
"""Up to here the network needs every core: augmentation in further processes slows it down (on 2
cores a step took 0.33 s with two of them, 0.27 s without)."""


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
    cores = os.cpu_count() or 1
    if "OMP_NUM_THREADS" not in os.environ:  # else torch has as many as the user wants
        torch.set_num_threads(cores if name == "cpu" else 1)
    if name == "cpu" and cores <= FEW_CORES:
        os.environ.setdefault("nnUNet_n_proc_DA", "0")
    return torch.device(name)
