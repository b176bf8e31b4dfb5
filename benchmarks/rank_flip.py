"""Whether candidates keep their order: before distillation, at each rung, after all of it; and which rungs follow.

    python benchmarks/rank_flip.py [--draws 2000] [--time 5m]

Reads the table that `math_table.py` records. Kendall's tau-b between accuracies at a point of training and those at full
fidelity, with standard errors over bootstrapped strategies; and successive halving with other rungs and shares, on many
random draws of as many strategies as a search proposes: what it costs, and how far its choice is behind the best drawn.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import report
from kept import Kept, mean
from math_search import STEP, TOKENS, Costs
from math_table import RUNGS, STORE, Line
from simulate import TRIALS, Table, load_table, plan

from autodistill.search.plan import _keep
from autodistill.strategy import Strategy
from autodistill.units import parse_duration

SHARES = {rung: f"1/{round(TOKENS / rung)}" if rung < TOKENS else "1" for rung in RUNGS}
# Rungs below the last, and how many of 16 go past each.
SCHEDULES = (
    ((), ()),
    ((2, 1), (8, 3)),  # the search's own: a ninth and a third, half and then a third of those
    ((2, 1), (6, 2)),
    ((2, 1), (4, 2)),
    ((2, 1), (8, 2)),
    ((2, 1), (12, 4)),
    ((1,), (8,)),
    ((1,), (4,)),
    ((1,), (2,)),
    ((2,), (4,)),
    ((2,), (2,)),
    ((3, 2, 1), (8, 4, 2)),
    ((3, 1), (8, 3)),
)


def tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b: concordant less discordant pairs, over the root of the pairs that are not tied in each."""
    a, b = (np.sign(np.subtract.outer(np.asarray(v), np.asarray(v))) for v in (first, second))
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def with_error(first: Sequence[float], second: Sequence[float], draws: int = 200) -> str:
    """Tau-b and its bootstrapped standard error."""
    a, b, dice = np.asarray(first), np.asarray(second), np.random.default_rng(0)
    found = [tau(a[chosen], b[chosen]) for chosen in dice.integers(0, len(a), (draws, len(a)))]
    return f"{tau(a, b):.3f} ± {np.std(found, ddof=1):.3f}"


def ladder(levels: Sequence[int]) -> tuple[int, ...]:
    """Recorded rungs by how many thirds they are below the last, 0 for the last."""
    return tuple(sorted(RUNGS[-1 - level] for level in (*levels, 0)))


def halve(lines: Sequence[Line], rungs: Sequence[int], keep: Sequence[int], *, decayed: bool = True) -> Line:
    """The best at full fidelity of those that pass every rung."""
    left = list(lines)
    for rung, kept in zip(rungs, keep, strict=False):
        place = RUNGS.index(rung)
        left = sorted(left, key=lambda line: -(line.decayed if decayed else line.plain)[place])[:kept]
    return max(left, key=lambda line: line.final)


def cost(
    lines: Sequence[Line], rungs: Sequence[int], keep: Sequence[int], table: Table, *, decayed: bool = True
) -> float:
    """Operations over those of the same strategies trained to the end."""
    costs = Costs(table.teacher, plan(len(lines), rungs, keep))
    left, spent = list(lines), 0
    for index, rung in enumerate(rungs):
        for line in left:
            strategy = Strategy.from_json(line.strategy)
            if decayed:
                spent += costs.stretch(strategy, index, index - 1)
            else:
                before = rungs[index - 1] if index else 0
                spent += costs.train(strategy, rung - before) + costs.evaluation(strategy, costs.read_at(index))
        if index < len(keep):
            place = RUNGS.index(rung)
            left = sorted(left, key=lambda line: -(line.decayed if decayed else line.plain)[place])[: keep[index]]
    whole = Costs(table.teacher, plan(len(lines), (TOKENS,), ()))
    return spent / sum(whole.stretch(Strategy.from_json(line.strategy), 0, -1) for line in lines)


