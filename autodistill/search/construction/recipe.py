"""The recipe that a search begins with, before it has learnt anything of its teacher."""

from __future__ import annotations

from autodistill.hardware.machine import memory_bytes
from autodistill.models.spec import ModelSpec
from autodistill.strategy.strategy import Distillation

_RATE, _WIDTH = 1e-4, 576  # what was best of a llama of this width on its own grid; rates go with 1 / width
_WEIGHT = 0.25  # of the divergence: most of the loss is on the true tokens
_BESIDE = 0.1  # of the machine's memory, that a teacher beside each student may take


def first_recipe(spec: ModelSpec) -> Distillation:
    """The recipe for students of a teacher.

    Where memory holds the teacher beside each student with ease, it runs there: that gives the whole divergence, and no
    trial waits for outputs that it does not read. Else they are cached.

    Args:
        spec: The teacher's shape.
    """
    beside = 4 * spec.parameters <= _BESIDE * memory_bytes()
    signal, tokens = ("online", 0) if beside else ("top-k", 64)
    rate = float(f"{_RATE * _WIDTH / spec.width:.1g}")
    return Distillation(learning_rate=rate, divergence_weight=_WEIGHT, signal=signal, signal_tokens=tokens)
