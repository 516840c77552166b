"""The teacher inside ambiguous groups: when it starts, what it is trusted with, what it needs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers.self_disambiguation.ambiguity import OpenVoxels
from nnmosaic.trainers.self_disambiguation.trainer import nnUNetTrainerSelfDisambiguation

PARTIAL = "Dataset007_Merged"
Make = Callable[..., Any]


def test_the_teacher_starts_when_it_is_told_to(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"ema_teacher": "true", "teacher_start": "0.4", "ramp": "0.4"}
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL, options=options)
    trainer.on_train_start()
    trainer.num_epochs, trainer.num_iterations_per_epoch = 2, 5
    trainer.teacher_threshold = trainer.teacher_foreground_threshold = 0.0
    batch = next(trainer.dataloader_train)
    logits = trainer.network(batch["data"])

    def weight() -> float:
        return trainer.auxiliary_losses(batch, logits)["teacher"].item()

    trainer.iteration = 9
    full = weight()
    assert full > 0
    for trainer.iteration, part in ((4, 0.25), (5, 0.5), (7, 1)):
        assert weight() == pytest.approx(part * full)
    trainer.iteration = 0
    monkeypatch.setattr(trainer, "_spent_budget", lambda: 0.5)
    assert weight() == pytest.approx(0.25 * full)
    monkeypatch.undo()

    def asked(_: torch.Tensor) -> torch.Tensor:
        raise AssertionError("the teacher was asked before its start")

    trainer.teacher = asked
    for trainer.iteration in range(4):
        assert trainer.auxiliary_losses(batch, logits) == {}
    trainer.iteration = 4
    with pytest.raises(AssertionError, match="before its start"):
        trainer.auxiliary_losses(batch, logits)


def test_the_teacher_answers_before_the_softmax_is_held_and_is_trusted_as_told(
    make_trainer: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {
        "ema_teacher": "true", "teacher_threshold": "0.4", "teacher_foreground_threshold": "0.8",
        "entropy": "conditional", "ramp": "0",
    }  # fmt: skip
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL, options=options)
    trainer.on_train_start()
    batch = next(trainer.dataloader_train)
    logits = [level.detach() for level in trainer.network(batch["data"])]
    goal = torch.zeros_like(logits[0])
    goal[:, 0, 6:] = goal[:, 1:, :6] = 1  # 0.73 inside a group: sure enough of background only
    inside = OpenVoxels(logits[0], batch["target"][0], trainer._representatives(batch))
    expected, swapped = (
        inside.teacher_cross_entropy(goal, threshold=a, foreground_threshold=b).item()
        for a, b in ((0.4, 0.8), (0.8, 0.4))
    )
    assert abs(expected - swapped) > 0.01
    order = []

    def teacher(_: torch.Tensor) -> torch.Tensor:
        order.append("teacher")
        return goal

    def student(*arguments: Any, **options: Any) -> OpenVoxels:
        order.append("student")
        return OpenVoxels(*arguments, **options)

    trainer.teacher = teacher
    monkeypatch.setattr("nnmosaic.trainers.self_disambiguation.trainer.OpenVoxels", student)
    terms = trainer.auxiliary_losses(batch, logits)
    assert order == ["teacher", "student"]
    assert terms["teacher"].item() == pytest.approx(expected)
    assert terms["conditional_entropy"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher_threshold": "0.5"}, "teacher_threshold=0.5 changes nothing without a teacher"),
        ({"teacher_foreground_threshold": "0.5"}, "teacher_foreground_threshold=0.5 changes"),
        ({"teacher_start": "0.5"}, "teacher_start=0.5 changes nothing.* Add ema_teacher=true"),
        ({"teacher_weight": "2"}, "teacher_weight=2 changes nothing"),
        ({"teacher_decay": "0.9"}, "teacher_decay=0.9 changes nothing"),
        (
            {"ema_teacher": "true", "teacher_start": "0.9"},
            r"teacher_start=0.9 and ramp=0.15: .* not count in full before .* ends. Let them",
        ),
        (
            {"ema_teacher": "true", "teacher_start": "1", "ramp": "0"},
            "teacher_start=1 and ramp=0: ",
        ),
    ],
)
def test_options_that_would_do_nothing_are_refused(
    make_trainer: Make, options: dict[str, str], message: str
) -> None:
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL, options=options)
    with pytest.raises(InputError, match=message):
        trainer.initialize()


@pytest.mark.parametrize(("start", "ramp"), [("0.85", "0.15"), ("0.6", "0.4"), ("0", "1")])
def test_a_teacher_that_is_there_in_full_at_the_end_is_accepted(
    make_trainer: Make, start: str, ramp: str
) -> None:
    options = {"ema_teacher": "true", "teacher_start": start, "ramp": ramp}
    trainer = make_trainer(nnUNetTrainerSelfDisambiguation, PARTIAL, options=options)
    trainer.initialize()
    trainer.iteration = trainer.num_epochs * trainer.num_iterations_per_epoch - 1
    assert trainer._ramp(trainer.teacher_start) == pytest.approx(1)
