"""What trained students taught about recipes: normal beliefs in a YAML file."""

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
"""Beliefs of the best rate: at the base, and what widths, batches, steps and cuts change of it."""

BASE_WIDTH, BASE_BATCH, BASE_STEPS = 576, 256, 24

UNITS = {
    RATE: 0.5,
    "distillation.divergence_weight": 0.25,
    "distillation.temperature.start": 0.3,
    "distillation.temperature.end": 0.3,
    "distillation.alignment.weight": 0.5,
}
"""Numbers that are believed in, and a step of each of which the cost is believed: of the decimal logarithm, but for the
divergence's weight. Temperatures are those of a schedule; a constant one is believed to be 1."""

CHOICES = {
    "distillation.temperature.shape": ("constant", "linear", "cosine", "exponential"),
    "distillation.alignment": ("none", "last", "even-2", "even-4", "even-8"),
    "distillation.alignment.projection": ("none", "linear"),
    "distillation.on_policy": ("none", "half"),
}
"""Choices that are believed in; the first is what the others are compared with."""


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
        width, batch, steps: The student's width, tokens of an optimizer step, and steps.
        cut: Whether the student is smaller than the teacher.
    """
    sizes = ((width, BASE_WIDTH), (batch, BASE_BATCH), (steps, BASE_STEPS))
    return dict(zip(LAW, (1.0, *(math.log10(size / base) for size, base in sizes), float(cut)), strict=True))


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """Beliefs about the recipe that is best for a student, and about what another one costs.

    Attributes:
        beliefs: By name. `LAW` makes the decimal logarithm of the best learning rate; a path of `UNITS` but for the
            rate is the best value, or its decimal logarithm; "cost PATH" is the natural logarithm of the nats lost at
            one unit from it; "cut PATH=NAME" and "whole PATH=NAME" are nats lost by a choice over the first one, of a
            smaller student and of a whole one; "family NAME" is what a family adds to the logarithm of the rate.
        unseen: The same of a family that is not among them.
        between: By path, the standard deviation of the best value from teacher to teacher, in the unit of the belief.
        made: From what, in words.
    """

    beliefs: Mapping[str, Belief]
    unseen: Belief
    between: Mapping[str, float]
    made: Mapping[str, Any] = field(default_factory=dict)

    def family(self, architecture: str) -> Belief:
        """Return what is believed of a family's rates."""
        return self.beliefs.get(f"family {architecture}", self.unseen)

    def to_json(self) -> dict[str, Any]:
        """The knowledge as plain data."""
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
            InputError: Not that.
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
    """Return the names of all beliefs, but for those of families."""
    numbers = [path for path in UNITS if path != RATE]
    choices = [
        f"{kind} {path}={name}" for path, known in CHOICES.items() for name in known[1:] for kind in ("cut", "whole")
    ]
    return (*LAW, *numbers, *(f"cost {path}" for path in UNITS), *choices)


def load() -> Knowledge:
    """Return the knowledge that ships."""
    return Knowledge.from_json(read_yaml(FILE), FILE.name)


def alignment_of(name: str, projection: str, weight: float) -> Alignment | None:
    """Return the alignment of a name of `CHOICES`."""
    if name == "none":
        return None
    layers, _, count = name.partition("-")
    return Alignment(layers=layers, count=int(count or 1), projection=projection, weight=weight)
