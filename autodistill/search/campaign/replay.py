"""How a resumed search restores its trials, as the events of earlier sessions left them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

from autodistill.runs.events import (
    NotEvaluated,
    RowAdded,
    RunEvent,
    RungReached,
    StudentKept,
    StudentsRemoved,
    TrialAdded,
    TrialEnded,
    TrunkDecided,
    WorkBegan,
    WorkLost,
    WorkRetried,
)
from autodistill.runs.results.row import Row, Status
from autodistill.search.campaign.admission import admit, candidate_of
from autodistill.search.campaign.judging import Judge
from autodistill.search.campaign.state import Question, TrialState
from autodistill.search.campaign.trunk import Trunk
from autodistill.search.planning.trial_memory import TrainingNeed


class Replay:
    """Takes one event after another, and writes nothing.

    Args:
        question: What is searched for.
        trials: The campaign's trials by id. Trials of the log are added here.
        judge: Receives every rung, in the original order.
        trunk: Called with each decision about a trunk.

    Attributes:
        kills: Number of processes that the kernel had ended for lack of memory when work last began.
    """

    def __init__(
        self, question: Question, trials: dict[str, TrialState], judge: Judge, trunk: Callable[[Trunk], None]
    ) -> None:
        self.kills = 0
        self._question = question
        self._trials = trials
        self._judge = judge
        self._trunk = trunk
        # Each trial's latest row.
        self._rows: dict[str, Row] = {}

    def take(self, log: Iterable[RunEvent]) -> None:
        """Take events in the order in which they were written."""
        for event in log:
            self._take(event)

    def _take(self, event: RunEvent) -> None:
        match event:
            case TrialAdded():
                self._add(event)
            case RowAdded():
                self._row(event.row)
            case RungReached():
                self._rung(event)
            case TrialEnded():
                self._end(event)
            case WorkBegan():
                self._trials[event.trial].begun[event.rung, event.work] += 1
                self.kills = event.kills
            case WorkLost():
                self._trials[event.trial].lose(event.trained)
            case StudentKept():
                self._trials[event.trial].kept = event.kept
            case NotEvaluated():
                self._trials[event.trial].settled.add(event.deployment)
            case WorkRetried():
                self._trials[event.trial].retry(event.rung, event.deployment)
            case TrunkDecided():
                self._trunk(Trunk.from_json(event.to_json()))
            case StudentsRemoved():
                for name in event.trials:
                    self._trials[name].collected = True

    def _add(self, event: TrialAdded) -> None:
        assert event.strategy is not None  # `check_log` has refused a log without
        # The estimate of that time counts: a strategy that was admitted on another machine stays admitted.
        need = TrainingNeed.from_json(event.training)
        self._trials[event.trial] = admit(
            self._question,
            replace(candidate_of(self._question, event.strategy), training=need),
            trial_id=event.trial,
            number=event.number,
            kind=event.kind,
            name=event.name,
            point=None if event.point is None else dict(event.point),
            seed=event.seed,
            length=event.length,
        )

    def _row(self, row: Row) -> None:
        trial = self._trials.get(row.trial)
        if trial is None or row.split != "validation":
            return
        self._rows[row.trial] = row
        trial.settled.add(row.deployment_name)
        # After a training's row comes its rung. All other work ends with its row.
        for piece in [piece for piece in trial.begun if piece[1] is not None]:
            del trial.begun[piece]

    def _rung(self, event: RungReached) -> None:
        trial, plan = self._trials[event.trial], self._question.plan
        trial.rung, trial.value, trial.judged, trial.further = event.rung, event.value, event.judged, event.further
        trial.ended_at(event.tokens, plan)
        trial.train_seconds += event.seconds["train"]
        trial.trained_tokens += event.trained + event.resumed
        trial.begun.clear()
        trial.lost = 0
        # Only the deployment that judged the rung counts. Later rows of other deployments follow in the log.
        row = self._rows.get(event.trial)
        trial.settled = set() if row is None else {row.deployment_name}
        # After further training of one trial, another student may be the best one before the end.
        for one in self._trials.values():
            one.kept = None
        trial.hold(event.steps, plan)
        self._judge.judge(trial, row)

    def _end(self, event: TrialEnded) -> None:
        trial = self._trials[event.trial]
        trial.status, trial.reason, trial.cause = event.status, event.reason, event.cause
        if trial.status is Status.FAILED:
            self._judge.discard(event.trial)
