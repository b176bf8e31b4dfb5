"""The values that a dimension of a space may take, and `Float`, `Int` and `Choice`, which declare them in Python."""

from __future__ import annotations

import copy
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autodistill.errors import InputError
from autodistill.utils.plain_dataclass import check

Value = str | int | float | bool


def near(word: object, known: Iterable[str]) -> str:
    """Return a hint at what was meant: the known word that is close to `word`, or all known words."""
    known = list(known)
    close = difflib.get_close_matches(str(word), known, n=1)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known) or 'none'}"


def check_fields(data: Mapping[Any, Any], fields: Sequence[str], where: str) -> None:
    """Raise `InputError` for the first key of `data` that is not in `fields`."""
    for key in data:
        if key not in fields:  # `near` is slow, so it is called only for a message
            raise InputError(f"{where} has no field {key}; {near(key, fields)}")


@dataclass(frozen=True, kw_only=True)
class Choices:
    """A finite domain.

    Attributes:
        values: Maps each label to what it puts at the dimension's path: the label itself, or a part of a strategy as
            plain data.
    """

    values: Mapping[Value, Any]

    @property
    def corners(self) -> tuple[Value, ...]:
        """Return the values at which contradictions are looked for: all of them."""
        return tuple(self.values)

    @property
    def grid(self) -> tuple[Value, ...]:
        """Return all values."""
        return tuple(self.values)

    def at(self, quantile: float) -> Value:
        """Return the value at `quantile` of the domain, 0 to 1."""
        labels = self.grid
        return labels[min(int(quantile * len(labels)), len(labels) - 1)]

    def meaning(self, value: Value) -> Any:
        """Return what the label `value` puts at the dimension's path."""
        return self.values[value]

    def holds(self, value: Any) -> bool:
        """Return whether `value` is a label of the domain."""
        return any(value == label and isinstance(value, bool) == isinstance(label, bool) for label in self.values)

    def to_json(self) -> dict[str, Any]:
        """Return the domain as plain data."""
        plain = all(label == data for label, data in self.values.items())
        return {"choices": list(self.values) if plain else copy.deepcopy(dict(self.values))}


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        low, high: Ends.
        step: Distance between neighbouring values, from `low` on, or None if any number is allowed.
        log: Whether values are spread evenly on a logarithmic scale.
        integer: Whether the values are whole numbers.
    """

    low: float
    high: float
    step: float | None = None
    log: bool = False
    integer: bool = False

    def __post_init__(self) -> None:
        check(self.low < self.high, f"low {self.low} must be below high {self.high}")
        check(not self.log or self.low > 0, f"a logarithmic range starts above 0, not at {self.low}")
        if self.step is not None:
            steps = (self.high - self.low) / self.step if self.step > 0 else 0.0
            whole = steps > 0.5 and abs(steps - round(steps)) < 1e-6
            check(whole, f"step {self.step} must be above 0 and lead from {self.low} to {self.high}")
            check(not self.log, "a logarithmic range has no step")

    @property
    def corners(self) -> tuple[Value, ...]:
        """Return both ends."""
        return (self.snap(self.low), self.snap(self.high))

    @property
    def grid(self) -> tuple[Value, ...] | None:
        """Return all values, or None if there is no step between them."""
        step = 1 if self.integer and self.step is None else self.step
        if step is None:
            return None
        return tuple(self.snap(self.low + index * step) for index in range(round((self.high - self.low) / step) + 1))

    def at(self, quantile: float) -> Value:
        """Return the value at `quantile` of the domain, 0 to 1."""
        if self.log:
            return self.snap(self.low * (self.high / self.low) ** quantile)
        if self.grid is not None:
            return Choices(values={value: value for value in self.grid}).at(quantile)
        return self.snap(self.low + quantile * (self.high - self.low))

    def snap(self, number: float) -> Value:
        """Return the nearest value of the domain, rounded to three digits (six if there is a step)."""
        if self.step is not None:
            number = float(f"{self.low + round((number - self.low) / self.step) * self.step:.6g}")
        elif not self.integer:
            number = float(f"{number:.3g}")
        number = min(max(number, self.low), self.high)
        return round(number) if self.integer else float(number)

    def meaning(self, value: Value) -> Any:
        """Return what `value` puts at the dimension's path: itself."""
        return value

    def holds(self, value: Any) -> bool:
        """Return whether `value` is a number of the domain, with any number of digits."""
        if isinstance(value, bool) or not isinstance(value, int if self.integer else int | float):
            return False
        if not self.low <= value <= self.high:
            return False
        return self.step is None or abs(float(self.snap(value)) - value) < 1e-9 * self.step

    def to_json(self) -> dict[str, Any]:
        """Return the domain as plain data."""
        data: dict[str, Any] = {"low": self.low, "high": self.high}
        if self.step is not None:
            data["step"] = self.step
        return data | ({"log": True} if self.log else {})


