"""A `Space`: what a search may try, from Python or YAML, and the strategy at each of its points."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from autodistill.errors import InputError
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.dimension import (
    PATHS,
    Dimension,
    Point,
    find,
    in_order,
    look_up,
    part_of,
    place,
    points,
    with_conditions,
)
from autodistill.strategy.divergence import get_divergence
from autodistill.strategy.domains import Choice, Float, Int, Value, check_fields
from autodistill.strategy.named import check_effect, find_file, load_strategy
from autodistill.strategy.restriction import Restriction, restriction, restricts
from autodistill.strategy.strategy import Strategy
from autodistill.utils.hashing import content_hash
from autodistill.utils.json_files import replacing
from autodistill.utils.plain_dataclass import check
from autodistill.utils.yaml_files import read_yaml

_NO_DIMENSION = "dimensions must be a mapping with an entry"
_SOLVED = "solved"  # in a space's list of deployments, it stands for those that the solver finds

_SPACE_FIELDS = (*("name", "description", "dimensions", "deployments", "baselines", "starts", "lengths", "solved"),)

Domain = Float | Int | Choice | Mapping[str, Any]
"""The domain of a dimension, as declared in Python, or as plain data like in a YAML file."""


@dataclass(frozen=True, init=False)
class Space:
    """What a search may try.

    A space may be written in Python or in a YAML file, with the same content hash:

        Space({
            "init.depth": Float(0.5, 1.0),
            "distillation.divergence": Choice("forward_kl", "jsd"),
            "distillation.mixture": Float(0.1, 0.9, when={"distillation.divergence": "jsd"}),
        })

    Attributes:
        dimensions: The dimensions, each after those that its condition names.
        name: Short name.
        description: One sentence.
        deployments: The deployments under which trained students are evaluated.
        baselines: Named strategies that run first, up to the full plan.
        starts: Named strategies of the space that are proposed first. They have to pass every rung, as others do.
        lengths: Multiples of the plan's tokens, 1 and above, up to which the best trials are trained.
        solved: Whether the solver chooses how a student begins and is stored (`init`, `finishing`) for the budget. The
            dimensions then say what else is raced.
        restrictions: In a solved space, the dimensions of `init` and `finishing`, which restrict the solver.
        types_solved: In a solved space, whether types are solved too. If so, the deployments in llama.cpp are evaluated
            in addition to the solutions. If not, they are the only storages that the solver may choose.
        narrowed_from: Hash of the space that this one was made from, by adding solutions. Runs of both spaces count as
            runs of one space. None if it was not made from another space.
    """

    dimensions: tuple[Dimension, ...]
    name: str
    description: str
    deployments: tuple[Deployment, ...]
    baselines: Mapping[str, Strategy]
    starts: Mapping[str, Strategy]
    lengths: tuple[float, ...]
    solved: bool
    restrictions: tuple[Dimension, ...]
    types_solved: bool
    narrowed_from: str | None

    def __init__(
        self,
        dimensions: Mapping[str, Domain] | tuple[Dimension, ...],
        *,
        name: str = "unnamed",
        description: str = "",
        deployments: Sequence[Deployment | Mapping[str, Any] | str] | None = None,
        baselines: Sequence[str] | Mapping[str, Strategy | Mapping[str, Any]] = (),
        starts: Sequence[str] | Mapping[str, Strategy | Mapping[str, Any]] = (),
        lengths: Sequence[float] = (1.0,),
        solved: bool = False,
        restrictions: tuple[Dimension, ...] = (),
        types_solved: bool = False,
        narrowed_from: str | None = None,
        **unknown: Any,
    ) -> None:
        """Read a space and check that each of its corners is a strategy.

        Args:
            dimensions: The domain of each dimension, by its dotted path in a strategy.
            name, description, lengths, solved: See the attributes.
            deployments: The deployments; by default those of the default space. "solved" in the list means that types
                are solved in llama.cpp.
            baselines, starts: Names of strategies, like "gkd", or a mapping from names of your own to strategies.
            restrictions, types_solved, narrowed_from: Only for a space that is made from another one.
            unknown: Unknown arguments, which are refused with a message of one line, as in a file.

        Raises:
            InputError: The space is invalid. The message names the dimension.
        """
        _check_names(unknown)
        read = isinstance(dimensions, tuple)  # an earlier call has read them: `replace` passes the fields of a space
        if not read:
            check(isinstance(solved, bool), f"solved is true or false, not {solved!r}")
            restrictions = _restrictions(dimensions) if solved else ()
            types_solved, deployments = _types_solved(solved, deployments)
        given: dict[str, Any] = {
            "dimensions": dimensions if read else _dimensions(dimensions, baselines, restrictions),
            "name": name,
            "description": description,
            "deployments": deployments if read else _deployments(deployments),
            "baselines": baselines if read else _named("baselines", baselines),
            "starts": starts if read else _named("starts", starts),
            "lengths": lengths if read else _lengths(lengths),
            "solved": solved,
            "restrictions": restrictions,
            "types_solved": types_solved,
            "narrowed_from": narrowed_from,
        }
        for field_name, value in given.items():
            object.__setattr__(self, field_name, value)
        if not read:
            self._check()

    def _check(self) -> None:
        check(isinstance(self.solved, bool), f"solved is true or false, not {self.solved!r}")
        if self.solved:
            check(
                not self.starts,
                "a solved space begins with what the solver finds: name shapes as choices of init, "
                "and storages as deployments, in place of starts",
            )
            assert self.restriction.dimensions == self.restrictions
        _check_corners(self)
        for name, strategy in self.starts.items():
            check(self.point(strategy) is not None, f"starts: {name} lies outside of the space")

    @property
    def restriction(self) -> Restriction:
        """What the solver may choose from in a solved space.

        Raises:
            InputError: The restrictions contradict each other.
        """
        storages = [one for one in self.deployments if one.runtime == "llama.cpp"]
        return restriction(self.restrictions, None if self.types_solved else storages)

    def strategy(self, point: Mapping[str, Value]) -> Strategy:
        """Return the strategy at `point`; fields that no dimension sets have their defaults.

        Raises:
            InputError: `point` sets a dimension that is not active, lacks an active one, or has a value outside of its
                domain; or its values contradict each other.
        """
        data: dict[str, Any] = {}
        left = dict(point)
        for dimension in self.dimensions:
            if not dimension.active(point):
                continue
            if dimension.path not in left:
                raise InputError(f"the point lacks {dimension.path}")
            value = left.pop(dimension.path)
            if not dimension.domain.holds(value):
                raise InputError(f"{dimension.path} is {value!r}, which is outside of its domain")
            place(data, dimension.path, dimension.domain.meaning(value))
        check(not left, f"the point sets {', '.join(left)}, which is no active dimension of the space")
        temperature = data.get("distillation", {}).get("temperature", {})
        if isinstance(temperature, dict) and temperature.get("shape", "constant") == "constant":
            # A constant temperature ends where it starts. No dimension sets that end, so it is set here.
            temperature.setdefault("end", temperature.get("start", 1.0))
        return Strategy.from_json(data)

    def point(self, strategy: Strategy) -> Point | None:
        """Return the point of `strategy`, or None if the strategy is outside of the space."""
        data = strategy.to_json()
        point: Point = {}
        for dimension in self.dimensions:
            if dimension.active(point):
                value = find(dimension.domain, look_up(data, dimension.path))
                if value is None:
                    return None
                point[dimension.path] = value
        return point if self.strategy(point) == strategy else None

    def points(self, values: Callable[[Dimension], Sequence[Value]]) -> Iterator[Point]:
        """Yield every point whose active dimensions have one of `values(dimension)`."""
        return points(self.dimensions, values, {})

    def varied(
        self, paths: Collection[str], values: Callable[[Dimension], Sequence[Value]] | None = None
    ) -> Iterator[Strategy]:
        """Yield strategies with every combination of values of some dimensions, and then the baselines.

        Every other dimension has one example value. A space without dimensions yields its baselines only.

        Args:
            paths: Paths of the dimensions to vary. The dimensions in their conditions are varied too.
            values: Returns the values to use for a dimension; by default its ends, or all of its choices.
        """
        if values is None:
            yield from self._at_corners(frozenset(paths))
        else:
            yield from self._over(paths, values)

    def _over(
        self, paths: Collection[str], values: Callable[[Dimension], Sequence[Value]] | None
    ) -> Iterator[Strategy]:
        yield from map(self.strategy, self._points_over(paths, values) if self.dimensions else ())
        yield from self.baselines.values()

    def _at_corners(self, paths: frozenset[str]) -> tuple[Strategy, ...]:
        """Return what `varied` yields of corners. A search asks for the same ones many times."""
        if paths not in self._known_corners:
            self._known_corners[paths] = tuple(self._over(paths, None))
        return self._known_corners[paths]

    @cached_property
    def _known_corners(self) -> dict[frozenset[str], tuple[Strategy, ...]]:
        return {}

    def _points_over(
        self, paths: Collection[str], values: Callable[[Dimension], Sequence[Value]] | None = None
    ) -> Iterator[Point]:
        branching = with_conditions(self.dimensions, paths)

        def taken(dimension: Dimension) -> Sequence[Value]:
            """Return the values of a dimension that the points combine."""
            corners = dimension.domain.corners
            if dimension.path not in branching:
                return corners[:1]
            return corners if values is None else values(dimension)

        return self.points(taken)

    def extremes(self) -> tuple[Strategy, ...]:
        """Return a strategy for each combination of the ends, or choices, of dimensions of `init`, and the baselines.

        They include the smallest and the largest student, and each pretrained model that a student may begin from. All
        dimensions outside of `init` have an example value.
        """
        return tuple(self.varied([path for path in PATHS if path.split(".")[0] == "init"]))

    @property
    def models(self) -> tuple[str, ...]:
        """References of the pretrained models that a student may begin from."""
        return tuple(dict.fromkeys(found.init.model for found in self.extremes() if found.init.model))

    @property
    def divergences(self) -> tuple[str, ...]:
        """Names of the divergences that a strategy may have, sorted."""
        strategies = (*self.varied(["distillation.divergence"]), *self.starts.values())
        return tuple(sorted({strategy.distillation.divergence for strategy in strategies}))

    @cached_property
    def hash(self) -> str:
        """Content hash of everything that a search depends on, which excludes name and description."""
        if self.narrowed_from is not None:
            return self.narrowed_from
        data = self.to_json()
        raced = [(dimension.path, dimension.to_json()) for dimension in self.dimensions]
        deployments = [one for one in data["deployments"] if one != _SOLVED]
        parts = [list(map(list, raced)), deployments, data["baselines"], list(data["starts"].items())]
        parts += ["solved"] if self.solved else []
        parts += [list(told.items())] if (told := self._restricting) else []
        parts += ["types by deployments"] if self.solved and not self.types_solved else []
        return content_hash(parts + ([data["lengths"]] if len(self.lengths) > 1 else []))

    @property
    def _restricting(self) -> dict[str, Any]:
        return {dimension.path: dimension.to_json() for dimension in self.restrictions}

    def to_json(self) -> dict[str, Any]:
        """Return the space as plain data for `from_json`, with baselines and starts written out."""
        return {
            "name": self.name,
            "description": self.description,
            "dimensions": self._restricting | {one.path: one.to_json() for one in self.dimensions},
            "deployments": [
                *([_SOLVED] if self.solved and self.types_solved else []),
                *(deployment.to_json() for deployment in self.deployments),
            ],
            "baselines": {name: strategy.to_json() for name, strategy in self.baselines.items()},
            "starts": {name: strategy.to_json() for name, strategy in self.starts.items()},
            "lengths": list(self.lengths),
            **({"solved": True} if self.solved else {}),
        }

    def to_yaml(self) -> str:
        """Return the space as the text of a YAML file; `load_space` reads it as a space with the same hash."""
        text: str = yaml.safe_dump(self.to_json(), sort_keys=False, allow_unicode=True, width=120)
        return text

    @classmethod
    def from_json(cls, data: Any) -> Space:
        """Read a space from plain data and check that each of its corners is a strategy.

        Raises:
            InputError: The space is invalid. The message names the dimension.
        """
        check(isinstance(data, Mapping), "the space must be a mapping with dimensions and deployments")
        _check_names(data)
        for name in ("name", "description"):
            check(isinstance(data.get(name, ""), str), f"{name} must be text, not {data.get(name)!r}")
        # Plain data must list its deployments: the default of `__init__` does not apply, so none are an error.
        return cls(**{"dimensions": None, **data, "deployments": data.get("deployments") or ()})

    @classmethod
    def stored(cls, data: Mapping[str, Any]) -> Space:
        """Read the space that a run has stored.

        Older runs also stored a field `optional`, which has no meaning any more and is ignored.

        Raises:
            InputError: As `from_json`.
        """
        return cls.from_json({name: value for name, value in data.items() if name != "optional"})


def _check_names(given: Mapping[str, Any]) -> None:
    """Refuse fields that a space does not have, or no longer has."""
    check(
        "optional" not in given,
        "there is no optional any more: leave it out, since what does not fit is rejected before it is trained",
    )
    check_fields(given, _SPACE_FIELDS, "the space")


def _dimensions(data: Any, baselines: Any, restrictions: Sequence[Dimension]) -> tuple[Dimension, ...]:
    # A run of a single strategy has a space with no dimensions, whose only content is that baseline.
    alone = data == {} and isinstance(baselines, Mapping) and len(baselines) > 0
    check(alone or (isinstance(data, Mapping) and len(data) > 0), _NO_DIMENSION)
    taken = {one.path for one in restrictions}
    return in_order([Dimension.from_json(str(path), entry) for path, entry in data.items() if path not in taken])


def _restrictions(data: Any) -> tuple[Dimension, ...]:
    """Read the dimensions of a solved space that restrict the solver."""
    check(isinstance(data, Mapping), _NO_DIMENSION)
    return in_order([Dimension.from_json(str(path), entry) for path, entry in data.items() if restricts(str(path))])


def _types_solved(solved: bool, deployments: Any) -> tuple[bool, Any]:
    """Return whether types are solved, and the deployments without the entry "solved"."""
    if deployments is None:
        return solved, None
    listed = list(deployments) if isinstance(deployments, list | tuple) else []
    if _SOLVED not in listed:
        return False, deployments
    others = [one for one in listed if one != _SOLVED]
    check(solved, f"deployments has {_SOLVED!r}, and the space is not solved: give it `solved: true`, or leave it out")
    check(
        others != [] and len(others) == len(listed) - 1,
        f"deployments has {_SOLVED!r} once, and beside it what students are read under where nothing can be solved, "
        "such as {runtime: llama.cpp, format: gguf-q8_0, bits: 8, group_size: 32}",
    )
    return True, others


def _check_corners(space: Space) -> None:
    """Check that the strategy at each corner can be built.

    Rules relate fields of one part only, so the corners of each part are tried separately.
    """
    active: set[str] = set()
    for part in dict.fromkeys(part_of(dimension.path) for dimension in space.dimensions):
        members = {item.path for item in space.dimensions if part_of(item.path) == part}
        for point in space._points_over(members):
            space.strategy(point)
            active.update(members & set(point))
    idle = [dimension.path for dimension in space.dimensions if dimension.path not in active]
    check(not idle, f"{', '.join(idle)} can never be active: its conditions exclude each other")


def _deployments(data: Any) -> tuple[Deployment, ...]:
    if data is None:
        return load_space("default").deployments
    check(isinstance(data, list | tuple) and len(data) > 0, "the space has no deployments: list at least one")
    deployments = tuple(
        item if isinstance(item, Deployment) else Deployment.from_json(item, f"deployments[{index}]")
        for index, item in enumerate(data)
    )
    check(len(set(deployments)) == len(deployments), "a deployment is listed twice")
    given = [one.name for one in deployments if one.file]
    check(not given, "a space cannot name a file as it was given: name it as --teacher or --candidate")
    return deployments


def _lengths(data: Any) -> tuple[float, ...]:
    check(
        isinstance(data, list | tuple), f"lengths must list multiples of the plan's tokens, like [1, 2], not {data!r}"
    )
    for value in data:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        check(number and 1 <= value <= 100, f"lengths are multiples of the plan's tokens from 1 to 100, not {value!r}")
    return tuple(sorted({1.0, *map(float, data)}))


def _named(field_name: str, data: Any) -> dict[str, Strategy]:
    if isinstance(data, Mapping):
        return {str(name): _strategy(item, f"{field_name}.{name}") for name, item in data.items()}
    check(isinstance(data, list | tuple), f"{field_name} must be a list of named strategies, not {data!r}")
    for name in data:
        check(not isinstance(name, Strategy), f"{field_name} has a strategy without a name: give a mapping of names")
    return {str(name): load_strategy(str(name)) for name in data}


def _strategy(item: Any, where: str) -> Strategy:
    if not isinstance(item, Strategy):
        return Strategy.from_json(item, where)
    try:
        check_effect(item)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    return item


def load_space(ref: str | Path) -> Space:
    """Load a space by its name in `search_spaces/`, or from a YAML file.

    Raises:
        InputError: No such space or file, YAML that is not plain data, an invalid space, an unknown divergence, or a
            baseline or start with a setting that has no effect.
    """
    data = read_yaml(find_file(ref, "spaces"))
    try:
        space = Space.from_json(data)
        check(len(space.dimensions) + len(space.restrictions) > 0, _NO_DIMENSION)
        for strategy in (*space.baselines.values(), *space.starts.values()):
            check_effect(strategy)
        for name in space.divergences:
            get_divergence(name)
        return space
    except InputError as error:
        raise InputError(f"space {ref}: {error}") from None


def space_reference(space: str | Path | Space, cache: Path) -> str:
    """Return a reference to a space; a space made in Python is saved in the cache, under its hash.

    Args:
        space: A name or a file, which is returned as it is, or a space.
        cache: Folder with everything that later searches may reuse.
    """
    if not isinstance(space, Space):
        return str(space)
    text = space.to_yaml()
    path = cache / "spaces" / f"{space.hash}-{content_hash(text)}.yaml"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return str(path)
