"""What earlier runs of the same space found: observations for a new search's sampler, and its first proposals."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from autodistill.distillation.student.check import probe_deployment
from autodistill.runs.events import RowAdded, TrialAdded, TrialEnded
from autodistill.runs.results.objectives import Objective
from autodistill.runs.results.row import Row, Status
from autodistill.runs.results.selection import KIND as CONFIRMATION
from autodistill.runs.run_folder import RunFolder
from autodistill.runs.run_log import RunLog
from autodistill.search.algorithms.optuna_study import Observation
from autodistill.search.campaign.admission import admit, candidate_of, untrained_figure, with_training
from autodistill.search.campaign.state import Question, TrialState
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.dimension import Point
from autodistill.utils.typed_data import check_typed

# A value within these multiples of this plan's tokens counts as one at its end. Tokens follow from a timing of seconds,
# so two runs of one command hardly ever plan the same number.
_SAME = (0.8, 1.25)

_KNOWN_BY = ("reference", "fingerprint")


@dataclass(frozen=True, kw_only=True)
class WarmStart:
    """The observations and strategies of earlier runs that a search begins with.

    Attributes:
        runs: Names of the earlier runs.
        observations: Results of their strategies, under this search's budget and plan. Those at full fidelity are not
            proposed again; the others may be.
        first: Points to propose first: the best of each run, because this search does not have their weights.
    """

    runs: tuple[str, ...] = ()
    observations: tuple[Observation, ...] = ()
    first: tuple[Point, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the warm start as plain data."""
        return {
            "runs": list(self.runs),
            "observations": [asdict(item) | {"further": list(item.further)} for item in self.observations],
            "first": [dict(point) for point in self.first],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> WarmStart:
        """Read what `to_json` wrote.

        Raises:
            InputError: The data has another form.
        """
        check_typed(data, cls, "warm_start of search.json")
        return cls(
            runs=tuple(data["runs"]),
            observations=tuple(
                Observation(**item | {"state": Status(item["state"]), "further": tuple(item["further"])})
                for item in data["observations"]
            ),
            first=tuple(data["first"]),
        )


def warm_start(out: Path, runs: Sequence[str], question: Question) -> WarmStart:
    """Read the logs of earlier runs, finished or not, as this search would have seen their trials.

    A trial's value is that of the rung nearest to this plan's end. A rung within 0.8 to 1.25 of the plan's tokens
    counts as finished. Without such a rung, the value is that of the last rung before, with its fraction of this plan's
    tokens as fidelity. A trial that went beyond this plan without a rung within it counts as finished.

    The value is one under a deployment that this budget allows. Memory, size and latency are computed again. A strategy
    that cannot fit is reported as rejected.

    Args:
        out, runs: As checked by `check_space` and `check_fingerprints`.
        question: What this search is asked.
    """
    sign = 1.0 if question.judge_direction == "max" else -1.0
    found: dict[str, Observation] = {}
    first: list[Point] = []
    for name in runs:
        mine = dict(_observations(RunFolder.open(out, name).events, question))
        for strategy_id, item in mine.items():
            if strategy_id not in found or found[strategy_id].fidelity <= item.fidelity:
                found[strategy_id] = item
        valued = [(item.fidelity, sign * item.values[0], item.point) for item in mine.values() if item.values]
        if valued:
            point = dict(max(valued, key=lambda one: one[:2])[2])
            first += [point] if point not in first else []
    return WarmStart(runs=tuple(runs), observations=tuple(found.values()), first=tuple(first))


def _observations(log: RunLog, question: Question) -> Iterable[tuple[str, Observation]]:
    """Yield each strategy of a run that lies in the space, by its id, except baselines: this search runs them too."""
    rows: dict[str, list[Row]] = {}
    for row in (event.row for event in log.of(RowAdded)):
        if row.split == "validation":
            rows.setdefault(row.trial, []).append(row)
    causes = {event.trial: event.cause for event in log.of(TrialEnded)}
    baselines = {strategy.id for strategy in question.space.baselines.values()}
    for event in log.of(TrialAdded):
        # A trial that was trained beyond its plan is already known at the plan's tokens.
        strategy = event.strategy
        if strategy is None or event.kind == CONFIRMATION or event.length > 1:
            continue
        point = question.space.point(strategy)
        if point is None or strategy.id in baselines:
            continue
        trial = admit(
            question,
            with_training(question, candidate_of(question, strategy)),
            trial_id=event.trial,
            number=None,
            kind="student",
            name=event.name,
            point=point,
        )
        item = _observation(question, trial, rows.get(event.trial, ()), causes.get(event.trial))
        if item is not None:
            yield strategy.id, item


def _observation(question: Question, trial: TrialState, rows: Sequence[Row], cause: str | None) -> Observation | None:
    assert trial.point is not None
    slack = trial.candidate.slack
    if trial.reason is not None:
        return Observation(point=trial.point, state=Status.REJECTED, constraint=max(1e-9, slack), further=trial.further)
    if cause in ("nan", "out-of-memory"):
        # The strategy would fail again in the same way. A worker's death would not repeat.
        return Observation(point=trial.point, state=Status.FAILED, constraint=slack, further=trial.further)
    usable = [
        (row.train_tokens, row.deployment, row)
        for row in rows
        if row.train_tokens and row.figure(question.judge) is not None
    ]
    usable = [item for item in usable if item[1] in trial.task.deployments]
    if not usable:
        return None
    tokens = question.plan.tokens
    level = _level([item[0] for item in usable], tokens)
    whole = level >= _SAME[0] * tokens
    seen = {deployment: row for reached, deployment, row in usable if reached == level}
    strategy = trial.task.strategy
    deployment = trial.task.probe if trial.task.probe in seen else probe_deployment(strategy, tuple(seen))
    return Observation(
        point=trial.point,
        state=Status.COMPLETED if whole else Status.STOPPED,
        value=seen[deployment].figure(question.judge),
        fidelity=min(1.0, level / tokens),
        constraint=slack,
        further=tuple(_further(item, trial, deployment, seen[deployment], question) for item in question.further),
        repeatable=not whole,
    )


def _level(levels: Sequence[int], tokens: int) -> int:
    """Return the training tokens whose value says most about a plan of so many tokens."""
    low, high = (share * tokens for share in _SAME)
    near = [level for level in levels if low <= level <= high]
    if near:
        return min(near, key=lambda level: abs(math.log(level / tokens)))
    return max((level for level in levels if level < tokens), default=min(levels))


def _further(
    objective: Objective, trial: TrialState, deployment: Deployment, row: Row, question: Question
) -> float | None:
    """Return a further objective: the row's value if only training shows it, else one computed for this budget."""
    if objective.trained or trial.candidate.spec is None:
        return row.figure(objective.figure)
    return untrained_figure(objective, trial.candidate.spec, deployment, question)
