"""The quantisation grids: how a group of weights becomes integer codes, a scale and possibly an offset.

A grid is defined so precisely that its codes and scales equal, bit for bit, those of the format's own tools:
`gguf.quants` (and so llama.cpp) and the `compressed-tensors` package. `packing` does that arithmetic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError
from autodistill.models.tensors import TensorSpec

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A quantisation grid: each group of consecutive weights has integer codes, one scale and possibly one offset.

    The scale is m / `divisor`, stored in `scale_dtype`. m is one of these: the group's largest magnitude ("absmax"),
    the first value that has this magnitude, with its sign ("signed_absmax"), or the largest weight minus the smallest
    ("range"). A symmetric grid has no offset. Otherwise the offset is the smallest weight, stored like the scale
    ("minimum"), or the code that means 0 ("zero_point"). For a zero point, 0 counts among the group's weights.

    On a grid of super-blocks, scales and minima lie on a second grid. Each block has one unit in `scale_dtype` for its
    scales and one for its minima, and each group has small whole multiples of them. Such scales have the rule
    "least_squares": they are searched for (`k_quants`). Minima are at most 0 and are stored without the sign.

    - "gguf": a code is the rounded product of the weight (minus its minimum) and 1/scale, in float32, with scale and
      minimum *before* they are rounded to `scale_dtype`. A weight is read as code * stored scale (+ stored minimum) in
      float32.
    - "compressed-tensors": a code is the rounded quotient of the weight and the *stored* scale in float32 (+ zero
      point). A stored scale of 0 becomes bfloat16's epsilon. A weight is read as (code - zero point) * stored scale,
      rounded to bfloat16. Weights must be quantised only once: to quantise the values that were read would change them,
      because the largest weight lies half a step off the codes.

    If scales are given (`Scales`), and in super-blocks, both containers use the same rule: a code is the quotient by
    the stored scale (+ zero point), rounded with ties to even.

    On a grid with a codebook, a code stands for one of a few whole numbers with unequal steps between them. Here a
    "code" is that number itself, so that a weight is read as on any other grid. The bytes hold its place in the
    codebook. The code is the number nearest to the quotient by the stored scale. The scale is searched for as in
    super-blocks.

    Attributes:
        name: Like "gguf-q4_0" or "compressed-tensors-int4-g64".
        container: The container whose arithmetic and layout it follows.
        bits: Width of a code.
        group_size: Number of weights that share a scale; 0 if a whole row does.
        qmin, qmax: The smallest and the largest code; values beyond them are clipped.
        scale_dtype: Type of the stored scale. "e8m0" is a power of two in a byte: half the value that the byte alone
            would mean.
        scale_rule, divisor: How the scale follows from the group.
        rounding: Where a tie goes under a scale that follows from the weights: "half_up" (to the larger), "half_away"
            (from zero) or "half_even".
        offset: What is stored in addition to the scale.
        block_size: Number of weights in a super-block; 0 if each group's scale is stored by itself.
        multiplier_bits: Width of a scale, and of a minimum, in units of its super-block; on a symmetric grid it
            includes a sign.
        cuts: The tries of "least_squares". Each says by how many steps the smallest and the largest code move inwards
            from the ends of a group. On a symmetric grid there is one number, measured from the largest magnitude. The
            tries were chosen greedily among some hundred, by the squared error of the best of them. The error was
            measured on normal weights, on Student's t with four degrees of freedom, and on a trained model's weights.
            One try of Q4_K and of Q5_K was chosen for another reason: under it, weights that already lie on a grid with
            as many levels, or one fewer, do not change.
        codebook: The codes, in the order in which bytes number them; empty if all whole numbers from `qmin` to `qmax`
            are codes.
        fallback: The grid of a matrix whose rows the super-blocks do not divide. It is llama.cpp's choice, except that
            Q4_0 takes the place of IQ4_NL.
    """

    name: str
    container: Literal["gguf", "compressed-tensors"]
    bits: int
    group_size: int
    qmin: int
    qmax: int
    scale_dtype: Literal["f16", "bf16", "e8m0"]
    scale_rule: Literal["absmax", "signed_absmax", "range", "least_squares"]
    divisor: float
    rounding: Literal["half_up", "half_away", "half_even"]
    offset: Literal["none", "minimum", "zero_point"] = "none"
    block_size: int = 0
    multiplier_bits: int = 0
    cuts: tuple[tuple[float, ...], ...] = ()
    codebook: tuple[int, ...] = ()
    fallback: Grid | None = None

    @property
    def symmetric(self) -> bool:
        """Whether the code 0 means the value 0."""
        return self.offset == "none"

    @property
    def searched(self) -> bool:
        """Whether scales that follow from the weights are the best of several tries, those with the nearest codes."""
        return self.scale_rule == "least_squares"

    @cached_property
    def reach(self) -> tuple[float, float]:
        """The steps beyond which a weight is clipped: half of the outermost step beyond the outermost codes."""
        held = sorted(self.codebook) or (self.qmin, self.qmin + 1, self.qmax - 1, self.qmax)
        return held[0] - (held[1] - held[0]) / 2, held[-1] + (held[-1] - held[-2]) / 2

    @cached_property
    def nearest(self) -> Floats:
        """The nearest code of the codebook for each half step from `qmin` to `qmax`; the larger of two equally near."""
        halves, held = np.arange(self.qmin, self.qmax + 0.5, 0.5), np.unique(self.codebook)
        middles = (held[1:] + held[:-1]) / 2
        return held[np.searchsorted(middles, halves, side="right")].astype(np.float32)

    @property
    def levels(self) -> int:
        """Steps on the longer side of 0, or in the whole range of an asymmetric grid: Q_P in LSQ."""
        return self.qmax if self.symmetric else self.qmax - self.qmin

    def group(self, columns: int) -> int:
        """Return the number of weights that share a scale in a row of `columns`."""
        return self.group_size or columns

    @property
    def scale_bytes(self) -> int:
        """Bytes of a scale that is stored by itself."""
        return 1 if self.scale_dtype == "e8m0" else 2

    @property
    def groups_per_block(self) -> int:
        """Number of groups whose scales share a unit."""
        return self.block_size // self.group_size if self.block_size else 1

    @property
    def largest_multiplier(self) -> int:
        """Largest multiple of a super-block's unit."""
        return int(2 ** (self.multiplier_bits - self.symmetric)) - 1

    def divides(self, columns: int) -> bool:
        """Return whether a row of this many weights divides into groups and super-blocks."""
        return columns % (self.block_size or self.group(columns)) == 0