def read_choices(data: Mapping[str, Any]) -> Choices:
    """Read a domain from a list of values, or from names for parts of a strategy.

    Raises:
        InputError: There are no choices, one is repeated, or bounds are given too.
    """
    choices = data["choices"]
    check(not {"low", "high", "step", "log"} & set(data), "give choices, or low and high, not both")
    check(isinstance(choices, list | Mapping), f"choices must be a list, or a mapping of names, not {choices!r}")
    check(len(choices) > 0, "the domain is empty: give at least one choice")
    if isinstance(choices, list):
        for item in choices:
            check(isinstance(item, Value), f"a listed choice is text or a number, not {item!r}: give it a name")
        check(len(set(choices)) == len(choices), f"the choices {choices} repeat a value")
        return Choices(values={item: item for item in choices})
    for label in choices:
        check(isinstance(label, str), f"the name of a choice is text, not {label!r}")
    return Choices(values=dict(choices))


def read_range(kind: type, data: Mapping[str, Any]) -> Range:
    """Read a domain between `low` and `high`, optionally in steps or on a logarithmic scale.

    Args:
        kind: `int` or `float`.
        data: The dimension's fields in a space file.

    Raises:
        InputError: Bounds are missing, have another type, or leave no values.
    """
    check(kind in (int, float), "this is no number: give choices in place of low and high")
    check("low" in data and "high" in data, "the domain is empty: give choices, or low and high")
    for name in ("low", "high", "step"):
        number = data.get(name, 1)
        usable = not isinstance(number, bool) and isinstance(number, int if kind is int else int | float)
        check(usable and math.isfinite(number), f"{name} must be a number of type {kind.__name__}, not {number!r}")
    check(isinstance(data.get("log", False), bool), f"log is true or false, not {data.get('log')!r}")
    return Range(**{key: data[key] for key in data if key != "when"}, integer=kind is int)


Condition = Mapping[str, Value | Sequence[Value]]
"""Maps paths of other dimensions to the value, or the values, that these must have for a dimension to be used."""


def _plain_condition(when: Condition | None) -> dict[str, Any]:
    if when is None:
        return {}
    check(isinstance(when, Mapping), f"when must be a mapping of paths to values, not {when!r}")
    return {"when": {path: [one] if isinstance(one, Value) else list(one) for path, one in when.items()}}


@dataclass(frozen=True)
class _Numbers:
    """Numbers from `low` to `high`, both included, as a dimension of a space that is made in Python.

    Attributes:
        low, high: Ends.
        step: Distance between neighbouring values, from `low` on, or None if any number is allowed.
        log: Whether values are spread evenly on a logarithmic scale.
        when: The condition on which the dimension is used.
    """

    low: float
    high: float
    step: float | None = field(default=None, kw_only=True)
    log: bool = field(default=False, kw_only=True)
    when: Condition | None = field(default=None, kw_only=True)

    def to_json(self) -> dict[str, Any]:
        """Return the dimension's fields as in a YAML file."""
        step = {} if self.step is None else {"step": self.step}
        return {"low": self.low, "high": self.high, **step, "log": self.log, **_plain_condition(self.when)}


class Float(_Numbers):
    """Numbers from `low` to `high`, both included: `Float(1e-5, 1e-3, log=True)`, `Float(0.5, 1.0, step=0.1)`."""


class Int(_Numbers):
    """Whole numbers from `low` to `high`, both included: `Int(1, 8)`."""


class Choice:
    """One of several values, like `Choice("forward_kl", "jsd")`, or one of several named parts of a strategy.

    A part is written as in a YAML file: `Choice({"none": None, "last": {"layers": "last", "count": 1}})`.

    Args:
        values: Text or numbers, or one mapping of names to parts.
        when: The condition on which the dimension is used.
    """

    def __init__(self, *values: Value | Mapping[str, Any], when: Condition | None = None) -> None:
        self.values, self.when = values, when

    def __repr__(self) -> str:
        when = "" if self.when is None else f", when={self.when!r}"
        return f"Choice({', '.join(map(repr, self.values))}{when})"

    def to_json(self) -> dict[str, Any]:
        """Return the dimension's fields as in a YAML file."""
        named = len(self.values) == 1 and isinstance(self.values[0], Mapping)
        return {"choices": self.values[0] if named else list(self.values), **_plain_condition(self.when)}
