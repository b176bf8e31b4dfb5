"""Compare samplers and schedulers on recorded students, in simulated time, over many seeds.

    python -m benchmarks.search.replay [--seeds 50] [--samplers tpe random] [--time 10m]

The real campaign, sampler and scheduler run on the table that `math_table.py` recorded. A proposal is looked up instead
of trained, and costs what its training would have cost. Every sampler is run with each scheduler. One trains all trials
to the end. One stops trials for good unless they are among the best at a rung when they report (ASHA as in Ray). This
search's own scheduler pauses and promotes. All are compared at equal operations: those that this search spends, with
its default sampler, on a plan of 12 trials. Earlier replays are not repeated.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from autodistill.search.algorithms.names import SAMPLERS
from autodistill.search.algorithms.successive_halving import kept_at_rungs
from benchmarks.common import report
from benchmarks.common.expenses import Expense
from benchmarks.common.math_search import TOKENS
from benchmarks.common.over_seeds import mean
from benchmarks.common.program import parse, parser_of
from benchmarks.common.recorded import Table, load_table
from benchmarks.common.report import Kept
from benchmarks.common.simulate import default_rungs, plan, simulate

SIZES = (12,)
SCHEDULERS: dict[str, dict[str, Any]] = {
    "to the end": {"sharing": False},
    "stops (ASHA)": {"sharing": False, "stopping": True},
    "pauses and promotes": {"sharing": False},
    "the same, two to the end": {"sharing": False},
    "pauses, promotes, shares": {},
}
REFERENCE = ("tpe", "pauses and promotes")
BROKEN_OFF = ("to the end", "stops (ASHA)")


def one(table: Table, scheduler: str, sampler: str, seed: int, trials: int, limit: int | None) -> Any:
    """Simulate one search, and return what it spent and found."""
    if scheduler == "to the end":
        made = plan(len(table.recorded) if limit else trials, (TOKENS,), ())
    else:
        count = len(table.recorded) if scheduler.startswith("stops") and limit else trials
        keep = kept_at_rungs(count, 3)
        made = plan(count, default_rungs(), (keep[0], 2) if scheduler.endswith("two to the end") else keep)
    until = None if limit is None else Expense(operations=limit)
    spent, _ = simulate(table, made, sampler=sampler, seed=seed, limit=until, **SCHEDULERS[scheduler])
    return {"curve": [[step[0], step[2]] for step in spent.curve], "total": spent.operations}


def best_at(curve: list[list[float]], operations: float) -> float:
    """Return the best accuracy known after this many operations, or 0 if there is none yet."""
    return max((value for spent, value in curve if spent <= operations), default=0.0)


def main() -> None:
    """Replay searches by scheduler, sampler and seed, and write the report of what they found."""
    parser = parser_of(__doc__, seeds=50, time=True)
    parser.add_argument("--samplers", nargs="+", default=SAMPLERS, choices=SAMPLERS, help="which of them")
    arguments = parse(parser, seeds=2, samplers=["random"])
    table = load_table()
    kept = Kept("replay", table.digest, arguments.time)
    seeds = range(arguments.seeds)

    def run(scheduler: str, sampler: str, seed: int, trials: int, limit: int | None = None) -> Any:
        key = f"{scheduler}, {sampler}, {seed}, {trials}, {limit}"
        return kept.get(key, lambda: one(table, scheduler, sampler, seed, trials, limit))

    own = {size: [run(REFERENCE[1], REFERENCE[0], seed, size) for seed in seeds] for size in SIZES}
    boxes = {size: float(np.mean([found["total"] for found in own[size]])) for size in SIZES}
    best = table.best()
    rows, gains = [], []
    for sampler in arguments.samplers:
        for scheduler in SCHEDULERS:
            cells: list[Any] = [sampler, scheduler]
            for size in SIZES:
                whole = scheduler not in BROKEN_OFF
                limit = None if whole else round(1.05 * boxes[size])
                runs = [run(scheduler, sampler, seed, size, limit) for seed in seeds]
                # A search that pauses ends by its own plan. Its operations are shown in the next column.
                values = [best_at(found["curve"], found["total"] if whole else boxes[size]) for found in runs]
                cells.append(mean([best - value for value in values], 3, factor=100))
                cells.append(
                    f"{np.mean([found['total'] if whole else boxes[size] for found in runs]) / boxes[size]:.2f}"
                )
                if size == SIZES[-1]:
                    gains.append((sampler, scheduler, values))
            rows.append(cells)
    # The reference is replayed for any choice of samplers, because all are compared at its operations.
    reference = [best_at(found["curve"], found["total"]) for found in own[SIZES[-1]]]
    titles = ["sampler", "trials"]
    for size in SIZES:
        titles += [f"behind the best, {size} trials", "operations"]
    head = (
        f"{len(table.recorded)} recorded strategies, {arguments.seeds} seeds of the samplers, one seed of the "
        "students. Given is how many points of validation accuracy the best student at full fidelity is behind the "
        f"best of the whole table ({100 * best:.2f}%), mean and standard error over seeds, after the operations "
        "that this search (TPE, pausing and promoting, nothing shared) spends on a plan of so many trials, and the "
        "operations of each over those. A search that trains to the end, or stops, is broken off there; one that "
        "pauses ends by its own plan. The hand-designed recipe runs first in all of them. Stages are shared in the "
        "last rows alone, which are a search by default."
    )
    parts = [head, report.table(titles, rows), f"## Paired by seed, {SIZES[-1]} trials\n\n" + pairs(reference, gains)]
    print(report.write("replay", "Samplers and schedulers, replayed", parts))


def pairs(reference: list[float], gains: list[tuple[str, str, list[float]]]) -> str:
    """Describe how far the search's own sampler and scheduler are ahead of each other pair, and whether it is clear.

    Args:
        reference: The accuracies that the search's own pair reaches, one for each seed.
        gains: For each pair: its names, and its accuracies with the same seeds.
    """
    lines = []
    for sampler, scheduler, values in gains:
        if (sampler, scheduler) == REFERENCE:
            continue
        gap = 100 * (np.asarray(reference) - np.asarray(values))
        said = f"- {', '.join(REFERENCE)}, less {sampler}, {scheduler}: {gap.mean():+.3f}"
        if len(gap) > 1:
            error = gap.std(ddof=1) / np.sqrt(len(gap))
            said += f" ± {error:.3f} points, {'clear' if abs(gap.mean()) > 2 * error else 'not clear'}"
        else:
            said += " points, of one seed"
        lines.append(said)
    return "\n".join(lines)


if __name__ == "__main__":
    main()
