"""Propose the next point of a space from what was observed: always the same point for the same question."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice

from autodistill.evaluation.base import Direction
from autodistill.runs.results.objectives import Objective
from autodistill.runs.results.row import Status
from autodistill.search.algorithms.names import check_sampler
from autodistill.search.algorithms.optuna_study import Observation, modeled
from autodistill.search.algorithms.pareto import fronts, spread
from autodistill.strategy.dimension import Dimension, Point
from autodistill.strategy.domains import Range, Value
from autodistill.strategy.space import Space

_STARTUP = 6  # proposals spread over the space before results are used
_NEAR = 4  # draws from which a neighbour takes the nearest
_ASKS = 8  # draws of the model before a duplicate is replaced by a random point
_SIZES = ("init.depth", "init.ffn", "init.heads", "init.width")  # fractions of the teacher's sizes
_DRAWS = 200  # random draws before a space is searched for its last unseen points


class Sampler:
    """Proposes points: the space's starts, then a spread over the space, and then what a model of the results suggests.

    Args:
        space: What may be proposed.
        name: "tpe", which alternates a tree-structured Parzen estimator with neighbours of the best point, or "random".
        seed: Each proposal follows from the seed, its number and the observations. Only the ids of points are kept
            between calls.
        direction: Whether more or less of the metric is better.
        further: The objectives in addition to the metric.
        earlier: Observations of other searches, on which every proposal depends too.
        first: Points that are proposed before all others, whatever is known about them.

    Raises:
        InputError: An unknown name.
    """

    def __init__(
        self,
        space: Space,
        *,
        name: str = "tpe",
        seed: int = 0,
        direction: Direction = "max",
        further: Sequence[Objective] = (),
        earlier: Sequence[Observation] = (),
        first: Sequence[Point] = (),
    ) -> None:
        check_sampler(name)
        self.space = space
        self.name = name
        self.seed = seed
        self.direction = direction
        self.further = tuple(further)
        self.earlier = tuple(earlier)
        self.first = tuple(first)
        # Ids by the text of a point: many proposals ask for those of all observations.
        self._ids: dict[str, str] = {}

    def propose(self, number: int, observations: Sequence[Observation] = ()) -> Point | None:
        """Return the point to try as proposal `number`, counted from 0, or None if the space has no other strategy.

        A space without dimensions has no proposals. Only its baselines are trained.

        Args:
            number: Number of the proposal.
            observations: Those of all others so far, in the order of their trials.
        """
        if not self.space.dimensions:
            return None
        here = {self._id(observation.point) for observation in observations}
        seen = here | {self._id(item.point) for item in self.earlier if not item.repeatable}
        if number < len(self.first) and self._id(self.first[number]) not in here:
            return dict(self.first[number])
        for point in self._candidates(number, [*self.earlier, *observations]):
            if self._id(point) not in seen:
                return point
        return None

    def _id(self, point: Mapping[str, Value]) -> str:
        key = str(point)
        if key not in self._ids:
            self._ids[key] = self.space.strategy(point).id
        return self._ids[key]

    def _candidates(self, number: int, observations: Sequence[Observation]) -> Iterator[Point]:
        place = number - len(self.first)
        if 0 <= place < len(self.space.starts):
            start = self.space.point(list(self.space.starts.values())[place])
            assert start is not None  # a space holds its starts
            yield start
        # Index among the sampler's own proposals; below 0 while first points or starts remain.
        own = place - len(self.space.starts)
        source = random.Random(f"{self.seed}/{number}")  # text seeds through SHA-512, so every process gets the same
        if self.name == "tpe":
            if self._changes_best(own):
                yield from self._neighbors(own // 2, source, observations)
            known = sum(item.values is not None for item in self.earlier) >= _STARTUP
            if own in self._spreads() and not known:
                yield self._spread(own)
            else:
                seed = source.getrandbits(32)
                model = modeled(seed, self.space, observations, self.direction, self.further, startup=_STARTUP)
                yield from islice(model, _ASKS)
        for _ in range(_DRAWS):
            yield self._draw(lambda dimension: source.random())
        if all(dimension.domain.grid is not None for dimension in self.space.dimensions):
            yield from self.space.points(lambda dimension: dimension.domain.grid or ())

    def _draw(self, quantile: Callable[[Dimension], float]) -> Point:
        point: Point = {}
        for dimension in self.space.dimensions:
            if dimension.active(point):
                point[dimension.path] = dimension.domain.at(quantile(dimension))
        return point

    @staticmethod
    def _changes_best(own: int) -> bool:
        return own % 2 == 0

    def _spreads(self) -> Sequence[int]:
        """Return which of the sampler's own proposals are spread over the space.

        They are the first few, without those that try a change of the best point first.
        """
        first = range(_STARTUP - len(self.first) - len(self.space.starts))
        return [own for own in first if not self._changes_best(own)]

    def _spread(self, own: int) -> Point:
        """Return a row of a Latin hypercube: over all rows, each dimension visits each part of its domain once."""
        rows = self._spreads()
        row = rows.index(own)

        def quantile(dimension: Dimension) -> float:
            """Return where the row lies along a dimension, from 0 to 1, in its own part of a shuffled division."""
            source = random.Random(f"{self.seed}/{dimension.path}")
            parts = source.sample(range(len(rows)), len(rows))
            offsets = [source.random() for _ in parts]
            return (parts[row] + offsets[row]) / len(rows)

        return self._draw(quantile)

    def _neighbors(self, turn: int, source: random.Random, observations: Sequence[Observation]) -> Iterator[Point]:
        """Yield the best point so far with one dimension drawn again, each in its turn, in the order of `_by_turns`.

        A dozen trials tell a model little, and a baseline that was designed by hand is a good place to begin.
        """
        best = self._best(turn, observations)
        if best is None:
            return
        active = _by_turns([dimension for dimension in self.space.dimensions if dimension.path in best])
        for step in range(len(active)):
            changed = active[(turn + step) % len(active)]
            value = _step(changed, best[changed.path], source)
            if value is None:
                continue
            point: Point = {}
            for dimension in self.space.dimensions:
                if not dimension.active(point):
                    continue
                if dimension is changed:
                    point[dimension.path] = value
                elif dimension.path in best:
                    point[dimension.path] = best[dimension.path]
                else:
                    point[dimension.path] = _brought_in(dimension, source)
            yield point

    def _best(self, turn: int, observations: Sequence[Observation]) -> Mapping[str, Value] | None:
        """Return the point with the best value, at any fidelity; the first point while none has a value.

        Values rise with training, so an early value above a late one says even more. Ranking by fidelity first would
        keep a search close to its baseline, the only trial that is trained to the end at once. With several objectives,
        the points of the front take turns.
        """
        signs = [-1.0 if way == "max" else 1.0 for way in (self.direction, *(one.direction for one in self.further))]
        usable = [item for item in observations if item.state not in (Status.REJECTED, Status.FAILED)]
        valued = [item for item in sorted(usable, key=lambda item: -item.fidelity) if item.values is not None]
        if not valued:
            return usable[0].point if usable else None
        costs = {
            # Named so that, among equals, the first one, which has the highest fidelity, goes first.
            f"{place:06d}": tuple(sign * value for sign, value in zip(signs, item.values or (), strict=True))
            for place, item in enumerate(valued)
        }
        front = spread({name: costs[name] for name in fronts(costs)[0]})
        return valued[int(front[turn % len(front) if self.further else 0])].point


def _by_turns(dimensions: Sequence[Dimension]) -> list[Dimension]:
    """Return the first dimension of each part of a strategy, then the second of each, and so on.

    A dozen trials change five dimensions. So each part is changed at least once, whichever has the most dimensions.
    """
    counts: Counter[str] = Counter()
    places: list[int] = []
    for dimension in dimensions:
        part = dimension.path.split(".")[0]
        places.append(counts[part])
        counts[part] += 1
    return [dimension for _, dimension in sorted(zip(places, dimensions, strict=True), key=lambda pair: pair[0])]


def _brought_in(dimension: Dimension, source: random.Random) -> Value:
    """Return the value of a dimension that a change of another dimension brings in.

    A size gets its largest value: a kind of shape is judged by the version that keeps most of the teacher. A random
    size would say more about the size than about the kind.
    """
    if dimension.path in _SIZES and isinstance(dimension.domain, Range):
        return dimension.domain.corners[1]
    return dimension.domain.at(source.random())


def _step(dimension: Dimension, value: Value, source: random.Random) -> Value | None:
    """Return another value of a dimension, for numbers the nearest of a few draws; None if there is no other."""
    domain = dimension.domain
    draws = [domain.at(source.random()) for _ in range(_NEAR if isinstance(domain, Range) else _ASKS)]
    others = [draw for draw in draws if draw != value]
    if not others:
        return None
    if not isinstance(domain, Range):
        return others[0]
    scale = math.log if domain.log else float
    return min(others, key=lambda other: abs(scale(float(other)) - scale(float(value))))
