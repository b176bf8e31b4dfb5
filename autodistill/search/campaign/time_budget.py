"""Estimates how long work takes at the measured speed, and whether it fits the time left."""

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

_EXPECTED_SPEED_SECONDS = 30.0
"""Seconds of work at the expected speed that are added to what was measured. Without them, a few slow seconds at the
start of a race would inflate every later estimate."""


class TimeBudget:
    """The time that is left for trials.

    Some of it is set aside for training the best further, and nothing else uses that part. The part is smaller than
    planned if less time than expected is left when the trials begin.

    Args:
        question: Has the plan and the measured speed.
        deadline: `time.monotonic()` after which no trial may run, or None.
    """

    def __init__(self, question: Question, deadline: float | None) -> None:
        self.deadline = deadline
        self._set_aside_seconds = 0.0
        if deadline is not None and question.plan.longest > 1:
            share = (1 - question.explore) * max(0.0, deadline - time.monotonic())
            self._set_aside_seconds = min(question.plan.seconds["longer"], share)
        self._question = question
        self._slowness = 1.0
        # Seconds that recent work took, and seconds that it was expected to take.
        self._recent_seconds = self._recent_expected_seconds = 0.0
        # Recent seconds of a piece of work outside training and evaluation: starting a process, building a student.
        self._overhead_seconds = 0.0
        self._closed = False

    def holds(self, seconds: float, *, whole: bool = False) -> bool:
        """Return whether work of so many expected seconds would still end in time.

        Args:
            seconds: Expected seconds of one worker.
            whole: Whether the work may use the time that is set aside.
        """
        return seconds <= self.left(whole=whole)

    def left(self, *, whole: bool = False) -> float:
        """Return how many expected seconds of work would still end in time; infinite without a time budget."""
        if self._closed:
            return -math.inf
        if self.deadline is None:
            return math.inf
        aside = 0.0 if whole else self._set_aside_seconds
        return (self._end() - aside - time.monotonic()) / self._slowness

    def trained_in(self, after: float, *, alone: bool, task: TrialTask | None = None) -> int:
        """Return the tokens that a worker can train on in the time left, before an evaluation and `after` more seconds.

        It is 0 without a time budget, or if nothing more is to start.

        Args:
            after: Expected seconds of the work that follows.
            alone: Whether it trains on all threads.
            task: What it trains; None if that is not known yet.
        """
        question, speed = self._question, self._speed(alone, task)
        if self._closed or self.deadline is None:
            return 0
        seconds = (self._end() - time.monotonic()) / self._recent_slowness() - after
        parameters = question.teacher_spec.parameters
        return max(0, trained_in(seconds, question.plan.eval_tokens, parameters, speed.worker_train, speed))

    def until(self, seconds: float) -> Moment | None:
        """Return the moment from which so many expected seconds of work no longer fit; None without a time budget."""
        return None if self.deadline is None else Moment(self._end() - seconds * self._recent_slowness())

    def _end(self) -> float:
        """Return the `time.monotonic()` by which the training and evaluation of work that begins now must end."""
        assert self.deadline is not None, "there is no time budget"
        return self.deadline - self._after() - self._overhead_seconds

    def _after(self) -> float:
        """Return the extra seconds expected for what follows the trials, if it is as slow as they are."""
        planned = self._question.plan.seconds
        after = sum(planned.get(phase, 0.0) for phase in ("export", "test"))
        return after * (self._recent_slowness() - 1)

    def _recent_slowness(self) -> float:
        """Return the ratio of actual to expected time of all recent work together, at least 1.

        Short pieces of work alone are often far slower.
        """
        return max(
            1.0,
            (_EXPECTED_SPEED_SECONDS + self._recent_seconds)
            / (_EXPECTED_SPEED_SECONDS + self._recent_expected_seconds),
        )

    def close(self) -> None:
        """Let nothing more start."""
        self._closed = True

    def expected(self, work: Assignment, reached: int) -> float:
        """Return the seconds that `work` is expected to take a worker on a trial at rung `reached`, -1 before any."""
        plan = self._question.plan
        if work.deployment is not None:
            return self.evaluation()
        last = work.rung == len(plan.rungs) - 1
        target, length = plan.rungs[work.rung], work.task.length
        # It continues from where the decay to that rung branched off.
        start = branch_point(plan.rungs[reached], plan.decay, plan.batch_tokens) if reached >= 0 else 0
        if length > 1:
            # If it shares the stage, it continues from where the decay to the plan's tokens branched off.
            start = branch_point(target, plan.decay, plan.batch_tokens) if work.task.stage else 0
            target = plan.tokens_of(length)
        evaluated = plan.eval_tokens if last else plan.rung_eval_tokens
        return self._segment(target - start, evaluated, bool(work.threads), work.task)

    def up_to(self, task: TrialTask, reached: int, rung: int) -> float:
        """Return the seconds that a trial at rung `reached` is expected to take a worker to reach `rung`."""
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
        """Return the expected seconds of a new trial up to its first rung."""
        plan = self._question.plan
        return self._segment(plan.rungs[0], plan.rung_eval_tokens)

    def whole(self) -> float:
        """Return the expected seconds of a trial that goes straight to the plan's end, as a baseline does."""
        plan = self._question.plan
        return self._segment(plan.tokens, plan.eval_tokens)

    def training(self, tokens: int, *, alone: bool, task: TrialTask | None = None) -> float:
        """Return a worker's expected seconds for so many tokens of a trial and the evaluation after them."""
        return self._segment(tokens, self._question.plan.eval_tokens, alone, task)

    def evaluation(self, *, alone: bool = False) -> float:
        """Return the expected seconds to evaluate one deployment of a trained student, on all threads or not."""
        question = self._question
        return evaluation_seconds(question.plan.eval_tokens, question.teacher_spec.parameters, self._speed(alone))

    def learn(
        self,
        work: Assignment,
        reached: int,
        seconds: float,
        trained: int = 0,
        other_seconds: float = 0.0,
    ) -> None:
        """Update the slowness of this machine from a finished piece of work: upwards at once, downwards slowly.

        The work after the trials is of another kind. Its slowness is estimated from all recent work together.

        Args:
            work: What was done.
            reached: Rung that its trial had reached before.
            seconds: Time of its training and evaluation.
            trained: Tokens that it trained on, which are fewer than expected if a stage was shared; 0 if unknown.
            other_seconds: Seconds spent on other things, which say nothing about the speed of the machine.
        """
        expected = self._expected_of(work, reached, trained)
        ratio = seconds / expected
        self._slowness = max(ratio, 0.8 * self._slowness + 0.2 * ratio)
        self._recent_seconds = 0.8 * self._recent_seconds + seconds
        self._recent_expected_seconds = 0.8 * self._recent_expected_seconds + expected
        self._overhead_seconds = max(other_seconds, 0.5 * (self._overhead_seconds + other_seconds))

    def _segment(self, tokens: int, eval_tokens: int, alone: bool = False, task: TrialTask | None = None) -> float:
        parameters = self._question.teacher_spec.parameters
        return trial_seconds(tokens, eval_tokens, parameters, self._speed(alone, task), judged=False)

    def _speed(self, alone: bool, task: TrialTask | None = None) -> Speed:
        """Return the speed of a worker that is one of several, or that has all threads for training and evaluation.

        If a trial uses nothing from the teacher, the teacher's time is left out. A trial that is not known yet may use
        it.
        """
        speed = self._question.speed
        if task is not None and not task.strategy.distillation.reads_teacher:
            speed = speed.by_labels()
        if not alone:
            return speed
        return replace(speed, worker_train=speed.train_on, worker_score=max(speed.score, speed.worker_score))
