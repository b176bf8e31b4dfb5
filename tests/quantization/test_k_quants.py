"""Scales of super-blocks: numpy and torch give the same bits, repacking keeps them, and they fit the weights."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import xllamacpp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from autodistill.quantization.formats import FORMATS
from autodistill.quantization.grids import IQ4_NL, MXFP4, Q2_K, Q3_K, Q4_0, Q4_K, Q5_K, Q6_K
from autodistill.quantization.k_quant_bytes import Block, to_bytes
from autodistill.quantization.k_quants import fitted, held_on_block_grid, on_block_grid, stored
from autodistill.quantization.loops import k_quants as compiled
from autodistill.quantization.packing import deployed, pack, unpack, unpack_codes
from tests.thinned import thinned

GRIDS = [Q2_K, Q3_K, Q4_K, Q5_K, Q6_K]
by_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)


def _bits(values):
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


def _weights():
    random = np.random.default_rng(0)
    normal = random.standard_normal((24, 512)).astype(np.float32)
    return {
        "normal": normal,
        "heavy-tailed": normal**9,
        "tied magnitudes": random.integers(-4, 5, (24, 512)).astype(np.float32),
        "all above zero": np.abs(normal) + 1,
        "all below zero": -np.abs(normal) - 1,
        "constant": np.full((2, 256), -0.3, np.float32),
        "zero": np.zeros((4, 256), np.float32),
        "negative zero": -np.zeros((4, 256), np.float32),
        "one zero group": normal * (np.arange(512) >= 32),
        "small": normal * np.float32(1e-6),
        "subnormal": normal * np.float32(1e-39),
    }


WEIGHTS = _weights()


@by_grid
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("at_once", thinned([256, 2**18]))
def test_torch_finds_the_scales_of_numpy(grid, weights, at_once):
    groups = weights.reshape(-1, grid.group_size)
    theirs = fitted(torch.from_numpy(groups), grid, torch)
    for mine, other in zip(fitted(groups, grid, np, at_once), theirs, strict=True):
        assert (mine is None) == (other is None)
        if mine is not None:
            assert mine.dtype == np.float32
            np.testing.assert_array_equal(_bits(mine), _bits(other.numpy()))


@by_grid
@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
def test_compiled_loops_find_the_scales_of_single_operations(grid, weights):
    groups = torch.from_numpy(weights).view(-1, grid.group_size)
    for mine, other in zip(
        fitted(groups, grid, torch, search=compiled.nearest), fitted(groups, grid, torch), strict=True
    ):
        assert (mine is None) == (other is None)
        if mine is not None:
            np.testing.assert_array_equal(_bits(mine.numpy()), _bits(other.numpy()))


def _codes_near(steps, grid):
    """Return the codes of a grid that are nearest to steps, and for each group whether no step lies near a tie."""
    book = {IQ4_NL: gguf.quants.IQ4_NL, MXFP4: gguf.quants.MXFP4}.get(grid)
    held = np.arange(grid.qmin, grid.qmax + 1) if book is None else np.unique(book.kvalues)
    ties = (held[1:] + held[:-1]) / 2
    places = np.searchsorted(ties, steps)
    around = np.concatenate([[-np.inf], ties, [np.inf]])
    # float32 may round ties differently.
    return held[places], (np.minimum(steps - around[places], around[places + 1] - steps) > 1e-4).all(1)


def _without_ties(clear, errors, weights):
    """Return the clear groups in which the least error is no tie, also not within the error of float32's sums."""
    least, second = np.sort(errors, 0)[:2]
    clear &= second - least > 1e-6 * np.square(weights).sum(1)
    assert clear.mean() > 0.5
    return clear


# The value that the largest magnitude of a group gets in each try, in steps between codes.
TRIED = {
    Q3_K: (-4.125, -4.625, -3.25, -3.75),
    Q6_K: (-32, -31, -30, -29),
    IQ4_NL: (-130, 114, -122, -136, -108, 120),
}


