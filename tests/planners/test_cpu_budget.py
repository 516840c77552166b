"""Choosing a CPU plan for some minutes, with a made-up machine."""

from typing import Any

import pytest

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.cpu_budget import (
    ENOUGH_STEPS,
    MIN_STEPS,
    Speed,
    fit_to_seconds,
    fitted_decisions,
    widened,
)
from nnmosaic.planners.small_machine_planner import CPU_RUN

NAME = "3d_fullres"


def plans(size: float) -> dict[str, Any]:
    arguments = {"features_per_stage": [8, 16, 32, 64, 128]}
    patch = [round(64 * size), 64, 64]
    configuration = {"patch_size": patch, "architecture": {"arch_kwargs": arguments}}
    return {"configurations": {NAME: configuration}}


class Machine:
    """Takes ``per_step`` seconds for 8 features and the whole patch; four times for twice that."""

    def __init__(self, per_step: float, **others: float) -> None:
        self.per_step = per_step
        self.others = others
        self.measured: list[tuple[int, int]] = []

    def measure(self, candidate: dict[str, Any]) -> Speed:
        chosen = candidate["configurations"][NAME]
        features = chosen["architecture"]["arch_kwargs"]["features_per_stage"][0]
        self.measured.append((features, chosen["patch_size"][0]))
        step = self.per_step * (features / 8) ** 2 * chosen["patch_size"][0] / 64
        beside = {"to_start": 5.0, "per_epoch": 1.0, "per_validation_case": 0.5, "memory_gb": 1.0}
        return Speed(per_step=step, per_validation_step=step / 2, **{**beside, **self.others})

    def fit(self, seconds: float) -> Any:
        arguments = {"seconds": seconds, "validation_cases": 20}
        return fit_to_seconds(plans, self.measure, NAME, CPU_RUN, **arguments)


@pytest.mark.parametrize("per_step", [0.001, 0.01, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("minutes", [2, 10, 30, 300])
def test_the_training_fits_and_uses_the_time(per_step: float, minutes: float) -> None:
    try:
        fit = Machine(per_step).fit(60 * minutes)
    except InputError:
        assert per_step * 10 / 16 > 60 * minutes - 40  # not even ten of the smallest steps
        return
    assert fit.seconds_per_fold <= 60 * minutes
    one_more = fit.settings.epochs * fit.speed.per_step
    assert fit.seconds_per_fold + 1.01 * one_more + fit.speed.per_step > 60 * minutes
    assert fit.settings.initial_lr == CPU_RUN.initial_lr


def test_time_to_spare_goes_into_a_wider_network() -> None:
    machine = Machine(0.1)
    fit = machine.fit(60 * 30)  # about 16000 steps of 8 features, or 4000 of 16
    assert fit.plans["configurations"][NAME]["architecture"]["arch_kwargs"][
        "features_per_stage"
    ] == [16, 32, 64, 128, 256]
    assert fit.settings.epochs * fit.settings.iterations_per_epoch >= ENOUGH_STEPS
    assert machine.measured == [(8, 64), (16, 64)]
    narrow = Machine(0.1).fit(60 * 8)
    assert (
        narrow.plans["configurations"][NAME]["architecture"]["arch_kwargs"]["features_per_stage"][0]
        == 8
    )
    what = {decision.what: decision for decision in fitted_decisions(fit, NAME, 1)}
    assert what["features"].choice == "from 16"
    assert "16 of 32 features" in what["given up"].choice


def test_a_slow_machine_gets_a_smaller_patch() -> None:
    machine = Machine(1.0)
    fit = machine.fit(60 * 7)
    assert [patch for _, patch in machine.measured] == [64, 32]
    assert fit.settings.epochs * fit.settings.iterations_per_epoch >= MIN_STEPS


def test_too_few_minutes_are_refused() -> None:
    with pytest.raises(InputError, match="too few for any training"):
        Machine(1.0).fit(15)


def test_features_are_doubled_up_to_nnunets() -> None:
    wider = widened(widened(plans(1.0), NAME), NAME)
    assert wider["configurations"][NAME]["architecture"]["arch_kwargs"]["features_per_stage"] == [
        32, 64, 128, 256, 320
    ]  # fmt: skip
    assert widened(wider, NAME) is None
