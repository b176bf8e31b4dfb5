"""Knowledge about recipes from students that were trained: normal distributions in a YAML file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autodistill.errors import InputError
from autodistill.strategy.recipe import Alignment
from autodistill.utils.plain_dataclass import PlainDataclass
from autodistill.utils.typed_data import check_typed
from autodistill.utils.yaml_files import read_yaml

FILE = Path(__file__).with_name("knowledge.yaml")

RATE = "distillation.learning_rate"
LAW = ("rate", "rate.width", "rate.batch", "rate.steps", "rate.cut")
"""Names of the beliefs about the best rate: at the base, and its changes with width, batch, steps and cuts."""

BASE_WIDTH, BASE_BATCH, BASE_STEPS = 576, 256, 24

UNITS = {
    RATE: 0.5,
    "distillation.divergence_weight": 0.25,
    "distillation.temperature.start": 0.3,
    "distillation.temperature.end": 0.3,
    "distillation.alignment.weight": 0.5,
}
"""Numbers that have beliefs, each with its unit: the step away from the best value whose cost has a belief. Units are
steps of the decimal logarithm, except for the divergence's weight. Temperatures are those of a schedule; a constant one
is taken to be 1."""

CHOICES = {
    "distillation.temperature.shape": ("constant", "linear", "cosine", "exponential"),
    "distillation.alignment": ("none", "last", "even-2", "even-4", "even-8"),
    "distillation.alignment.projection": ("none", "linear"),
    "distillation.on_policy": ("none", "half"),
}
"""Choices that have beliefs. The others are compared with the first one."""


@dataclass(frozen=True, kw_only=True)
class Belief(PlainDataclass):
    """A normal distribution of a figure.

    Attributes:
        mean, sd: Its mean and standard deviation.
    """

    mean: float
    sd: float


def covariates(*, width: int, batch: int, steps: int, cut: bool) -> dict[str, float]:
    """Return the factors of `LAW`, whose weighted sum is the decimal logarithm of a student's best rate.

    Args:
        width, batch, steps: The student's width, the tokens of an optimiser step, and the number of steps.
        cut: Whether the student is smaller than the teacher.
    """
    sizes = ((width, BASE_WIDTH), (batch, BASE_BATCH), (steps, BASE_STEPS))
    return dict(zip(LAW, (1.0, *(math.log10(size / base) for size, base in sizes), float(cut)), strict=True))


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """Beliefs about the best recipe for a student, and about the cost of other recipes.

    Attributes:
        beliefs: Beliefs by name. The names of `LAW` give the decimal logarithm of the best learning rate. Any other
            path of `UNITS` is the best value, or its decimal logarithm. "cost PATH" is the natural logarithm of the
            nats lost at one unit from the best value. "cut PATH=NAME" and "whole PATH=NAME" are the nats that a choice
            loses compared with the first one, for a smaller student and for a whole one. "family NAME" is what a family
            adds to the logarithm of the rate.
        unseen: The same for a family without a belief.
        between: By path, the standard deviation of the best value between teachers, in the unit of the belief.
        made: A description of the data that the knowledge was made from.
    """

    beliefs: Mapping[str, Belief]
    unseen: Belief
    between: Mapping[str, float]
    made: Mapping[str, Any] = field(default_factory=dict)

    def family(self, architecture: str) -> Belief:
        """Return the belief about a family's rates."""
        return self.beliefs.get(f"family {architecture}", self.unseen)

    def to_json(self) -> dict[str, Any]:
        """Return the knowledge as plain data."""
        return {
            "made": dict(self.made),
            "unseen": self.unseen.to_json(),
            "between": dict(self.between),
            "beliefs": {name: belief.to_json() for name, belief in self.beliefs.items()},
        }

    @classmethod
    def from_json(cls, data: Any, where: str = "knowledge") -> Knowledge:
        """Read what `to_json` wrote.

        Raises:
            InputError: The data was not written by it.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("beliefs"), Mapping):
            raise InputError(f"{where} has no beliefs")
        beliefs = {str(name): Belief.from_json(one, f"{where}: {name}") for name, one in data["beliefs"].items()}
        between: Any = data.get("between")
        check_typed(between, dict[str, float], f"{where}: between")
        missing = [name for name in names() if name not in beliefs] + [path for path in UNITS if path not in between]
        if missing:
            raise InputError(f"{where} lacks {', '.join(missing)}")
        return cls(
            beliefs=beliefs,
            unseen=Belief.from_json(data.get("unseen"), f"{where}: unseen"),
            between=between,
            made=dict(data.get("made") or {}),
        )


def names() -> tuple[str, ...]:
    """Return the names of all beliefs except those of families."""
    numbers = [path for path in UNITS if path != RATE]
    choices = [
        f"{kind} {path}={name}" for path, known in CHOICES.items() for name in known[1:] for kind in ("cut", "whole")
    ]
    return (*LAW, *numbers, *(f"cost {path}" for path in UNITS), *choices)


def load() -> Knowledge:
    """Return the knowledge that ships."""
    return Knowledge.from_json(read_yaml(FILE), FILE.name)


def alignment_of(name: str, projection: str, weight: float) -> Alignment | None:
    """Return the alignment that a name of `CHOICES` stands for."""
    if name == "none":
        return None
    layers, _, count = name.partition("-")
    return Alignment(layers=layers, count=int(count or 1), projection=projection, weight=weight)
