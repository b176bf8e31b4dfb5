"""Restrictions of the solver: the shapes, types and storages that it may choose from in a solved space."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from autodistill.errors import InputError
from autodistill.quantization.formats import TYPES
from autodistill.quantization.grids import Grid, Storage
from autodistill.quantization.scheme import QuantizationScheme
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.dimension import PATHS, Dimension, in_order, place, points
from autodistill.strategy.domains import Choices, Range, Value
from autodistill.strategy.strategy import Finishing, Init
from autodistill.utils.plain_dataclass import check

PARTS = ("init", "finishing")
"""The parts of a strategy that a solver chooses. Dimensions of a space within these parts restrict the solver."""

_FRACTIONS = ("init.depth", "init.ffn", "init.heads")  # the solver finds the best values of these itself
_MOST_SHAPES = 24  # the most shapes that a space may name, since each is built and measured
_HOW_TRAINED = ("finishing.scales", "finishing.start")
_GRIDS = ("finishing", "finishing.format", "finishing.bits", "finishing.group_size", "finishing.symmetric")
_DECLARE = "leave `solved` out and declare the space by hand, as search_spaces/declared.yaml does"


@dataclass(frozen=True, kw_only=True)
class Restriction:
    """What a solver may choose from; by default everything that it knows.

    Attributes:
        dimensions: Dimensions of `init` and `finishing`, each after those that its condition names. A list of values,
            or a range, narrows what may be chosen. A single value fixes it.
        storages: The only storages in llama.cpp that may be chosen, or None if types are solved too.
    """

    dimensions: tuple[Dimension, ...] = ()
    storages: tuple[Deployment, ...] | None = None

    def check(self) -> None:
        """Refuse dimensions that the solver does not choose, and dimensions that contradict each other.

        Raises:
            InputError: The message names the dimension, or the two that contradict each other.
        """
        for one in self.dimensions:
            known = one.path in (*_GRIDS, *_HOW_TRAINED) or one.path.startswith("init")
            check(known, f"{one.path} is nothing that is solved: give such a storage as a deployment, or {_DECLARE}")
            others = [path for path in one.when if not (path.startswith("init") and one.path.startswith("init"))]
            check(not others, f"{one.path} restricts the solver in every case: leave its `when` out")
        assert self.kinds is None or self.kinds
        assert self.inits is None or self.inits
        for path in _FRACTIONS:
            if self.inits is None and (domain := self._domains.get(path)):
                for value in domain.corners:
                    check(
                        isinstance(value, int | float) and 0 < value <= 1,
                        f"{path} is a fraction of the teacher's above 0, not {value!r}",
                    )
        self._check_storages()

    def _check_storages(self) -> None:
        if self.storages is None or self.kinds is None:
            return
        check(
            self.storages != (),
            f"{self._grid_paths} says which types of GGUF are solved, and no deployment is for llama.cpp: leave one of "
            "the two out",
        )
        held = [one for one in self.storages if self.holds(one.scheme)]
        if not held:
            names = ", ".join(one.name for one in self.storages)
            raise InputError(
                f"{self._grid_paths} and deployments ({names}) contradict each other: no deployment in llama.cpp is of "
                "what finishing allows; change one of the two"
            )

    @property
    def _grid_paths(self) -> str:
        return " and ".join(one.path for one in self.dimensions if one.path in (*_GRIDS, "finishing.scales"))

    def holds(self, scheme: QuantizationScheme) -> bool:
        """Return whether matrices of linear layers may be stored as they are in `scheme`."""
        return self.kinds is None or _kind(scheme.linear) in self.kinds

    @cached_property
    def fixed(self) -> tuple[Deployment, ...] | None:
        """The deployments that may be chosen as a whole, or None if types are solved."""
        return None if self.storages is None else tuple(one for one in self.storages if self.holds(one.scheme))

    @cached_property
    def _domains(self) -> dict[str, Choices | Range]:
        return {one.path: one.domain for one in self.dimensions}

    @cached_property
    def training(self) -> tuple[Dimension, ...]:
        """The dimensions that say how training ends on the solved grid, without changing the grid."""
        return tuple(one for one in self.dimensions if one.path in _HOW_TRAINED)

    @cached_property
    def inits(self) -> tuple[Init, ...] | None:
        """The only shapes that may be chosen, or None if the solver finds its own.

        Raises:
            InputError: A range without steps, too many shapes to measure, or a shape that is not cut from the teacher.
        """
        told = [one for one in self.dimensions if one.path.startswith("init")]
        if all(one.path in _FRACTIONS and not one.when for one in told):
            return None
        for one in told:
            check(
                one.domain.grid is not None,
                f"{one.path} is a range next to other dimensions of init: each shape is measured, so give it choices, "
                "or a step",
            )
        found = dict.fromkeys(_init_at(told, point) for point in points(told, _grid, {}))
        check(len(found) <= _MOST_SHAPES, f"init has {len(found)} shapes, and at most {_MOST_SHAPES} are measured")
        for init in found:
            check(
                init.source == "teacher",
                f"init.source {init.source} leaves nothing of the teacher, on which types are scored: {_DECLARE}",
            )
        return tuple(found)

    @cached_property
    def kinds(self) -> tuple[str, ...] | None:
        """The types of GGUF that matrices of linear layers may have, or None for all types.

        Raises:
            InputError: A value that no type has, or two dimensions that together leave no type.
        """
        told = [(path, set(found)) for path, found in self._kinds_by_path()]
        if not told:
            return None
        left = set(TYPES)
        for place_, (path, kinds) in enumerate(told):
            if not left & kinds:
                apart = (other for other, those in told[:place_] if not those & kinds)
                first = next(apart, " and ".join(other for other, _ in told[:place_]))
                raise InputError(
                    f"{first} and {path} contradict each other: no type of GGUF that llama.cpp runs has both; change "
                    "one of the two"
                )
            left &= kinds
        return tuple(kind for kind in TYPES if kind in left)

    def _kinds_by_path(self) -> Iterator[tuple[str, list[str]]]:
        values = {
            "finishing.format": lambda kind: f"gguf-{kind}",
            "finishing.bits": lambda kind: _key(kind)[0],
            "finishing.group_size": lambda kind: _key(kind)[1],
            "finishing.symmetric": lambda kind: _key(kind)[2],
        }
        for path, domain in self._domains.items():
            if path == "finishing":
                yield path, [_kind_of(data, label) for label, data in _parts(domain)]
            elif path in values:
                wanted = domain.grid or ()
                for value in wanted if isinstance(domain, Choices) else ():
                    known = list(dict.fromkeys(map(values[path], TYPES)))
                    check(
                        value in known,
                        f"{path} is {value!r}, which no type of GGUF has that is solved: these have "
                        f"{', '.join(map(str, known))}; or {_DECLARE}",
                    )
                yield path, [kind for kind in TYPES if domain.holds(values[path](kind))]
            elif path == "finishing.scales" and domain.holds("learned"):
                yield path, [kind for kind in TYPES if not (isinstance(one := TYPES[kind], Grid) and one.codebook)]

    def depth(self, fraction: float) -> bool:
        """Return whether this share of the teacher's layers may be kept."""
        return _within(self._domains.get("init.depth"), fraction)

    def ffn(self, fraction: float) -> bool:
        """Return whether this share of an FFN's neurons may be kept."""
        return _within(self._domains.get("init.ffn"), fraction)

    def heads(self, fraction: float) -> bool:
        """Return whether this share of attention's groups of heads may be kept."""
        return _within(self._domains.get("init.heads"), fraction)

    def ends(self, path: str) -> tuple[float, ...]:
        """Return the fractions that a dimension lists, or the ends of its range; () if there is no such dimension."""
        domain = self._domains.get(path)
        return () if domain is None else tuple(map(float, domain.corners))


