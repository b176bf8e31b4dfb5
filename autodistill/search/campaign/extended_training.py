"""Extended training: the best trials, trained to multiples of the plan's tokens or for as long as time is left."""

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
    """Return the name of the trial that trains `trial`'s strategy to `length` times the plan's tokens."""
    return f"{trial}x{length:g}"


def next_longer(
    trained: Sequence[TrialState], lengths: Sequence[float], begun: Collection[str]
) -> tuple[TrialState, float] | None:
    """Return the trial to train further next, and its length; None if all have begun.

    The baseline is among them, so that a longer training is compared with a baseline of as many tokens.

    Args:
        trained: Trials at full fidelity, the best first.
        lengths: Multiples of the plan's tokens.
        begun: Ids of the existing trials.
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
    """Return the name of the trial that trains `trial`'s strategy further, to the next decay of its trunk."""
    return f"{trial}x"


def _root(trial: str) -> str:
    """Return the name of the trial that a trunk began with, given the name of any trial of the trunk."""
    return trial.rstrip("x")


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """The next work on a trunk.

    Attributes:
        original: Trial that it continues.
        assignment: The work.
        decided: The decision about the trunk, if it is new; None for a trunk that has begun.
    """

    original: TrialState
    assignment: Assignment
    decided: Trunk | None


