"""The recipe that a search begins with, before it has learnt anything of its teacher."""

from __future__ import annotations

from autodistill.models.spec import ModelSpec
from autodistill.strategy.strategy import Distillation

_RATE, _WIDTH = 1e-4, 576  # what was best of a llama of this width on its own grid; rates go with 1 / width
_WEIGHT = 0.25  # of the divergence: most of the loss is on the true tokens


def first_recipe(spec: ModelSpec) -> Distillation:
    """The recipe for students of a teacher.

    Args:
        spec: The teacher's shape.
    """
    return Distillation(learning_rate=float(f"{_RATE * _WIDTH / spec.width:.1g}"), divergence_weight=_WEIGHT)