FloatType: TypeAlias = Literal["f32", "f32_plus_1", "f16", "bf16"]
"""How values are stored one by one. "f32_plus_1" is float32 of the value plus 1, which a runtime uses as it is."""


Storage: TypeAlias = Grid | FloatType


class Scales(NamedTuple):
    """What is stored in addition to the codes of a matrix.

    Attributes:
        scales: float32 [out, groups], values of the grid's scale type, or multiples of them that a super-block can
            hold.
        offsets: float32 [out, groups], minima or zero points, or None on a symmetric grid.
    """

    scales: Floats
    offsets: Floats | None = None


def _gguf_grid(kind: str, bits: int, **rule: Any) -> Grid:
    given: dict[str, Any] = {"scale_dtype": "f16", **rule}
    return Grid(name=f"gguf-{kind}", container="gguf", bits=bits, group_size=32, **given)


_SIGNED: Mapping[str, Any] = {"scale_rule": "signed_absmax", "rounding": "half_up"}
_MINIMUM: Mapping[str, Any] = {"scale_rule": "range", "rounding": "half_up", "offset": "minimum"}
Q4_0 = _gguf_grid("q4_0", 4, qmin=-8, qmax=7, divisor=-8.0, **_SIGNED)
Q4_1 = _gguf_grid("q4_1", 4, qmin=0, qmax=15, divisor=15.0, **_MINIMUM)
Q5_0 = _gguf_grid("q5_0", 5, qmin=-16, qmax=15, divisor=-16.0, **_SIGNED)
Q5_1 = _gguf_grid("q5_1", 5, qmin=0, qmax=31, divisor=31.0, **_MINIMUM)
Q8_0 = _gguf_grid("q8_0", 8, qmin=-127, qmax=127, divisor=127.0, scale_rule="absmax", rounding="half_away")


