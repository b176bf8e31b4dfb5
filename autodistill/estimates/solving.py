"""The work and the memory of solving a teacher's storage, counted from its sizes. Loads nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from autodistill.models.families import FAMILIES
from autodistill.models.spec import ModelSpec
from autodistill.models.tensors import Role

CUT_TOKENS, MOMENT_TOKENS = 512, 4096
"""Tokens of text on which single cuts are scored, and tokens to which cut FFNs and attention are fitted."""

COMPENSATION = 4
"""How many times the calibration text is needed for the inputs with which a solution's errors are compensated."""

CUT_SCORES = "scores of cuts, where types are not enough"
"""The step that is taken only if the whole teacher does not fit, or loses much."""

PASS_TOKENS, BLOCK_TOKENS = 1024, 4096
"""Tokens that are read forward and backward at once, and tokens if one block after another is scored. Each type of a
matrix is rounded once for all of them."""

_WHOLE, _HELD_OUT = 13, 6  # most storages that are measured whole, on calibration text and on held-out text
_CUTS, _MEASURED = 2, 0.1  # widths tried for each FFN, and the share of them that costs so much that it is measured too
_GROUPS = 3  # most numbers of groups of heads that are scored
_SHAPES, _READ = 12, 2  # most shapes that are measured whole, and readings by each: for its importance and its KL
_WHOLE_COARSE, _SHAPES_COARSE = 7, 8  # the same where the request is not thorough
_TEXTS = 3  # readings by the teacher itself: of both texts, and of one for the importance of columns
_TEXTS_OF_SEARCH = 2  # the same in a search: of the calibration text, and of a short one that repeats itself
_FLOAT = 4
_SCALES = 0.2  # bytes a weight and type: each group's scale and possibly its offset, kept for later requests
_REFERENCE_TOKENS = 256  # likeliest tokens whose log-probabilities are kept for each token of a text
_ROUNDED = 2  # copies of a matrix that are made to score a type: the rounded matrix and the difference

LOGITS = 2**22
"""Logits whose gradients are computed at once: a few rows if the vocabulary is large."""
_PER_LOGIT = 7  # numbers of 4 bytes that are held for each logit


