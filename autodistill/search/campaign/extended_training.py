"""Longer budgets: the best trials, trained on to multiples of the plan's tokens, or in what time is left."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from autodistill.distillation.training.learning_rate import branch_point, end_of
from autodistill.runs.results.row import Status
from autodistill.runs.results.selection import KIND as CONFIRMATION
from autodistill.search.algorithms.successive_halving import BEST
from autodistill.search.campaign.state import Question, TrialState
from autodistill.search.campaign.time_budget import TimeBudget
from autodistill.search.campaign.trunk import BRANCH_DECAY, Trunk, plan_trunk
from autodistill.search.planning.plan import WORTHWHILE
from autodistill.search.worker.attempt import Assignment
from autodistill.search.worker.messages import TrialTask


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
    students = [trial for trial in plain if trial.kind == "student"][:BEST]
    baselines = [trial for trial in plain if trial.kind == "baseline"][:1]
    for length in sorted(length for length in lengths if length > 1):
        for trial in (*students, *baselines) if students else ():
            if lengthened(trial.task.id, length) not in begun:
                return trial, length
    return None


def trained_on(trial: str) -> str:
    """Name of the trial that trains `trial`'s strategy on, to the next decay of its trunk."""
    return f"{trial}x"


def _root(trial: str) -> str:
    """Name of the trial that a trunk began with, of any of its own."""
    return trial.rstrip("x")


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """What is to be done next of a trunk.

    Attributes:
        original: Trial that it goes on from.
        assignment: The work.
        decided: What is decided of the trunk, where that is new; None of one that was begun.
    """

    original: TrialState
    assignment: Assignment
    decided: Trunk | None


