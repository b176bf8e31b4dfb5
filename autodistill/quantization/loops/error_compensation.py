"""Rounding of some columns one after another, with each error spread over the later ones: a loop compiled by numba.

It does the arithmetic of `error_compensation`. That module works column by column on all rows if this one cannot be
imported or the weights are not on a CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from autodistill.quantization.grids import Grid
from autodistill.quantization.group_scales import Steps
from autodistill.quantization.loops.compiled import Array, array_of, code_near, compiled, over_threads, upper_half

_ZERO, _UPPER = np.float32(0.0), np.uint32(16)


# A product and the sum that adds it may be rounded once.
@compiled(fastmath={"contract"})
def _round_columns(
    left: Array,
    scales: Array,
    divisors: Array,
    minima: Array | None,
    zero_points: Array | None,
    out: Array,
    errors: Array,
    factor: Array,
    groups: Array,
    low: np.float32,
    high: np.float32,
    table: Array | None,
    rounded: bool,
) -> None:
    rows, columns = left.shape
    weights = np.empty(columns, np.float32)
    value = np.empty(1, np.float32)
    bits = value.view(np.uint32)
    for row in range(rows):
        weights[:] = left[row]
        for j in range(columns):
            group = groups[j]
            step = weights[j]
            if minima is not None:
                step = step - minima[row, group]
            step = step / divisors[row, group]
            if zero_points is not None:
                step = step + zero_points[row, group]
            if table is not None:
                code = code_near(step, table, low) if step == step else step
            else:
                code = low if step < low else step
                code = np.rint(high if code > high else code)
            if zero_points is not None:
                code = code - zero_points[row, group]
            value[0] = (code + _ZERO) * scales[row, group]
            if minima is not None:
                value[0] = value[0] + minima[row, group]
            if rounded:
                bits[0] = upper_half(bits[0]) << _UPPER
            out[row, j] = value[0]
            error = (weights[j] - value[0]) / factor[j, j]
            errors[row, j] = error
            for k in range(j + 1, columns):
                weights[k] -= error * factor[j, k]


class Rows:
    """The scaling of a matrix's groups, in the form that the loop reads.

    Args:
        steps: Scaling of all groups; its factors must be divisors.
        rows: Number of rows of the matrix.
        grid: The grid.
    """

    def __init__(self, steps: Steps, rows: int, grid: Grid) -> None:
        self._grid = grid
        parts = (steps.scales, steps.factors, steps.bases, steps.zero_points)
        self._tensors = [None if one is None else one.reshape(rows, -1).contiguous() for one in parts]

    def made_up(self, left: Tensor, factor: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Return the values of some columns, and the errors that later columns make up for, float32 [out, columns].

        Args:
            left: float32 [out, columns], in the order in which they are rounded.
            factor: float32 [columns, columns]; row j, divided by its value at j, spreads an error at j.
            groups: int64 [columns], the group of each column.
        """
        out, errors = torch.empty_like(left), torch.empty_like(left)
        grid = self._grid
        arrays = [None if one is None else array_of(one) for one in (left, *self._tensors, out, errors)]
        bounds = (np.float32(grid.qmin), np.float32(grid.qmax))
        rounded = grid.container == "compressed-tensors"
        table = grid.nearest if grid.codebook else None
        over_threads(_round_columns, *arrays, constants=(array_of(factor), array_of(groups), *bounds, table, rounded))
        return out, errors
