"""Checks of settings: names, types and ranges, each with a one-line remedy. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from chargpt.base.errors import UserError

ConfigT = TypeVar("ConfigT")


class Rule(NamedTuple):
    """The values that a field ``Annotated[T, Rule(...)]`` takes, besides None where T has None."""

    accepts: Callable[[Any], bool]
    remedy: str  # ends an error message: "give a positive number"


def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Build a configuration from plain values; a UserError names the first bad name or value."""
    assert dataclasses.is_dataclass(cls)
    check_names(values, [field.name for field in dataclasses.fields(cls)])
    return cls(**values)


def check_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Raise a UserError for the first name that is not `known`, with the nearest known one."""
    known = list(known)
    for name in names:
        if name not in known:
            raise UserError(f"unknown setting {name!r}{did_you_mean(str(name), known)}")


def did_you_mean(
    word: str, known: Iterable[str], *, otherwise: str = "", cutoff: float = 0.6
) -> str:
    """Return ``": did you mean …?"`` with the nearest known word to an unknown one.

    If none is near (`cutoff`, see `difflib.get_close_matches`): `otherwise`, or all known words.
    """
    known = list(known)
    if near := difflib.get_close_matches(word, known, n=1, cutoff=cutoff):
        return f": did you mean {near[0]}?"
    return f": {otherwise or 'give one of ' + ', '.join(known)}"


def check(good: bool, config: object, name: str, remedy: str) -> None:
    """Unless `good`, raise a UserError with the field's name, its value, the remedy, its flag."""
    if not good:
        flag = "--" + name.replace("_", "-")
        raise UserError(f"{name} is {getattr(config, name)!r:.80}: {remedy} ({flag})")


def check_fields(config: Any) -> None:
    """Raise a UserError for the first field of a dataclass with a wrong type or range.

    An int in a float field becomes a float, and a list in a tuple field becomes a tuple.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for field in dataclasses.fields(config):
        name, hint = field.name, hints[field.name]
        kind, *rules = typing.get_args(hint) if typing.get_origin(hint) is Annotated else [hint]
        value = _as_type(getattr(config, name), kind)
        check(value is not _WRONG, config, name, f"give {_describe(kind)}")
        object.__setattr__(config, name, value)
        for rule in rules:
            check(value is None or rule.accepts(value), config, name, rule.remedy)


_WRONG = object()


def _as_type(value: Any, hint: Any) -> Any:
    """Return `value` converted to the type `hint`, or _WRONG if it does not fit."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value if value in arguments else _WRONG
    if origin is types.UnionType:
        kinds = (_as_type(value, kind) for kind in arguments)
        return next((good for good in kinds if good is not _WRONG), _WRONG)
    if origin is tuple:
        good = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        return tuple(value) if good else _WRONG
    if origin in (dict, Mapping) and isinstance(value, Mapping):
        key, entry = arguments
        entries = {_as_type(k, key): _as_type(v, entry) for k, v in value.items()}
        return _WRONG if _WRONG in (*entries, *entries.values()) else entries
    if hint is float and type(value) in (int, float):
        return float(value) if abs(value) <= sys.float_info.max else _WRONG  # not NaN or infinite
    return value if hint is Any or type(value) is hint else _WRONG


def _describe(hint: Any) -> str:
    """Return in words what to give for the type `hint`."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return _describe(arguments[0])
    if origin is Literal:
        return "one of " + ", ".join(arguments)
    if origin is Mapping:
        return "texts with numbers, such as e=-2"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return words.get(hint, "a list of texts")
