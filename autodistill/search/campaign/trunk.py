"""The trunk of a search: the best trained on at a constant rate, with decays that branch off, each a whole student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autodistill.distillation.training.learning_rate import end_of
from autodistill.search.planning.plan import BRANCHES
from autodistill.utils.plain_dataclass import ToJson

BRANCH_DECAY = 0.08
"""Share of a student's tokens over which its rate falls where it branches off short of the trunk's end."""

_COST = 0.07
"""Share of the trunk's time that decays short of its end, and what follows them, may take together."""

_SHORT = 600.0
"""Seconds of a trunk below which no early student is worth its time: the trials before it have left theirs."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A decay short of the trunk's end.

    Attributes:
        share: Of the trunk's tokens, after which it branches off.
        tokens: Of the student at its end.
        cost: What it takes, training and evaluation, as a share of the trunk's time.
        kept: Whether it is trained, since the trunk can spare that.
    """

    share: float
    tokens: int
    cost: float
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Trunk(ToJson):
    """One stable training, as it was decided before it began; its end follows the time that is left.

    Attributes:
        trial: That it goes on from.
        tokens: Expected at its end.
        branches: In the order of their tokens, those that are not trained among them.
    """

    trial: str
    tokens: int
    branches: tuple[Branch, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the students that branch off short of the end."""
        return tuple(branch.tokens for branch in self.branches if branch.kept)

    def describe(self) -> str:
        """The decision in a line for a person."""

        def told(kept: bool) -> str:
            some = [one for one in self.branches if one.kept is kept]
            return " and ".join(f"{one.share:.0%} ({one.tokens:,} tokens, {one.cost:.1%} of the time)" for one in some)

        kept, left_out = told(True), told(False)
        said = f"{self.trial} is trained on to about {self.tokens:,} tokens"
        said += f", and students are kept at {kept}" if kept else ""
        return said + (f"; not at {left_out}: too much of its time" if left_out else "")

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trunk:
        """Read what `to_json` wrote."""
        branches = tuple(Branch(**one) for one in data["branches"])
        return cls(trial=data["trial"], tokens=data["tokens"], branches=branches)


def plan_trunk(
    trial: str,
    *,
    start: int,
    end: int,
    least: float,
    batch_tokens: int,
    seconds: Callable[[int], float],
) -> Trunk:
    """Decide which decays a trunk can spare: the later one first, whose student is the better.

    Args:
        trial: That it goes on from.
        start: Tokens of the checkpoint that it goes on from.
        end: Tokens that are expected at its end.
        least: Tokens below which a student is not worth a decay of its own.
        batch_tokens: Of a step.
        seconds: Expected time of so many tokens, and of the evaluation after them.
    """
    whole, spent, found = seconds(end - start), 0.0, list[Branch]()
    most = _COST if whole >= _SHORT else 0.0
    for share in sorted(BRANCHES, reverse=True):
        at = round(share * end / batch_tokens) * batch_tokens
        if at <= start:
            continue
        tokens = end_of(at, BRANCH_DECAY, batch_tokens)
        cost = seconds(tokens - at) / whole
        if tokens < least or tokens >= end:
            continue
        kept = spent + cost <= most
        spent += cost if kept else 0.0
        found.append(Branch(share=share, tokens=tokens, cost=cost, kept=kept))
    return Trunk(trial=trial, tokens=end, branches=tuple(reversed(found)))