def tried(
    table: Table, lines: list[Line], levels: Sequence[int], keep: Sequence[int], draws: int, decayed: bool
) -> Any:
    """Cost of a schedule, and how far it is behind the best drawn: means over draws of 16 strategies."""
    dice = np.random.default_rng(0)
    behind, costs, found = [], [], []
    rungs = ladder(levels)
    for number in range(draws):
        drawn = [lines[index] for index in dice.choice(len(lines), TRIALS, replace=False)]
        chosen, best = halve(drawn, rungs, keep, decayed=decayed), max(line.final for line in drawn)
        behind.append(best - chosen.final)
        found.append(chosen.final >= best)
        if number < 200:
            costs.append(cost(drawn, rungs, keep, table, decayed=decayed))
    return [behind, found, costs]


def main() -> None:
    """Reads the table and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--time", type=parse_duration, default=float("inf"))
    arguments = parser.parse_args()
    table = load_table()
    lines = table.recorded
    kept = Kept("rank-flip", STORE, arguments.time)
    final = [line.final for line in lines]
    rows = [["before distillation", "", with_error([line.initial for line in lines], final)]]
    for place, rung in enumerate(RUNGS[:-1]):
        plain, decayed = ([getattr(line, name)[place] for line in lines] for name in ("plain", "decayed"))
        rows.append([f"{SHARES[rung]} of the tokens", with_error(plain, final), with_error(decayed, final)])
    schedules = []
    for levels, keep in SCHEDULES:
        for decayed in (True, False) if levels else (True,):
            if not decayed and (levels, keep) != SCHEDULES[1]:
                continue
            key = f"{levels} {keep} {decayed} {arguments.draws}"
            behind, found, costs = kept.get(
                key,
                lambda levels=levels, keep=keep, decayed=decayed: tried(
                    table, lines, levels, keep, arguments.draws, decayed
                ),
            )
            shares = ", ".join(SHARES[rung] for rung in ladder(levels)[:-1]) or "none"
            own = " (the search's)" if keep == _keep(TRIALS, 3) and levels == (2, 1) and decayed else ""
            schedules.append(
                [
                    shares + own + ("" if decayed else " (no decay before it)"),
                    ", ".join(map(str, keep)) or "all",
                    mean(costs, 100, 1),
                    mean(behind, 100, 3),
                    mean(found, 100, 0),
                ]
            )
    head = (
        f"{len(lines)} strategies of `math_space.yaml` on the math teacher, {TOKENS:,} training tokens each in {TOKENS // STEP} "
        "optimiser steps, one seed, recorded by `math_table.py`. Accuracy is that of the next token of an answer on "
        "validation, under the deployment that rungs are judged on. Before distillation, candidates differ in how they are "
        f"cut and packed alone: {len({round(line.initial, 9) for line in lines})} different values. Final accuracies "
        f"lie between {100 * min(final):.2f}% and {100 * max(final):.2f}%, their standard deviation is "
        f"{100 * np.std(final):.2f} points."
    )
    parts = [
        head,
        '## Kendall\'s tau-b with the order at full fidelity\n\n"Decayed" is after the short decay branched off the stable '
        'part, which rungs are judged after; "plain" is without it, at the same tokens. Standard errors from '
        "bootstrapped strategies.\n\n" + report.table(["judged at", "plain", "decayed"], rows),
        f"## Rungs\n\nSuccessive halving of {TRIALS} strategies drawn at random, {arguments.draws:,} draws, all proposed at "
        "once: operations over those of training all to the end, the decays that rungs cost included; how many points the "
        "chosen student is behind the best of those drawn; and how often it is that best one.\n\n"
        + report.table(["rungs", "kept", "operations, %", "behind the best drawn, points", "found, %"], schedules),
    ]
    print(report.write("rank-flip", "Do rankings flip?", parts))


if __name__ == "__main__":
    main()
