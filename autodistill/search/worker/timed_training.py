"""Training that must end by a given time: its decay begins and ends by what the steps so far took."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from autodistill.distillation.training.fsdp import Sharding, agreed
from autodistill.distillation.training.learning_rate import end_of
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.step_record import StepRecord
from autodistill.strategy.strategy import Strategy
from autodistill.utils.clock import Moment

# How much longer the steps of a decay are assumed to take than the steps before it. Usually they take equally long, so
# `_NOISE` covers only noise: a larger factor would leave time unused, and a decay that turns out slower is shortened.
# `_ON_GRID` is the factor when nobody knows how much slower steps on a grid are.
_NOISE, _ON_GRID = 1.03, 1.1 * 1.25

# A decay is shortened if it has more than this many times the steps that the time left holds.
_SPARE = 1.1

# Step times are estimated from the latest steps, without a worker's first step, which is slow. There are at least
# `_FEW_STEPS` of them, which took at least the share `_SEEN` of the time left; in a decay, also at least a twentieth of
# its remaining steps. With fewer, one slow moment of the machine would count as the future, and a long training has
# many such moments.
_FEW_STEPS, _SEEN, _TWENTIETH = 3, 0.25, 20


class TimedTraining:
    """Keeps a training to the time that it has.

    Args:
        until: When the student must be ready.
        plan: Has the tokens of a step, and those that the student gets in any case.
        strategy: The strategy to train.
        decay: Share of the student's tokens over which the rate falls.
        writing: Seconds in which the student generates its own tokens for a step, if a phase needs them.
        on_grid: Extra seconds of a step on the finishing's grid; None if unknown. Both are for as many tokens as a step
            of the plan has.
        sharding: The processes that train it together; None if this one trains it alone.
    """

    def __init__(
        self,
        until: Moment,
        plan: Plan,
        strategy: Strategy,
        decay: float,
        *,
        writing: float,
        on_grid: float | None,
        sharding: Sharding | None,
    ) -> None:
        self._until, self._plan, self._strategy, self._decay = until, plan, strategy, decay
        self._writing, self._on_grid, self._sharding = writing, on_grid, sharding

    def must_decay(self, steps: Sequence[StepRecord]) -> bool:
        """Return whether the decay must begin now to end in time, judged by the time of the steps so far.

        It never begins before the student would get more tokens than the plan's. The first of several processes
        decides.

        Args:
            steps: All steps of this segment so far.
        """
        batch, tokens = self._plan.batch_tokens, steps[-1].tokens
        if len(steps) <= _FEW_STEPS or end_of(tokens, self._decay, batch) <= self._plan.tokens:
            return False
        left = (end_of(tokens + batch, self._decay, batch) - tokens) // batch
        each = self._step_seconds(steps, _FEW_STEPS)
        on_grid = (_ON_GRID - _NOISE) * each if self._on_grid is None else self._on_grid
        if finishing := self._strategy.finishing:
            on_grid *= 1 - finishing.start
        phase = self._strategy.distillation.on_policy
        writing = _SPARE * phase.share * self._writing if phase else 0.0
        late = left * (_NOISE * each + on_grid + writing) > self._until.left
        return bool(agreed(self._sharding, late))

    def end(self, steps: Sequence[StepRecord], end: int) -> int:
        """Return the tokens at which a running decay is to end: fewer than before if the machine has become slower.

        They are always more than the plan's tokens, unless the decay was to end sooner. The first of several processes
        decides.

        Args:
            steps: Steps of the decay so far.
            end: Tokens at its end, as expected before.
        """
        batch = self._plan.batch_tokens
        own = [step for step in steps if step.on_policy]
        left = (end - steps[-1].tokens) // batch
        few = max(_FEW_STEPS, left // _TWENTIETH)
        # In the last phase, its own steps give the time. Before it, all remaining steps are assumed to belong to it.
        each = self._step_seconds(own, few) if own else self._step_seconds(steps, few) + self._writing
        left = 0 if len(steps) < few else left
        held = max(0, int(self._until.left / each))
        least = self._plan.tokens + batch
        found = min(end, max(steps[-1].tokens + held * batch, least)) if left > _SPARE * held else end
        return agreed(self._sharding, found)

    def _step_seconds(self, steps: Sequence[StepRecord], few: int) -> float:
        """Return the seconds of a step, from at least `few` of the latest ones.

        Earlier ones do not count, because the machine may have become slower.
        """
        took, seen = list[float](), _SEEN * self._until.left
        for step in reversed(steps[1:] or steps):
            if len(took) >= few and sum(took) >= seen:
                break
            took.append(self._plan.batch_tokens / step.tokens_per_second)
        return fmean(took)
