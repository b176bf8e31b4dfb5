"""The trunk of a search: the best student's further training at a constant rate, with decays that branch off.

Each decay gives a complete student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from autodistill.distillation.training.learning_rate import end_of
from autodistill.search.planning.plan import BRANCHES
from autodistill.utils.plain_dataclass import ToJson

BRANCH_DECAY = 0.08
"""Share of a student's tokens over which its rate falls, if it branches off before the trunk's end."""

_COST = 0.07
"""Largest share of the trunk's time that all decays before its end may take, with the evaluations after them."""

_SHORT = 600.0
"""Length in seconds below which a trunk makes no early students: the trials before it have already left students."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A decay before the trunk's end.

    Attributes:
        share: Share of the trunk's tokens after which it branches off.
        tokens: Tokens of the student at its end.
        cost: Time of its training and evaluation, as a share of the trunk's time.
        kept: Whether it is trained, because the trunk can spare the time.
    """

    share: float
    tokens: int
    cost: float
    kept: bool


@dataclass(frozen=True, kw_only=True)
class Trunk(ToJson):
    """One stable training, as decided before it began. It ends when the time runs out.

    Attributes:
        trial: Trial that it continues.
        tokens: Tokens expected at its end.
        branches: All decays in the order of their tokens, including those that are not trained.
    """

    trial: str
    tokens: int
    branches: tuple[Branch, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of the students that branch off before the end."""
        return tuple(branch.tokens for branch in self.branches if branch.kept)

    def describe(self) -> str:
        """Describe the decision in one line for the user."""

        def told(kept: bool) -> str:
            some = [one for one in self.branches if one.kept is kept]
            return " and ".join(f"{one.share:.0%} ({one.tokens:,} tokens, {one.cost:.1%} of the time)" for one in some)

        kept, left_out = told(True), told(False)
        said = f"{self.trial} is trained further, to about {self.tokens:,} tokens"
        said += f", and students are kept at {kept}" if kept else ""
        return said + (f"; no student is kept at {left_out}: that takes too much of its time" if left_out else "")

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
    fewest_tokens: float,
    batch_tokens: int,
    seconds: Callable[[int], float],
) -> Trunk:
    """Decide which decays a trunk can spare: later ones first, because their students are better.

    Args:
        trial: Trial that it continues.
        start: Tokens of the checkpoint that it continues from.
        end: Tokens expected at its end.
        fewest_tokens: Tokens below which a student is not worth a decay of its own.
        batch_tokens: Tokens of a step.
        seconds: Returns the expected time of so many tokens and the evaluation after them.
    """
    whole, spent, found = seconds(end - start), 0.0, list[Branch]()
    most = _COST if whole >= _SHORT else 0.0
    for share in sorted(BRANCHES, reverse=True):
        at = round(share * end / batch_tokens) * batch_tokens
        if at <= start:
            continue
        tokens = end_of(at, BRANCH_DECAY, batch_tokens)
        cost = seconds(tokens - at) / whole
        if tokens < fewest_tokens or tokens >= end:
            continue
        kept = spent + cost <= most
        spent += cost if kept else 0.0
        found.append(Branch(share=share, tokens=tokens, cost=cost, kept=kept))
    return Trunk(trial=trial, tokens=end, branches=tuple(reversed(found)))
