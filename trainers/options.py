"""Options of a trainer: class attributes that a command may set with ``--set NAME=VALUE``.

A class lists the names in ``OPTIONS``, the annotations give types and choices, and a trainer that
combines two methods has the options of both.
"""

from collections.abc import Callable, Mapping
from math import inf
from typing import Any, Literal, NewType, get_args, get_origin, get_type_hints

from nnmosaic.data_conversion.errors import InputError

SWITCH = {"true": True, "false": False}
Fraction = NewType("Fraction", float)
"""An option from 0 to 1."""
Positive = NewType("Positive", float)
"""An option above 0, finite."""
Count = NewType("Count", int)
"""An option that is a whole number from 1."""


LIMITS: Mapping[Any, Callable[[float], bool]] = {
    float: lambda value: value >= 0,
    Fraction: lambda value: 0 <= value <= 1,
    Positive: lambda value: 0 < value < inf,
}


def option_types(trainer: type) -> dict[str, Any]:
    """Return the options' types: `bool`, a number type or ``Literal`` of words."""
    names = [name for cls in trainer.__mro__ for name in vars(cls).get("OPTIONS", ())]
    hints = get_type_hints(trainer) if names else {}
    return {name: hints[name] for name in dict.fromkeys(names)}


def parse_options(trainer: type, given: Mapping[str, str]) -> dict[str, Any]:
    """Return the values of options that were given as text.

    Raises
    ------
    InputError
        If the trainer has no such option, or the value is none that it takes.
    """
    types = option_types(trainer)
    known = ", ".join(f"{name} ({_values(kind)})" for name, kind in types.items())
    for name in given:
        if name not in types:
            raise InputError(
                f"--set: {trainer.__name__} has no option {name!r}. It has {known or 'none'}."
            )
    return {name: _parse(name, text, types[name]) for name, text in given.items()}


def options_of(trainer: Any) -> dict[str, str]:
    """Return the options of a trainer object and their values, as `parse_options` takes them."""
    return {name: str(getattr(trainer, name)).lower() for name in option_types(type(trainer))}


def _parse(name: str, text: str, kind: Any) -> Any:
    if get_origin(kind) is Literal and text in get_args(kind):
        return text
    if kind is bool and text in SWITCH:
        return SWITCH[text]
    if kind in LIMITS:
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if LIMITS[kind](value):
            return value
    if kind is Count and text.isdecimal() and int(text) > 0:
        return int(text)
    raise InputError(f"--set {name}={text}: expected {_values(kind)}.")


def _values(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if kind is Fraction:
        return "a number from 0 to 1"
    if kind is Count:
        return "a whole number from 1"
    if kind is Positive:
        return "a number above 0"
    return "true|false" if kind is bool else "a number of at least 0"
