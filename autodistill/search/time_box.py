"""How long a piece of work is expected to take, by the speed measured and the slowness since, and whether that fits."""

from __future__ import annotations

import math
import time

from autodistill.distillation.schedule import branch_point
from autodistill.search.plan import evaluation_seconds, trial_seconds
from autodistill.search.trials import Assignment, Question
from autodistill.trial_data import TrialTask


class TimeBox:
    """The time that is left for trials.

    Args:
        question: Has the plan and the measured speed.
        deadline: `time.monotonic()` after which no trial may run, or None.
    """

    def __init__(self, question: Question, deadline: float | None) -> None:
        self.deadline = deadline
        self._question = question
        self._slowness = 1.0
        self._closed = False

    def holds(self, seconds: float) -> bool:
        """Whether work that is expected to take so many seconds still ends in time."""
        return seconds <= self.left()

    def left(self) -> float:
        """Seconds of work, as it is expected, that still end in time; infinite without a box."""
        if self._closed:
            return -math.inf
        if self.deadline is None:
            return math.inf
        # What follows the trials will be as slow as they are.
        planned = self._question.plan.seconds
        after = sum(planned.get(phase, 0.0) for phase in ("export", "test"))
        return (self.deadline - time.monotonic() - after * max(0.0, self._slowness - 1)) / self._slowness

    def close(self) -> None:
        """Nothing is to start any more."""
        self._closed = True

    def expected(self, work: Assignment, reached: int) -> float:
        """Seconds that `work` is expected to take a worker, on a trial that stands at rung `reached`, -1 before any."""
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
        return self._stretch(target - start, plan.eval_tokens if last else plan.rung_eval_tokens)

    def up_to(self, task: TrialTask, reached: int, rung: int) -> float:
        """Seconds that a trial, which stands at rung `reached`, is expected to take a worker up to another rung."""
        steps = range(reached + 1, rung + 1)
        return sum(self.expected(Assignment(task=task, rung=step), step - 1) for step in steps)

    def _expected_of(self, work: Assignment, reached: int, trained: int) -> float:
        if not trained or work.deployment is not None:
            return self.expected(work, reached)
        plan = self._question.plan
        last = work.rung == len(plan.rungs) - 1
        return self._stretch(trained, plan.eval_tokens if last else plan.rung_eval_tokens)

    def first_stretch(self) -> float:
        """Expected seconds of a new trial up to its first rung."""
        plan = self._question.plan
        return self._stretch(plan.rungs[0], plan.rung_eval_tokens)

    def whole(self) -> float:
        """Expected seconds of a trial that goes straight to the plan's end, as a baseline does."""
        plan = self._question.plan
        return self._stretch(plan.tokens, plan.eval_tokens)

    def evaluation(self) -> float:
        """Expected seconds of one deployment of a trained student."""
        question = self._question
        return evaluation_seconds(question.plan.eval_tokens, question.teacher_spec.parameters, question.speed)

    def learn(self, work: Assignment, reached: int, seconds: float, trained: int = 0) -> None:
        """Follows how much longer than measured at first work takes: upwards at once, downwards slowly.

        Args:
            work: What was done.
            reached: Rung at which its trial stood before.
            seconds: What it took.
            trained: Tokens that it trained on, fewer than expected where a stage was shared; 0 where that is unknown.
        """
        ratio = seconds / self._expected_of(work, reached, trained)
        self._slowness = max(ratio, 0.8 * self._slowness + 0.2 * ratio)

    def _stretch(self, tokens: int, eval_tokens: int) -> float:
        question = self._question
        return trial_seconds(tokens, eval_tokens, question.teacher_spec.parameters, question.speed, judged=False)
