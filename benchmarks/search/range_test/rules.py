"""Rules that choose a rate after a few steps, and what each loses at the end of a long training."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from autodistill.search.prior.tried_rates import (
    FACTOR,
    TriedRate,
    choose,
    next_rate,
    paired,
)
from benchmarks.common import report
from benchmarks.search.range_test.found import Found

Rule = Callable[[Sequence[TriedRate], Sequence[int], float], float]


def _best(tried: Sequence[TriedRate]) -> int:
    return max(range(len(tried)), key=lambda place: -math.inf if tried[place].gain is None else tried[place].gain)


def lower(tried: Sequence[TriedRate], factor: float) -> float:
    """Return the rate of the lowest NLL, divided by a factor, but not below the smallest rate."""
    return max(tried[0].rate, tried[_best(tried)].rate / factor)


def not_clearly_worse(tried: Sequence[TriedRate], counts: Sequence[int], pick: Callable[..., float]) -> float:
    """Return the smallest or the largest of the rates that are within a standard error of the lowest NLL."""
    best = tried[_best(tried)]

    def near(one: TriedRate) -> bool:
        if one is best or not one.sums:
            return one is best
        gap, error = paired(counts, one.sums, best.sums)
        return gap <= (error or 0.0)

    return pick(one.rate for one in tried if near(one))


POWERS_OF_LENGTH = (0.0, -0.2, -0.35, -0.5)
RULES: dict[str, Rule] = {
    "lowest NLL": lambda tried, counts, longer: lower(tried, 1.0),
    "half a step below the lowest": lambda tried, counts, longer: lower(tried, FACTOR**0.5),
    "one step below the lowest": lambda tried, counts, longer: lower(tried, FACTOR),
    "two steps below the lowest": lambda tried, counts, longer: lower(tried, FACTOR**2),
    "largest that is not clearly worse": lambda tried, counts, longer: not_clearly_worse(tried, counts, max),
    "smallest that is not clearly worse": lambda tried, counts, longer: not_clearly_worse(tried, counts, min),
    **{
        f"top of the parabola, times length to the power of {power:g}": (
            lambda tried, counts, longer, power=power: choose(tried, longer, power)
        )
        for power in POWERS_OF_LENGTH
    },
}


def adaptive(found: Found, steps: int) -> list[TriedRate]:
    """Return the rates that the range test would try, among those that were trained."""
    known = {round(math.log(one.rate / found.first, FACTOR)): one for one in found.tried[steps]}
    tried: list[TriedRate] = []
    while (rate := next_rate(found.first, tried, found.counts)) is not None:
        power = round(math.log(rate / found.first, FACTOR))
        if power not in known:
            break
        tried.append(known[power])
    return tried


def _kinds(found: Sequence[Found]) -> dict[str, list[Found]]:
    kinds: dict[str, list[Found]] = {}
    for one in found:
        kinds.setdefault(one.kind, []).append(one)
    return kinds


def _shorter(found: Found) -> list[int]:
    """Return the lengths of short trainings that are at most a quarter of the long one."""
    return [steps for steps in found.tried if 4 * steps <= found.steps]


def rules_table(found: Sequence[Found]) -> str:
    """Return the table of each rule's loss at the end of the long training."""
    kinds = _kinds(found)
    lines = []
    for name, rule in RULES.items():
        cells = [name]
        for members in kinds.values():
            if "clearly" in name and not members[0].counts:
                cells.append("")
                continue
            picked = [
                (one, rule(one.tried[steps], one.counts, one.steps / steps))
                for one in members
                for steps in _shorter(one)
            ]
            cells.append(_losses(picked))
        lines.append(cells)
    cells = ["the rate that the test begins with, untested"]
    cells += [_losses([(one, one.first) for one in members]) for members in kinds.values()]
    lines.append(cells)
    cells = ["the range test as it is, which tries few rates"]
    for members in kinds.values():
        picked = [
            (one, choose(adaptive(one, steps), one.steps / steps, one.power))
            for one in members
            if one.counts
            for steps in _shorter(one)
        ]
        cells.append(_losses(picked) if picked else "")
    lines.append(cells)
    return report.table(["rule", *(f"{kind} ({len(members)})" for kind, members in kinds.items())], lines)


def _losses(picked: Sequence[tuple[Found, float]]) -> str:
    lost = [1000 * one.lost(rate) for one, rate in picked]
    ruined = sum(one.below(rate) > 2 for one, rate in picked)
    return f"{np.mean(lost):.1f}, {max(lost):.1f}" + (f", {ruined} below" if ruined else "")


def best_table(found: Sequence[Found]) -> str:
    """Return the table of the best rates by length of training."""
    lines = []
    for one in found:
        tops = []
        for steps in one.tried:
            top = choose(one.tried[steps], 1.0, 0.0)
            tops.append(f"{steps}: {top:.1e}")
        gains = f"{one.most:.4f}"
        chosen = [
            f"{choose(adaptive(one, steps), one.steps / steps, one.power):.1e} after {len(adaptive(one, steps))} rates"
            for steps in _shorter(one)
            if one.counts
        ]
        lines.append([one.name, f"{one.first:.1e}", ", ".join(tops), ", ".join(chosen), gains])
    titles = ["student", "first", "best rate by steps", "chosen by the range test", "nats won at best"]
    return report.table(titles, lines)