@pytest.mark.parametrize("grid", TRIED, ids=lambda grid: grid.name)
def test_of_what_is_tried_the_scale_that_loses_least_is_found(grid):
    """By definition, in float64: each step gives codes, least squares give their scale, and the least error wins."""
    weights = np.random.default_rng(3).standard_normal((4096, grid.group_size)).astype(np.float32)
    largest = np.take_along_axis(weights, np.abs(weights).argmax(1)[:, None], 1).astype(np.float64)
    scales, errors, clear = [], [], np.ones(len(weights), bool)
    for divisor in TRIED[grid]:
        codes, apart = _codes_near(weights / (largest / divisor), grid)
        clear &= apart
        scales.append((codes * weights).sum(1) / (codes * codes).sum(1))
        errors.append(np.square(weights - codes * scales[-1][:, None]).sum(1))
    expected = np.take_along_axis(np.array(scales), np.argmin(errors, 0)[None], 0)[0]
    (found,) = compiled.nearest(torch.from_numpy(weights), grid)
    clear = _without_ties(clear, errors, weights)
    np.testing.assert_allclose(found.numpy()[clear], expected[clear], rtol=1e-5)


def test_of_two_powers_of_two_the_one_that_loses_less_is_found():
    """By definition, in float64: an eighth or a quarter of the largest power of two within the largest magnitude."""
    weights = np.random.default_rng(3).standard_normal((4096, 32)).astype(np.float32)
    power = 2.0 ** np.floor(np.log2(np.abs(weights).max(1)))
    scales, errors, clear = np.array([power / 8, power / 4]), [], np.ones(len(weights), bool)
    for scale in scales:
        codes, apart = _codes_near(weights / scale[:, None], MXFP4)
        clear &= apart
        errors.append(np.square(weights - codes * scale[:, None]).sum(1))
    (found,) = compiled.nearest(torch.from_numpy(weights), MXFP4)
    clear = _without_ties(clear, errors, weights)
    expected = np.take_along_axis(scales, np.argmin(errors, 0)[None], 0)[0]
    np.testing.assert_array_equal(found.numpy()[clear], expected[clear])
    assert 0.1 < (found.numpy() == scales[0])[clear].mean() < 0.9


# By how many steps the smallest and the largest code move inwards from the ends of a group in each try.
MOVED = {
    grid: ((0, 0.2), (0.4, 0), (-0.2, 0.4), fourth, (0.3, 0.3))
    for grid, fourth in {Q2_K: (0.4, -0.2), Q4_K: (0, -15 / 14), Q5_K: (0, -31 / 30)}.items()
}


@pytest.mark.parametrize("grid", MOVED, ids=lambda grid: grid.name)
def test_of_what_is_tried_the_minimum_that_loses_least_is_found(grid):
    """By definition, in float64: codes between moved ends, and the straight line through them that errs least."""
    weights = np.random.default_rng(4).standard_normal((4096, grid.group_size)).astype(np.float32)
    low, high = weights.min(1).clip(None, 0).astype(np.float64), weights.max(1).astype(np.float64)
    steps = 2**grid.bits - 1
    minima, errors, clear = [], [], np.ones(len(weights), bool)
    for below, above in MOVED[grid]:
        step = (high - low) / steps
        first, last = low + below * step, high - above * step
        codes, apart = _codes_near((weights - first[:, None]) / ((last - first) / steps)[:, None], grid)
        clear &= apart
        centred = codes - codes.mean(1, keepdims=True)
        slope = (centred * weights).sum(1) / np.square(centred).sum(1)
        minima.append(weights.mean(1) - slope * codes.mean(1))
        clear &= minima[-1] < -1e-3  # a minimum above 0 cannot be stored
        errors.append(np.square(weights - slope[:, None] * codes - minima[-1][:, None]).sum(1))
    expected = np.take_along_axis(np.array(minima), np.argmin(errors, 0)[None], 0)[0]
    found = compiled.nearest(torch.from_numpy(weights), grid)[0].numpy()
    clear = _without_ties(clear, errors, weights)
    np.testing.assert_allclose(found[clear], expected[clear], rtol=1e-4, atol=1e-5)


