"""A few strategies that stand for a whole space in what a search needs for it: teacher outputs, or memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from autodistill.strategy.dimension import Dimension
from autodistill.strategy.domains import Value
from autodistill.strategy.recipe import Alignment, Attention, Distillation
from autodistill.strategy.space import Space
from autodistill.strategy.strategy import Init, Strategy

# Dimensions that decide which layers a student has or corresponds to.
_LAYERS = ("init", "init.depth", "init.layers", "init.dropped", "init.source", "init.model")
# Dimensions that decide which teacher outputs a strategy reads.
_SIGNAL = (
    "distillation",
    "distillation.signal",
    "distillation.signal_tokens",
    "distillation.divergence_weight",
    "distillation.final_divergence_weight",
    "distillation.temperature",
    "distillation.temperature.shape",
    "distillation.temperature.start",
    "distillation.temperature.end",
    "distillation.on_policy",
)


def cases(space: Space, paths: Collection[str], teacher_layers: int) -> Iterator[Strategy]:
    """Return strategies with all values of `paths`, and the baselines; a continuous range is taken layer by layer."""
    return space.varied(paths, lambda dimension: dimension.domain.grid or _depths(dimension, teacher_layers))


def _depths(dimension: Dimension, teacher_layers: int) -> tuple[Value, ...]:
    """Return one depth of a continuous range for each number of layers that it can leave."""
    low, high = (float(value) for value in dimension.domain.corners)
    inner = (min(max((count + 0.5) / teacher_layers, low), high) for count in range(teacher_layers + 1))
    return tuple(sorted({low, high, *inner}))


def alignment_cases(space: Space, teacher_layers: int) -> tuple[tuple[Init, Alignment], ...]:
    """Return every way to keep layers and choose aligned ones in a space and its baselines, if it reads the cache.

    The teacher's hidden states that a search may keep follow from these. Other fields of both parts are examples.
    """
    aligned = ("distillation.signal", *(f"distillation.alignment{name}" for name in ("", ".layers", ".count")))
    found: dict[tuple[str, str, float, str, tuple[int, ...], str, int], tuple[Init, Alignment]] = {}
    for strategy in cases(space, {*_LAYERS, *aligned, "distillation"}, teacher_layers):
        init, alignment = strategy.init, strategy.distillation.alignment
        if alignment is not None and strategy.distillation.signal != "online":
            kept = (init.source, init.model, init.depth, init.layers, init.dropped)
            key = (*kept, alignment.layers, alignment.count)
            found.setdefault(key, (init, alignment))
    return tuple(found[key] for key in sorted(found))


def attention_cases(space: Space, teacher_layers: int) -> tuple[Attention, ...]:
    """Return every choice of the teacher layer whose attention is read from the cache; other fields are examples."""
    parts = ("attention", "attention.teacher_depth", "signal")
    paths = {"distillation", *(f"distillation.{part}" for part in parts)}
    recipes = (strategy.distillation for strategy in cases(space, paths, teacher_layers))
    followed = (recipe.attention for recipe in recipes if recipe.signal != "online")
    found = {attention.teacher_depth: attention for attention in followed if attention is not None}
    return tuple(found[depth] for depth in sorted(found))


def signal_cases(space: Space) -> tuple[Distillation, ...]:
    """Return every source of teacher outputs in a space and its baselines, at the extreme temperatures.

    The teacher outputs that a search may need follow from these. Other fields are examples.
    """
    return tuple(dict.fromkeys(strategy.distillation for strategy in space.varied(_SIGNAL)))
