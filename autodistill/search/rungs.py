"""Where the trials of a plan are judged, and how many of them go on."""

from __future__ import annotations

from collections.abc import Sequence

REDUCTION = 3
"""Each rung has so many times the tokens of the one below."""
DECAY = 0.2
"""Share of a rung's tokens over which the learning rate falls before it is judged."""
_FINALISTS = 2
# A rung of fewer optimiser steps takes longer beside its training than in it, and its order says little.
_LEAST_STEPS = 3
CONFIRMED = 3  # students that are trained on further seeds, where that is asked for


def rung_tokens(tokens: int, batch: int) -> tuple[int, ...]:
    """Geometric rungs in whole steps: a ninth of the tokens, if that is three steps, a third and all of them."""
    ninth, third = (max(2, round(tokens / batch / REDUCTION**level)) * batch for level in (2, 1))
    inner = {third} | ({ninth} if ninth >= _LEAST_STEPS * batch else set())
    return (*sorted(rung for rung in inner if rung < tokens), tokens)


def kept_at_rungs(trials: int, rungs: int) -> tuple[int, ...]:
    """How many trials go past each rung: half of them past each of two, a third past a single one; two at least."""
    keep = []
    left = trials
    for _ in range(rungs - 1):
        left = -(-left // (REDUCTION if rungs == 2 else 2))
        keep.append(min(trials, max(left, _FINALISTS)))
    return tuple(keep)


def confirmed(trials: int, keep: Sequence[int], baselines: int) -> int:
    """How many strategies are trained on each further seed: the best few and the best baseline."""
    return min(CONFIRMED, keep[-1] if keep else trials) + min(1, baselines)