@dataclass(frozen=True, kw_only=True)
class SolvingWork:
    """The work and the memory of solving, by step.

    Attributes:
        operations: Operations of products in float32, by step; a multiply-add counts as two.
        rounded: Number of weights that are rounded to each type, by the type's name.
        memory_bytes: Memory of the process, without its libraries.
        readings: How often all weights are read from the teacher's files.
        weights: Weights of the teacher.
        matrix: Mean number of weights of a matrix of a layer.
        tokens_run: Tokens that are run through a layer, over all layers and passes.
    """

    operations: Mapping[str, float]
    rounded: Mapping[str, int]
    memory_bytes: int
    readings: int
    weights: int
    matrix: int
    tokens_run: float

    def seconds(self, rate: float, rounding: Mapping[str, float]) -> float:
        """Predict the time.

        Args:
            rate: Operations a second.
            rounding: Seconds to round one weight to each type.
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
    thorough: bool = True,
    held_out: bool = True,
    threads: int = 1,
    together: bool = False,
) -> SolvingWork:
    """Count the work for one budget if nothing is known yet.

    Args:
        spec: Shape of the teacher.
        kinds: The types that are scored for each matrix and table, by its name.
        caches: Number of types that are scored for keys and for values.
        tokens: Tokens of the calibration text; the held-out text has twice as many.
        streamed: Whether only one block of the teacher is in memory at a time.
        thorough: Whether types are exchanged, more shapes measured, and errors compensated.
        held_out: Whether the importance of columns is measured and storages are measured on held-out text too, as
            solve does. A search does neither.
        threads: Number of threads; each reads a sequence of its own.
        together: Whether a storage is measured on both texts while its blocks are in memory, as on a GPU.
    """
    sizes = {one.name: math.prod(one.shape) for one in spec.tensors if one.name in kinds}
    tables = [one.name for one in spec.tensors if one.role in (Role.EMBEDDING, Role.HEAD) and one.name in kinds]
    active = spec.active_experts / spec.experts if spec.experts else 1.0
    linear = sum(size * (active if ".experts." in name else 1.0) for name, size in sizes.items() if name not in tables)
    head = spec.vocabulary * spec.width
    forward = 2.0 * (linear + head)
    types = sum(2.0 * sizes[name] * len(found) for name, found in kinds.items() if name not in tables)
    exact = sum(len(kinds[name]) for name in tables) + caches
    measured_again = _HELD_OUT if held_out else 0
    storages = (_WHOLE if thorough else _WHOLE_COARSE) + (0 if together else measured_again)
    operations = {
        "the teacher itself": (4 if held_out else 1) * tokens * forward,
        "scores of types, by gradients": tokens
        * (
            2 * forward
            + (2.0 * linear if spec.architecture in FAMILIES else 0.0)
            + types * (active if spec.experts else 1.0)
        ),
        "scores of tables and cache": exact * tokens * forward,
        "whole storages": ((_WHOLE if thorough else _WHOLE_COARSE) + 2 * measured_again) * tokens * forward,
        "the solution's errors made up for": 0.0
        if streamed or not thorough or spec.architecture not in FAMILIES
        else COMPENSATION * tokens * (4.0 * linear + _moments(spec))
        + sum(_compensation(one.shape) for one in spec.tensors if one.role is Role.LINEAR),
        CUT_SCORES: CUT_TOKENS * (2 * forward + 2.0 * spec.layers * _CUTS * spec.width * spec.ffn_width)
        + _MEASURED * spec.layers * _CUTS * CUT_TOKENS * (linear + 2.0 * head)
        + min(_GROUPS, spec.kv_heads - 1) * CUT_TOKENS * forward
        + MOMENT_TOKENS * 2.0 * (linear + spec.layers * (spec.ffn_width**2 + (spec.heads * spec.head_dim) ** 2))
        + (_SHAPES if thorough else _SHAPES_COARSE) * _READ * tokens * forward,
    }
    rounded: dict[str, int] = {}
    for name, found in kinds.items():
        for kind in found:
            # A layer that is freed is rounded again in each whole storage. Of its types, each is as likely.
            again = storages * sizes[name] // len(found) if streamed and name not in tables else 0
            rounded[kind] = rounded.get(kind, 0) + sizes[name] + again
    memory = _memory_of(spec, kinds, active, tokens, streamed=streamed, threads=threads)
    passes = -(-tokens // BLOCK_TOKENS)
    return SolvingWork(
        operations=operations,
        rounded=rounded,
        memory_bytes=memory,
        readings=(_TEXTS if held_out else _TEXTS_OF_SEARCH) + 2 * passes + exact + storages if streamed else 1,
        weights=spec.parameters,
        matrix=sum(sizes[name] for name in sizes if name not in tables) // max(1, len(sizes) - len(tables)),
        tokens_run=spec.layers * sum(operations.values()) / forward,
    )


def _moments(spec: ModelSpec) -> float:
    """Return a token's operations for the second moments of all matrices' inputs. A shared input counts once."""
    inputs = {
        (one.name.rsplit(".", 2)[0], one.shape[1]): one.shape[1] for one in spec.tensors if one.role is Role.LINEAR
    }
    return sum(2.0 * columns**2 for columns in inputs.values())


def _compensation(shape: tuple[int, ...]) -> float:
    """Return the operations to spread each column's error over the later ones, and to factor the matrix's moments."""
    rows, columns = shape
    return float(rows * columns**2 + 2 * columns**3)


def _memory_of(
    spec: ModelSpec, kinds: Mapping[str, tuple[str, ...]], active: float, tokens: int, *, streamed: bool, threads: int
) -> int:
    """Return the most bytes that are held at once, without the process's libraries.

    Args:
        spec, kinds, tokens, streamed, threads: As for `solving_work`.
        active: Share of the experts that a token takes.
    """
    linear = [one for one in spec.tensors if one.name in kinds and one.role is Role.LINEAR]
    by_block = spec.architecture in FAMILIES
    at_once = min(tokens, BLOCK_TOKENS if by_block else PASS_TOKENS)
    # A pass holds the inputs of each matrix and the gradients of its outputs. If blocks are scored one after another,
    # it holds those of one block only, and the states before each block.
    seen = int(sum(sum(one.shape) for one in linear) * active) * at_once
    states = 0
    if by_block:
        seen, states = seen // spec.layers, spec.width * spec.layers * at_once
    # The teacher's likeliest tokens for each token of both texts, and on each thread the arrays made from logits.
    others = 3 * tokens * 2 * _REFERENCE_TOKENS + threads * _PER_LOGIT * min(LOGITS, tokens * spec.vocabulary)
    if not streamed:
        scales = int(sum(math.prod(one.shape) * len(kinds[one.name]) for one in linear) * _SCALES)
        return _FLOAT * (2 * spec.parameters + seen + states + others) + scales
    tables = sum(math.prod(one.shape) for one in spec.tensors if one.role in (Role.EMBEDDING, Role.HEAD))
    block = sum(math.prod(one.shape) for one in linear) // spec.layers
    largest = max(math.prod(one.shape) for one in linear)
    # The states before and after a block for both texts may take more than those of a pass.
    states = max(states, spec.width * 2 * 3 * tokens)
    blocks = 2 * block + threads * _ROUNDED * largest
    return _FLOAT * (2 * tables + blocks + seen + states + others)
