"""Do candidates keep their order from before distillation over each rung to its end, and what follows for the rungs?

    python -m benchmarks.search.rank_flip [--draws 2000] [--time 10m]

Reads the table that `math_table.py` records. It computes Kendall's tau-b between accuracies at a point of training and
those at full fidelity, with standard errors over bootstrapped strategies. It also runs successive halving with other
rungs and shares on many random draws of as many strategies as a search proposes. It reports the cost, and how far the
choice is behind the best strategy drawn. If the time ends first, the report covers the draws until then, and states
their number.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from autodistill.search.algorithms.successive_halving import kept_at_rungs
from autodistill.strategy.strategy import Strategy
from benchmarks.common import report
from benchmarks.common.math_search import STEP, TOKENS
from benchmarks.common.math_table import RUNGS, STORE
from benchmarks.common.over_seeds import mean
from benchmarks.common.prepared import Costs
from benchmarks.common.program import TRACKED, parse, parser_of
from benchmarks.common.recorded import TRIALS, Table, load_table
from benchmarks.common.simulate import plan

SHARES = {rung: f"1/{round(TOKENS / rung)}" if rung < TOKENS else "1" for rung in RUNGS}
OWN = ((1, 2), kept_at_rungs(TRIALS, 3))
# Rungs below the last, by their index among the recorded ones, and how many of 12 pass each.
SCHEDULES = (
    OWN,
    ((1, 2), (8, 3)),
    ((1, 2), (6, 2)),
    ((1, 2), (4, 2)),
    ((1, 2), (3, 1)),
    ((0, 1, 2), (6, 3, 2)),
    ((0, 2), (6, 2)),
    ((0,), (3,)),
    ((1,), (6,)),
    ((1,), (4,)),
    ((1,), (2,)),
    ((2,), (6,)),
    ((2,), (4,)),
    ((2,), (2,)),
)


def tau(
    first: npt.NDArray[np.float64], second: npt.NDArray[np.float64], counted: npt.NDArray[np.bool_] | None = None
) -> float:
    """Return Kendall's tau-b: concordant minus discordant pairs, over the root of the pairs that are not tied in each.

    Args:
        first, second: [n], two orders.
        counted: [n, n], pairs that count; all by default.
    """
    a, b = (np.sign(np.subtract.outer(values, values)) for values in (first, second))
    if counted is not None:
        a, b = a * counted, b * counted
    return float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()))


def with_error(
    first: Sequence[float], second: Sequence[float], groups: Sequence[str] | None = None, draws: int = 500
) -> str:
    """Return tau-b and its bootstrapped standard error. With groups, only pairs within a group count."""
    a, b, dice = np.asarray(first), np.asarray(second), np.random.default_rng(0)
    same = None if groups is None else np.equal.outer(np.asarray(groups), np.asarray(groups))

    def of(chosen: npt.NDArray[np.int64]) -> float:
        return tau(a[chosen], b[chosen], None if same is None else same[np.ix_(chosen, chosen)])

    with np.errstate(invalid="ignore"):
        value = of(np.arange(len(a)))
        found = [of(chosen) for chosen in dice.integers(0, len(a), (draws, len(a)))]
    return "" if np.isnan(value) else f"{value:.3f} ± {np.nanstd(found, ddof=1):.3f}"


class Halving:
    """Runs successive halving over recorded strategies, as arrays.

    Args:
        table: Recorded students.
        places: Indices of the rungs below the last, among the recorded ones.
        keep: How many strategies pass each rung.
        decayed: Whether rungs are judged after a decay that branched off, which is extra training.
    """

    def __init__(self, table: Table, places: Sequence[int], keep: Sequence[int], *, decayed: bool = True) -> None:
        lines = table.recorded
        self._keep = keep
        self._final = np.array([line.final for line in lines])
        source = [line.decayed if decayed else line.plain for line in lines]
        self._values = np.array([[values[place] for place in places] for values in source]).reshape(len(lines), -1)
        rungs = (*(RUNGS[place] for place in places), TOKENS)
        costs = Costs(table.teacher, plan(len(lines), rungs, ()))
        strategies = [Strategy.from_json(line.strategy) for line in lines]

        def segment(strategy: Strategy, index: int) -> int:
            if decayed:
                return costs.segment(strategy, index, index - 1)
            before = rungs[index - 1] if index else 0
            read = costs.evaluation(strategy, costs.read_at(index))
            return costs.train(strategy, rungs[index] - before) + read

        self._costs = np.array([[segment(one, index) for index in range(len(rungs))] for one in strategies], float)
        whole = Costs(table.teacher, plan(len(lines), (TOKENS,), ()))
        self._whole = np.array([whole.segment(one, 0, -1) for one in strategies], float)

    def run(self, drawn: npt.NDArray[np.int64]) -> tuple[float, float]:
        """Return how far the choice is behind the best drawn, and the operations relative to training all fully."""
        left, spent = drawn, 0.0
        for index, kept in enumerate(self._keep):
            spent += self._costs[left, index].sum()
            left = left[np.argsort(-self._values[left, index], kind="stable")[:kept]]
        spent += self._costs[left, len(self._keep)].sum()
        return self._final[drawn].max() - self._final[left].max(), spent / self._whole[drawn].sum()


def on_draws(
    halvings: Sequence[Halving], strategies: int, draws: int, deadline: float
) -> list[list[tuple[float, float]]]:
    """Return the results of each halving on the same random draws, as given by `Halving.run`.

    Args:
        halvings: Halvings over the same recorded strategies.
        strategies: Number of these strategies.
        draws: Number of draws to make.
        deadline: `time.monotonic()` after which no further draw is begun. Two are always made.
    """
    dice = np.random.default_rng(0)
    found: list[list[tuple[float, float]]] = [[] for _ in halvings]
    for number in range(draws):
        if number > 1 and time.monotonic() > deadline:
            break
        drawn = dice.choice(strategies, TRIALS, replace=False)
        for halving, results in zip(halvings, found, strict=True):
            results.append(halving.run(drawn))
        if (number + 1) % max(1, draws // 20) == 0:
            print(f"draw {number + 1:,} of {draws:,}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    """Judge the recorded students at each stage, and write the report of how their order changes."""
    parser = parser_of(__doc__, time=True)
    parser.add_argument("--draws", type=int, default=2000, help="of strategies to be halved")
    arguments = parse(parser, draws=2)
    deadline = time.monotonic() + arguments.time
    table = load_table()
    lines = table.recorded
    final = [line.final for line in lines]
    shapes = [str(line.strategy["init"]) for line in lines]
    initial = [line.initial for line in lines]
    rows = [["before distillation", "", with_error(initial, final), with_error(initial, final, shapes)]]
    for place, rung in enumerate(RUNGS[:-1]):
        plain, decayed = ([getattr(line, name)[place] for line in lines] for name in ("plain", "decayed"))
        found = [with_error(plain, final), with_error(decayed, final), with_error(decayed, final, shapes)]
        rows.append([f"{SHARES[rung]} of the tokens", *found])
        print(f"judged at {rows[-1][0]}", file=sys.stderr, flush=True)
    tried = ((OWN, False), *((one, True) for one in dict.fromkeys(SCHEDULES)))
    halvings = [Halving(table, *schedule, decayed=decayed) for schedule, decayed in tried]
    results = on_draws(halvings, len(lines), arguments.draws, deadline)
    schedules = []
    for (schedule, decayed), found in zip(tried, results, strict=True):
        places, keep = schedule
        name = ", ".join(SHARES[RUNGS[place]] for place in places)
        name += " (the search's)" if schedule == OWN and decayed else "" if decayed else " (no decay before it)"
        behind = [one[0] for one in found]
        best = [one <= 0 for one in behind]
        cost = [one[1] for one in found]
        schedules.append(
            [
                name,
                ", ".join(map(str, keep)),
                mean(cost, 1, factor=100),
                mean(behind, 3, factor=100),
                mean(best, 0, factor=100),
            ]
        )
    head = (
        f"{len(lines)} strategies of `math_space.yaml` on the math teacher, {TOKENS:,} training tokens each in "
        f"{TOKENS // STEP} optimiser steps, one seed, recorded by `math_table.py`. Accuracy is that of an answer's "
        "next token on validation, under the deployment that rungs are judged on. Before distillation candidates "
        f"differ in how they are cut and packed alone: {len({round(line.initial, 9) for line in lines})} different "
        f"values. Final accuracies lie between {100 * min(final):.2f}% and {100 * max(final):.2f}%; their standard "
        f"deviation is {100 * np.std(final):.2f} points."
    )
    parts = [
        head,
        '## Kendall\'s tau-b with the order at full fidelity\n\n"Decayed" is after the short decay branched off the '
        'stable part, after which rungs are judged; "plain" is without it, at the same tokens. Standard errors are of '
        "bootstrapped strategies.\n\n"
        + report.table(["judged at", "plain", "decayed", "decayed, within a shape"], rows),
        f"## Rungs\n\nSuccessive halving of {TRIALS} strategies drawn at random, {len(results[0]):,} draws, all "
        "proposed at once: operations over those of training all of them to the end, the decays that rungs cost "
        "included; how far, in points, the chosen student is behind the best of those drawn; and how often it is "
        "that one.\n\n"
        + report.table(["rungs", "kept", "operations, %", "behind, points", "the best found, %"], schedules),
    ]
    print(report.write("rank-flip", "Do rankings flip?", parts, TRACKED / STORE))


if __name__ == "__main__":
    main()
