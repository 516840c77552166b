from typing import Any

import pytest

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.planners.plans_section import (
    ClusteringPlan,
    PlansSection,
    RunSettings,
    read_section,
    write_section,
)


def test_a_section_is_read_as_it_was_written() -> None:
    section = PlansSection({"device": "cpu"}, RunSettings(epochs=3, optimizer="adamw"))
    plans: dict[str, Any] = {"plans_name": "p"}
    write_section(plans, section)
    assert read_section(plans) == section
    assert plans["nnmosaic"]["run_settings"] == {"epochs": 3, "optimizer": "adamw"}


def test_what_a_network_is_built_from_is_only_in_plans_that_have_it() -> None:
    plans: dict[str, Any] = {}
    write_section(plans, PlansSection())
    assert not {"multirater", "clustering"} & set(plans["nnmosaic"])
    assert read_section(plans).clustering is None
    section = PlansSection(clustering=ClusteringPlan("last", regions=True))
    write_section(plans, section)
    assert read_section(plans) == section


def test_plans_of_nnunet_have_an_empty_section() -> None:
    assert read_section({}).run_settings == RunSettings()


def test_settings_of_the_command_go_before_those_of_the_plans() -> None:
    merged = RunSettings(epochs=5).over(RunSettings(epochs=3, seed=1))
    assert merged == RunSettings(epochs=5, seed=1)


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"initial_lr": -1.0}, {"optimizer": "lion"}, {"time_budget": 0.0}]
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"--{next(iter(wrong))} must be"):
        RunSettings(**wrong)


@pytest.mark.parametrize(
    "section", [{"run_settings": {"epoch": 3}}, {"multirater": {"raters": ["A", "B"], "bank": 100}}]
)
def test_an_unknown_setting_in_the_plans_is_refused(section: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=r"unknown setting .*\.(epoch|bank)\"\. Correct it"):
        read_section({"nnmosaic": section})
