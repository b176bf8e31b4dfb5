"""How much faster is a search on 1 to 64 workers, how long do they wait, and what does the loss of workers cost?

    python -m benchmarks.search.many_workers [--seeds 10] [--time 10m]

The real campaign, sampler and scheduler run on the table that `math_table.py` recorded, in simulated time. A proposal
is looked up instead of trained, and takes the seconds that its training took. Workers are lost at random with their
work, and each is replaced after a while. The work continues from the last checkpoint, as on a cluster. One machine runs
the teacher before the first trial. This time is left out, because it is the same for any number of workers. Earlier
replays are not repeated.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from autodistill.runs.results.row import Status
from autodistill.search.algorithms.successive_halving import kept_at_rungs
from benchmarks.common import report
from benchmarks.common.over_seeds import mean
from benchmarks.common.program import parse, parser_of
from benchmarks.common.recorded import Table, load_table
from benchmarks.common.report import Kept
from benchmarks.common.simulate import Worker, default_rungs, plan, simulate

WORKERS = (1, 2, 4, 8, 16, 32, 64)
TRIALS = 32
LOSSES = {"none is lost": None, "each is lost every 10 pieces of work": 10, "each is lost every 3": 3}
AWAY = 1.0  # how long a lost worker is away, in pieces of work


def one(table: Table, workers: int, pieces: int | None, seed: int, trials: int) -> dict[str, Any]:
    """Return a search as plain data: the seconds of its trials and of work in them, its best, and what was lost."""
    made = plan(trials, default_rungs(), kept_at_rungs(trials, len(default_rungs())), workers)
    typical = float(np.median([made.rungs[-1] * line.train_seconds for line in table.lines.values()]))
    lives = {} if pieces is None else {"life": pieces * typical, "away": AWAY * typical}
    spent, campaign = simulate(table, made, seed=seed, **lives)
    began = Worker(table, made).start.seconds
    return {
        "seconds": spent.seconds - began,
        "worked": spent.worked,
        "best": spent.best[2] if spent.curve else 0.0,
        "lost": spent.lost,
        "failed": sum(trial.status is Status.FAILED for trial in campaign.trials.values()),
        "operations": spent.operations,
    }


def main() -> None:
    """Replay what is missing, and write the report."""
    parser = parser_of(__doc__, seeds=10, time=True)
    arguments = parse(parser, seeds=1)
    table = load_table()
    trials = 8 if arguments.smoke else TRIALS
    kept = Kept("many-workers", table.digest, arguments.time)
    seeds = range(arguments.seeds)
    sections = [
        f"{len(table.recorded)} recorded strategies, plans of {trials} trials, {arguments.seeds} seeds of sampler and "
        "losses; mean and standard error over them. *Speedup* is over one worker that is never lost. *Idle* is the "
        "share of all workers' time in which they brought no report: they wait for a trial to be promoted or proposed, "
        "are away, or work on what is lost. *Cost* is all workers' time, over that of one worker. *Behind* is by how "
        "many points the best student is behind that of the same seed on one worker. A piece of work is "
        "the median training of a student to its end; lost work goes on from the last rung."
    ]
    base = [
        kept.get(f"1, None, {seed}, {trials}", lambda seed=seed: one(table, 1, None, seed, trials)) for seed in seeds
    ]
    for title, pieces in LOSSES.items():
        rows = []
        for workers in WORKERS:
            runs = [
                kept.get(
                    f"{workers}, {pieces}, {seed}, {trials}",
                    lambda seed=seed, workers=workers, pieces=pieces: one(table, workers, pieces, seed, trials),
                )
                for seed in seeds
            ]
            pairs = list(zip(runs, base, strict=True))
            rows.append(
                (
                    workers,
                    mean([alone["seconds"] / run["seconds"] for run, alone in pairs], 2),
                    mean([1 - run["worked"] / (workers * run["seconds"]) for run in runs], 1, factor=100),
                    mean([workers * run["seconds"] / alone["seconds"] for run, alone in pairs], 2),
                    mean([alone["best"] - run["best"] for run, alone in pairs], 2, factor=100, sign=True),
                    mean([run["lost"] for run in runs], 1),
                    mean([run["failed"] for run in runs], 1),
                )
            )
        titles = ("workers", "speedup", "idle, %", "cost", "behind, points", "losses", "trials failed")
        sections.append(f"## {title[0].upper()}{title[1:]}\n\n{report.table(titles, rows)}")
    print(report.write("many-workers", "A search on 1 to 64 workers, some of which are lost", sections))


if __name__ == "__main__":
    main()
