"""The work and the memory that solving a teacher's storage takes, counted from its sizes; loads nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autodistill.models.families import FAMILIES
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role

CUT_TOKENS, MOMENT_TOKENS = 512, 4096
"""Of text, on which single cuts are scored, and to which FFNs that are cut are fitted."""

COMPENSATION = 4
"""Times as much text as that of calibration, whose inputs say how the errors of a solution are made up for."""

CUT_SCORES = "scores of cuts, where types are not enough"
"""The step that is taken only where the whole teacher does not fit, or loses much."""

PASS_TOKENS, BLOCK_TOKENS = 1024, 4096
"""Of text, that are read forward and backward at once, and where one block after another is watched: each type of a
matrix is rounded once for all of them."""

_WHOLE, _HELD_OUT = 13, 6  # storages that are measured whole on calibration and on held-out text, at the most
_CUTS, _MEASURED = 2, 0.1  # widths of each FFN, and the share that costs so much that it is measured too
_FLOAT = 4
_SCALES = 0.2  # bytes of a weight and type: a scale and perhaps an offset of each group, kept for whoever asks again
_REFERENCE_TOKENS = 256  # whose log-probabilities are kept of each token of a text
_ROUNDED = 2  # copies of a matrix that are made to score a type: it, and its difference

LOGITS = 2**22
"""Numbers of a vocabulary's size at once, of which gradients are made; a few rows of a large vocabulary."""
_PER_LOGIT = 7  # numbers of 4 bytes that are held for each


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


def solving_work(
    spec: ModelSpec,
    kinds: Mapping[str, tuple[str, ...]],
    caches: int,
    tokens: int,
    *,
    streamed: bool = False,
    threads: int = 1,
) -> SolvingWork:
    """Count what one budget takes where nothing is known yet.

    Args:
        spec: Shape of the teacher.
        kinds: The types of each matrix and table that are scored, by name.
        caches: Types of keys and of values that are scored.
        tokens: Of the calibration text; the held-out text has twice as many.
        streamed: Whether one block of the teacher is in memory at a time, and not all of it.
        threads: That read a sequence each.
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
        "the teacher itself": 4 * tokens * forward,
        "scores of types, by gradients": tokens
        * (
            2 * forward
            + (2.0 * linear if spec.architecture in FAMILIES else 0.0)
            + types * (active if spec.experts else 1.0)
        ),
        "scores of tables and cache": exact * tokens * forward,
        "whole storages": (_WHOLE + 2 * _HELD_OUT) * tokens * forward,
        "the solution's errors made up for": 0.0
        if streamed or spec.architecture not in FAMILIES
        else COMPENSATION * tokens * (4.0 * linear + _moments(spec))
        + sum(_compensation(one.shape) for one in spec.tensors if one.role is Role.LINEAR),
        CUT_SCORES: CUT_TOKENS * (2 * forward + 2.0 * spec.layers * _CUTS * spec.width * spec.ffn_width)
        + _MEASURED * spec.layers * _CUTS * CUT_TOKENS * (linear + 2.0 * head)
        + MOMENT_TOKENS * 2.0 * (linear + spec.layers * spec.ffn_width**2),
    }
    rounded: dict[str, int] = {}
    for name, found in kinds.items():
        for kind in found:
            rounded[kind] = rounded.get(kind, 0) + sizes[name]
    memory = _memory_of(spec, kinds, active, tokens, streamed=streamed, threads=threads)
    return SolvingWork(operations=operations, rounded=rounded, memory_bytes=memory)


def _moments(spec: ModelSpec) -> float:
    """Operations of a token for the second moments of what goes into all matrices, of which some have one input."""
    inputs = {
        (one.name.rsplit(".", 2)[0], one.shape[1]): one.shape[1] for one in spec.tensors if one.role is Role.LINEAR
    }
    return sum(2.0 * columns**2 for columns in inputs.values())


def _compensation(shape: tuple[int, ...]) -> float:
    """Operations to spread the errors of a matrix: each column's over those behind it, and a factor of its moments."""
    rows, columns = shape
    return float(rows * columns**2 + 2 * columns**3)


def _memory_of(
    spec: ModelSpec, kinds: Mapping[str, tuple[str, ...]], active: float, tokens: int, *, streamed: bool, threads: int
) -> int:
    """The most bytes at once, beside the process's libraries.

    Args:
        spec, kinds, tokens, streamed, threads: As for `solving_work`.
        active: Share of the experts that a token takes.
    """
    linear = [one for one in spec.tensors if one.name in kinds and one.role is Role.LINEAR]
    by_block = spec.architecture in FAMILIES
    at_once = min(tokens, BLOCK_TOKENS if by_block else PASS_TOKENS)
    # Of a pass what goes into each matrix and the gradients of what comes out; of one block alone, beside the states
    # before each block, where these are watched one after another.
    seen = int(sum(sum(one.shape) for one in linear) * active) * at_once
    states = 0
    if by_block:
        seen, states = seen // spec.layers, spec.width * spec.layers * at_once
    # Of each token of either text the teacher's likeliest ones, and on each thread what is made of logits.
    others = 3 * tokens * 2 * _REFERENCE_TOKENS + threads * _PER_LOGIT * min(LOGITS, tokens * spec.vocabulary)
    if not streamed:
        scales = int(sum(math.prod(one.shape) * len(kinds[one.name]) for one in linear) * _SCALES)
        return _FLOAT * (2 * spec.parameters + seen + states + others) + scales
    tables = sum(math.prod(one.shape) for one in spec.tensors if one.role in (Role.EMBEDDING, Role.HEAD))
    block = sum(math.prod(one.shape) for one in linear) // spec.layers
    largest = max(math.prod(one.shape) for one in linear)
    # The states before and behind a block of the held-out text may be more than those of a pass.
    states = max(states, spec.width * 2 * 2 * tokens)
    blocks = 2 * block + threads * _ROUNDED * largest
    return _FLOAT * (2 * tables + blocks + seen + states + others)
