"""What each part of the search is worth: rejection, stage sharing, pausing, the warm start, the cache.

    python -m benchmarks.search.ablation [--seeds 50] [--time 10m]

The real campaign, sampler and scheduler are replayed on the table that `math_table.py` recorded. The budget is too
small for half of the proposed shapes. Each ablation runs the same plan on the same seeds as the whole search, without
one part:

- rejection: trials that no deployment can hold are trained to their first rung, where they turn out not to fit;
- sharing: every trial trains all of its tokens itself;
- pausing: a trial stops for good unless it is among the best at a rung when it reports (ASHA as in Ray);
- warm start: a search that would begin with an earlier search's observations begins without them;
- cache: the teacher runs with each student that learns from it. The cost in seconds is measured by training the
recipe's student for some steps in both ways.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from autodistill.options import cache_folder
from autodistill.search.algorithms.successive_halving import kept_at_rungs
from autodistill.search.campaign.agenda import observation
from autodistill.strategy.strategy import Strategy
from benchmarks.common import math_table, report
from benchmarks.common.math_search import RECIPE, TOKENS, prepare
from benchmarks.common.over_seeds import mean
from benchmarks.common.program import parse, parser_of
from benchmarks.common.recorded import TRIALS, Table, load_table
from benchmarks.common.report import Kept
from benchmarks.common.simulate import Worker, default_rungs, plan, simulate
from benchmarks.common.timed_parts import live, step_seconds

CASES: dict[str, dict[str, Any]] = {
    "the whole search": {},
    "without rejection": {"rejection": False},
    "without sharing": {"sharing": False},
    "without pausing": {"stopping": True},
    "without the cache": {"live_teacher": True},
}


def one(table: Table, case: str, seed: int) -> dict[str, Any]:
    """Simulate one search, and return what it spent and found."""
    made = plan(TRIALS, default_rungs(), kept_at_rungs(TRIALS, 3))
    spent, campaign = simulate(table, made, seed=seed, **CASES[case])
    rejected = sum(trial.status == "rejected" for trial in campaign.trials.values())
    return {
        "operations": spent.operations,
        "tokens": spent.trained,
        "shared": spent.shared,
        "best": spent.best[2],
        "rejected": rejected,
        "curve": [[step[0], step[2]] for step in spent.curve],
    }


def warm(table: Table, seed: int, warmed: bool) -> dict[str, Any]:
    """Run a search of half the trials, begun with the observations of one with another seed, or cold."""
    made = plan(TRIALS // 2, default_rungs(), kept_at_rungs(TRIALS // 2, 3))
    hints: dict[str, Any] = {}
    if warmed:
        spent, before = simulate(table, plan(TRIALS, default_rungs(), kept_at_rungs(TRIALS, 3)), seed=1000 + seed)
        trials = [trial for trial in before.trials.values() if trial.point is not None]
        observed = [observation(trial, before.question) for trial in trials]
        told = [replace(item, repeatable=item.fidelity < 1) for item in observed]
        hints = {"earlier": told, "first": [table.space.point(Strategy.from_json(table.lines[spent.best[3]].strategy))]}
    spent, _ = simulate(table, made, seed=seed, **hints)
    return {"operations": spent.operations, "tokens": spent.trained, "best": spent.best[2]}


def main() -> None:
    """Replay searches without each part in turn, and write the report of the losses."""
    parser = parser_of(__doc__, seeds=50, time=True)
    arguments = parse(parser, seeds=2)
    if arguments.smoke:
        math_table.make_small()
    torch.set_num_threads(1)
    table = load_table()
    kept = Kept("ablation", table.digest, arguments.time)
    seeds = range(arguments.seeds)
    found = {
        case: [kept.get(f"{case} {seed}", lambda case=case, seed=seed: one(table, case, seed)) for seed in seeds]
        for case in CASES
    }
    warmed = {
        name: [kept.get(f"{name} {seed}", lambda seed=seed, flag=flag: warm(table, seed, flag)) for seed in seeds]
        for name, flag in (("with a warm start", True), ("without", False))
    }
    recipe, steps = table.space.baselines[RECIPE], 2 if arguments.smoke else 12
    with prepare(cache_folder() / "benchmarks" / "runs", f"table-{TOKENS}") as prepared:
        seconds = kept.get("seconds", lambda: [step_seconds(prepared, one, steps) for one in (recipe, live(recipe))])
    print(report.write("ablation", "What each part of the search is worth", sections(table, found, warmed, seconds)))


def paired(values: list[float], base: list[float], scale: float) -> str:
    """Return the mean difference of two cases, paired by seed, with its error."""
    return mean(np.asarray(values) - np.asarray(base), 3, factor=scale)


def sections(
    table: Table, found: dict[str, list[Any]], warmed: dict[str, list[Any]], seconds: list[float]
) -> list[str]:
    """Return the parts of the report."""
    whole, best = found["the whole search"], table.best()
    rows = []
    for case, runs in found.items():
        more = [mine["operations"] / theirs["operations"] - 1 for mine, theirs in zip(runs, whole, strict=True)]
        # The best student that this case knows when the whole search has ended.
        equal = [
            max((value for operations, value in mine["curve"] if operations <= theirs["operations"]), default=0.0)
            for mine, theirs in zip(runs, whole, strict=True)
        ]
        rows.append(
            [
                case,
                mean([run["operations"] / 1e9 for run in runs], 1),
                "" if case == "the whole search" else mean(more, 1, factor=100),
                mean([run["tokens"] / 1000 for run in runs], 0),
                mean([best - run["best"] for run in runs], 3, factor=100),
                ""
                if case == "the whole search"
                else paired([run["best"] for run in runs], [run["best"] for run in whole], 100),
                "" if case == "the whole search" else paired(equal, [run["best"] for run in whole], 100),
            ]
        )
    warm_rows = [
        [
            name,
            mean([run["operations"] / 1e9 for run in runs], 1),
            mean([best - run["best"] for run in runs], 3, factor=100),
            paired([run["best"] for run in runs], [run["best"] for run in warmed["without"]], 100)
            if name != "without"
            else "",
        ]
        for name, runs in warmed.items()
    ]
    shared = [run["shared"] / (run["shared"] + run["tokens"]) for run in whole]
    rejected = [run["rejected"] for run in whole]
    head = (
        f"{len(table.recorded)} recorded strategies, {len(whole)} seeds of the proposals, plans of {TRIALS} trials; "
        f"the best recorded student has {100 * best:.2f}% on validation. Under this budget {mean(rejected, 1)} "
        f"proposals of a search were rejected without training, and {mean(shared, 1, factor=100)}% of the tokens that "
        "its trials stand on had been trained by others. Means and standard errors over seeds, differences paired by "
        "seed. One seed of the students."
    )
    worker = Worker(table, plan(1, default_rungs(), (1, 1)))
    share = worker.costs.online(1) / worker.costs.train(table.space.baselines[RECIPE], 1)
    return [
        head,
        report.table(
            [
                "",
                "10^9 operations",
                "more, %",
                "1000 tokens",
                "behind the best, points",
                "gained at the end",
                "gained at equal compute",
            ],
            rows,
        ),
        '"At equal compute" is what is known once the whole search of that seed has ended; below 0 is a loss.',
        f"## The cache, in seconds\n\nA step of the recipe's student takes {1000 * seconds[0]:.0f} ms with cached "
        f"outputs and {1000 * seconds[1]:.0f} ms with the teacher live, {seconds[1] / seconds[0] - 1:+.0%} (of one "
        f"thread's own time; by operations {share:+.0%}).",
        f"## The warm start\n\nPlans of {TRIALS // 2} trials, with the observations of a search of {TRIALS} trials "
        "of another seed, or without.\n\n"
        + report.table(["", "10^9 operations", "behind the best, points", "gained, points"], warm_rows),
    ]


if __name__ == "__main__":
    main()
