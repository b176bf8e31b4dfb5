"""Joint search against pruning, distilling and quantising in turn, at the same memory limit and total tokens.

    python -m benchmarks.search.joint_or_sequential [--seeds 50] [--time 10m]

All arms use the real campaign, sampler and scheduler on the table that `math_table.py` recorded, under the same budget.
Joint is one search of the whole space. In turn, the shape is chosen first, with the recipe's distillation at any
learning rate. Then the distillation of that shape is chosen. Both are without a grid. Last, it is chosen whether the
distilled student finishes on the grid, which trains only the decay. There are two ways of taking turns. In the first,
as done by hand, trials go to the end and are judged in 16 bits. In the second, each step pauses and promotes as this
search does, and judges students as deployed. Each has the tokens of the joint search of the same seed. The last trial
that begins within them is included.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from autodistill.options import cache_folder
from autodistill.search.algorithms.successive_halving import kept_at_rungs
from autodistill.search.worker.context import Workbench
from autodistill.strategy.dimension import Point
from autodistill.strategy.strategy import Strategy
from benchmarks.common import math_table, report
from benchmarks.common.math_search import RECIPE, TOKENS, prepare
from benchmarks.common.math_table import RUNGS, Line, Recorder
from benchmarks.common.over_seeds import mean
from benchmarks.common.prepared import Prepared, accuracy
from benchmarks.common.program import parse, parser_of
from benchmarks.common.recorded import SEED, TRIALS, Remembering, Table, load_table, points
from benchmarks.common.report import Kept
from benchmarks.common.simulate import Worker, default_rungs, plan, simulate

# Shares of the tokens for choosing the shape. The distillation has the rest.
PRUNING = (0.3, 0.5)


def joint(table: Table, seed: int) -> dict[str, Any]:
    """Simulate a joint search, and return its training tokens and what it found."""
    spent, _ = simulate(table, plan(TRIALS, default_rungs(), kept_at_rungs(TRIALS, 3)), seed=seed)
    return {"tokens": spent.trained, "best": spent.best[2], "strategy": spent.best[3]}


class Turns:
    """Prunes, then distils, then quantises.

    Args:
        table: Recorded students.
        wide: Accuracy of unquantised students, by strategy.
    """

    def __init__(self, table: Table, wide: dict[str, float]) -> None:
        self._table = table
        self._wide = wide
        self._finish = TOKENS - Worker(table, plan(1, (TOKENS,), ())).costs.branch(0)
        recipe = table.space.point(table.space.baselines[RECIPE])
        assert recipe is not None
        self._recipe = recipe

    def by_hand(self, tokens: int, pruning: float, seed: int) -> dict[str, Any]:
        """Run trials to the end, in 16 bits, in a random order after the recipe's own."""
        dice, whole = np.random.default_rng(seed), tokens - self._finish
        shapes = self._shuffled(self._of(), dice)
        # Every shape comes once, before any learning rate other than the recipe's.
        own = self._recipe["distillation.learning_rate"]
        shapes.sort(key=lambda point: point["distillation.learning_rate"] != own)
        known: dict[str, float] = {}
        used = self._train(shapes, pruning * whole, known)
        shape = self._best(known)["init"]
        used += self._train(self._shuffled(self._of(shape), dice), whole - used, known)
        best = self._best({name: value for name, value in known.items() if self._point(name)["init"] == shape})
        return self._quantize(best, used)

    def searched(self, tokens: int, pruning: float, seed: int) -> dict[str, Any]:
        """Run this search in each step, with as many trials as the tokens allow."""
        whole = tokens - self._finish
        used, found = self._search(self._of(), pruning * whole, seed)
        shape = self._table.space.point(found)["init"]  # type: ignore[index]
        further, found = self._search(self._of(shape), whole - used, seed)
        point = self._table.space.point(found)
        assert point is not None
        return self._quantize(point, used + further)

    def _of(self, shape: Any = None) -> list[Point]:
        """Return points without a grid: all shapes with the recipe's distillation, or all points of one shape."""
        fixed = ("distillation.divergence_weight", "distillation.temperature")
        return [
            point
            for point in points(self._table.space)
            if point["finishing"] == "none"
            and self._table.space.strategy(point).id in self._table.lines
            and (point["init"] == shape if shape else all(point.get(path) == self._recipe[path] for path in fixed))
        ]

    def _shuffled(self, found: list[Point], dice: np.random.Generator) -> list[Point]:
        return [found[place] for place in dice.permutation(len(found))]

    def _train(self, order: Sequence[Point], tokens: float, known: dict[str, float]) -> int:
        """Train points that are not known, at least one. Return the tokens spent."""
        used = 0
        for point in order:
            name = self._table.space.strategy(point).id
            if name in known:
                continue
            if used and used + TOKENS / 2 > tokens:
                break
            known[name] = self._wide[name]
            used += TOKENS
        return used

    def _best(self, known: dict[str, float]) -> Point:
        return self._point(max(known, key=lambda name: known[name]))

    def _point(self, name: str) -> Point:
        point = self._table.space.point(Strategy.from_json(self._table.lines[name].strategy))
        assert point is not None
        return point

    def _search(self, allowed: list[Point], tokens: float, seed: int) -> tuple[int, Strategy]:
        """Run the largest search of the sub-space that the tokens allow."""
        data = self._table.space.to_json()
        for path, entry in data["dimensions"].items():
            values = {point[path] for point in allowed if path in point}
            choices = entry["choices"]
            kept = {name: choices[name] for name in choices if name in values} if isinstance(choices, dict) else None
            entry["choices"] = kept if kept is not None else [name for name in choices if name in values]
            if "when" in entry:
                weights = {point["distillation.divergence_weight"] for point in allowed}
                entry["when"] = {
                    key: [value for value in held if value in weights] for key, held in entry["when"].items()
                }
        space = Remembering.from_json({**data, "baselines": {}})
        best: tuple[int, Strategy] | None = None
        for trials in range(2, len(allowed) + 1, 2):
            keep = tuple(min(trials, kept) for kept in kept_at_rungs(trials, 3))
            spent, _ = simulate(self._table, plan(trials, default_rungs(), keep), seed=seed, space=space)
            if best is not None and spent.trained > tokens:
                break
            best = spent.trained, Strategy.from_json(self._table.lines[spent.best[3]].strategy)
        assert best is not None
        return best

    def _quantize(self, point: Point, used: int) -> dict[str, Any]:
        lines = [self._line(point), self._line({**point, "finishing": "int4"})]
        best = max(lines, key=fitting)
        return {"tokens": used + self._finish, "best": fitting(best), "strategy": best.id}

    def _line(self, point: Point) -> Line:
        return self._table.lines[self._table.space.strategy(point).id]


