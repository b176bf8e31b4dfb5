"""The temperature of the divergence as a function of tokens, snapped to the grid that the teacher cache stores."""

from __future__ import annotations

import math

from autodistill.strategy import Temperature

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
