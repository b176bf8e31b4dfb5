"""Scales by importance, against a search of every scale that a file can hold and against llama.cpp's quantiser."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autodistill.quantization.formats import INTEGER_TYPES, TYPES
from autodistill.quantization.grids import Grid, Scales
from autodistill.quantization.packing import deployed, pack, unpack
from autodistill.quantization.rounding import deploy_tensor
from autodistill.quantization.weighted_scales import weighted_scales

GRIDS = {name: grid for name, grid in (TYPES | INTEGER_TYPES).items() if isinstance(grid, Grid)}


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_t(5, (rows, columns)).astype(np.float32) / 20)


def importance_of(columns: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.exp(np.random.default_rng(50 + seed).normal(0, 1.5, columns)).astype(np.float32))


def found(weight: torch.Tensor, grid: Grid, importance: torch.Tensor) -> Scales:
    scales, offsets = weighted_scales(weight, grid, importance)
    return Scales(scales.numpy(), None if offsets is None else offsets.numpy())


def error(weight: torch.Tensor, values: torch.Tensor, importance: torch.Tensor) -> float:
    return float(((values - weight).double().square() * importance.double()).sum())


@pytest.mark.parametrize("name", GRIDS)
def test_what_counts_changes_less_and_is_packed_as_it_was_found(name: str) -> None:
    grid = GRIDS[name]
    weight, importance = matrix(24, 512), importance_of(512)
    scales = found(weight, grid, importance)
    values = deploy_tensor(weight, grid, scales)
    packed = unpack(pack(weight.numpy(), grid, scales), grid, tuple(weight.shape))
    np.testing.assert_array_equal(packed, values.numpy())
    plain = error(weight, deploy_tensor(weight, grid), importance)
    assert error(weight, values, importance) <= plain * (1 + 1e-6)
    # Fewer bits leave more to choose. Powers of two leave hardly any choice.
    if grid.bits <= 5 and grid.scale_dtype != "e8m0":
        assert error(weight, values, importance) < 0.97 * plain


@pytest.mark.parametrize("name", [name for name, grid in GRIDS.items() if grid.bits <= 5])
def test_compiled_loops_find_what_single_operations_do(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = GRIDS[name]
    weight, importance = matrix(80, 256, 3), importance_of(256, 3)
    weight[0] *= 1e-6  # its scales are below the normal numbers of float16
    weight[1, :64] = 0
    compiled = found(weight, grid, importance)
    monkeypatch.setattr("autodistill.quantization.weighted_scales.loops", lambda *_: None)
    single = found(weight, grid, importance)
    # Sums are added in another order, so either of two equally good tries may be taken.
    assert (compiled.scales == single.scales).mean() > 0.98
    left = [error(weight, deploy_tensor(weight, grid, one), importance) for one in (compiled, single)]
    assert left[0] == pytest.approx(left[1], rel=1e-3)


@pytest.mark.parametrize("name", ["iq4_nl", *(pytest.param(one, marks=pytest.mark.slow) for one in ("q4_0", "q5_0"))])
def test_other_scales_leave_hardly_less(name: str) -> None:
    """Try every float16 of either sign up to twice the plain scale, one by one in float64."""
    grid = GRIDS[name]
    weight, importance = matrix(8, 32, 1), importance_of(32, 1)
    scales = found(weight, grid, importance)
    held = np.sort(np.array(grid.codebook or range(grid.qmin, grid.qmax + 1), np.float64))
    halves = np.arange(0, 2**15, dtype=np.uint16).view(np.float16).astype(np.float64)
    left = []
    for row, scale in zip(weight.double().numpy(), scales.scales[:, 0], strict=True):
        most = 2 * np.abs(row).max() / np.abs(held).min(where=held != 0, initial=8)
        tried = halves[(halves > 0) & (halves < most)]
        tried = np.concatenate([tried, -tried, [scale]])[:, None]
        steps = row / tried
        codes = held[np.abs(steps[..., None] - held).argmin(-1)]
        errors = ((codes * tried - row) ** 2 * importance.double().numpy()).sum(-1)
        left.append((errors[-1], errors.min()))
    mine, least = np.sum(left, axis=0)
    assert mine < 1.12 * least


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "q4_k", "q2_k", "q3_k", "q6_k"])
def test_it_leaves_no_more_than_llama_cpp_with_the_same_importance(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    from benchmarks.engine.export_quality import llama_kernel

    grid = GRIDS[name]
    weight, importance = matrix(32, 512, 2), importance_of(512, 2)
    theirs = llama_kernel()(weight.numpy(), gguf.GGMLQuantizationType[name.upper()], importance.numpy())
    ours = deployed(weight.numpy(), grid, found(weight, grid, importance))
    left = error(weight, torch.from_numpy(theirs), importance)
    assert error(weight, torch.from_numpy(ours), importance) < 1.02 * left


def test_equal_importance_and_weights_on_a_grid_stay_where_they_are() -> None:
    for name in ("q4_0", "q4_1", "iq4_nl", "int4-g32", "q4_k"):
        grid = GRIDS[name]
        on_grid = deploy_tensor(matrix(8, 256), grid)
        values = deploy_tensor(on_grid, grid, found(on_grid, grid, importance_of(256)))
        again = deploy_tensor(on_grid, grid)
        # Never further off than what the weights alone give. That is no error at all if they are restored exactly.
        assert float((values - on_grid).abs().max()) <= float((again - on_grid).abs().max())


def test_groups_of_zeros_and_columns_that_never_count() -> None:
    weight = matrix(4, 64)
    weight[1] = 0
    importance = importance_of(64)
    importance[:32] = 0
    for name in ("q4_0", "q4_1", "iq4_nl", "mxfp4", "int4-g32", "int4-g32-asym"):
        values = deploy_tensor(weight, GRIDS[name], found(weight, GRIDS[name], importance))
        assert torch.isfinite(values).all()
        assert not values[1].any()
        assert values[0, :32].any()


def test_importance_that_cannot_be_is_refused() -> None:
    for wrong in (torch.ones(32), torch.full((64,), float("nan")), -torch.ones(64)):
        with pytest.raises(ValueError, match="importance of 64 columns"):
            weighted_scales(matrix(2, 64), GRIDS["q4_0"], wrong)
