"""A student that is trained until a moment: when its decay must begin, and where it must end, by the steps so far."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, median

from autodistill.distillation.training.fsdp import Sharding, agreed
from autodistill.distillation.training.learning_rate import end_of
from autodistill.distillation.training.plan import Plan
from autodistill.distillation.training.step_record import StepRecord
from autodistill.strategy.strategy import Strategy
from autodistill.utils.clock import Moment

# How many times as long as the steps before them the steps of a decay are taken to last. Where they are of the same
# kind that is noise alone: time that is left at the end teaches nothing, and a decay that turns out slower is made
# shorter. Steps on a grid are slower, by how much is not known before.
_NOISE, _ON_GRID = 1.03, 1.1 * 1.25

# How many times as many steps as there is time for a decay may have left before it is made shorter.
_SPARE = 1.1

# Steps by which the time of those to come is told, the first of a worker aside, which is slow.
_FEW_STEPS, _MANY_STEPS = 3, 100


class Punctual:
    """Keeps a training to the time that it has.

    Args:
        until: When the student is to be trained.
        plan: Tokens of a step, and those that it has in any case.
        strategy: What is trained.
        decay: The share of its tokens in which the rate falls.
        writing: Seconds in which the student writes a step's own tokens, where a phase lets it.
        sharding: The processes that train it together; None for this one alone.
    """

    def __init__(
        self, until: Moment, plan: Plan, strategy: Strategy, decay: float, writing: float, sharding: Sharding | None
    ) -> None:
        self._until, self._plan, self._strategy, self._decay = until, plan, strategy, decay
        self._writing, self._sharding = writing, sharding

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
        slower = _ON_GRID if self._strategy.finishing and not self._strategy.scales_alone else _NOISE
        phase = self._strategy.distillation.on_policy
        writing = _SPARE * phase.share * self._writing if phase else 0.0
        late = left * (slower * _each(steps, batch) + writing) > self._until.left
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
        # In the last phase a step takes as long as those of it; before, as if all that are left were of it.
        each = _each(own, batch) if own else _each(steps, batch) + self._writing
        left = 0 if len(steps) < _FEW_STEPS else (end - steps[-1].tokens) // batch
        held = max(0, int(self._until.left / each))
        least = self._plan.tokens + batch
        found = min(end, max(steps[-1].tokens + held * batch, least)) if left > _SPARE * held else end
        return agreed(self._sharding, found)


def _each(steps: Sequence[StepRecord], batch_tokens: int) -> float:
    """Return the seconds that a step takes, by those that were made; the machine may have become slower of late."""
    took = [batch_tokens / step.tokens_per_second for step in steps[-_MANY_STEPS:]]
    return max(fmean(took[1:] or took), median(took[-_FEW_STEPS:]))
