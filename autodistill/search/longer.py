"""Longer budgets: the best trials and the best baseline, trained on to a multiple of the plan's tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from autodistill.search.forks import FEW
from autodistill.search.trials import TrialState


def lengthened(trial: str, length: float) -> str:
    """Name of the trial that trains `trial`'s strategy to so many times the plan's tokens."""
    return f"{trial}x{length:g}"


def next_longer(
    trained: Sequence[TrialState], lengths: Sequence[float], begun: Collection[str]
) -> tuple[TrialState, float] | None:
    """The trial to train on next, and how far; None where all are begun.

    The baseline is among them, so that what is longer is compared with a baseline of as many tokens.

    Args:
        trained: Trials at full fidelity, the best first.
        lengths: Multiples of the plan's tokens.
        begun: Ids of the trials there are.
    """
    plain = [trial for trial in trained if trial.task.length == 1]
    students = [trial for trial in plain if trial.kind == "student"][:FEW]
    baselines = [trial for trial in plain if trial.kind == "baseline"][:1]
    for length in sorted(length for length in lengths if length > 1):
        for trial in (*students, *baselines) if students else ():
            if lengthened(trial.task.id, length) not in begun:
                return trial, length
    return None
