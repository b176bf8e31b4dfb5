"""The learning rate as a function of absolute tokens: warm-up, stable phase, and a decay that branches off."""

from __future__ import annotations

from dataclasses import dataclass


def stable_rate(peak: float, tokens: int, warmup: int) -> float:
    """Return the rate of the warm-up and the stable phase, for the step that ends after `tokens` (above 0)."""
    return peak * min(1.0, tokens / max(warmup, 1))


@dataclass
class Decay:
    """A decay: the rate falls linearly to 0 at its end. While it runs, the end can be moved to an earlier token.

    Attributes:
        start, end: Tokens at its start and its end.
        height: Share of the stable rate at the start.
    """

    start: int
    end: int
    height: float = 1.0

    def factor(self, tokens: int) -> float:
        """Return the share of the stable rate for the step that begins after `tokens`."""
        return self.height * (self.end - tokens) / (self.end - self.start)

    def shorten(self, tokens: int, end: int) -> None:
        """Move the end to `end`: from `tokens` on, the rate falls on a steeper line, from the value it has there."""
        self.start, self.end, self.height = tokens, end, self.factor(tokens)


def branch_point(target: int, decay: float, batch_tokens: int) -> int:
    """Return the tokens, in whole steps, at which the decay to `target` begins. At least one step decays."""
    steps = target // batch_tokens
    return (steps - max(1, round(steps * decay))) * batch_tokens


def end_of(branch: int, decay: float, batch_tokens: int) -> int:
    """Return the fewest tokens, in whole steps, of a training whose decay begins after `branch` tokens."""
    steps = branch // batch_tokens
    # Start just below the answer: rounding moves it by at most one step.
    target = max(steps + 1, int(steps / (1 - decay)) - 2) * batch_tokens
    while branch_point(target, decay, batch_tokens) < branch:
        target += batch_tokens
    return target
