"""Notes about the parts of its plan that a search did not complete."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import takewhile

from autodistill.distillation.training.plan import Plan
from autodistill.runs.results.gains import named
from autodistill.runs.results.leaderboard import DISTILLED
from autodistill.runs.results.row import Row, Status
from autodistill.runs.results.selection import KIND as CONFIRMATION
from autodistill.runs.run_folder import RunFolder
from autodistill.search.algorithms.successive_halving import confirmed
from autodistill.search.campaign.agenda import REJECTIONS_IN_A_ROW
from autodistill.search.campaign.campaign import Campaign
from autodistill.search.campaign.state import TrialState
from autodistill.search.request.resolve import SearchConfig
from autodistill.search.workplace import resuming

_MORE = "give it more --time"


def shortfall(campaign: Campaign, plan: Plan) -> list[str]:
    """Return notes about what the plan still held: too little time, or too few strategies that fit.

    As in the agenda, failed trials count as tried. Rejected ones, and those that never began, do not. The search
    reports failures elsewhere.
    """
    trials = list(campaign.trials.values())
    proposed = [trial for trial in trials if trial.number is not None]
    tried = sum(trial.status is not Status.REJECTED and not _unbegun(trial) for trial in proposed)
    if campaign.exhausted and tried < plan.trials:
        return [_exhausted(proposed, tried, plan), *_time_budget(campaign, plan, trials)]
    if campaign.time_budget.deadline is not None and tried < plan.trials:
        return [
            f"the time budget was enough for {tried} of the {plan.trials} planned trials: {_MORE}",
            *_time_budget(campaign, plan, trials),
        ]
    return _time_budget(campaign, plan, trials)


def _exhausted(proposed: list[TrialState], tried: int, plan: Plan) -> str:
    """Return why no more trials were proposed although the plan held more."""
    rejected = sum(1 for _ in takewhile(lambda trial: trial.status is Status.REJECTED, reversed(proposed)))
    held = f"{tried} of the {plan.trials} planned trials"
    if rejected >= REJECTIONS_IN_A_ROW:
        training = proposed[-1].candidate.training
        miss = training.miss if training is not None else None
        if miss is not None:
            return (
                f"the last {rejected} strategies that were proposed cannot be trained here or do not fit, so that the "
                f"search tried {held}; the last one: {miss.text}"
            )
        return (
            f"the last {rejected} strategies that were proposed did not fit, so that the search tried {held}: raise "
            "--budget, or name a --space of smaller students"
        )
    return f"the space holds no more strategies, so that the search tried {held}: widen it with --space"


def _time_budget(campaign: Campaign, plan: Plan, trials: list[TrialState]) -> list[str]:
    """Return notes about what the time budget did not hold."""
    if campaign.time_budget.deadline is None:
        return []
    notes = []
    students = [trial for trial in trials if trial.kind == "student" and trial.task.length == 1]
    whole = sum(trial.status is Status.COMPLETED for trial in students)
    waiting = sum(trial.status is Status.STOPPED and (_unbegun(trial) or trial.value is not None) for trial in students)
    planned = min(plan.keep[-1] if plan.keep else plan.trials, whole + waiting)
    if whole < planned:
        notes.append(f"the time budget took {whole} of {planned} trials to full fidelity: {_MORE}")
    notes += [
        f"the time budget was too short for the baseline {name}, so the gain over it is unknown: {_MORE}"
        for name in campaign.untrained_baselines()
    ]
    completed = [trial.kind for trial in trials if trial.status is Status.COMPLETED]
    again = [trial for trial in trials if trial.kind == CONFIRMATION and not _unbegun(trial)]
    few = confirmed(completed.count("student"), (), completed.count("baseline"))
    wanted = campaign.question.confirm * few
    if len(again) < wanted:
        notes.append(f"the time budget was enough for {len(again)} of the {wanted} trainings on further seeds: {_MORE}")
    return notes


def _unbegun(trial: TrialState) -> bool:
    """Return whether a trial never reached its first rung although it neither failed nor was rejected."""
    return trial.rung < 0 and trial.status in (None, Status.STOPPED)


def short_of_the_end(best: Row, rows: Sequence[Row], config: SearchConfig, run: RunFolder, plan: Plan) -> list[str]:
    """Return a note if no student was trained to the end: what is exported anyway, and how to continue training."""
    trained = [row for row in rows if row.kind in DISTILLED]
    if any(row.full for row in trained) and best.full:
        return []
    note = "no trial reached the end of the plan" if trained else "no training reached a rung"
    if best.full:
        note += f": {named(best)} is exported"
    else:
        note += (
            f": the best student is exported as it is after {best.fidelity:.0%} of the plan's tokens "
            f"({best.train_tokens:,} of {plan.tokens:,})"
        )
    if plan.box_seconds is None and config.time_seconds is None:
        return [note]
    again = "" if config.time_seconds is not None else f" --time {math.ceil(plan.box_seconds or 0)}s"
    return [f"{note}; to continue for the same time again: {resuming(config, run)}{again}"]