class TrainingOn:
    """The best trained on for what the time budget has left, where the plan sets some of it aside.

    That is a trunk: one stable training from which decays branch off, at shares of it that are decided before it begins
    and at its end. Each is a trial of its own, which goes on from the checkpoint that the one before left in their
    stage: a row with a student that may be exported, whatever becomes of the next.

    Where a finished search goes on without a time budget, its best trial alone is trained on, as far as another before,
    so that the two can be compared.

    Args:
        question: Its plan says how far at most.
        trials: Of the campaign, by id, as they are at any moment.
        box: The time that is left.
        checkpoints: Tokens of those of a trial's stage, the furthest first.

    Attributes:
        trunks: What was decided of each, by the trial that it began with.
    """

    def __init__(
        self,
        question: Question,
        trials: Mapping[str, TrialState],
        box: TimeBudget,
        checkpoints: Callable[[TrialState], Sequence[int]],
    ) -> None:
        self._question = question
        self._trials = trials
        self._box = box
        self._checkpoints = checkpoints
        self.trunks: dict[str, Trunk] = {}

    def is_one(self, task: TrialTask) -> bool:
        """Return whether a trial is trained on for as long as there is time."""
        return self._question.plan.longest > 1 and task.length > 1

    def threads(self, task: TrialTask) -> int:
        """CPU threads of a trial that trains with nothing beside it; 0 for one that does not."""
        return self._question.plan.alone if self.is_one(task) else 0

    def sets_aside(self, trained: Sequence[TrialState]) -> bool:
        """Return whether some of the time is to be left, since a trial is worth training on, or will be once it has
        ended.

        Args:
            trained: Trials at full fidelity, the best first.
        """
        plan = self._question.plan
        if plan.longest <= 1:
            return False
        lengths = [trial.task.length for trial in self._candidates(trained)]
        if not any(trial.kind == "student" for trial in trained):
            lengths = [1.0]
        held = self._box.trained_in(self.rows(), alone=plan.alone > 0) / plan.tokens
        # From where its decay branched off.
        return any((WORTHWHILE - 1 + plan.decay) * length <= held for length in lengths)

    def next(self, trained: Sequence[TrialState], busy: Collection[str]) -> Continuation | None:
        """Return what is to be trained on next: a trunk that was begun, then the best; None where none is worth it.

        Args:
            trained: Trials at full fidelity, the best first.
            busy: Stages that are being trained, which are gone on from later.
        """
        plan = self._question.plan
        for original in sorted(self._candidates(trained), key=lambda trial: not self._begun(trial)):
            end = None if original.task.stage in busy else self._end(original)
            if end is None:
                continue
            start, held, length = end
            known = self.trunks.get(_root(original.task.id))
            trunk = known or self._planned(original, start, held)
            tokens = self._branch(original, trunk, start, held)
            task = replace(original.task, length=length, straight=True, decay=None)
            if tokens is not None:
                task = replace(task, length=tokens / plan.tokens, decay=BRANCH_DECAY)
            # It is evaluated where it trains, with as many threads.
            until = self._box.until(self._box.evaluation(alone=plan.alone > 0) + self.rows())
            assignment = Assignment(task=task, rung=len(plan.rungs) - 1, until=until, threads=self.threads(task))
            return Continuation(original=original, assignment=assignment, decided=None if known else trunk)
        return None

    def _begun(self, trial: TrialState) -> bool:
        """Return whether a trial is of a trunk of which decays were decided that it does not go beyond."""
        trunk = self.trunks.get(_root(trial.task.id))
        return trunk is not None and self._tokens(trial) <= max(trunk.lengths, default=0)

    def _tokens(self, trial: TrialState) -> int:
        return self._question.plan.tokens_of(trial.task.length)

    def _planned(self, original: TrialState, start: int, held: int) -> Trunk:
        """The decision of a new trunk; without a time budget, where its length is another's, nothing branches off."""
        plan, alone = self._question.plan, self._question.plan.alone > 0
        if self._box.deadline is None:
            return Trunk(trial=original.task.id, tokens=held, branches=())
        return plan_trunk(
            original.task.id,
            start=start,
            end=min(held, plan.tokens_of(plan.longest)),
            least=WORTHWHILE * original.task.length * plan.tokens,
            batch_tokens=plan.batch_tokens,
            seconds=lambda tokens: self._box.training(tokens, alone=alone, task=original.task),
        )

    def _branch(self, original: TrialState, trunk: Trunk, start: int, held: int) -> int | None:
        """Return the tokens at the end of the next decay short of the trunk's end, if there is one, and time for more.

        Nothing branches off a trunk behind the checkpoint that it goes on from.
        """
        batch, least = self._question.plan.batch_tokens, self._tokens(original)
        left = (one for one in trunk.lengths if one > least and branch_point(one, BRANCH_DECAY, batch) > start)
        return next((one for one in left if one < held), None)

    def _candidates(self, trained: Sequence[TrialState]) -> Iterator[TrialState]:
        """The best few, what they were trained on to, and the best baseline, as far as nobody goes on from them yet."""
        plain = [trial for trial in trained if trial.task.length == 1 and trial.kind != CONFIRMATION]
        if self._box.deadline is None:
            # Nothing would bound the others' training.
            plain = trained = plain[:1]
        few = {trial.task.id for trial in (*plain[:BEST], *[one for one in plain if one.kind == "baseline"][:1])}
        for trial in trained:
            further = self._trials.get(trained_on(trial.task.id))
            begun = further is not None and (further.running or further.status is not None)
            far = WORTHWHILE * trial.task.length > self._question.plan.longest
            if not (begun or far) and (
                trial.task.id in few or (self.is_one(trial.task) and trial.kind != CONFIRMATION)
            ):
                yield trial

    def _end(self, original: TrialState) -> tuple[int, int, float] | None:
        """Return the tokens that a trial is trained on from, and is expected to reach; and how many times the plan's at
        most.

        From the furthest checkpoint of its stage whose decay the time holds: to what it is expected to hold, and as far
        as the plan allows, since the trial is told when to end. None where that is not worth it.
        """
        plan = self._question.plan
        if self._box.deadline is None:
            before = [trial for trial in self._trials.values() if self.is_one(trial.task)]
            ended = [trial.task.length for trial in before if trial.status is Status.COMPLETED]
            length = max(ended, default=plan.expected)
            return 0, plan.tokens_of(length), length
        trained = self._box.trained_in(self.rows(), alone=plan.alone > 0, task=original.task)
        most = plan.longest
        for start in (*self._checkpoints(original), 0):
            held = start + trained
            end = end_of(start, plan.decay, plan.batch_tokens)
            if held >= max(end, WORTHWHILE * original.task.length * plan.tokens):
                return start, held, most
            # Then it must not go on from this one, of which the decay alone takes too long.
            most = min(most, (end - plan.batch_tokens) / plan.tokens)
        return None

    def rows(self) -> float:
        """Expected seconds, all workers at it, of the best student's other rows, each under one deployment."""
        count = max((len(trial.task.deployments) for trial in self._trials.values()), default=1) - 1
        return math.ceil(count / self._question.plan.workers) * self._box.evaluation()
