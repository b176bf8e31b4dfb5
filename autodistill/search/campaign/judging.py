"""What a rung means for a trial: its place among the others and, in a race, whether it is clearly behind."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from autodistill.runs.results.row import LIKELIHOOD, Decision, Row
from autodistill.search.algorithms.race import clearly_behind
from autodistill.search.algorithms.successive_halving import SuccessiveHalving
from autodistill.search.campaign.state import Question, TrialState


class Judge:
    """Judges trials at their rungs.

    Args:
        question: What is searched for.
        trials: The campaign's trials by id, always up to date.
        scheduler: Decides by the trials' places at each rung.
    """

    def __init__(self, question: Question, trials: Mapping[str, TrialState], scheduler: SuccessiveHalving) -> None:
        self._raced = question.raced
        self._trials = trials
        self._scheduler = scheduler
        # The row that judged each trial at its latest rung, and how far each trial is behind.
        self._rows: dict[str, Row] = {}
        self._behind: dict[str, tuple[float, float]] = {}

    def judge(self, trial: TrialState, row: Row | None) -> Decision:
        """Say what becomes of a trial that has just reached a rung.

        Args:
            trial: Its state at the rung.
            row: Row of its student under the deployment that judges it; None if the log has no row.
        """
        if row is not None:
            self._rows[trial.task.id] = row
        # A baseline runs straight to the end and takes nobody's place at a rung.
        if trial.task.straight:
            return Decision.STOP
        decision = self._scheduler.report(trial.task.id, trial.rung, trial.judged, further=trial.further)
        if self._raced:
            self._race(trial.rung)
        return decision

    def _race(self, rung: int) -> None:
        """Take out the trials that are clearly behind the best at a rung, whatever their place."""
        here = [
            trial
            for trial in self._trials.values()
            if trial.status is None and trial.rung == rung and trial.judged is not None and not trial.task.straight
        ]
        for name, (behind, error) in self.behind(here).items():
            if name not in self._behind:
                self._behind[name] = (behind, error)
                self.discard(name)

    def behind(self, trials: Sequence[TrialState]) -> dict[str, tuple[float, float]]:
        """Return those trials that are clearly behind the best of them, each with its gap and the gap's standard error.

        Both are in nats a token.
        """
        return clearly_behind({trial.task.id: self._rows[trial.task.id] for trial in trials}, LIKELIHOOD)

    def lag(self, trial_id: str) -> str:
        """Return in words how far behind a trial was that the race took out, or "" for any other trial."""
        if trial_id not in self._behind:
            return ""
        gap, error = self._behind[trial_id]
        return f"{gap:.4f} ± {error:.4f} nats a token behind the best there"

    def discard(self, trial_id: str) -> None:
        """Take a trial out, so that it goes past no further rung."""
        self._scheduler.discard(trial_id)

    def promotable(self, in_flight: Collection[str]) -> set[str]:
        """Return the ids of the trials that may go past their rung, given the trials in flight."""
        return self._scheduler.promotable(in_flight)
