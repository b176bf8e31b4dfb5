"""A dimension of a space: a dotted path in a strategy, its domain, and its conditions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autodistill.errors import InputError
from autodistill.strategy.domains import (
    Choice,
    Choices,
    Float,
    Int,
    Range,
    Value,
    check_fields,
    near,
    read_choices,
    read_range,
)
from autodistill.strategy.strategy import Strategy
from autodistill.utils.plain_dataclass import PlainDataclass, check, hints_of, without_none

Point = dict[str, Value]

_DIMENSION_FIELDS = ("choices", "low", "high", "step", "log", "when")


def _strategy_paths(part: type[PlainDataclass] = Strategy, prefix: str = "") -> dict[str, type]:
    paths: dict[str, type] = {}
    for name, optional in hints_of(part).items():
        hint = without_none(optional)
        paths[prefix + name] = hint
        if isinstance(hint, type) and issubclass(hint, PlainDataclass):
            paths |= _strategy_paths(hint, f"{prefix}{name}.")
    return paths


PATHS: Mapping[str, type] = _strategy_paths()


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """One property of a strategy that may vary.

    Attributes:
        path: Dotted path in a strategy, like "distillation.temperature.shape".
        domain: The values that it may have.
        when: For other dimensions, the values that they may have. The dimension is used only if all of these hold.
    """

    path: str
    domain: Choices | Range
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)

    def __hash__(self) -> int:
        return hash(self.path)  # mappings have no hash of their own

    def active(self, point: Mapping[str, Value]) -> bool:
        """Return whether this dimension is used at `point`, which has values for the dimensions before this one."""
        return all(path in point and point[path] in values for path, values in self.when.items())

    def to_json(self) -> dict[str, Any]:
        """Return the dimension as plain data, without its path."""
        when = {path: list(values) for path, values in self.when.items()}
        return self.domain.to_json() | ({"when": when} if when else {})

    @classmethod
    def from_json(cls, path: str, data: Any) -> Dimension:
        """Read one dimension from plain data, as in a space file, or from its declaration in Python.

        Args:
            path: Dotted path in a strategy.
            data: Plain data, or a `Float`, `Int` or `Choice`.

        Raises:
            InputError: An unknown path or field, a wrong type, an empty domain.
        """
        if path not in PATHS:
            raise InputError(f"no strategy has {path}; {near(path, PATHS)}")
        if isinstance(data, Float | Int | Choice):
            other = int if isinstance(data, Float) else float if isinstance(data, Int) else None
            hint = "a whole number: use Int" if other is int else "no whole number: use Float"
            check(PATHS[path] is not other, f"{path} is {hint}")
            data = data.to_json()
        asked = "choices, or low and high: a mapping in a file; Choice, Float or Int in Python"
        check(isinstance(data, Mapping), f"{path} must have {asked}; not {data!r}")
        check_fields(data, _DIMENSION_FIELDS, path)
        when = data.get("when", {})
        check(isinstance(when, Mapping), f"{path}.when must be a mapping of paths to lists of values, not {when!r}")
        for values in when.values():
            check(isinstance(values, list) and values != [], f"{path}.when needs a list of values, not {values!r}")
        try:
            domain = read_choices(data) if "choices" in data else read_range(PATHS[path], data)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return cls(path=path, domain=domain, when={str(other): tuple(values) for other, values in when.items()})


def place(data: dict[str, Any], path: str, value: Any) -> None:
    """Set the field at `path` in a strategy's plain data."""
    *parents, leaf = path.split(".")
    for depth, name in enumerate(parents, 1):
        data = data.setdefault(name, {})
        if not isinstance(data, dict):
            holder = ".".join(parents[:depth])
            raise InputError(f"{path} is set where {holder} is none: give it a condition (`when`) on {holder}")
    check(leaf not in data, f"{path} is set by two dimensions at once")
    data[leaf] = copy.deepcopy(value)


def look_up(data: Any, path: str) -> Any:
    """Return the field at `path` in a strategy's plain data, or None."""
    for name in path.split("."):
        data = data.get(name) if isinstance(data, Mapping) else None
    return data


def find(domain: Choices | Range, value: Any) -> Value | None:
    """Return the value of `domain` that puts `value` at the dimension's path, or None if there is none.

    If several named parts match, the one with the most fields is returned.
    """
    if isinstance(domain, Range):
        return value if domain.holds(value) else None
    found: Value | None = None
    most = -1
    for label, data in domain.values.items():
        if value == data:
            return label
        part = isinstance(data, Mapping) and isinstance(value, Mapping)
        if part and len(data) > most and all(key in value and value[key] == data[key] for key in data):
            found, most = label, len(data)
    return found


def points(
    dimensions: Sequence[Dimension], values: Callable[[Dimension], Sequence[Value]], point: Point
) -> Iterator[Point]:
    """Yield every point that extends `point` by one of `values(dimension)` for each active dimension."""
    if not dimensions:
        yield dict(point)
    elif not dimensions[0].active(point):
        yield from points(dimensions[1:], values, point)
    else:
        for value in values(dimensions[0]):
            yield from points(dimensions[1:], values, point | {dimensions[0].path: value})


def with_conditions(dimensions: Sequence[Dimension], paths: Collection[str]) -> set[str]:
    """Return `paths` and all paths that their conditions name, directly or not.

    The `dimensions` must be sorted as by `in_order`.
    """
    found = set(paths)
    for dimension in reversed(dimensions):
        if dimension.path in found:
            found.update(dimension.when)
    return found


def in_order(dimensions: Sequence[Dimension]) -> tuple[Dimension, ...]:
    """Sort dimensions so that each comes after those it depends on: those in its conditions, and its own part."""
    by_path = {dimension.path: dimension for dimension in dimensions}
    for dimension in dimensions:
        for path, values in dimension.when.items():
            if path not in by_path:
                raise InputError(
                    f"{dimension.path} has a condition on {path}, no dimension here; {near(path, by_path)}"
                )
            domain = by_path[path].domain
            check(isinstance(domain, Choices), f"{dimension.path} has a condition on {path}, which has no choices")
            for value in values:
                where = f"{dimension.path} has a condition on {path} being {value!r}, none of its choices"
                check(domain.holds(value), f"{where}: {', '.join(map(str, domain.corners))}")
    ordered: list[Dimension] = []
    waiting = list(dimensions)
    while waiting:
        behind = {dimension.path for dimension in waiting}
        ready = next((item for item in waiting if not _depends(item, behind)), None)
        check(ready is not None, f"the conditions of {waiting[0].path} lead in a circle")
        assert ready is not None
        waiting.remove(ready)
        ordered.append(ready)
    return tuple(ordered)


def _depends(dimension: Dimension, paths: set[str]) -> bool:
    return any(path in paths for path in dimension.when) or any(dimension.path.startswith(f"{path}.") for path in paths)


def part_of(path: str) -> str:
    """Return the path of the strategy's part that holds `path`, or `path` itself if it is a part."""
    hint = PATHS[path]
    return path if isinstance(hint, type) and issubclass(hint, PlainDataclass) else path.rpartition(".")[0]
