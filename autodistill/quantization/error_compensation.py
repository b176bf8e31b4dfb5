"""Rounding that compensates its errors: each column's error is spread over the columns that are not rounded yet."""

from __future__ import annotations

import torch
from torch import Tensor

from autodistill.quantization.grids import Grid, Scales
from autodistill.quantization.group_scales import Steps, given_steps, in_steps
from autodistill.quantization.k_quants import nearest_codes
from autodistill.quantization.loops import loops
from autodistill.quantization.rounding import fitted_scales, given_values

# Share of the mean of the moments' diagonal that is added to the diagonal: a short text's inputs do not span all
# directions.
DAMPING = 0.01
# Columns in a block. The errors of a block reach all later columns together.
_BLOCK = 128


@torch.no_grad()
def compensated(
    weight: Tensor, moments: Tensor, grid: Grid, *, scales: Scales | None = None, damping: float = DAMPING
) -> tuple[Tensor, Scales]:
    """Round a matrix so that its outputs change little. Plain rounding only keeps the change of its weights small.

    H is the second moments of the inputs. After column j is rounded with error e, the columns F that are not rounded
    yet move by -e H^-1[j, F] / H^-1[j, j], with H restricted to j and F. This minimises the mean square of the outputs'
    change. Columns with the largest moments come first. The scales are fixed beforehand, so the columns of a group need
    not be rounded together. This is GPTQ (Frantar et al., 2022, arXiv:2210.17323), with the Cholesky factor of H^-1 and
    in blocks of columns.

    Args:
        weight: float32 [out, in], where `in` is a multiple of the grid's groups.
        moments: [in, in], the mean over tokens of the input times the transposed input.
        grid: The grid.
        scales: Scales and offsets to use; by default they follow from the weights.
        damping: Share of the mean moment that is added to the diagonal.

    Returns:
        The values that a runtime reads, float32 [out, in], and the scales with which they are packed.

    Raises:
        ValueError: The moments have another size or are not finite.
    """
    columns = weight.shape[1]
    if moments.shape != (columns, columns) or not torch.isfinite(moments).all():
        raise ValueError(f"moments of {columns} inputs are finite numbers, [{columns}, {columns}]")
    fitted, offsets = fitted_scales(weight, grid) if scales is None else _as_tensors(scales, weight.device)
    steps = given_steps(fitted, offsets, grid)
    stored = Scales(steps.scales.view_as(fitted).cpu().numpy(), None if offsets is None else offsets.cpu().numpy())
    diagonal = moments.double().diagonal()
    if not diagonal.mean() > 0:
        return given_values(weight, steps, grid), stored
    order = diagonal.argsort(descending=True, stable=True)
    factor = _factor(moments.double()[order][:, order], damping).to(weight.dtype)
    left, out = weight[:, order], torch.empty_like(weight)
    places = order // grid.group(columns)
    compiled = loops("error_compensation") if weight.device.type == "cpu" else None
    rows = None if compiled is None else compiled.Rows(steps, len(weight), grid)
    for start in range(0, columns, _BLOCK):
        part = slice(start, start + _BLOCK)
        block, spread, groups = left[:, part].contiguous(), factor[part, part].contiguous(), places[part]
        if rows is not None:
            values, errors = rows.made_up(block, spread, groups)
        else:
            values, errors = _round_columns(block, spread, groups.tolist(), steps, grid)
        out[:, order[part]] = values
        left[:, start + _BLOCK :] -= errors @ factor[part, start + _BLOCK :]
    return out, stored


def _round_columns(left: Tensor, factor: Tensor, groups: list[int], steps: Steps, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return the values of some columns, and the errors that later columns make up for, [out, columns] each."""
    values, errors = torch.empty_like(left), torch.empty_like(left)
    count = len(steps.scales) // len(left)
    for place, group in enumerate(groups):
        column = left[:, place : place + 1]
        values[:, place : place + 1] = found = _on_grid(column, _of_group(steps, group, count), grid)
        row = factor[place, place:]
        errors[:, place] = (column - found)[:, 0] / row[0]
        left[:, place:] -= errors[:, place : place + 1] * row
    return values, errors


def _as_tensors(scales: Scales, device: torch.device) -> tuple[Tensor, Tensor | None]:
    offsets = None if scales.offsets is None else torch.from_numpy(scales.offsets).to(device)
    return torch.from_numpy(scales.scales).to(device), offsets


def _factor(moments: Tensor, damping: float) -> Tensor:
    """Return the upper Cholesky factor of the inverse. Row j, divided by its value at j, spreads an error at j."""
    damped = moments + damping * moments.diagonal().mean() * torch.eye(len(moments), device=moments.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True)


def _of_group(steps: Steps, place: int, groups: int) -> Steps:
    """Return the scaling of one group in each row."""
    return steps.part(slice(place, None, groups))


def _on_grid(column: Tensor, steps: Steps, grid: Grid) -> Tensor:
    """Return a column's values, [out, 1], as `given_values` computes them."""
    codes = torch.empty_like(column)
    in_steps(column, steps, codes)
    if grid.codebook:
        codes = nearest_codes(codes, grid, torch)
    else:
        codes.clamp_(grid.qmin, grid.qmax).round_().add_(0.0)  # a code of 0 is never -0
    if steps.zero_points is not None:
        codes.sub_(steps.zero_points)
    codes.mul_(steps.scales)
    if steps.bases is not None:
        codes.add_(steps.bases)
    return codes.bfloat16().float() if grid.container == "compressed-tensors" else codes
