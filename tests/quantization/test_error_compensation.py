"""Rounding that compensates for its errors, against explicit inverses in float64 and against plain rounding."""

import numpy as np
import pytest
import torch

from autodistill.quantization import error_compensation
from autodistill.quantization.error_compensation import DAMPING, compensated
from autodistill.quantization.formats import TYPES
from autodistill.quantization.grids import Grid, Scales
from autodistill.quantization.group_scales import given_steps
from autodistill.quantization.packing import deployed
from autodistill.quantization.rounding import deploy_tensor, fitted_scales, given_values

GRIDS = {name: grid for name, grid in TYPES.items() if isinstance(grid, Grid)}
PLAIN = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


def matrix(rows, columns, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 0.1, (rows, columns)).astype(np.float32))


def moments_of(columns, seed=0, rank=None):
    """Return moments of inputs that depend on each other. Some inputs are much larger than others."""
    dice = np.random.default_rng(100 + seed)
    mixed = dice.normal(size=(rank or columns, columns)) * np.exp(dice.normal(0, 1, columns))
    inputs = dice.normal(size=(4 * columns, rank or columns)) @ mixed
    return torch.from_numpy(inputs.T @ inputs / len(inputs))


def error(weight, values, moments):
    gap = (values - weight).double()
    return float((gap @ moments * gap).sum())


def reference(weight, moments, grid):
    """Round column by column in float64, and compute the inverse of the rest again each time."""
    scales, offsets = fitted_scales(weight, grid)
    steps = given_steps(scales, offsets, grid)
    damped = moments.numpy() + DAMPING * np.diag(moments.numpy()).mean() * np.eye(len(moments))
    order = np.argsort(-np.diag(moments.numpy()), kind="stable")
    left, out = weight.double().numpy().copy(), np.zeros(weight.shape)
    for place, column in enumerate(order):
        # The whole matrix is rounded as a runtime's tools would round it, and one column is taken from it.
        rounded = given_values(torch.from_numpy(left.astype(np.float32)), steps, grid).double().numpy()
        out[:, column] = rounded[:, column]
        rest = order[place:]
        inverse = np.linalg.inv(damped[np.ix_(rest, rest)])
        gap = left[:, column] - out[:, column]
        left[:, rest] -= np.outer(gap, inverse[0]) / inverse[0, 0]
        left[:, column] = out[:, column]
    return out


@pytest.mark.parametrize("name", PLAIN)
def test_it_is_what_explicit_inverses_give(name):
    weight, moments = matrix(5, 160), moments_of(160)
    values, _ = compensated(weight, moments, GRIDS[name])
    expected = reference(weight, moments, GRIDS[name])
    # A sum in float32 may rarely fall on the other side of a tie.
    same = np.isclose(values.numpy(), expected, atol=1e-6)
    assert same.mean() > 0.99
    assert error(weight, values, moments) == pytest.approx(error(weight, torch.from_numpy(expected), moments), rel=0.02)


@pytest.mark.parametrize("name", GRIDS)
def test_outputs_change_less_than_by_plain_rounding(name):
    grid = GRIDS[name]
    columns = 512 if grid.block_size else 128
    ratios = []
    for seed in range(2):
        weight, moments = matrix(16, columns, seed), moments_of(columns, seed)
        values, scales = compensated(weight, moments, grid)
        ratios.append(error(weight, values, moments) / error(weight, deploy_tensor(weight, grid), moments))
        # The values are on the grid: packing them with these scales does not change them.
        assert torch.equal(deploy_tensor(values, grid, scales), values)
        np.testing.assert_array_equal(deployed(values.numpy(), grid, scales), values.numpy())
    assert np.mean(ratios) < 0.8
    assert max(ratios) < 1


def test_independent_inputs_leave_plain_rounding():
    weight = matrix(4, 64)
    for moments in (torch.eye(64), torch.diag(torch.arange(1.0, 65.0)), torch.zeros(64, 64)):
        values, _ = compensated(weight, moments, GRIDS["q4_1"])
        scales, offsets = fitted_scales(weight, GRIDS["q4_1"])
        plain = given_values(weight, given_steps(scales, offsets, GRIDS["q4_1"]), GRIDS["q4_1"])
        torch.testing.assert_close(values, plain, atol=1e-6, rtol=0)


def test_inputs_of_few_directions_are_no_hindrance():
    weight, moments = matrix(8, 128), moments_of(128, rank=5)
    values, _ = compensated(weight, moments, GRIDS["q4_0"])
    assert torch.isfinite(values).all()
    assert error(weight, values, moments) < 0.3 * error(weight, deploy_tensor(weight, GRIDS["q4_0"]), moments)


def test_given_scales_are_kept_and_the_weight_is_left_alone():
    weight, moments, grid = matrix(4, 64), moments_of(64), GRIDS["q4_0"]
    scales = Scales(np.full((4, 2), 0.0625, np.float32))
    before = weight.clone()
    values, stored = compensated(weight, moments, grid, scales=scales)
    np.testing.assert_array_equal(stored.scales, scales.scales)
    assert torch.equal(weight, before)
    codes = values / 0.0625
    assert torch.equal(codes, codes.round())
    assert codes.min() >= -8
    assert codes.max() <= 7


def test_moments_that_cannot_be_are_refused():
    for moments in (torch.eye(32), torch.full((64, 64), float("nan"))):
        with pytest.raises(ValueError, match=r"\[64, 64\]"):
            compensated(matrix(4, 64), moments, GRIDS["q4_0"])


@pytest.mark.parametrize("name", [*PLAIN, "q4_k", "mxfp4"])
def test_the_compiled_loop_is_what_single_operations_give(name, monkeypatch):
    grid = GRIDS[name]
    weight, moments = matrix(24, 512), moments_of(512)
    assert error_compensation.loops("error_compensation") is not None
    compiled, _ = compensated(weight, moments, grid)
    monkeypatch.setattr(error_compensation, "loops", lambda *_: None)
    plain, _ = compensated(weight, moments, grid)
    # In this case a product and its sum are rounded together, so a weight may fall on the other side of a tie.
    assert (compiled == plain).float().mean() > 0.999
