"""Check of plain data against type annotations, when it is read back."""

from __future__ import annotations

import dataclasses
import enum
import math
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from autodistill.errors import InputError

# JSON allows numbers of any size. Here they are used in calculations and tables with 64 bits.
_LARGEST = 2**63 - 1
# A name with its quotes that `reprlib` leaves as it is.
_SHORT = reprlib.aRepr.maxstring - 2
_MAPPINGS: tuple[Any, ...] = (Mapping, dict)
_LISTS: tuple[Any, ...] = (Sequence, tuple, list)


def check_typed(value: Any, kind: Any, where: str, *, whole: bool = True) -> None:
    """Check plain data, as read from JSON, against an annotation. Lists stand for tuples.

    A `TypedDict` may have unknown keys, which a later version may have written. A dataclass may not.

    Args:
        value: The data.
        kind: A plain type, a union, a literal, an enumeration, a mapping, a tuple of one type, a `TypedDict`, a
            dataclass, or a combination of these. `Any` allows everything.
        where: Name of the data, for the message.
        whole: Whether fields without a default are required.

    Raises:
        InputError: The data do not fit. The message names the first wrong place, and what it must be.
    """
    origin, arguments, has_fields = _parts(kind)
    if origin in (typing.Union, types.UnionType):
        _check_union(value, arguments, where)
    elif origin is typing.Literal:
        _check(isinstance(value, str) and value in arguments, where, f"one of {', '.join(arguments)}", value)
    elif origin in _MAPPINGS:
        _check(isinstance(value, dict), where, "a mapping", value)
        for key, item in value.items():
            check_typed(item, arguments[1], f"{where}.{_short(key)}")
    elif origin in _LISTS:
        _check(isinstance(value, list | tuple), where, "a list", value)
        for place, item in enumerate(value):
            check_typed(item, arguments[0], f"{where}[{place}]")
    elif has_fields:
        _check_fields(value, kind, where, whole=whole)
    else:
        _check_plain(value, kind, where)


@cache
def _parts(kind: Any) -> tuple[Any, tuple[Any, ...], bool]:
    """Return the origin and arguments of an annotation, and whether it is a dataclass or `TypedDict`."""
    has_fields = dataclasses.is_dataclass(kind) or typing.is_typeddict(kind)
    return typing.get_origin(kind), typing.get_args(kind), has_fields


def _short(key: Any) -> str:
    """Return a key as `reprlib` shortens it. Most are short names, which stay as they are."""
    as_it_is = isinstance(key, str) and len(key) <= _SHORT and key.isidentifier()
    return key if as_it_is else reprlib.repr(key)[1:-1]


def _check_union(value: Any, kinds: tuple[Any, ...], where: str) -> None:
    if value is None and type(None) in kinds:
        return None
    left = [kind for kind in kinds if kind is not type(None)]
    for kind in left[:-1]:
        try:
            return check_typed(value, kind, where)
        except InputError:
            continue
    return check_typed(value, left[-1], where)


def _check_fields(value: Any, kind: Any, where: str, *, whole: bool) -> None:
    _check(isinstance(value, dict), where, "a mapping", value)
    hints, required, closed = _fields(kind)
    missing = sorted(required - value.keys()) if whole else []
    if missing:
        raise InputError(f"{where} lacks {', '.join(missing)}")
    unknown = sorted(value.keys() - hints.keys()) if closed else []
    if unknown:
        raise InputError(f"{where} has no {_short(unknown[0])}")
    for name, hint in hints.items():
        if name in value:
            check_typed(value[name], hint, f"{where}.{name}")


@cache
def _fields(kind: Any) -> tuple[dict[str, Any], frozenset[str], bool]:
    """Return the annotations of a dataclass or `TypedDict`, the required names, and whether others are forbidden."""
    hints = typing.get_type_hints(kind)
    if typing.is_typeddict(kind):
        # `__required_keys__` does not see `NotRequired` if the annotations are strings.
        marked = typing.get_type_hints(kind, include_extras=True)
        optional = {name for name, hint in marked.items() if typing.get_origin(hint) is typing.NotRequired}
        return hints, frozenset(hints.keys() - optional) if kind.__total__ else frozenset(), False
    fields = dataclasses.fields(kind)
    missing = dataclasses.MISSING
    needed = {field.name for field in fields if field.default is missing and field.default_factory is missing}
    return {field.name: hints[field.name] for field in fields}, frozenset(needed), True


def _check_plain(value: Any, kind: Any, where: str) -> None:
    if kind is Any:
        return
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float:
        fine = number and abs(value) <= _LARGEST if isinstance(value, int) else number and math.isfinite(value)
        _check(fine, where, "a finite number", value)
    elif kind is int:
        _check(number and isinstance(value, int) and abs(value) <= _LARGEST, where, "a whole number", value)
    elif isinstance(kind, type) and issubclass(kind, enum.StrEnum):
        allowed = [one.value for one in kind]
        _check(value in allowed, where, f"one of {', '.join(allowed)}", value)
    else:
        _check(type(value) is kind, where, {str: "text", bool: "true or false"}.get(kind, kind.__name__), value)


def _check(fine: bool, where: str, wanted: str, value: Any) -> None:
    if not fine:
        raise InputError(f"{where} must be {wanted}, not {reprlib.repr(value)}")
