"""The work and the memory that solving a teacher's storage takes, counted from its sizes; loads nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role

CUT_TOKENS, MOMENT_TOKENS = 512, 4096
"""Of text, on which single cuts are scored, and to which FFNs that are cut are fitted."""

CUT_SCORES = "scores of cuts, where types are not enough"
"""The step that is taken only where the whole teacher does not fit, or loses much."""

_PASS_TOKENS = 1024  # that are read forward and backward at once
_WHOLE, _HELD_OUT = 13, 6  # storages that are measured whole on calibration and on held-out text, at the most
_CUTS = 2  # widths of each FFN
_FLOAT = 4


@dataclass(frozen=True, kw_only=True)
class SolvingWork:
    """What solving takes, by step.

    Attributes:
        operations: Of products in float32, by step; a multiply-add counts as two.
        rounded: Weights that are rounded to each type, by name.
        memory_bytes: Of the process, beside its libraries.
    """

    operations: Mapping[str, float]
    rounded: Mapping[str, int]
    memory_bytes: int

    def seconds(self, rate: float, rounding: Mapping[str, float]) -> float:
        """Predict the time.

        Args:
            rate: Operations a second.
            rounding: Seconds that a weight takes to be rounded to each type.
        """
        return sum(self.operations.values()) / rate + sum(
            count * rounding[kind] for kind, count in self.rounded.items()
        )


def solving_work(spec: ModelSpec, kinds: Mapping[str, tuple[str, ...]], caches: int, tokens: int) -> SolvingWork:
    """Count what one budget takes where nothing is known yet.

    Args:
        spec: Shape of the teacher.
        kinds: The types of each matrix and table that are scored, by name.
        caches: Types of keys and of values that are scored.
        tokens: Of the calibration text; the held-out text has twice as many.
    """
    sizes = {one.name: math.prod(one.shape) for one in spec.tensors if one.name in kinds}
    tables = [one.name for one in spec.tensors if one.role in (Role.EMBEDDING, Role.HEAD) and one.name in kinds]
    active = spec.active_experts / spec.experts if spec.experts else 1.0
    linear = sum(size * (active if ".experts." in name else 1.0) for name, size in sizes.items() if name not in tables)
    head = spec.vocabulary * spec.width
    forward = 2.0 * (linear + head)
    types = sum(2.0 * sizes[name] * len(found) for name, found in kinds.items() if name not in tables)
    exact = sum(len(kinds[name]) for name in tables) + caches
    operations = {
        "the teacher itself": 3 * tokens * forward,
        "scores of types, by gradients": tokens * (2 * forward + types * (active if spec.experts else 1.0)),
        "scores of tables and cache": exact * tokens * forward,
        "whole storages": (_WHOLE + 2 * _HELD_OUT) * tokens * forward,
        CUT_SCORES: spec.layers * _CUTS * CUT_TOKENS * (linear + 2.0 * head)
        + MOMENT_TOKENS * 2.0 * (linear + spec.layers * spec.ffn_width**2),
    }
    rounded: dict[str, int] = {}
    for name, found in kinds.items():
        for kind in found:
            rounded[kind] = rounded.get(kind, 0) + sizes[name]
    seen = sum(one.shape[0] + one.shape[1] for one in spec.tensors if one.name in kinds and one.name not in tables)
    # Weights, a copy of what is rounded, and of a pass what goes into each matrix and the gradients of what comes out.
    memory = _FLOAT * (2 * spec.parameters + int(seen * active) * _PASS_TOKENS + spec.vocabulary * _PASS_TOKENS // 4)
    return SolvingWork(operations=operations, rounded=rounded, memory_bytes=memory)
