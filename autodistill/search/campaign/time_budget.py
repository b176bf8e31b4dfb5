"""How long a piece of work is expected to take, by the speed measured and the slowness since, and whether that fits."""

from __future__ import annotations

import math
import time
from dataclasses import replace

from autodistill.distillation.training.learning_rate import branch_point
from autodistill.search.campaign.state import Question
from autodistill.search.planning.durations import Speed, evaluation_seconds, trained_in, trial_seconds
from autodistill.search.worker.attempt import Assignment
from autodistill.search.worker.messages import TrialTask
from autodistill.utils.clock import Moment

_AS_EXPECTED = 30.0
"""Seconds of work that went as expected, which count beside what was seen: a few seconds of a race, slow for what they
begin with, do not tell how long what follows takes."""


class TimeBudget:
    """The time that is left for trials.

    Some of it is set aside for training the best on, and nothing else takes it; less than planned where less is left
    when the trials begin than was expected.

    Args:
        question: Has the plan and the measured speed.
        deadline: `time.monotonic()` after which no trial may run, or None.
    """

    def __init__(self, question: Question, deadline: float | None) -> None:
        self.deadline = deadline
        self._aside = 0.0
        if deadline is not None and question.plan.longest > 1:
            share = (1 - question.explore) * max(0.0, deadline - time.monotonic())
            self._aside = min(question.plan.seconds["longer"], share)
        self._question = question
        self._slowness = 1.0
        # Seconds that work took, and was expected to take, of late.
        self._took = self._expected = 0.0
        # Seconds that a piece of work took beside training and reading of late: a process that begins, a student made.
        self._beside = 0.0
        self._closed = False

    def holds(self, seconds: float, *, whole: bool = False) -> bool:
        """Return whether work that is expected to take so many seconds still ends in time.

        Args:
            seconds: Of a worker.
            whole: Whether it may take what is set aside.
        """
        return seconds <= self.left(whole=whole)

    def left(self, *, whole: bool = False) -> float:
        """Return the seconds of work, as it is expected, that still end in time; infinite without a time budget."""
        if self._closed:
            return -math.inf
        if self.deadline is None:
            return math.inf
        aside = 0.0 if whole else self._aside
        return (self._end() - aside - time.monotonic()) / self._slowness

    def trained_in(self, after: float, *, alone: bool, task: TrialTask | None = None) -> int:
        """Return the tokens that a worker may train on before an evaluation and `after` seconds more, in all that is
        left.

        0 without a time budget, or where nothing is to start any more.

        Args:
            after: Seconds of work that is to follow.
            alone: Whether it trains on all threads.
            task: What it trains; None where that is not known yet.
        """
        question, speed = self._question, self._speed(alone, task)
        if self._closed or self.deadline is None:
            return 0
        seconds = (self._end() - time.monotonic()) / self._usual() - after
        parameters = question.teacher_spec.parameters
        return max(0, trained_in(seconds, question.plan.eval_tokens, parameters, speed.worker_train, speed))

    def until(self, seconds: float) -> Moment | None:
        """When so many seconds of work, as expected, no longer end in time; None without a time budget."""
        return None if self.deadline is None else Moment(self._end() - seconds * self._usual())

    def _end(self) -> float:
        """`time.monotonic()` at which the training and reading of a piece of work that begins now must have ended."""
        assert self.deadline is not None, "there is no time budget"
        return self.deadline - self._after() - self._beside

    def _after(self) -> float:
        """Return the seconds that what follows the trials is expected to take longer than planned, being as slow as
        they are.
        """
        planned = self._question.plan.seconds
        after = sum(planned.get(phase, 0.0) for phase in ("export", "test"))
        return after * (self._usual() - 1)

    def _usual(self) -> float:
        """Return how many times as long as expected work took of late, all of it together: short work is often far
        slower.
        """
        return max(1.0, (_AS_EXPECTED + self._took) / (_AS_EXPECTED + self._expected))

    def close(self) -> None:
        """Start nothing any more."""
        self._closed = True

    def expected(self, work: Assignment, reached: int) -> float:
        """Return the seconds that `work` is expected to take a worker, on a trial that stands at rung `reached`, -1
        before any.
        """
        plan = self._question.plan
        if work.deployment is not None:
            return self.evaluation()
        last = work.rung == len(plan.rungs) - 1
        target, length = plan.rungs[work.rung], work.task.length
        # It goes on from where the decay to that rung branched off.
        start = branch_point(plan.rungs[reached], plan.decay, plan.batch_tokens) if reached >= 0 else 0
        if length > 1:
            # Likewise of the plan's tokens, if it shares that stage.
            start = branch_point(target, plan.decay, plan.batch_tokens) if work.task.stage else 0
            target = plan.tokens_of(length)
        evaluated = plan.eval_tokens if last else plan.rung_eval_tokens
        return self._segment(target - start, evaluated, bool(work.threads), work.task)

    def up_to(self, task: TrialTask, reached: int, rung: int) -> float:
        """Return the seconds that a trial, which stands at rung `reached`, is expected to take a worker up to another
        rung.
        """
        steps = range(reached + 1, rung + 1)
        return sum(self.expected(Assignment(task=task, rung=step), step - 1) for step in steps)

    def _expected_of(self, work: Assignment, reached: int, trained: int) -> float:
        if not trained or work.deployment is not None:
            return self.expected(work, reached)
        plan = self._question.plan
        last = work.rung == len(plan.rungs) - 1
        evaluated = plan.eval_tokens if last else plan.rung_eval_tokens
        return self._segment(trained, evaluated, bool(work.threads), work.task)

    def first_segment(self) -> float:
        """Expected seconds of a new trial up to its first rung."""
        plan = self._question.plan
        return self._segment(plan.rungs[0], plan.rung_eval_tokens)

    def whole(self) -> float:
        """Expected seconds of a trial that goes straight to the plan's end, as a baseline does."""
        plan = self._question.plan
        return self._segment(plan.tokens, plan.eval_tokens)

    def training(self, tokens: int, *, alone: bool, task: TrialTask | None = None) -> float:
        """Expected seconds of a worker for so many tokens of a trial, on all threads or not, and the evaluation after
        them.
        """
        return self._segment(tokens, self._question.plan.eval_tokens, alone, task)

    def evaluation(self, *, alone: bool = False) -> float:
        """Expected seconds of one deployment of a trained student, on all threads or not."""
        question = self._question
        return evaluation_seconds(question.plan.eval_tokens, question.teacher_spec.parameters, self._speed(alone))

    def learn(
        self,
        work: Assignment,
        reached: int,
        seconds: float,
        trained: int = 0,
        beside: float = 0.0,
    ) -> None:
        """Follow how much longer than measured at first work takes: upwards at once, downwards slowly.

        What follows the trials, and is of another kind, is told by all of it together.

        Args:
            work: What was done.
            reached: Rung at which its trial stood before.
            seconds: What its training and reading took.
            trained: Tokens that it trained on, fewer than expected where a stage was shared; 0 where that is unknown.
            beside: Seconds that it took beside these, which say nothing of how fast the machine is.
        """
        expected = self._expected_of(work, reached, trained)
        ratio = seconds / expected
        self._slowness = max(ratio, 0.8 * self._slowness + 0.2 * ratio)
        self._took = 0.8 * self._took + seconds
        self._expected = 0.8 * self._expected + expected
        self._beside = max(beside, 0.5 * (self._beside + beside))

    def _segment(self, tokens: int, eval_tokens: int, alone: bool = False, task: TrialTask | None = None) -> float:
        parameters = self._question.teacher_spec.parameters
        return trial_seconds(tokens, eval_tokens, parameters, self._speed(alone, task), judged=False)

    def _speed(self, alone: bool, task: TrialTask | None = None) -> Speed:
        """The speed of a worker that is one of several, or that has all threads, with which it reads too.

        Of a trial that reads nothing of the teacher without what that takes; a trial that is not known may read it.
        """
        speed = self._question.speed
        if task is not None and not task.strategy.distillation.reads_teacher:
            speed = speed.by_labels()
        if not alone:
            return speed
        return replace(speed, worker_train=speed.train_on, worker_score=max(speed.score, speed.worker_score))