def _values(grid):
    # Up to the values for which float16 still holds the unit.
    largest = 6e4 * grid.largest_multiplier
    return npst.arrays(np.float32, (4, 2 * grid.groups_per_block), elements=st.floats(-largest, largest, width=32))


@by_grid
def test_what_a_block_holds_it_holds_again_and_each_value_within_half_a_unit(grid):
    @settings(max_examples=80, deadline=None)
    @given(_values(grid), st.floats(1e-9, 1))
    def check(values, factor):
        values = values * np.float32(factor)  # down to units that float16 holds coarsely or not at all
        units, multipliers = on_block_grid(values, grid, np)
        read = stored(values, grid, np)
        np.testing.assert_array_equal(_bits(stored(read, grid, np)), _bits(read))
        np.testing.assert_array_equal(_bits(stored(torch.from_numpy(values), grid, torch).numpy()), _bits(read))
        again, those_again = on_block_grid(read, grid, np)
        np.testing.assert_array_equal(again, units)
        np.testing.assert_array_equal(those_again, np.where(units > 0, multipliers, 0))
        least = -grid.largest_multiplier if grid.symmetric else 0
        assert ((multipliers >= least) & (multipliers <= grid.largest_multiplier)).all()
        assert (np.float16(units) == units).all()
        possible = values if grid.symmetric else values.clip(0, None)
        error = np.abs(read - possible).reshape(multipliers.shape)
        # Half a multiple, plus the rounding of the unit itself: relative, or half of float16's smallest step.
        allowed = 0.501 * units + np.abs(multipliers) * np.maximum(2**-11 * units, 2.0**-25) + 2.0**-24
        assert (error <= allowed).all()

    check()


def _blocks(grid, count, most, least=None):
    """Return super-blocks with any codes, units and multipliers, as another tool's file may have them, as bytes.

    Args:
        grid: The grid.
        count: Number of super-blocks.
        most, least: Largest and smallest multiplier.
    """
    random = np.random.default_rng(11)
    groups, least = grid.groups_per_block, (-most if grid.symmetric else 0) if least is None else least
    units = random.choice([-1, 1] if grid.symmetric else [1], (count, 1)) * random.uniform(1e-4, 0.3, (count, 1))
    block = Block(
        codes=random.integers(0, 2**grid.bits, (count, grid.block_size)).astype(np.uint8),
        units=(units if grid.symmetric else np.concatenate([units, units * 0.7], axis=1)).astype(np.float16),
        scales=random.integers(least, most + 1, (count, groups)).astype(np.int8),
        minima=None if grid.symmetric else random.integers(0, most + 1, (count, groups)).astype(np.uint8),
    )
    return to_bytes(block, grid)


@by_grid
@pytest.mark.parametrize("share", [1.0, 0.9, 0.3], ids=["all multipliers", "most", "few"])
def test_what_a_file_of_another_tool_holds_is_packed_as_it_is(grid, share):
    """Its largest multiplier need not be the largest possible one, and signed ones may be the least, such as -128."""
    most, lowest = round(share * grid.largest_multiplier), -grid.largest_multiplier - 1
    data = _blocks(grid, 96, most, lowest if grid.symmetric and share == 1.0 else None)
    kind = gguf.GGMLQuantizationType[grid.name.removeprefix("gguf-").upper()]
    values = gguf.quants.dequantize(data, kind)
    _, scales = unpack_codes({"data": data}, grid, values.shape)
    again = pack(values, grid, scales)
    np.testing.assert_array_equal(gguf.quants.dequantize(again["data"], kind), values)
    np.testing.assert_array_equal(unpack(again, grid, values.shape), values)
    for own in (scales.scales, *(() if scales.offsets is None else (-scales.offsets,))):
        units, multipliers = held_on_block_grid(own, grid, np)
        theirs = held_on_block_grid(torch.from_numpy(own), grid, torch)
        np.testing.assert_array_equal(units * multipliers, own.reshape(multipliers.shape))
        for mine, other in zip((units, multipliers), theirs, strict=True):
            np.testing.assert_array_equal(mine, other.numpy())


