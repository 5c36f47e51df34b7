"""Checks of settings: names, types and ranges, each with a one-line remedy. No torch."""

from __future__ import annotations

import dataclasses
import difflib
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

from chargpt.base.errors import UserError

ConfigT = TypeVar("ConfigT")


def from_dict(cls: type[ConfigT], values: Mapping[str, Any]) -> ConfigT:
    """Build a configuration from plain values, such as a saved ``config.json``.

    Raises:
        UserError: an unknown name (with the nearest known one), a value of the wrong type or range.
    """
    assert dataclasses.is_dataclass(cls)
    check_names(values, [field.name for field in dataclasses.fields(cls)])
    return cls(**values)


def check_names(names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name that is not `known`, naming the nearest that is.

    Raises:
        UserError: the first unknown name.
    """
    known = list(known)
    for name in names:
        if name not in known:
            raise UserError(f"unknown setting {name!r}{did_you_mean(str(name), known)}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``": did you mean …?"`` for the nearest known word, or else the choice of words."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    if near:
        return f": did you mean {near[0]}?"
    return f": known are {', '.join(known)}"


def flag(name: str) -> str:
    """Return the command-line flag for a field: ``d_model`` is ``--d-model``."""
    return "--" + name.replace("_", "-")


def check(good: bool, config: object, name: str, remedy: str) -> None:
    """Refuse the value of a field that is not good.

    Raises:
        UserError: what, the value, the remedy and the flag.
    """
    if not good:
        raise UserError(f"{name} is {getattr(config, name)!r:.80}: {remedy} ({flag(name)})")


def check_seed(config: Any) -> None:
    """Refuse a seed that the generators do not take.

    Raises:
        UserError: it is negative or has more than 63 bits.
    """
    check(0 <= config.seed < 2**63, config, "seed", "give a whole number from 0 to 2^63 - 1")


def check_types(config: Any) -> None:
    """Refuse values of the wrong type, which TOML, JSON and Python let through.

    A whole number where a number belongs becomes one, a list where a tuple belongs too.

    Raises:
        UserError: the first field whose value has the wrong type.
    """
    hints = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        good = _as_type(value, hint)
        if good is _WRONG:
            raise UserError(
                f"{field.name} is {value!r}: give {_describe(hint)} ({flag(field.name)})"
            )
        object.__setattr__(config, field.name, good)


_WRONG = object()


def _as_type(value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`, where JSON's and TOML's types allow it, else _WRONG."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value if value in arguments else _WRONG
    if origin is types.UnionType:
        kinds = (_as_type(value, kind) for kind in arguments)
        return next((good for good in kinds if good is not _WRONG), _WRONG)
    if origin is tuple:
        good = isinstance(value, list | tuple) and all(isinstance(v, str) for v in value)
        return tuple(value) if good else _WRONG
    if origin in (dict, Mapping):
        return _as_mapping(value, *arguments)
    if hint is float and type(value) in (int, float):
        return float(value) if abs(value) <= sys.float_info.max else _WRONG  # no NaN, no infinity
    return value if type(value) is hint else _WRONG


def _as_mapping(value: Any, key_hint: Any, value_hint: Any) -> Any:
    if not isinstance(value, Mapping):
        return _WRONG
    if value_hint is Any:
        return dict(value)
    good = {_as_type(k, key_hint): _as_type(v, value_hint) for k, v in value.items()}
    return _WRONG if _WRONG in (*good, *good.values()) else good


def _describe(hint: Any) -> str:
    """Return what a person is to give for the type `hint`."""
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is Mapping:
        return "texts with numbers, such as e=-2"
    if typing.get_origin(hint) is types.UnionType:
        return _describe(typing.get_args(hint)[0])
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return words.get(hint, "a list of texts")
