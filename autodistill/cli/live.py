"""An observer that shows a running search as lines and figures of the live view."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from autodistill.cli.tables import Progress, View
from autodistill.runs.results.row import Status
from autodistill.runs.results.selection import KIND as CONFIRMATION
from autodistill.search.algorithms.successive_halving import confirmed
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.campaign.observer import Observer
from autodistill.search.campaign.state import TrialState


class SearchView(Observer):
    """Shows a search on a view.

    Args:
        view: The view to show it on.
        clock: The clock that the search's deadline is measured with.
    """

    def __init__(self, view: View, clock: Callable[[], float] = time.monotonic) -> None:
        self._view = view
        self._clock = clock
        self._progress = Progress(phase="starting")
        self._end: float | None = None

    def phase(self, name: str) -> None:
        """Show that a phase began."""
        self._show(replace(self._progress, phase=name, tokens_per_second=None))

    def line(self, text: str) -> None:
        """Print a line."""
        self._view.log(text)

    def campaign(self, campaign: Campaign, best: float | None, baseline: float | None) -> None:
        """Show the state of the trials."""
        question = campaign.question
        if campaign.time_budget.deadline is not None:
            # Trials end at the deadline. The phases after it are expected to take this many seconds.
            after = sum(question.plan.seconds.get(phase, 0.0) for phase in ("export", "test"))
            self._end = campaign.time_budget.deadline + after
        plan, baselines = question.plan, len(question.space.baselines)
        trials = list(campaign.trials.values())
        again = sum(trial.kind == CONFIRMATION for trial in trials)
        longer = sum(trial.task.length > 1 and trial.kind != CONFIRMATION for trial in trials)
        # More students than planned may reach the end. They are then confirmed too, in the time that is left.
        confirming = max(again, question.confirm * confirmed(plan.trials, plan.keep, baselines))
        count = {status: sum(trial.status is status for trial in trials) for status in Status}
        self._show(
            Progress(
                phase="trials",
                planned=plan.trials + baselines + longer + confirming,
                done=count[Status.COMPLETED],
                running=sum(trial.running for trial in trials),
                paused=sum(_waiting(trial) for trial in trials),
                stopped=count[Status.STOPPED],
                rejected=count[Status.REJECTED],
                failed=count[Status.FAILED],
                metric=question.metric,
                best=best,
                baseline=baseline,
                teacher=question.teacher_accuracy if question.metric == "accuracy" else None,
                tokens_per_second=_speed(campaign),
            )
        )

    def _show(self, progress: Progress) -> None:
        left = None if self._end is None else self._end - self._clock()
        self._progress = replace(progress, seconds_left=left)
        self._view.update(self._progress)


def _waiting(trial: TrialState) -> bool:
    """Return whether a trial is paused at a rung and may still be promoted."""
    return trial.status is None and not trial.running and trial.rung >= 0


def _speed(campaign: Campaign) -> float | None:
    """Return the training tokens a second of all workers together, over the finished segments."""
    plan, trials = campaign.question.plan, campaign.trials.values()
    # In extended training that runs alone, no other worker runs at the same time.
    beside = [1 if plan.alone and trial.task.length > 1 else plan.workers for trial in trials]
    seconds = sum(trial.train_seconds / workers for trial, workers in zip(trials, beside, strict=True))
    return sum(trial.trained_tokens for trial in trials) / seconds if seconds > 0 else None
