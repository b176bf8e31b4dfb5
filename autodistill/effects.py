"""What was written into a strategy and can have no effect beside the rest of it."""

from __future__ import annotations

from autodistill.errors import InputError
from autodistill.strategy import Alignment, Distillation, Init, Strategy

_OF_THE_DIVERGENCE = ("divergence", "mixture", "temperature", "standardise", "signal", "signal_tokens")


def check_effect(strategy: Strategy) -> None:
    """Refuses a strategy of a person's that says what would be ignored; a space may propose one at a dimension's end.

    Args:
        strategy: What is not written in it has its default, and is not refused.

    Raises:
        InputError: Names the fields, and what they would need.
    """
    init, recipe, plain = strategy.init, strategy.distillation, Distillation()
    if init.depth == 1 and init.layers != Init().layers:
        raise InputError(
            f"init.layers {init.layers} chooses among the layers, and with init.depth 1 all are kept: leave "
            "init.layers out, or lower init.depth"
        )
    idle = [f"distillation.{name}" for name in _OF_THE_DIVERGENCE if getattr(recipe, name) != getattr(plain, name)]
    if idle and not recipe.weighs_teacher:
        raise InputError(
            f"{', '.join(idle)} say how the teacher's outputs are followed, and with distillation.divergence_weight 0 "
            "they are not: leave them out, or give divergence_weight or final_divergence_weight a value above 0"
        )
    alignment = recipe.alignment
    if alignment and alignment.projection == "none" and alignment.projection_rate != Alignment().projection_rate:
        raise InputError(
            "distillation.alignment.projection_rate is of a projection's weights, and projection none has none: leave "
            "it out, or choose a projection"
        )