class TrainingOn:
    """Trains the best student further in what is left of the time budget, if the plan sets time aside for that.

    This further training is a trunk: one stable training from which decays branch off, at shares that are decided
    before it begins and at its end. Each decay is a trial of its own, which continues from the checkpoint that the
    previous one left in their stage. It gives a row with a student that may be exported, whatever happens to the next
    one.

    If a finished search goes on without a time budget, only its best trial is trained further. It gets as many tokens
    as an earlier further training, so that the two can be compared.

    Args:
        question: Its plan has the longest training that is allowed.
        trials: The campaign's trials by id, always up to date.
        time_budget: The time that is left.
        checkpoints: Returns the tokens of the checkpoints of a trial's stage, the furthest first.

    Attributes:
        trunks: The decision about each trunk, by the trial that it began with.
    """

    def __init__(
        self,
        question: Question,
        trials: Mapping[str, TrialState],
        time_budget: TimeBudget,
        checkpoints: Callable[[TrialState], Sequence[int]],
    ) -> None:
        self._question = question
        self._trials = trials
        self._time_budget = time_budget
        self._checkpoints = checkpoints
        self.trunks: dict[str, Trunk] = {}

    def is_further_training(self, task: TrialTask) -> bool:
        """Return whether a trial is a further training, which goes on for as long as there is time."""
        return self._question.plan.longest > 1 and task.length > 1

    def threads(self, task: TrialTask) -> int:
        """Return the CPU threads of a trial that trains while nothing else runs; 0 for any other trial."""
        return self._question.plan.alone if self.is_further_training(task) else 0

    def sets_aside(self, trained: Sequence[TrialState]) -> bool:
        """Return whether to keep some of the time for further training.

        That is so if a trial is worth training further, or will be once it has ended.

        Args:
            trained: Trials at full fidelity, the best first.
        """
        plan = self._question.plan
        if plan.longest <= 1:
            return False
        lengths = [trial.task.length for trial in self._candidates(trained)]
        if not any(trial.kind == "student" for trial in trained):
            lengths = [1.0]
        held = self._time_budget.trained_in(self.rows(), alone=plan.alone > 0) / plan.tokens
        # It continues from where its decay branched off.
        return any((WORTHWHILE - 1 + plan.decay) * length <= held for length in lengths)

    def next(self, trained: Sequence[TrialState], busy: Collection[str]) -> Continuation | None:
        """Return what to train further next: a trunk that has begun, then the best; None if nothing is worth it.

        Args:
            trained: Trials at full fidelity, the best first.
            busy: Stages that are being trained. They are continued later.
        """
        plan = self._question.plan
        for original in sorted(self._candidates(trained), key=lambda trial: not self._begun(trial)):
            end = None if original.task.stage in busy else self._start_and_reach(original)
            if end is None:
                continue
            start, held, length = end
            known = self.trunks.get(_root(original.task.id))
            trunk = known or self._planned(original, start, held)
            tokens = self._branch(original, trunk, start, held)
            task = replace(original.task, length=length, straight=True, decay=None)
            if tokens is not None:
                task = replace(task, length=tokens / plan.tokens, decay=BRANCH_DECAY)
            # It is evaluated in the worker that trains it, with as many threads.
            until = self._time_budget.until(self._time_budget.evaluation(alone=plan.alone > 0) + self.rows())
            assignment = Assignment(task=task, rung=len(plan.rungs) - 1, until=until, threads=self.threads(task))
            return Continuation(original=original, assignment=assignment, decided=None if known else trunk)
        return None

    def _begun(self, trial: TrialState) -> bool:
        """Return whether a trial belongs to a trunk whose last decided decay it has not passed."""
        trunk = self.trunks.get(_root(trial.task.id))
        return trunk is not None and self._tokens(trial) <= max(trunk.lengths, default=0)

    def _tokens(self, trial: TrialState) -> int:
        return self._question.plan.tokens_of(trial.task.length)

    def _planned(self, original: TrialState, start: int, held: int) -> Trunk:
        """Return the decision about a new trunk.

        Without a time budget its length is that of another trunk, and nothing branches off.
        """
        plan, alone = self._question.plan, self._question.plan.alone > 0
        if self._time_budget.deadline is None:
            return Trunk(trial=original.task.id, tokens=held, branches=())
        return plan_trunk(
            original.task.id,
            start=start,
            end=min(held, plan.tokens_of(plan.longest)),
            fewest_tokens=WORTHWHILE * original.task.length * plan.tokens,
            batch_tokens=plan.batch_tokens,
            seconds=lambda tokens: self._time_budget.training(tokens, alone=alone, task=original.task),
        )

    def _branch(self, original: TrialState, trunk: Trunk, start: int, held: int) -> int | None:
        """Return the tokens at the end of the next decay before the trunk's end, if one is left and time allows more.

        A decay cannot branch off before the checkpoint from which the trunk continues.
        """
        batch, least = self._question.plan.batch_tokens, self._tokens(original)
        left = (one for one in trunk.lengths if one > least and branch_point(one, BRANCH_DECAY, batch) > start)
        return next((one for one in left if one < held), None)

    def _candidates(self, trained: Sequence[TrialState]) -> Iterator[TrialState]:
        """Yield the trials that may be trained further and that nobody continues yet.

        They are the best few, the best baseline, and what any of these became after further training.
        """
        plain = [trial for trial in trained if trial.task.length == 1 and trial.kind != CONFIRMATION]
        if self._time_budget.deadline is None:
            # Nothing would limit the training of the others.
            plain = trained = plain[:1]
        few = {trial.task.id for trial in (*plain[:BEST], *[one for one in plain if one.kind == "baseline"][:1])}
        for trial in trained:
            further = self._trials.get(trained_on(trial.task.id))
            begun = further is not None and (further.running or further.status is not None)
            far = WORTHWHILE * trial.task.length > self._question.plan.longest
            if not (begun or far) and (
                trial.task.id in few or (self.is_further_training(trial.task) and trial.kind != CONFIRMATION)
            ):
                yield trial

    def _start_and_reach(self, original: TrialState) -> tuple[int, int, float] | None:
        """Return where a trial continues from and where it is expected to end, in tokens, and its greatest length.

        It continues from the furthest checkpoint of its stage whose decay still fits the time. The greatest length is a
        multiple of the plan's tokens. It may exceed the expected end, because the trial ends at a given time. None if
        the training is not worth it.
        """
        plan = self._question.plan
        if self._time_budget.deadline is None:
            before = [trial for trial in self._trials.values() if self.is_further_training(trial.task)]
            ended = [trial.task.length for trial in before if trial.status is Status.COMPLETED]
            length = max(ended, default=plan.expected)
            return 0, plan.tokens_of(length), length
        trained = self._time_budget.trained_in(self.rows(), alone=plan.alone > 0, task=original.task)
        most = plan.longest
        for start in (*self._checkpoints(original), 0):
            held = start + trained
            end = end_of(start, plan.decay, plan.batch_tokens)
            if held >= max(end, WORTHWHILE * original.task.length * plan.tokens):
                return start, held, most
            # The trial must then end earlier, so that it does not continue from this checkpoint, whose decay takes too
            # long.
            most = min(most, (end - plan.batch_tokens) / plan.tokens)
        return None

    def rows(self) -> float:
        """Return the expected seconds, with all workers, for the best student's rows under its further deployments."""
        count = max((len(trial.task.deployments) for trial in self._trials.values()), default=1) - 1
        return math.ceil(count / self._question.plan.workers) * self._time_budget.evaluation()