def fitting(line: Line) -> float:
    """Return the best value of a line within the budget."""
    return max(line.rows.values())


def unquantized(table: Table, prepared: Prepared, kept: Kept, most: int | None = None) -> dict[str, float]:
    """Return the validation accuracy of each recorded student without a grid, in 16 bits, whether that fits or not.

    Args:
        table: Recorded students.
        prepared: The search whose teacher and data are used.
        kept: Known results.
        most: How many students are judged; the others are taken as recorded. By default all are judged.
    """
    bench, recorder = Workbench(prepared.setting), Recorder(prepared)
    wide, tokens = next(one for one in table.deployments if one.bits == 16), prepared.setting.plan.eval_tokens

    def judge(strategy: Strategy) -> float:
        return accuracy(bench, strategy, recorder.student(strategy, SEED), wide, tokens)

    strategies = [Strategy.from_json(line.strategy) for line in table.recorded]
    plain = [strategy for strategy in strategies if strategy.finishing is None]
    recorded = {one.id: fitting(table.lines[one.id]) for one in plain}
    judged = {one.id: kept.get(f"wide {one.id}", lambda one=one: judge(one)) for one in plain[:most]}
    return recorded | judged


def main() -> None:
    """Replay the joint and the sequential search by seed, and write the report of both."""
    parser = parser_of(__doc__, seeds=50, time=True)
    arguments = parse(parser, seeds=2)
    if arguments.smoke:
        math_table.make_small()
    torch.set_num_threads(1)
    table = load_table()
    kept = Kept("joint-or-sequential", table.digest, arguments.time)
    seeds = range(arguments.seeds)
    with prepare(cache_folder() / "benchmarks" / "runs", f"table-{RUNGS[-1]}") as prepared:
        turns = Turns(table, unquantized(table, prepared, kept, 1 if arguments.smoke else None))
    found = {"joint": [kept.get(f"joint {seed}", lambda seed=seed: joint(table, seed)) for seed in seeds]}
    for pruning in PRUNING:
        for name, way in (("in turn, trials to the end", turns.by_hand), ("in turn, each searched", turns.searched)):
            title = f"{name}, {pruning:.0%} for the shape"
            found[title] = [
                kept.get(
                    f"{title} {seed}",
                    lambda way=way, seed=seed, share=pruning: way(found["joint"][seed]["tokens"], share, seed),
                )
                for seed in seeds
            ]
    print(
        report.write(
            "joint-or-sequential", "Joint search, or prune, distil and quantise in turn", sections(table, found)
        )
    )


def sections(table: Table, found: dict[str, list[Any]]) -> list[str]:
    """Return the parts of the report."""
    best = table.best()
    joint_best = np.array([run["best"] for run in found["joint"]])
    rows, sentences = [], []
    for name, runs in found.items():
        values = np.array([run["best"] for run in runs])
        gain = joint_best - values
        rows.append(
            [
                name,
                mean([run["tokens"] / 1000 for run in runs], 0),
                mean(values, 2, factor=100),
                mean(best - values, 3, factor=100),
                "" if name == "joint" else mean(gain, 3, factor=100),
            ]
        )
        if name != "joint":
            error = gain.std(ddof=1) / np.sqrt(len(gain))
            clear = "a clear" if abs(gain.mean()) > 3 * error else "no clear"
            sentences.append(f"- Joint less {name}: {mean(gain, 3, factor=100)} points, {clear} difference.")
    head = (
        f"{len(table.recorded)} recorded strategies that fit the budget, {len(joint_best)} seeds of the proposals "
        f"and of the order in which hands try, one seed of the students; joint plans of {TRIALS} trials. The best "
        f"recorded student that fits has {100 * best:.2f}% on validation. Means and standard errors over seeds, "
        "differences paired by seed."
    )
    titles = ["", "1000 tokens trained", "accuracy, %", "behind the best, points", "joint less this, points"]
    return [head, "## What was found\n\n" + "\n".join(sentences), report.table(titles, rows)]


if __name__ == "__main__":
    main()
