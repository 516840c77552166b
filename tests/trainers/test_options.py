"""Options that ``--set`` takes."""

from typing import ClassVar, Literal

import pytest

from nnmosaic.data_conversion.errors import InputError
from nnmosaic.trainers import TRAINERS
from nnmosaic.trainers.lookup import trainer_class
from nnmosaic.trainers.options import (
    Count,
    Fraction,
    Positive,
    option_types,
    options_of,
    parse_options,
)


class First:
    OPTIONS: ClassVar[tuple[str, ...]] = ("form", "weight")
    form: Literal["a", "b"] = "a"
    weight: float = 1.0
    hidden: float = 2.0


class Second:
    OPTIONS: ClassVar[tuple[str, ...]] = ("teacher", "decay", "every", "heat")
    teacher: bool = False
    every: Count = Count(1)
    heat: Positive = Positive(1.0)
    decay: Fraction = Fraction(0.5)


class Both(First, Second):
    """A combination has the options of both parents."""


def test_values_have_the_type_of_the_option() -> None:
    given = {"form": "b", "weight": "0.5", "teacher": "true", "every": "3"}
    assert parse_options(Both, given) == {"form": "b", "weight": 0.5, "teacher": True, "every": 3}
    assert parse_options(First, {"weight": "inf"}) == {"weight": float("inf")}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hidden": "1"}, r"no option 'hidden'. It has form \(a\|b\), weight \(a number"),
        ({"form": "c"}, r"--set form=c: expected a\|b"),
        ({"weight": "-1"}, "--set weight=-1: expected a number of at least 0"),
        ({"weight": "much"}, "--set weight=much: expected a number"),
        ({"decay": "99"}, "--set decay=99: expected a number from 0 to 1"),
        ({"every": "0"}, "--set every=0: expected a whole number from 1"),
        ({"every": "1.5"}, "--set every=1.5: expected a whole number from 1"),
        ({"heat": "0"}, "--set heat=0: expected a number above 0"),
        ({"heat": "inf"}, "--set heat=inf: expected a number above 0"),
        ({"teacher": "yes"}, r"--set teacher=yes: expected true\|false"),
    ],
)
def test_what_is_none_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_options(Both, given)


@pytest.mark.parametrize("name", list(TRAINERS))
def test_every_option_of_a_trainer_is_an_attribute_with_its_default(name: str) -> None:
    trainer = trainer_class(name)
    defaults = {option: getattr(trainer, option) for option in option_types(trainer)}
    assert parse_options(trainer, options_of(trainer.__new__(trainer))) == defaults
