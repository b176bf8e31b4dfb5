"""What a rung means for a trial: its place among the others, and in a race whether it is clearly behind."""

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
        trials: Of the campaign, by id, as they are at any moment.
        scheduler: Decides by places.
    """

    def __init__(self, question: Question, trials: Mapping[str, TrialState], scheduler: SuccessiveHalving) -> None:
        self._raced = question.raced
        self._trials = trials
        self._scheduler = scheduler
        # By which each trial was judged at its latest rung, and how far it is behind.
        self._rows: dict[str, Row] = {}
        self._behind: dict[str, tuple[float, float]] = {}

    def judge(self, trial: TrialState, row: Row | None) -> Decision:
        """Say what becomes of a trial that has just reached a rung.

        Args:
            trial: As it stands there.
            row: Of its student under the deployment that it is judged by; None where a log has none.
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
        """Take the trials out that are clearly behind the best at a rung, whatever place they have."""
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
        """Return how far trials are clearly behind the best of them, in nats a token, and its standard error."""
        return clearly_behind({trial.task.id: self._rows[trial.task.id] for trial in trials}, LIKELIHOOD)

    def lag(self, trial_id: str) -> str:
        """Return how far a trial that a race took out was behind, in words; "" of any other."""
        if trial_id not in self._behind:
            return ""
        gap, error = self._behind[trial_id]
        return f"{gap:.4f} ± {error:.4f} nats a token behind the best there"

    def discard(self, trial_id: str) -> None:
        """Take a trial out: it goes past no rung."""
        self._scheduler.discard(trial_id)

    def promotable(self, in_flight: Collection[str]) -> set[str]:
        """Return the ids of the trials that may go past their rung, while those in flight are on their way."""
        return self._scheduler.promotable(in_flight)
