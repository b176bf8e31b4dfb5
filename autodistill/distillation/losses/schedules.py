"""Schedules of the temperature and of TAID's target over the tokens of a training."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from autodistill.strategy.recipe import Temperature

# Size of an update of the share, and decay of its momentum, as in the paper's experiments.
_STEP, _MEMORY = 5e-4, 0.99


@dataclass(frozen=True, kw_only=True)
class Interpolation:
    """The teacher's share in the target, and the state that determines its next value (arXiv 2501.16937, algorithm 1).

    As in the paper, each step uses the share that the earlier steps led to. The first step uses the start value. If the
    loss never falls in N steps, the last one is 1 - 1/N of the way. From the plan's end on, the target is the teacher
    alone.

    Attributes:
        share: The teacher's share in the target, from its start value to 1.
        momentum: Moving average of the loss's relative decrease.
        loss: Loss of the last step that had one, or None before the first.
    """

    share: float
    momentum: float = 0.0
    loss: float | None = None

    def after(self, loss: float | None, start: float, progress: float) -> Interpolation:
        """Return the state after a step. The share is at least on a line from `start` to 1, higher if the loss falls.

        Args:
            loss: The step's loss before its weight. None if no token had teacher outputs, so the decrease is unknown.
            start: The share at the beginning of training.
            progress: Tokens trained on as a share of the horizon, 0 to 1.
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


# The cache stores an exact logsumexp of the teacher's whole row at each of these temperatures. No other one is exact.
GRID: tuple[float, ...] = (0.5, 0.7, 1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)


def snap(temperature: float) -> float:
    """Return the grid's nearest temperature by ratio, or the lower of two equally near ones."""
    return min(GRID, key=lambda value: (round(abs(math.log(value / temperature)), 12), value))


def progress(tokens: float, horizon: int) -> float:
    """Return `tokens` as a share of the horizon, at most 1."""
    return min(max(tokens / horizon, 0.0), 1.0)


def along(start: float, end: float | None, x: float) -> float:
    """Return the value at `x`, 0 to 1, on a line from `start` to `end`, or `start` if there is no end."""
    return start if end is None else start + (end - start) * x


def temperature_at(schedule: Temperature, tokens: float, horizon: int) -> float:
    """Return the temperature after `tokens` of training, before snapping.

    Args:
        schedule: Shape and end points.
        tokens: Tokens trained on so far. For a step, this is the middle of its own tokens.
        horizon: Tokens at which the schedule reaches its end. The temperature stays constant afterwards.
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
