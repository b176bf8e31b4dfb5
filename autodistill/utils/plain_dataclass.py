"""Frozen dataclasses that convert to and from plain data. Each field is checked by name and type when it is read."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Self

from autodistill.errors import InputError


def check(condition: bool, message: str) -> None:
    """Raise `InputError` with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise `InputError` unless `value` is in `allowed`."""
    check(value in allowed, f"{name} is {value!r}; it can be {', '.join(allowed)}")


def check_no_blank(request: Any) -> None:
    """Refuse a request with an empty or blank text, which would look like one that was left out.

    Raises:
        InputError: There is such a field; the message names the first one.
    """
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        texts = value if isinstance(value, list | tuple) else [value]
        blank = any(isinstance(text, str) and not text.strip() for text in texts)
        check(not blank, f"{field.name} is empty: give it a text, or leave it out")


def left_out(default: Any, *, mapping: bool = False) -> Any:
    """Make a field that is left out of plain data while it has its default, so that older data stay the same.

    Args:
        default: The default of the field.
        mapping: Whether its pairs become a mapping in plain data.
    """
    return dataclasses.field(default=default, metadata={"left_out": True, "mapping": mapping})


class ToJson:
    """A dataclass whose fields become plain data."""

    def to_json(self) -> dict[str, Any]:
        """Return all fields as plain data, except those that are `left_out`."""
        return typing.cast(dict[str, Any], plain(self))


class PlainDataclass(ToJson):
    """A frozen dataclass that reads and writes plain data, with each field checked by name and type."""

    @classmethod
    def from_json(cls, data: Any, where: str = "") -> Self:
        """Build the dataclass from plain data.

        Raises:
            InputError: A field is unknown, missing or of another type, or the data break a rule of the dataclass.
        """
        where = where or cls.__name__.lower()
        if not isinstance(data, Mapping):
            raise InputError(f"{where} must be a mapping of fields to values, not {data!r}")
        hints = _field_types(cls)
        unknown = sorted(str(key) for key in data if key not in hints)
        if unknown:
            raise InputError(f"{where} has no field {', '.join(unknown)}; its fields are {', '.join(hints)}")
        for name in required(cls):
            if name not in data:
                raise InputError(f"{where} lacks the field {name}")
        return cls(**{name: _convert(data[name], hints[name], f"{where}.{name}") for name in hints if name in data})


hints_of: Callable[[type], dict[str, Any]] = cache(typing.get_type_hints)
"""The types of a class's fields. They are cached, since Python evaluates annotations again at each call."""


def _of_fields(kind: Any) -> dict[str, Any]:
    return {field.name: hints_of(kind)[field.name] for field in dataclasses.fields(kind)}


_field_types: Callable[[type], dict[str, Any]] = cache(_of_fields)


@cache
def without_none(hint: Any) -> Any:
    """Return the type of a value without the alternative None."""
    (held,) = set(typing.get_args(hint)) - {types.NoneType} if isinstance(hint, types.UnionType) else (hint,)
    return held


def _required(kind: Any) -> tuple[str, ...]:
    missing = dataclasses.MISSING
    fields = dataclasses.fields(kind)
    return tuple(one.name for one in fields if one.default is missing and one.default_factory is missing)


required: Callable[[type], tuple[str, ...]] = cache(_required)
"""The names of a dataclass's fields that have no default."""


def plain(value: Any) -> Any:
    """Return a frozen dataclass, or a value of one of its fields, as plain data."""
    if dataclasses.is_dataclass(value):
        found = {}
        for field in dataclasses.fields(value):
            item = getattr(value, field.name)
            if not (field.metadata.get("left_out") and item == field.default):
                found[field.name] = dict(item) if field.metadata.get("mapping") else plain(item)
        return found
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    return value


def _convert(value: Any, hint: Any, where: str) -> Any:
    """Check `value` against the annotation of its field, and return it converted. An int is accepted as a float."""
    held = without_none(hint)
    if value is None and held is not hint:
        return None
    hint = held
    if isinstance(hint, type) and issubclass(hint, PlainDataclass):
        return hint.from_json(value, where)
    if typing.get_origin(hint) is tuple:
        (inner, *_) = typing.get_args(hint)
        if typing.get_origin(inner) is tuple:
            if not isinstance(value, Mapping):
                raise InputError(f"{where} must be a mapping, not {value!r}")
            return tuple(
                tuple(_convert(item, kind, where) for item, kind in zip(pair, typing.get_args(inner), strict=True))
                for pair in value.items()
            )
        if not isinstance(value, list | tuple):
            raise InputError(f"{where} must be a list, not {value!r}")
        return tuple(_convert(item, typing.get_args(hint)[0], where) for item in value)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        raise InputError(f"{where} must be of type {hint.__name__}, not {value!r}")
    if hint is float and not math.isfinite(value):
        raise InputError(f"{where} must be a finite number, not {value!r}")
    return value
