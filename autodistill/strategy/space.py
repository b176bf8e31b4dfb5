"""A search space: YAML to `Space` with conditional dimensions, and a point of the space to a strategy."""

from __future__ import annotations

import copy
import types
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any

from autodistill.errors import InputError
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.domains import Choices, Range, Value, check_fields, near, read_choices, read_range
from autodistill.strategy.strategy import Alignment, Distillation, Init, Strategy
from autodistill.utils.hashing import content_hash
from autodistill.utils.plain_dataclass import PlainDataclass, check
from autodistill.utils.yaml_files import read_yaml

Point = dict[str, Value]

_DIMENSION_FIELDS = ("choices", "low", "high", "step", "log", "when")

_NO_DIMENSION = "dimensions must be a mapping with an entry"

_SPACE_FIELDS = ("name", "description", "dimensions", "deployments", "baselines", "starts", "optional", "lengths")


def _strategy_paths(part: type[PlainDataclass] = Strategy, prefix: str = "") -> dict[str, type]:
    """Return every dotted path of a strategy with its type."""
    paths: dict[str, type] = {}
    for name, hint in typing.get_type_hints(part).items():
        if isinstance(hint, types.UnionType):
            (hint,) = (arm for arm in hint.__args__ if arm is not type(None))
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
        domain: What it may be.
        when: Values of other dimensions, all of which must hold for this one to count.
    """

    path: str
    domain: Choices | Range
    when: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)

    def active(self, point: Mapping[str, Value]) -> bool:
        """Return whether this dimension is used at `point`, which has the dimensions before this one."""
        return all(path in point and point[path] in values for path, values in self.when.items())

    def to_json(self) -> dict[str, Any]:
        """Return the dimension as plain data, without its path."""
        when = {path: list(values) for path, values in self.when.items()}
        return self.domain.to_json() | ({"when": when} if when else {})

    @classmethod
    def from_json(cls, path: str, data: Any) -> Dimension:
        """Read one dimension from plain data, as a space file has it.

        Raises:
            InputError: An unknown path or field, a wrong type, an empty domain.
        """
        check(path in PATHS, f"no strategy has {path}; {near(path, PATHS)}")
        check(isinstance(data, Mapping), f"{path} must be a mapping with choices, or low and high, not {data!r}")
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


@dataclass(frozen=True, kw_only=True)
class Space:
    """The set of strategies and deployments that a search may try.

    Attributes:
        name: Short name.
        description: One sentence.
        dimensions: Each after those that its condition names.
        deployments: How trained students are packed.
        baselines: Named strategies that run first, to the full plan.
        starts: Named strategies of the space that are proposed first, and have to pass every rung.
        optional: Of dimensions the choices that a search does without where no student of them fits its budget, or can
            be trained on its machines.
        lengths: Multiples of the plan's tokens, 1 and above, that the best trials are trained on to.
        narrowed_from: Hash of the space that this one was made of by `required`; runs of the two are of one space.
    """

    name: str
    description: str
    dimensions: tuple[Dimension, ...]
    deployments: tuple[Deployment, ...]
    baselines: Mapping[str, Strategy]
    starts: Mapping[str, Strategy] = field(default_factory=dict)
    optional: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    lengths: tuple[float, ...] = (1.0,)
    narrowed_from: str | None = None

    def strategy(self, point: Mapping[str, Value]) -> Strategy:
        """Return the strategy at `point`; fields that no dimension sets have the strategy's default.

        Raises:
            InputError: A value for no active dimension, an active one without a value, a value outside of its domain,
                or values that contradict each other.
        """
        data: dict[str, Any] = {}
        left = dict(point)
        for dimension in self.dimensions:
            if not dimension.active(point):
                continue
            check(dimension.path in left, f"the point lacks {dimension.path}")
            value = left.pop(dimension.path)
            check(dimension.domain.holds(value), f"{dimension.path} is {value!r}, which is outside of its domain")
            _place(data, dimension.path, dimension.domain.meaning(value))
        check(not left, f"the point sets {', '.join(left)}, which is no active dimension of the space")
        temperature = data.get("distillation", {}).get("temperature", {})
        if isinstance(temperature, dict) and temperature.get("shape", "constant") == "constant":
            # A constant temperature has no end of its own, so that no dimension could set it.
            temperature.setdefault("end", temperature.get("start", 1.0))
        return Strategy.from_json(data)

    def point(self, strategy: Strategy) -> Point | None:
        """Return the point of `strategy`, or None if it lies outside the space."""
        data = strategy.to_json()
        point: Point = {}
        for dimension in self.dimensions:
            if dimension.active(point):
                value = _find(dimension.domain, _look_up(data, dimension.path))
                if value is None:
                    return None
                point[dimension.path] = value
        return point if self.strategy(point) == strategy else None

    def points(self, values: Callable[[Dimension], Sequence[Value]]) -> Iterator[Point]:
        """Return every point whose active dimensions have one of `values(dimension)`."""
        return _points(self.dimensions, values, {})

    def varied(
        self, paths: Collection[str], values: Callable[[Dimension], Sequence[Value]] | None = None
    ) -> Iterator[Strategy]:
        """Yield strategies with all values of some dimensions, and the baselines.

        What does not bear on these is an example. Without dimensions nothing is proposed, and the baselines are all
        there is.

        Args:
            paths: Of those dimensions; the ones that decide whether these count are varied too.
            values: What a dimension may be; by default its ends, or all of its choices.
        """
        yield from map(self.strategy, self._points_over(paths, values) if self.dimensions else ())
        yield from self.baselines.values()

    def _points_over(
        self, paths: Collection[str], values: Callable[[Dimension], Sequence[Value]] | None = None
    ) -> Iterator[Point]:
        """Return the points of `varied`."""
        branching = _with_conditions(self.dimensions, paths)

        def taken(dimension: Dimension) -> Sequence[Value]:
            corners = dimension.domain.corners
            if dimension.path not in branching:
                return corners[:1]
            return corners if values is None else values(dimension)

        return self.points(taken)

    def extremes(self) -> tuple[Strategy, ...]:
        """Return the baselines, and a strategy for each kind of initial student at the ends of its dimensions.

        The smallest and the largest student are among them, and each model that one may start from. What does not bear
        on how a student begins is an example.
        """
        return tuple(self.varied([path for path in PATHS if path.split(".")[0] == "init"]))

    @property
    def models(self) -> tuple[str, ...]:
        """References of the pretrained models that a student may begin from."""
        return tuple(dict.fromkeys(found.init.model for found in self.extremes() if found.init.model))

    def required(self) -> Space:
        """Return the space without optional choices, and without dimensions and starts that need one."""
        if not self.optional:
            return self
        dimensions = []
        for dimension in self.dimensions:
            when = {path: self._required(path, values) for path, values in dimension.when.items()}
            if all(when.values()):
                domain = dimension.domain
                if isinstance(domain, Choices):
                    left = self._required(dimension.path, domain.corners)
                    domain = Choices(values={label: domain.values[label] for label in left})
                dimensions.append(replace(dimension, domain=domain, when=when))
        narrowed = replace(self, dimensions=tuple(dimensions), starts={}, optional={}, narrowed_from=self.hash)
        starts = {name: start for name, start in self.starts.items() if narrowed.point(start) is not None}
        return replace(narrowed, starts=starts)

    def _required(self, path: str, values: Sequence[Value]) -> tuple[Value, ...]:
        return tuple(value for value in values if value not in self.optional.get(path, ()))

    @cached_property
    def hash(self) -> str:
        """Content hash of everything that a search depends on, except for the wording."""
        if self.narrowed_from is not None:
            return self.narrowed_from
        data = self.to_json()
        parts = [list(data["dimensions"].items()), data["deployments"], data["baselines"], list(data["starts"].items())]
        parts += [data["optional"]] if self.optional else []
        return content_hash(parts + ([data["lengths"]] if len(self.lengths) > 1 else []))

    def to_json(self) -> dict[str, Any]:
        """Return the space as plain data for `from_json`; baselines and enqueued strategies are written out."""
        return {
            "name": self.name,
            "description": self.description,
            "dimensions": {dimension.path: dimension.to_json() for dimension in self.dimensions},
            "deployments": [deployment.to_json() for deployment in self.deployments],
            "baselines": {name: strategy.to_json() for name, strategy in self.baselines.items()},
            "starts": {name: strategy.to_json() for name, strategy in self.starts.items()},
            "optional": {path: list(labels) for path, labels in self.optional.items()},
            "lengths": list(self.lengths),
        }

    @classmethod
    def from_json(cls, data: Any) -> Space:
        """Read a space from plain data and check that each of its corners is a strategy.

        Raises:
            InputError: Anything wrong with it, naming the dimension.
        """
        check(isinstance(data, Mapping), "the space must be a mapping with dimensions and deployments")
        check_fields(data, _SPACE_FIELDS, "the space")
        for name in ("name", "description"):
            check(isinstance(data.get(name, ""), str), f"{name} must be text, not {data.get(name)!r}")
        dimensions = data.get("dimensions")
        # A run of one strategy has a space that holds its baseline alone.
        alone = dimensions == {} and isinstance(data.get("baselines"), Mapping) and len(data["baselines"]) > 0
        check(alone or (isinstance(dimensions, Mapping) and len(dimensions) > 0), _NO_DIMENSION)
        space = cls(
            name=data.get("name", "unnamed"),
            description=data.get("description", ""),
            dimensions=_in_order([Dimension.from_json(str(path), entry) for path, entry in dimensions.items()]),
            deployments=_deployments(data.get("deployments")),
            baselines=_named("baselines", data.get("baselines", [])),
            starts=_named("starts", data.get("starts", [])),
            optional=_optional(data.get("optional", {})),
            lengths=_lengths(data.get("lengths", [1])),
        )
        _check_corners(space)
        _check_optional(space)
        for name, strategy in space.starts.items():
            check(space.point(strategy) is not None, f"starts: {name} lies outside of the space")
        return space


def _place(data: dict[str, Any], path: str, value: Any) -> None:
    """Set the field at `path` in a strategy's plain data."""
    *parents, leaf = path.split(".")
    for depth, name in enumerate(parents, 1):
        data = data.setdefault(name, {})
        holder = ".".join(parents[:depth])
        check(isinstance(data, dict), f"{path} is set where {holder} is none: give it a condition (`when`) on {holder}")
    check(leaf not in data, f"{path} is set by two dimensions at once")
    data[leaf] = copy.deepcopy(value)


