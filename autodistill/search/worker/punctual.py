"""A student that is trained until a moment: when its decay must begin, and where it must end, by the steps so far."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

from autodistill.distillation.training.fsdp import Sharding, agreed
from autodistill.distillation.training.learning_rate import end_of
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.step_record import StepRecord
from autodistill.strategy.strategy import Strategy
from autodistill.utils.clock import Moment

# How many times as long as the steps before them the steps of a decay are taken to last. Where they are of the same
# kind that is noise alone: time that is left at the end teaches nothing, and a decay that turns out slower is made
# shorter. Where nobody knows by how much steps on a grid are slower, they are taken to be so much slower.
_NOISE, _ON_GRID = 1.03, 1.1 * 1.25

# How many times as many steps as there is time for a decay may have left before it is made shorter.
_SPARE = 1.1

# Steps by which the time of those to come is told, at least, the first of a worker aside, which is slow; and the share
# of the time left that they took, and of a decay's steps that they are. By fewer a moment in which the machine is slow
# would be taken for what is to come, and of the many moments of a long training some are slow.
_FEW_STEPS, _SEEN, _TWENTIETH = 3, 0.25, 20


class Punctual:
    """Keeps a training to the time that it has.

    Args:
        until: When the student is to be trained.
        plan: Tokens of a step, and those that it has in any case.
        strategy: What is trained.
        decay: The share of its tokens in which the rate falls.
        writing: Seconds in which the student writes a step's own tokens, where a phase lets it.
        on_grid: Seconds that a step on the finishing's grid takes longer; None where nobody knows. Both are of as many
            tokens as the plan's steps have.
        sharding: The processes that train it together; None for this one alone.
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
        """Return whether the decay must begin to end in time, by what the steps so far took; of several processes the
        first's.

        Never before the student has more tokens than the plan's.

        Args:
            steps: Of this segment, all of them so far.
        """
        batch, tokens = self._plan.batch_tokens, steps[-1].tokens
        if len(steps) <= _FEW_STEPS or end_of(tokens, self._decay, batch) <= self._plan.tokens:
            return False
        left = (end_of(tokens + batch, self._decay, batch) - tokens) // batch
        each = self._each(steps, _FEW_STEPS)
        on_grid = (_ON_GRID - _NOISE) * each if self._on_grid is None else self._on_grid
        if finishing := self._strategy.finishing:
            on_grid *= 1 - finishing.start
        phase = self._strategy.distillation.on_policy
        writing = _SPARE * phase.share * self._writing if phase else 0.0
        late = left * (_NOISE * each + on_grid + writing) > self._until.left
        return bool(agreed(self._sharding, late))

    def end(self, steps: Sequence[StepRecord], end: int) -> int:
        """Return the tokens at which a decay under way is to end: fewer than before if the machine has become slower.

        Never fewer than the plan's; of several processes the first's.

        Args:
            steps: Of the decay so far.
            end: Tokens at its end, as was thought before.
        """
        batch = self._plan.batch_tokens
        own = [step for step in steps if step.on_policy]
        left = (end - steps[-1].tokens) // batch
        few = max(_FEW_STEPS, left // _TWENTIETH)
        # In the last phase a step takes as long as those of it; before, as if all that are left were of it.
        each = self._each(own, few) if own else self._each(steps, few) + self._writing
        left = 0 if len(steps) < few else left
        held = max(0, int(self._until.left / each))
        least = self._plan.tokens + batch
        found = min(end, max(steps[-1].tokens + held * batch, least)) if left > _SPARE * held else end
        return agreed(self._sharding, found)

    def _each(self, steps: Sequence[StepRecord], few: int) -> float:
        """Return the seconds that a step takes, by the last ones, so many at least; the machine may have become slower
        of late.
        """
        took, seen = list[float](), _SEEN * self._until.left
        for step in reversed(steps[1:] or steps):
            if len(took) >= few and sum(took) >= seen:
                break
            took.append(self._plan.batch_tokens / step.tokens_per_second)
        return fmean(took)
