"""From names to trainer classes, also where nnU-Net's own lookup is broken."""

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers import TRAINERS
from nnmosaic.trainers.lookup import trainer_class


def broken(name: str) -> type:
    raise RuntimeError("operator torchvision::nms does not exist\nmore lines")


def test_own_trainers_and_nnunets_need_no_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "nnunetv2.utilities.find_objects.recursive_find_trainer_class_by_name", broken
    )
    assert {trainer_class(name).__name__ for name in TRAINERS} == set(TRAINERS)
    assert trainer_class("nnUNetTrainer") is nnUNetTrainer


def test_a_broken_walk_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "nnunetv2.utilities.find_objects.recursive_find_trainer_class_by_name", broken
    )
    with pytest.raises(
        InputError, match=r"'nnUNetTrainer_5epochs' was not found.*torchvision::nms"
    ):
        trainer_class("nnUNetTrainer_5epochs")