def _within(domain: Choices | Range | None, fraction: float) -> bool:
    """Return whether a domain has a fraction, up to a small tolerance, since sizes are rounded."""
    if domain is None:
        return True
    if isinstance(domain, Range):
        return domain.low - _ROUNDED <= fraction <= domain.high + _ROUNDED
    return any(abs(float(value) - fraction) <= _ROUNDED for value in domain.corners)


_ROUNDED = 1e-6


def _grid(dimension: Dimension) -> Sequence[Value]:
    return dimension.domain.grid or ()


def _init_at(told: Sequence[Dimension], point: dict[str, Value]) -> Init:
    data: dict[str, object] = {}
    for one in told:
        if one.active(point):
            place(data, one.path, one.domain.meaning(point[one.path]))
    return Init.from_json(data.get("init", {}), "init")


def _parts(domain: Choices | Range) -> Iterator[tuple[Value, object]]:
    assert isinstance(domain, Choices)  # a part is not a number, so it cannot have a range
    yield from domain.values.items()


def _kind_of(data: object, label: Value) -> str:
    """Return the type that a finishing trains on; "f16" if there is no finishing."""
    if data is None:
        return "f16"
    finishing = Finishing.from_json(data, f"finishing.{label}")
    check(
        not finishing.by_name and finishing.container == "gguf" and finishing.format.removeprefix("gguf-") in TYPES,
        f"finishing.{label} is {finishing.name}, and types by tensor are solved in GGUF: give it as a deployment, or "
        f"{_DECLARE}",
    )
    return _kind(finishing.linear)


def _kind(storage: Storage) -> str:
    """Return the name of a storage among GGUF's types, or "" if it is none of them."""
    return next((kind for kind, one in TYPES.items() if one == storage), "")


def _key(kind: str) -> tuple[int, int, bool]:
    storage = TYPES[kind]
    return (storage.bits, storage.group_size, storage.symmetric) if isinstance(storage, Grid) else (16, 0, True)


def restriction(dimensions: Sequence[Dimension], storages: Sequence[Deployment] | None) -> Restriction:
    """Return a space's restriction of how students begin and are stored.

    Args:
        dimensions: The space's dimensions within `PARTS`.
        storages: As in `Restriction`.

    Raises:
        InputError: As `Restriction.check`.
    """
    found = Restriction(dimensions=in_order(dimensions), storages=None if storages is None else tuple(storages))
    found.check()
    return found


def restricts(path: str) -> bool:
    """Return whether a path in a strategy belongs to a part that a solver chooses."""
    return path in PATHS and path.partition(".")[0] in PARTS
