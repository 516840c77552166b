"""Checkpoints are data: what would run code is refused, what nnU-Net writes is read."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers.checkpoint import read_checkpoint


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.path,)


def test_a_pickle_that_runs_code_is_refused_unread(tmp_path: Path) -> None:
    trap, path = tmp_path / "sprung", tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": {}, "extra": Trap(str(trap))}, path)
    with pytest.raises(InputError, match=r"checkpoint_final\.pth cannot be read as a checkpoint"):
        read_checkpoint(path)
    assert not trap.exists()
    torch.load(path, weights_only=False)
    assert trap.exists()  # the trap does work


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off", pickle.dumps({"a": 1})])
def test_a_damaged_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint_best.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"checkpoint_best\.pth"):
        read_checkpoint(path)


def test_another_kind_of_file_and_a_missing_one_are_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "other.pth")
    with pytest.raises(InputError, match="is no checkpoint of nnU-Net"):
        read_checkpoint(tmp_path / "other.pth")
    with pytest.raises(InputError, match="does not exist"):
        read_checkpoint(tmp_path / "missing.pth")


def test_nnunets_own_checkpoint_is_read(make_trainer: Callable[..., Any], tmp_path: Path) -> None:
    trainer = make_trainer(nnUNetTrainer)
    trainer.initialize()
    trainer._best_ema = np.float64(0.5)
    trainer.logger.log("ema_fg_dice", np.float32(0.25), 0)
    trainer.save_checkpoint(str(tmp_path / "checkpoint_best.pth"))
    checkpoint = read_checkpoint(tmp_path / "checkpoint_best.pth")
    assert checkpoint["_best_ema"] == 0.5
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
