"""What evaluations at rungs need not read, as they are certain to fall short, and whether that was so.

    python benchmarks/early_end.py [--seeds 1] [--trials 12]

Searches of the math task (`math_search.py`) with the inline runner, by three metrics. Each evaluation is read whole,
and then looked at as the search looks at it, against the bar that it would have had. So the share that would not have
been read is counted, and beside it whether any of these trials reached its bar after all, and how far its estimate was
off.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import report
from math_search import RUNG_QUESTIONS, prepare

from autodistill.evaluation.early_stopping import counted, expected
from autodistill.runs.results.row import Decision
from autodistill.search.algorithms.sampler import Sampler
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.runners.inline import run_inline
from autodistill.search.worker.attempt import Assignment
from autodistill.search.worker.messages import RungReport

METRICS = ("kl", "accuracy", "exact_match")


@dataclass(frozen=True, kw_only=True)
class Looked:
    """An evaluation at a rung below the last.

    Attributes:
        held: Whether there was a bar.
        read: Share that would have been read.
        reached: Whether it was ended and would have reached its bar.
        off: By how much the estimate of one that was ended differs from its value, relative to that.
    """

    held: bool
    read: float = 1.0
    reached: bool = False
    off: float = math.nan


class Watched(Campaign):
    """Reads everything, and takes down what the search would have left out."""

    def next(self) -> Assignment | None:
        """Work without a bar, which is remembered."""
        assignment = super().next()
        self.bar = assignment.bar if assignment is not None else None
        return assignment and replace(assignment, bar=None)

    def report(self, assignment: Assignment, report: RungReport) -> Decision:
        """Looks at what was read as the search does."""
        reading, metric = report.evaluation.reading, self.question.metric
        if reading is not None:
            self.looked.append(self._look(report, reading.looks, metric))
        return super().report(assignment, report)

    def _look(self, report: RungReport, looks: Sequence[object], metric: str) -> Looked:
        whole, bar = report.evaluation.measurements[metric], self.bar
        if bar is None:
            return Looked(held=False)
        sign = 1 if self.question.direction == "max" else -1
        for look, documents in enumerate(looks[:-1]):
            found = replace(whole, documents=documents)
            estimate = expected(found, bar, look)
            if estimate is not None:
                return Looked(
                    held=True,
                    read=counted(documents) / counted(looks[-1]),
                    reached=sign * (whole.value - bar.value) >= 0,
                    off=abs(estimate - whole.value) / whole.value if whole.value else math.nan,
                )
        return Looked(held=True)


def searched(metric: str, seed: int, trials: int) -> list[Looked]:
    """The evaluations of one search."""
    with (
        tempfile.TemporaryDirectory() as folder,
        prepare(Path(folder), "run", seed=seed, trials=trials, metric=metric) as ready,
    ):
        question = ready.question
        campaign = Watched(
            question,
            sampler=Sampler(ready.space, seed=seed, direction=question.direction),
            log=ready.run.events,
            checkpoints=ready.run.checkpoints,
        )
        campaign.looked = []
        run_inline(campaign, ready.setting, None)
        return campaign.looked


def line(metric: str, found: Sequence[Looked]) -> list[object]:
    """A row of the table."""
    held, ended = [one for one in found if one.held], [one for one in found if one.read < 1]
    unread = sum(1 - one.read for one in found)
    off = [one.off for one in ended if math.isfinite(one.off)]
    return [
        metric,
        len(found),
        len(held),
        len(ended),
        f"{unread / len(found):.1%}",
        f"{unread / len(held):.1%}" if held else "-",
        sum(one.reached for one in ended),
        f"{np.median(off):.1%}" if off else "-",
    ]


def main() -> None:
    """Runs the searches and writes the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--trials", type=int, default=12)
    asked = parser.parse_args()
    lines = []
    for metric in METRICS:
        found = [one for seed in range(asked.seeds) for one in searched(metric, seed, asked.trials)]
        lines.append(line(metric, found))
        report.note(metric, found)
        print(lines[-1], flush=True)
    titles = ["metric", "evaluations at rungs", "held to a bar", "ended early", "not read", "of those held to a bar"]
    table = report.table([*titles, "ended and would have reached it", "estimate off by, median"], lines)
    said = (
        f"Searches of {asked.trials} trials of the math task, {asked.seeds} of each metric, {RUNG_QUESTIONS} questions "
        "at a rung. Not read is the share of what all evaluations at rungs below the last were to read."
    )
    print(report.write("early-end", "What evaluations at rungs need not read", [said, table]))


if __name__ == "__main__":
    main()
