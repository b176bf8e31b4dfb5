"""What callbacks receive about the trials of a campaign."""

from __future__ import annotations

from collections.abc import Callable

from autodistill.runs.results.row import Decision
from autodistill.search.callbacks import Event, RungReached, Step, TrialFinished, TrialStarted
from autodistill.search.campaign.state import TrialState
from autodistill.search.worker.messages import RungReport


class EventReporter:
    """Turns what becomes of a trial into the events of `search.callbacks`.

    Args:
        tell: Called with each event.
        metric: Name of the metric that ranks the students.
    """

    def __init__(self, tell: Callable[[Event], None], metric: str) -> None:
        self._tell = tell
        self._metric = metric
        self._started: set[str] = set()

    def starts(self, trial: TrialState) -> None:
        """Report that a trial begins. This happens once, even if its first work is given out again."""
        if trial.task.id in self._started or trial.rung >= 0:
            return
        self._started.add(trial.task.id)
        spec = trial.candidate.spec
        self._tell(
            TrialStarted(
                trial=trial.task.id,
                name=trial.name,
                kind=trial.kind,
                strategy=trial.candidate.strategy,
                seed=trial.task.seed,
                parameters=spec.parameters if spec else None,
            )
        )

    def reaches(self, trial: TrialState, report: RungReport, decision: Decision) -> None:
        """Report the steps of a trial up to a rung, and how it was judged there."""
        name = trial.task.id
        for step in report.steps:
            self._tell(
                Step(
                    trial=name,
                    tokens=step.tokens,
                    loss=step.loss,
                    learning_rate=step.learning_rate,
                    gradient_norm=step.gradient_norm,
                    tokens_per_second=step.tokens_per_second,
                )
            )
        self._tell(
            RungReached(
                trial=name,
                rung=report.rung,
                tokens=report.tokens,
                metric=self._metric,
                value=trial.value,
                decision=decision.value,
            )
        )

    def ends(self, trial: TrialState) -> None:
        """Report that a trial has ended."""
        assert trial.status is not None
        value = trial.value if trial.rung >= 0 else None
        self._tell(
            TrialFinished(
                trial=trial.task.id, name=trial.name, status=trial.status.value, reason=trial.reason, value=value
            )
        )