@by_grid
def test_scales_that_no_block_holds_are_rounded_as_ever(grid):
    values = np.abs(np.random.default_rng(3).standard_normal((4, 2 * grid.groups_per_block))).astype(np.float32)
    for mine, other in zip(held_on_block_grid(values, grid, np), on_block_grid(values, grid, np), strict=True):
        np.testing.assert_array_equal(mine, other)


def _plain(weights, grid):
    """Return what the ends of each group give by the rule of Q4_1 or Q4_0, in float64, without a second grid."""
    groups = weights.astype(np.float64).reshape(-1, grid.group_size)
    if grid.symmetric:
        first = np.abs(groups).argmax(-1)[:, None]
        scale = np.take_along_axis(groups, first, -1) / grid.qmin
        return (np.rint(groups / scale).clip(grid.qmin, grid.qmax) * scale).reshape(weights.shape)
    low = groups.min(-1, keepdims=True).clip(None, 0)
    scale = (groups.max(-1, keepdims=True) - low) / grid.qmax
    return (np.rint((groups - low) / scale) * scale + low).reshape(weights.shape)


def _llama_cpp(weights, grid):
    """Return what llama.cpp's own quantiser makes of the weights, or None if the package does not export it."""
    library = ctypes.CDLL(str(next(Path(xllamacpp.__file__).parent.glob("xllamacpp*.so"))))
    try:
        quantize = library.ggml_quantize_chunk
    except AttributeError:
        return None
    quantize.restype = ctypes.c_size_t
    quantize.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    kind = gguf.GGMLQuantizationType[grid.name.removeprefix("gguf-").upper()]
    size, count = gguf.GGML_QUANT_SIZES[kind]
    packed = np.empty((len(weights), weights.shape[1] // size * count), np.uint8)
    quantize(int(kind), weights.ctypes.data, packed.ctypes.data, 0, *weights.shape, None)
    return gguf.quants.dequantize(packed, kind)


@by_grid
def test_weights_lose_less_than_by_plain_scales_and_by_llama_cpp(grid):
    random = np.random.default_rng(7)
    for draw in (random.standard_normal((64, 1024)), random.standard_t(4, (64, 1024))):
        weights = draw.astype(np.float32)
        lost = np.square(deployed(weights, grid) - weights).mean()
        assert lost < 0.95 * np.square(_plain(weights, grid) - weights).mean()
        theirs = _llama_cpp(weights, grid)
        if theirs is not None:
            assert lost < np.square(theirs - weights).mean()


@pytest.mark.parametrize("grid", [Q4_K, Q5_K], ids=lambda grid: grid.name)
def test_weights_that_lie_on_a_grid_of_no_more_levels_stay_near_it(grid):
    """As with a file that was quantised before. llama.cpp loses no less there either."""
    normal = np.random.default_rng(5).standard_normal((64, 1024)).astype(np.float32)
    on_fewer = deployed(normal, Q4_0)
    lost = np.square(deployed(on_fewer, grid) - on_fewer).mean()
    theirs = _llama_cpp(on_fewer, grid)
    if theirs is not None:
        assert lost < np.square(theirs - on_fewer).mean()
    # The largest multiples of powers of two are exact, and so are codes that use all levels except one.
    codes = np.random.default_rng(6).integers(0, grid.qmax, (256, 32)).astype(np.float32)
    codes[:, :2] = 0, grid.qmax - 1
    exact = ((codes - 2) * np.float32(63 / 256)).reshape(16, 512)
    np.testing.assert_array_equal(deployed(exact, grid), exact)


def test_every_grid_of_super_blocks_is_tested():
    assert set(GRIDS) == {s for held in FORMATS.values() for s in held.linears if getattr(s, "block_size", 0)}
