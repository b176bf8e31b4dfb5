"""What a student's short and long trainings gained at each rate."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from autodistill.search.prior.tried_rates import (
    FACTOR,
    HORIZON,
    HORIZON_OF_SCALES,
    TriedRate,
    paired,
)
from autodistill.strategy.strategy import Strategy
from benchmarks.common import math_table, report
from benchmarks.common.math_search import STEP
from benchmarks.common.math_table import Line
from benchmarks.search.range_test.students import Case, Student, opened


@dataclass(frozen=True, kw_only=True)
class Found:
    """The results of a student's trainings.

    Attributes:
        kind: The group in which rules are compared.
        name: The student's name.
        first: The rate that a test begins with.
        steps: Steps of the long training.
        counts: Tokens of each held-out document; empty if they were not kept.
        tried: By steps, the rates as in a range test, ascending.
        power: Power of the training's length by which the range test assumes that the best rate falls.
    """

    kind: str
    name: str
    first: float
    steps: int
    counts: Sequence[int]
    tried: Mapping[int, Sequence[TriedRate]]
    power: float = HORIZON

    @property
    def ends(self) -> list[TriedRate]:
        """The rates that were trained to the end and did not diverge."""
        return [one for one in self.tried[self.steps] if one.gain is not None]

    def gain(self, rate: float) -> float:
        """Return the nats per token that the long training gains at a rate.

        Between two rates the gain is interpolated linearly over the rate's logarithm.
        """
        rates, gains = zip(*((math.log(one.rate), one.gain) for one in self.ends), strict=True)
        return float(np.interp(math.log(rate), rates, gains))

    @property
    def most(self) -> float:
        """The gain at the best rate."""
        return max(one.gain or 0.0 for one in self.ends)

    def lost(self, rate: float) -> float:
        """Return the nats per token that a rate loses against the best."""
        return self.most - self.gain(rate)

    def below(self, rate: float) -> float:
        """Return how many standard errors the long training at a rate ends below the untrained student.

        It is 0 if the training ends above it.
        """
        near = min(self.ends, key=lambda one: abs(math.log(one.rate / rate)))
        return max(0.0, -self.gain(rate)) / (near.stderr or math.inf)


def measured(case: Case, kept: report.Kept, teacher_steps: int, eval_tokens: int) -> Found:
    """Return the results of a case's trainings. Known results are not measured again."""
    students: list[Student] = []
    with ExitStack() as stack:

        def get(key: str, make: Callable[[Student], Any]) -> Any:
            """Return what is kept under a key, or make it now with the one student of this case."""

            def made() -> Any:
                if not students:
                    students.append(stack.enter_context(opened(case, teacher_steps, eval_tokens)))
                print(f"{case.name}: {key}", file=sys.stderr, flush=True)
                return make(students[0])

            return kept.get(f"{case.name}: {key}", made)

        before = get("before", lambda student: student.before())
        wanted = [(steps, power) for steps in (*case.short, case.steps) for power in case.powers]
        after = {
            (steps, power): get(f"{steps} steps, power {power}", lambda student, p=power, s=steps: student.after(p, s))
            for steps, power in wanted
        }
    tried = {}
    for steps in (*case.short, case.steps):
        tried[steps] = [_tried(case.first * FACTOR**power, before, after[steps, power]) for power in case.powers]
    return Found(
        kind=case.kind,
        name=case.name,
        first=case.first,
        steps=case.steps,
        counts=before["counts"],
        tried=tried,
        power=HORIZON_OF_SCALES if case.strategy.scales_alone else HORIZON,
    )


def _tried(rate: float, before: Mapping[str, Any], sums: list[float] | None) -> TriedRate:
    gain, stderr = paired(before["counts"], before["sums"], sums) if sums else (None, None)
    return TriedRate(rate=rate, gain=gain, stderr=stderr, sums=tuple(sums or ()), seconds=0.0)


def of_sums() -> list[Found]:
    """Return the recorded students of sums that have all four rates. The logarithm of accuracy replaces nats."""
    groups: dict[Any, list[Line]] = {}
    for line in math_table.read():
        strategy = Strategy.from_json(line.strategy)
        same = replace(strategy, distillation=replace(strategy.distillation, learning_rate=1e-3))
        groups.setdefault((same.describe().replace(", lr 0.001", ""), line.seed), []).append(line)
    found = []
    for (name, seed), lines in groups.items():
        if len(lines) < len(math_table.RATES):
            continue
        tried: dict[int, list[TriedRate]] = {}
        for line in sorted(lines, key=_rate):
            for tokens, accuracy in zip(line.tokens, line.decayed, strict=True):
                gain = math.log(accuracy / line.initial)
                told = TriedRate(rate=_rate(line), gain=gain, stderr=None, sums=(), seconds=0.0)
                tried.setdefault(tokens // STEP, []).append(told)
        found.append(
            Found(kind="sums", name=f"{name}, seed {seed}", first=2e-3, steps=max(tried), counts=(), tried=tried)
        )
    return found


def _rate(line: Line) -> float:
    return Strategy.from_json(line.strategy).distillation.learning_rate
