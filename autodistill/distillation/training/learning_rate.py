"""The learning rate as a function of absolute tokens: warm-up, stable phase, and a decay that branches off."""

from __future__ import annotations


def stable_rate(peak: float, tokens: int, warmup: int) -> float:
    """Return the learning rate in warm-up and stable phase for the step that ends after `tokens` (above 0)."""
    return peak * min(1.0, tokens / max(warmup, 1))


def decayed(tokens: int, start: int, end: int) -> float:
    """Return the decay factor for the step that begins after `tokens`: linear from 1 at `start` to 0."""
    return (end - tokens) / (end - start)


def branch_point(target: int, decay: float, batch_tokens: int) -> int:
    """Return the tokens, in whole steps, at which the decay of a run to `target` begins; at least one step decays."""
    steps = target // batch_tokens
    return (steps - max(1, round(steps * decay))) * batch_tokens


def end_of(branch: int, decay: float, batch_tokens: int) -> int:
    """Return the fewest tokens, in whole steps, of a run whose decay begins after `branch` tokens."""
    steps = branch // batch_tokens
    # From just below the answer: rounding moves it by a step at most.
    target = max(steps + 1, int(steps / (1 - decay)) - 2) * batch_tokens
    while branch_point(target, decay, batch_tokens) < branch:
        target += batch_tokens
    return target