# Each tried scale gives the largest magnitude the code `divisor` plus a cut, and is then fitted by least squares.
# Scales of MXFP4 are powers of two and are not fitted; only two of them come into question.
IQ4_NL = _gguf_grid(
    "iq4_nl",
    4,
    qmin=-127,
    qmax=113,
    scale_dtype="f16",
    scale_rule="least_squares",
    divisor=-127.0,
    rounding="half_even",
    codebook=(-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
    cuts=((-3,), (241,), (5,), (-9,), (19,), (247,)),
)
MXFP4 = _gguf_grid(
    "mxfp4",
    4,
    qmin=-12,
    qmax=12,
    scale_dtype="e8m0",
    scale_rule="least_squares",
    divisor=8.0,
    rounding="half_even",
    codebook=(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12),
    cuts=((0,), (-4,)),
)


def _k_grid(kind: str, bits: int, group_size: int, multiplier_bits: int, fallback: Grid, **rule: Any) -> Grid:
    """Return the grid of one of llama.cpp's K-quants. It is symmetric if no offset is given."""
    lowest = -(2 ** (bits - 1)) if rule.get("offset", "none") == "none" else 0
    return Grid(
        name=f"gguf-{kind}",
        container="gguf",
        bits=bits,
        group_size=group_size,
        qmin=lowest,
        qmax=lowest + 2**bits - 1,
        scale_dtype="f16",
        scale_rule="least_squares",
        divisor=float(lowest or 2**bits - 1),
        rounding="half_even",
        block_size=256,
        multiplier_bits=multiplier_bits,
        fallback=fallback,
        **rule,
    )


def _cuts(fourth: tuple[float, float]) -> tuple[tuple[float, float], ...]:
    return ((0.0, 0.2), (0.4, 0.0), (-0.2, 0.4), fourth, (0.3, 0.3))


def _one_code_fewer(divisor: int) -> tuple[float, float]:
    """Return the cut that leaves the largest code out, for weights that already lie on a grid with one code fewer."""
    return (0.0, -divisor / (divisor - 1))


Q2_K = _k_grid("q2_k", 2, 16, 4, Q4_0, offset="minimum", cuts=_cuts((0.4, -0.2)))
Q3_K = _k_grid("q3_k", 3, 16, 6, Q4_0, cuts=((-0.125,), (-0.625,), (0.75,), (0.25,)))
Q4_K = _k_grid("q4_k", 4, 32, 6, Q5_0, offset="minimum", cuts=_cuts(_one_code_fewer(15)))
Q5_K = _k_grid("q5_k", 5, 32, 6, Q5_1, offset="minimum", cuts=_cuts(_one_code_fewer(31)))
Q6_K = _k_grid("q6_k", 6, 16, 8, Q8_0, cuts=((0,), (1,), (2,), (3,)))


def integer_grid(bits: int, group_size: int, symmetric: bool) -> Grid:
    """Return the grid of compressed-tensors with codes of `bits` bits; a group size of 0 means a whole row."""
    # As in its `calculate_qparams`: absmax / ((qmax - qmin) / 2), or the range / (qmax - qmin).
    levels = 2**bits
    return Grid(
        name=f"compressed-tensors{integer_suffix(bits, group_size, symmetric)}",
        container="compressed-tensors",
        bits=bits,
        group_size=group_size,
        qmin=-levels // 2,
        qmax=levels // 2 - 1,
        scale_dtype="bf16",
        scale_rule="absmax" if symmetric else "range",
        divisor=(levels - 1) / 2 if symmetric else levels - 1,
        rounding="half_even",
        offset="none" if symmetric else "zero_point",
    )


def integer_suffix(bits: int, group_size: int, symmetric: bool) -> str:
    """Return the suffix of an integer grid's name, like "-int4-g64-asym"."""
    return f"-int{bits}-{f'g{group_size}' if group_size else 'row'}{'' if symmetric else '-asym'}"


def check_tensor(tensor: TensorSpec, storage: Storage) -> None:
    """Refuse a tensor whose rows the grid's groups do not divide, before it is trained.

    Raises:
        InputError: The tensor is not two-dimensional, or a row is not a multiple of the group or super-block.
    """
    if not isinstance(storage, Grid):
        return
    if len(tensor.shape) != 2:
        raise InputError(f"{tensor.name} of shape {list(tensor.shape)} is no matrix: {storage.name} cannot hold it")
    if not storage.divides(tensor.together):
        cut = f"blocks of {storage.block_size}" if storage.block_size else f"groups of {storage.group_size}"
        rows = f"runs in a file of {tensor.run}" if tensor.run else f"rows of {tensor.shape[1]}"
        instead = storage.fallback and f", nor the groups of {storage.fallback.group_size} that stand in for them,"
        raise InputError(
            f"{tensor.name} has {rows} weights, which the {cut} of {storage.name}{instead or ''} do "
            f"not divide: choose {'' if instead else 'a smaller group, or '}a format without groups"
        )
