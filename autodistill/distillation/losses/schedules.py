"""How the temperature, and TAID's target, move over a training's tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from autodistill.strategy.recipe import Temperature

# Of the paper's experiments: the size of a step, and how much of the earlier change it remembers.
_STEP, _MEMORY = 5e-4, 0.99


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """The teacher's share in the target and what its next step follows from (arXiv 2501.16937, algorithm 1).

    As there, a step has the share that the steps before it led to: the first one the start, and of N steps without a
    falling loss the last one 1 - 1/N of the way. The teacher alone is the target from the plan's end on.

    Attributes:
        share: Of the teacher in the target, from its start to 1.
        momentum: Moving average of the loss's relative fall.
        loss: Of the last step that had one, or None before the first.
    """

    share: float
    momentum: float = 0.0
    loss: float | None = None

    def after(self, loss: float | None, start: float, progress: float) -> Interpolation:
        """The state after a step: at least as far as a line from `start` to 1, further where the loss falls.

        Args:
            loss: Of the step, before its weight; None where nothing of the teacher was heard, which says nothing of
                how fast it falls.
            start: The share at the beginning of training.
            progress: Tokens trained on over the horizon, 0 to 1.
        """
        line = start + (1 - start) * progress
        if loss is None:
            return replace(self, share=min(1.0, max(line, self.share)))
        if not math.isfinite(loss):
            return self
        share, momentum = self.share, self.momentum
        if self.loss is not None:
            fall = (self.loss - loss) / (self.loss + 1e-15)
            momentum = _MEMORY * momentum + (1 - _MEMORY) * fall
            share += _STEP * (1 + math.tanh(momentum / 2)) / 2 * (1 - share)  # a sigmoid of the momentum
        return Interpolation(share=min(1.0, max(line, share)), momentum=momentum, loss=loss)


# The cache keeps an exact logsumexp of the teacher's whole row for each of these, so no other temperature is exact.
GRID: tuple[float, ...] = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)


def snap(temperature: float) -> float:
    """The grid's nearest temperature, by ratio; of two equally near, the lower."""
    return min(GRID, key=lambda value: (round(abs(math.log(value / temperature)), 12), value))


def progress(tokens: float, horizon: int) -> float:
    """Share of the horizon that `tokens` of training are, 1 beyond it."""
    return min(max(tokens / horizon, 0.0), 1.0)


def along(start: float, end: float | None, x: float) -> float:
    """A line from `start` to `end` at the share `x` of the horizon; constant where there is no end."""
    return start if end is None else start + (end - start) * x


def temperature_at(schedule: Temperature, tokens: float, horizon: int) -> float:
    """Temperature after `tokens` of training, before snapping.

    Args:
        schedule: Shape and end points.
        tokens: Tokens trained on so far; a step has the temperature of the middle of its own.
        horizon: Tokens at which the schedule reaches its end; it stays there beyond.
    """
    x = progress(tokens, horizon)
    start, end = schedule.start, schedule.end
    if schedule.shape == "linear":
        return along(start, end, x)
    if schedule.shape == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * x)) / 2
    if schedule.shape == "exponential":
        return start * (end / start) ** x
    return start