def _look_up(data: Any, path: str) -> Any:
    for name in path.split("."):
        data = data.get(name) if isinstance(data, Mapping) else None
    return data


def _find(domain: Choices | Range, value: Any) -> Value | None:
    """Return the value of `domain` that puts `value` at the dimension's path; of several, the most complete one."""
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


def _points(
    dimensions: Sequence[Dimension], values: Callable[[Dimension], Sequence[Value]], point: Point
) -> Iterator[Point]:
    if not dimensions:
        yield dict(point)
    elif not dimensions[0].active(point):
        yield from _points(dimensions[1:], values, point)
    else:
        for value in values(dimensions[0]):
            yield from _points(dimensions[1:], values, point | {dimensions[0].path: value})


def _with_conditions(dimensions: Sequence[Dimension], paths: Collection[str]) -> set[str]:
    """Return `paths` and all paths that their conditions name, directly or not; `dimensions` are in order."""
    found = set(paths)
    for dimension in reversed(dimensions):
        if dimension.path in found:
            found.update(dimension.when)
    return found


def _in_order(dimensions: Sequence[Dimension]) -> tuple[Dimension, ...]:
    """Sort dimensions so that each comes after those it depends on: its conditions, and the part it belongs to."""
    by_path = {dimension.path: dimension for dimension in dimensions}
    for dimension in dimensions:
        for path, values in dimension.when.items():
            check(
                path in by_path,
                f"{dimension.path} has a condition on {path}, no dimension here; {near(path, by_path)}",
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


def _check_corners(space: Space) -> None:
    """Build the strategy at each corner; rules hold within a part, so parts are crossed one at a time."""
    active: set[str] = set()
    for part in dict.fromkeys(_part_of(dimension.path) for dimension in space.dimensions):
        members = {item.path for item in space.dimensions if _part_of(item.path) == part}
        for point in space._points_over(members):
            space.strategy(point)
            active.update(members & set(point))
    idle = [dimension.path for dimension in space.dimensions if dimension.path not in active]
    check(not idle, f"{', '.join(idle)} can never be active: its conditions exclude each other")


def _part_of(path: str) -> str:
    hint = PATHS[path]
    return path if isinstance(hint, type) and issubclass(hint, PlainDataclass) else path.rpartition(".")[0]


def _deployments(data: Any) -> tuple[Deployment, ...]:
    check(isinstance(data, list) and len(data) > 0, "the space has no deployments: list at least one")
    deployments = tuple(Deployment.from_json(item, f"deployments[{index}]") for index, item in enumerate(data))
    check(len(set(deployments)) == len(deployments), "a deployment is listed twice")
    return deployments


def _optional(data: Any) -> dict[str, tuple[Value, ...]]:
    check(isinstance(data, Mapping), f"optional must be a mapping of dimensions to lists of choices, not {data!r}")
    for path, labels in data.items():
        check(isinstance(labels, list) and labels != [], f"optional.{path} needs a list of choices, not {labels!r}")
    return {str(path): tuple(labels) for path, labels in data.items()}


def _check_optional(space: Space) -> None:
    """Refuse optional choices that no dimension has, and a dimension without other choices."""
    domains = {dimension.path: dimension.domain for dimension in space.dimensions}
    for path, labels in space.optional.items():
        check(path in domains, f"optional names {path}, which is no dimension here; {near(path, domains)}")
        domain = domains[path]
        if not isinstance(domain, Choices):
            raise InputError(f"optional names {path}, which has no choices")
        for label in labels:
            hint = near(label, map(str, domain.corners))
            check(domain.holds(label), f"optional names {label!r} of {path}, which is none of its choices; {hint}")
        left = [label for label in domain.corners if label not in labels]
        check(left != [], f"optional leaves {path} no choice that is not")


def _lengths(data: Any) -> tuple[float, ...]:
    check(isinstance(data, list), f"lengths must list multiples of the plan's tokens, like [1, 2], not {data!r}")
    for value in data:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        check(number and 1 <= value <= 100, f"lengths are multiples of the plan's tokens from 1 to 100, not {value!r}")
    return tuple(sorted({1.0, *map(float, data)}))


def _named(field_name: str, data: Any) -> dict[str, Strategy]:
    if isinstance(data, Mapping):
        return {str(name): Strategy.from_json(item, f"{field_name}.{name}") for name, item in data.items()}
    check(isinstance(data, list), f"{field_name} must be a list of named strategies, not {data!r}")
    return {str(name): load_strategy(str(name)) for name in data}


def load_space(ref: str | Path) -> Space:
    """Load the space of a name in `search_spaces/`, or of a YAML file.

    Raises:
        InputError: No such space or file, YAML that is not plain data, a space that does not hold together, or a named
            strategy of it with parts that can have no effect.
    """
    data = read_yaml(_resolve(ref, "spaces"))
    try:
        space = Space.from_json(data)
        check(len(space.dimensions) > 0, _NO_DIMENSION)
        for strategy in (*space.baselines.values(), *space.starts.values()):
            check_effect(strategy)
        return space
    except InputError as error:
        raise InputError(f"space {ref}: {error}") from None


def load_strategy(ref: str | Path) -> Strategy:
    """Load the strategy of a name in `search_spaces/strategies/`, or of a YAML file.

    Raises:
        InputError: No such strategy or file, YAML that is not plain data, a broken rule, or parts that can have no
            effect.
    """
    data = read_yaml(_resolve(ref, "strategies"))
    try:
        strategy = Strategy.from_json(data)
        check_effect(strategy)
        return strategy
    except InputError as error:
        raise InputError(f"strategy {ref}: {error}") from None


def packaged_files(what: str) -> dict[str, Path]:
    """Return the YAML files of the package by their names.

    Args:
        what: "spaces" or "strategies".
    """
    folder = {"spaces": ".", "strategies": "strategies"}[what]
    home = Path(str(files("autodistill.search_spaces"))) / folder
    return {path.stem: path for path in sorted(home.glob("*.yaml"))}


def packaged_file(what: str, name: str) -> Path:
    """Return one YAML file of the package.

    Raises:
        InputError: There is none of that name.
    """
    known = packaged_files(what)
    if name not in known:
        raise InputError(f"there is no {_ONE[what]} {name!r}; {near(name, known)}; or give a .yaml file")
    return known[name]


_ONE = {"spaces": "space", "strategies": "strategy"}


def _resolve(ref: str | Path, what: str) -> Path:
    if isinstance(ref, Path) or ref.endswith((".yaml", ".yml")) or "/" in ref or "\\" in ref:
        check(not Path(ref).is_dir(), f"{ref} is a folder: give a YAML file in it")
        check(Path(ref).is_file(), f"there is no {_ONE[what]} file {ref}")
        return Path(ref)
    return packaged_file(what, ref)


_OF_THE_DIVERGENCE = ("divergence", "mixture", "temperature", "standardise", "signal", "signal_tokens")


def check_effect(strategy: Strategy) -> None:
    """Refuse a user's strategy with settings that have no effect; a space may propose those at a dimension's end.

    Args:
        strategy: What is not written in it has its default, and is not refused.

    Raises:
        InputError: Names the fields, and what they would need.
    """
    init, recipe, plain = strategy.init, strategy.distillation, Distillation()
    if init.depth == 1 and init.layers != Init().layers:
        raise InputError(
            f"init.layers {init.layers} chooses among the layers, and with init.depth 1 all are kept: leave "
            "init.layers out, or lower init.depth"
        )
    idle = [f"distillation.{name}" for name in _OF_THE_DIVERGENCE if getattr(recipe, name) != getattr(plain, name)]
    if idle and not recipe.weighs_teacher:
        raise InputError(
            f"{', '.join(idle)} say how the teacher's outputs are followed, and with distillation.divergence_weight 0 "
            "they are not: leave them out, or give divergence_weight or final_divergence_weight a value above 0"
        )
    alignment = recipe.alignment
    if alignment and alignment.projection == "none" and alignment.projection_rate != Alignment().projection_rate:
        raise InputError(
            "distillation.alignment.projection_rate is of a projection's weights, and projection none has none: leave "
            "it out, or choose a projection"
        )
