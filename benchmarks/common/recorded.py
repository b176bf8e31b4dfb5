"""The table of recorded students: the accuracy that each strategy of the math space reached at every rung."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from autodistill.distillation.student.check import student_spec
from autodistill.estimates.fit import fits
from autodistill.models.config import spec_from_config
from autodistill.models.spec import ModelSpec
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.dimension import Point
from autodistill.strategy.domains import Value
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Strategy
from autodistill.utils.hashing import content_hash
from autodistill.utils.yaml_files import read_yaml
from benchmarks.common import math_table, timed_parts
from benchmarks.common.expenses import Clock
from benchmarks.common.math_search import BUDGET, RECIPE, SPACE_FILE
from benchmarks.common.math_table import Line
from benchmarks.common.math_teacher import SHAPE
from benchmarks.common.timed_parts import Parts

TRIALS = 12
SEED = 0  # the seed of the recorded students


def teacher_spec() -> ModelSpec:
    """Return the shape of the math teacher."""
    return spec_from_config(
        {"model_type": "llama", "vocab_size": 20, "max_position_embeddings": 80, "tie_word_embeddings": True, **SHAPE}
    )


class Remembering(Space):
    """A space that makes the strategy of a point only once."""

    def strategy(self, point: Mapping[str, Value]) -> Strategy:
        """Return the strategy of a point. It is made only once."""
        return _strategy(self, frozenset(point.items()))

    def __hash__(self) -> int:
        return int(self.hash, 16)


@cache
def _strategy(space: Remembering, point: frozenset[tuple[str, Value]]) -> Strategy:
    return Space.strategy(space, dict(point))


class Table:
    """Recorded students by strategy, for one seed of data order.

    Attributes:
        space: The space with those learning rates for which every strategy is recorded.
        deployments: The space's deployments.
        lines: The lines of the main seed, by strategy.
        every: The lines of all seeds, by strategy and seed.
        teacher: The teacher's shape.
        clock: Estimates how long work took when the table was recorded.
    """

    def __init__(self, lines: Sequence[Line], parts: Parts) -> None:
        self.teacher = teacher_spec()
        self.deployments = Space.from_json(read_yaml(SPACE_FILE)).deployments
        self.every = {(line.id, line.seed): line for line in lines}
        self.lines = {line.id: line for line in lines if line.seed == SEED}
        self.space = self._recorded()
        self.clock = Clock(lines, parts, self.space.baselines[RECIPE], self.teacher)

    @property
    def digest(self) -> str:
        """A hash of everything that a replay depends on: the recorded values, and the space."""
        return content_hash(
            [self.space.hash, TRIALS, sorted([one.id, *one.decayed, *one.plain] for one in self.recorded)]
        )

    def _recorded(self) -> Space:
        data = read_yaml(SPACE_FILE)
        whole = Space.from_json(data)
        missing = {
            strategy.distillation.learning_rate
            for strategy in map(whole.strategy, whole.points(lambda dimension: dimension.domain.grid or ()))
            if self._fits(strategy) and strategy.id not in self.lines
        }
        rates = data["dimensions"]["distillation.learning_rate"]["choices"]
        kept = [rate for rate in rates if float(rate) not in missing]
        if len(kept) < 2:
            raise SystemExit(
                "the table is too small to be replayed on: run `python -m benchmarks.common.math_table` first"
            )
        data["dimensions"]["distillation.learning_rate"] = {"choices": kept}
        return Remembering.from_json(data)

    def _fits(self, strategy: Strategy) -> bool:
        return bool(allowed(student_spec(strategy, self.teacher), self.deployments))

    def line(self, strategy: Strategy) -> Line:
        """Return the line of a strategy."""
        return self.lines[strategy.id]

    def best(self) -> float:
        """Return the best value of any recorded student."""
        return max(max(line.rows.values()) for line in self.recorded)

    @property
    def recorded(self) -> list[Line]:
        """The lines of the space's strategies."""
        points = self.space.points(lambda dimension: dimension.domain.grid or ())
        strategies = map(self.space.strategy, points)
        return [self.lines[strategy.id] for strategy in strategies if strategy.id in self.lines]


@cache
def allowed(spec: ModelSpec, deployments: tuple[Deployment, ...]) -> tuple[Deployment, ...]:
    """Return the deployments within the budget."""
    return tuple(fit.deployment for fit in fits(spec, deployments, BUDGET) if fit.slack <= 0)


def points(space: Space) -> list[Point]:
    """Return all points of a space's grids."""
    return list(space.points(lambda dimension: dimension.domain.grid or ()))


def load_table() -> Table:
    """Return the recorded table.

    Raises:
        SystemExit: Too little is recorded.
    """
    return Table(math_table.read(), timed_parts.read())
