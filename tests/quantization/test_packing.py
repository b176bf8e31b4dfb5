"""Codes and bytes, against the tools that define the formats: `gguf.quants` and the `compressed-tensors` package."""

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from autodistill.errors import InputError
from autodistill.quantization import packing
from autodistill.quantization.formats import get_format
from autodistill.quantization.grids import (
    IQ4_NL,
    MXFP4,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    Scales,
)
from autodistill.quantization.k_quants import fitted, stored
from autodistill.quantization.loops import k_quants as compiled
from autodistill.quantization.packing import (
    deployed,
    dequantize,
    from_bf16_bits,
    pack,
    quantize,
    to_bf16_bits,
    unpack,
    unpack_codes,
)
from autodistill.quantization.rounding import deploy_tensor
from tests.thinned import thinned

INTEGERS = get_format("compressed-tensors").linears
GGUF = [Q4_0, Q4_1, Q5_0, Q5_1, Q8_0]
BLOCKS = [Q2_K, Q3_K, Q4_K, Q5_K, Q6_K]
CODEBOOKS = [IQ4_NL, MXFP4]
GRIDS = [*GGUF, *BLOCKS, *CODEBOOKS, *INTEGERS]
QTYPES = {
    grid.name: gguf.GGMLQuantizationType[grid.name.removeprefix("gguf-").upper()]
    for grid in [*GGUF, *BLOCKS, *CODEBOOKS]
}


def _weights():
    random = np.random.default_rng(0)
    normal = random.standard_normal((16, 128)).astype(np.float32)
    ties = random.integers(-4, 5, (16, 128)).astype(np.float32)
    # The package cannot read back 4-bit zero points of 8 rows or fewer, which fit one word.
    zeros = np.zeros((12, 64), np.float32)
    return {
        "normal": normal,
        "heavy-tailed": normal**9,
        "tied magnitudes": ties,
        "negative zero": -zeros,
        "zero": zeros,
        "one zero group": np.concatenate([normal[:, :64], 0 * normal[:, 64:]], axis=1),
        "scales below float16's normals": normal * np.float32(1e-5),
        "scales that are zero in float16": normal * np.float32(1e-9),
        "large": normal * np.float32(1e4),
        "odd row": normal[:, :96][:12],
    }


WEIGHTS = _weights()


def _bits(values):
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


def test_scales_that_are_powers_of_two_have_the_bytes_of_their_exponents() -> None:
    """An e8m0 exponent is one less because codes are halves: from 2^-128, which is subnormal in float32, to 2^126."""
    codes = np.arange(255)
    values = np.ldexp(np.float32(1), codes - 128).astype(np.float32).reshape(5, 51)
    stored = packing._scale_bytes(values, MXFP4)
    assert stored.shape == (5, 51, 1)
    np.testing.assert_array_equal(stored.ravel(), codes)
    np.testing.assert_array_equal(packing._scales_of(stored, MXFP4).ravel(), values.ravel())


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("grid", GGUF, ids=lambda grid: grid.name)
def test_gguf_blocks_are_those_of_gguf_quants(grid, weights):
    if grid.offset == "minimum":
        weights = weights.clip(-60000, 60000)  # the range of float16
    packed = pack(weights, grid)["data"]
    np.testing.assert_array_equal(packed, gguf.quants.quantize(weights, QTYPES[grid.name]))
    expected = gguf.quants.dequantize(packed, QTYPES[grid.name])
    np.testing.assert_array_equal(_bits(unpack({"data": packed}, grid, weights.shape)), _bits(expected))
    np.testing.assert_array_equal(_bits(deployed(weights, grid)), _bits(expected))


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("grid", BLOCKS, ids=lambda grid: grid.name)
def test_super_blocks_are_read_by_gguf_as_they_were_meant(grid, weights):
    weights = np.tile(weights, (4, 1))[:, :64].reshape(-1, 256)
    packed = pack(weights, grid)["data"]
    expected = gguf.quants.dequantize(packed, QTYPES[grid.name])
    np.testing.assert_array_equal(_bits(unpack({"data": packed}, grid, weights.shape)), _bits(expected))
    np.testing.assert_array_equal(_bits(deployed(weights, grid)), _bits(expected))


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("grid", CODEBOOKS, ids=lambda grid: grid.name)
def test_codebooks_are_read_by_gguf_as_they_were_meant_and_lose_no_more_than_by_their_own_tools(grid, weights):
    packed = pack(weights, grid)["data"]
    expected = gguf.quants.dequantize(packed, QTYPES[grid.name])
    np.testing.assert_array_equal(_bits(unpack({"data": packed}, grid, weights.shape)), _bits(expected))
    np.testing.assert_array_equal(_bits(deployed(weights, grid)), _bits(expected))
    groups = weights.reshape(-1, 32).astype(np.float64)
    lost = np.square(expected.reshape(-1, 32) - groups).sum(axis=1)
    size = np.square(groups).sum(axis=1)
    if grid is MXFP4:
        theirs = gguf.quants.dequantize(gguf.quants.quantize(weights, QTYPES[grid.name]), QTYPES[grid.name])
        assert (lost <= np.square(theirs.reshape(-1, 32) - groups).sum(axis=1) + 1e-6 * size).all()
    else:
        # llama.cpp's rule without its search, in float64: the largest weight gets the smallest code.
        first = np.take_along_axis(groups, np.abs(groups).argmax(axis=1)[:, None], axis=1)
        book = np.array(grid.codebook, np.float64)
        scales = (first / -127).astype(np.float16).astype(np.float64)
        nearest = np.abs(groups[:, :, None] - scales[:, :, None] * book).argmin(axis=2)
        plain = np.square(scales * book[nearest] - groups).sum(axis=1)
        # With scales that float16 holds coarsely, either may be better.
        assert lost.sum() <= plain.sum() + 1e-6 * size.sum() or np.abs(groups).max() < 1e-3


@pytest.mark.parametrize("grid", CODEBOOKS, ids=lambda grid: grid.name)
def test_any_block_of_a_codebook_is_read_as_gguf_reads_it_and_packs_again_to_its_values(grid):
    kind = QTYPES[grid.name]
    random = np.random.default_rng(3)
    packed = random.integers(0, 256, (300, 4 * gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    if grid is MXFP4:
        packed[:256, 0] = np.arange(256)
    expected = gguf.quants.dequantize(packed, kind)
    rows = np.isfinite(expected).all(axis=1)  # a random scale may be NaN, which no real file has
    packed, expected = packed[rows], expected[rows]
    found = unpack({"data": packed}, grid, expected.shape)
    np.testing.assert_array_equal(found, expected)
    own = unpack_codes({"data": packed}, grid, expected.shape)[1]
    usual = (np.abs(own.scales) > 2.0**-120).all(axis=1)
    assert usual.sum() > 200
    given = Scales(own.scales[usual])
    again = pack(expected[usual], grid, given)["data"]
    np.testing.assert_array_equal(unpack({"data": again}, grid, expected[usual].shape), expected[usual])


@pytest.mark.parametrize("grid", CODEBOOKS, ids=lambda grid: grid.name)
def test_torch_and_compiled_loops_find_the_codebook_scales_of_numpy(grid):
    for name, weights in WEIGHTS.items():
        groups = weights.reshape(-1, 32)
        mine = fitted(groups, grid, np)[0]
        for search in (None, compiled.nearest):
            theirs = fitted(torch.from_numpy(groups), grid, torch, search=search)[0]
            np.testing.assert_array_equal(_bits(mine), _bits(theirs.numpy()), err_msg=name)


@pytest.mark.parametrize("grid", BLOCKS, ids=lambda grid: grid.name)
def test_any_super_block_is_read_as_gguf_reads_it(grid):
    kind = QTYPES[grid.name]
    random = np.random.default_rng(3)
    packed = random.integers(0, 256, (40, 3 * gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    packed[:20] |= random.integers(0, 2, packed[:20].shape, dtype=np.uint8) * np.uint8(255)
    expected = gguf.quants.dequantize(packed, kind)
    # A random unit may be infinite or NaN, which no real file has.
    usual = np.isfinite(expected.reshape(-1, 256)).all(axis=-1)
    assert usual.sum() > 60
    found = unpack({"data": packed}, grid, (40, 768))
    np.testing.assert_array_equal(_bits(found).reshape(-1, 256)[usual], _bits(expected).reshape(-1, 256)[usual])


def _theirs(weights, grid):
    """Return what the package compresses to, with its own scales and zero points, and what it reads back."""
    args = QuantizationArgs(
        num_bits=grid.bits,
        group_size=grid.group_size or None,
        strategy=QuantizationStrategy.GROUP if grid.group_size else QuantizationStrategy.CHANNEL,
        symmetric=grid.symmetric,
        scale_dtype=torch.bfloat16,
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    tensor = torch.from_numpy(weights)
    groups = tensor.unflatten(-1, (-1, grid.group_size or weights.shape[1]))
    scale, zero_point = calculate_qparams(groups.amin(-1), groups.amax(-1), args)
    state = {"weight": tensor, "weight_scale": scale.to(torch.bfloat16), "weight_zero_point": zero_point}
    packed = PackedQuantizationCompressor.compress(state, scheme)
    read = PackedQuantizationCompressor.decompress(packed, scheme)["weight"]
    assert read.dtype == torch.bfloat16
    return packed, read.float().numpy()


def _same_arrays(ours, theirs):
    assert set(ours) == set(theirs)
    for name, values in theirs.items():
        bits = values.view(torch.uint16) if values.dtype == torch.bfloat16 else values
        np.testing.assert_array_equal(ours[name], bits.numpy(), err_msg=name)


@pytest.mark.parametrize("grid", INTEGERS, ids=lambda grid: grid.name)
def test_compressed_tensors_are_those_of_its_package(grid):
    for name, weights in WEIGHTS.items():
        if weights.shape[1] % (grid.group_size or 1):
            continue
        theirs, read = _theirs(weights, grid)
        ours = pack(weights, grid)
        _same_arrays(ours, theirs)
        np.testing.assert_array_equal(_bits(unpack(ours, grid, weights.shape)), _bits(read), err_msg=name)
        np.testing.assert_array_equal(_bits(deployed(weights, grid)), _bits(read), err_msg=name)


@pytest.mark.parametrize("grid", INTEGERS, ids=lambda grid: grid.name)
def test_given_scales_are_packed_as_the_package_packs_them(grid):
    weights = WEIGHTS["normal"]
    _, found = quantize(weights, grid)
    given = Scales(from_bf16_bits(to_bf16_bits(found.scales * np.float32(0.7))), found.offsets)
    args = QuantizationArgs(
        num_bits=grid.bits,
        group_size=grid.group_size or None,
        strategy=QuantizationStrategy.GROUP if grid.group_size else QuantizationStrategy.CHANNEL,
        symmetric=grid.symmetric,
    )
    zero_point = None if given.offsets is None else torch.from_numpy(given.offsets.astype(np.int8))
    state = {"weight": torch.from_numpy(weights), "weight_scale": torch.from_numpy(given.scales).bfloat16()}
    state |= {"weight_zero_point": zero_point} if zero_point is not None else {}
    theirs = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
    ours = pack(weights, grid, given)
    _same_arrays(ours, theirs)
    np.testing.assert_array_equal(unpack(ours, grid, weights.shape), deployed(weights, grid, given))


@pytest.mark.parametrize("grid", GGUF, ids=lambda grid: grid.name)
def test_given_scales_are_read_by_gguf_as_they_were_meant(grid):
    weights = WEIGHTS["normal"].copy()
    weights[0, 0] = 100  # far outside the range of the codes
    _, found = quantize(WEIGHTS["normal"], grid)
    given = Scales((found.scales * np.float32(0.7)).astype(np.float16).astype(np.float32), found.offsets)
    given.scales[1, 0] = 0
    packed = pack(weights, grid, given)["data"]
    read = gguf.quants.dequantize(packed, QTYPES[grid.name])
    np.testing.assert_array_equal(read, deployed(weights, grid, given))
    scales, offset = (np.repeat(v, 32, axis=1).astype(np.float64) if v is not None else 0 for v in given)
    codes = np.clip((weights - offset) / np.where(scales == 0, np.inf, scales), grid.qmin, grid.qmax)
    assert (np.abs(read - (codes * scales + offset)) <= np.abs(scales) * (0.5 + 1e-6)).all()


@pytest.mark.parametrize("grid", BLOCKS, ids=lambda grid: grid.name)
def test_given_scales_are_held_by_super_blocks_as_they_were_meant(grid):
    weights = WEIGHTS["normal"].reshape(-1, 256).copy()
    weights[0, 0] = 100  # far outside the range of the codes
    _, found = quantize(WEIGHTS["normal"].reshape(-1, 256), grid)
    found.scales[1, 0] = 0
    given = Scales(stored(found.scales * np.float32(0.7), grid, np), found.offsets)
    packed = pack(weights, grid, given)["data"]
    read = gguf.quants.dequantize(packed, QTYPES[grid.name])
    np.testing.assert_array_equal(_bits(read), _bits(deployed(weights, grid, given)))
    scales, offset = (np.repeat(v, grid.group_size, axis=1).astype(np.float64) if v is not None else 0 for v in given)
    codes = np.clip((weights - offset) / np.where(scales == 0, np.inf, scales), grid.qmin, grid.qmax)
    assert (np.abs(read - (codes * scales + offset)) <= np.abs(scales) * (0.5 + 1e-6) + 1e-7).all()


def test_a_row_of_odd_groups_is_no_matter_to_compressed_tensors():
    weights = WEIGHTS["odd row"]
    grids = {(grid.bits, grid.group_size): grid for grid in INTEGERS if grid.symmetric}
    assert pack(weights, grids[4, 32])["weight_packed"].shape == (12, 12)
    with pytest.raises(ValueError):
        quantize(weights, grids[4, 64])


def test_q8_0_rounds_halves_away_from_zero_and_q4_0_up():
    eighths = np.zeros((1, 32), np.float32)
    eighths[0, :4] = [127, 2.5, -2.5, 0.49999997]
    assert quantize(eighths, Q8_0)[0][0, :4].tolist() == [127, 3, -3, 0]
    eighths[0, :4] = [-8, 2.5, -2.5, 8]
    assert quantize(eighths, Q4_0)[0][0, :4].tolist() == [-8, 3, -2, 7]


@pytest.mark.parametrize("dtype", ["f16", "bf16", "f32"])
def test_floats_are_rounded_as_torch_rounds_them(dtype):
    weights = np.concatenate([values.reshape(-1) for values in WEIGHTS.values()]).clip(-65504, 65504).reshape(-1, 32)
    expected = torch.from_numpy(weights).to({"f16": torch.float16, "bf16": torch.bfloat16, "f32": torch.float32}[dtype])
    packed = pack(weights, dtype)["data"]
    np.testing.assert_array_equal(packed.view(np.uint8), expected.view(torch.uint8).numpy())
    np.testing.assert_array_equal(
        _bits(unpack({"data": packed}, dtype, weights.shape)), _bits(expected.float().numpy())
    )
    np.testing.assert_array_equal(_bits(deployed(weights, dtype)), _bits(expected.float().numpy()))


def test_bfloat16_covers_every_kind_of_float():
    bits = np.random.default_rng(1).integers(0, 2**32, 100_000, dtype=np.uint32)
    values = np.concatenate([bits.view(np.float32), np.float32([np.inf, -np.inf, 0.0, -0.0, 3.4e38, 1e-45])])
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(from_bf16_bits(to_bf16_bits(values)), expected)


@pytest.mark.parametrize("storage", [*GGUF, *BLOCKS, "f16"], ids=str)
def test_what_float16_cannot_hold_is_refused(storage):
    with pytest.raises(InputError, match=r"cannot hold a weight of 1e\+09"):
        pack(np.array([[1e9, *[0] * 255]], np.float32), storage)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_learned_scales_that_are_not_finite_are_refused_as_such(grid, value):
    """The error must not blame weights that the format can hold. It must blame weights that are not finite."""
    weights = np.ones((2, 256), np.float32)
    learned = quantize(weights, grid)[1]
    learned.scales[1, 0] = value
    with pytest.raises(InputError, match=f"a learned scale is not finite, or beyond float16, .* as {grid.name}: train"):
        pack(weights, grid, learned)
    weights[0, 3] = np.nan
    with pytest.raises(InputError, match="weights that are not finite"):
        pack(weights, grid, learned)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(grid, value):
    weights = np.ones((2, 256), np.float32)
    weights[1, 5] = value
    with pytest.raises(InputError, match="not finite cannot be packed"):
        pack(weights, grid)


def _matrices(grid):
    unit = grid.block_size or grid.group_size or 20
    sizes = st.tuples(st.integers(1, 3), st.integers(1, 3).map(lambda units: units * unit))
    # The range in which float16 still holds Q4_0's scale, and a minimum.
    largest = 6e4 if grid.offset == "minimum" else 5e5
    return npst.arrays(np.float32, sizes, elements=st.floats(-largest, largest, width=32))


@pytest.mark.parametrize("grid", thinned(GRIDS), ids=lambda grid: grid.name)
def test_packing_and_unpacking_are_inverse_on_the_grid(grid):
    @settings(max_examples=15, deadline=None)
    @given(_matrices(grid), st.integers(0, 2**32 - 1))
    def check(weights, seed):
        codes, scales = quantize(weights, grid)
        assert codes.min() >= grid.qmin
        assert codes.max() <= grid.qmax
        on_grid = dequantize(codes, scales, grid)
        packed = pack(weights, grid)
        np.testing.assert_array_equal(unpack(packed, grid, weights.shape), on_grid)
        if grid.codebook:
            held = scales.scales[..., None, None].astype(np.float64) * np.unique(grid.codebook)
            groups = weights.reshape(*scales.scales.shape, -1).astype(np.float64)
            nearest = np.abs(groups[..., None] - held).min(axis=-1)
            size = np.abs(groups).max(axis=-1, keepdims=True)
            assert (np.abs(on_grid.reshape(groups.shape) - groups) <= nearest + 1e-5 * size + 2.0**-120).all()
        if grid.searched:
            # Values that were read have the same bytes when they are packed again with their own scales.
            np.testing.assert_array_equal(pack(on_grid, grid, scales)["data"], packed["data"])
            return
        if grid.container == "gguf" and grid.symmetric:
            # Values that were read are packed to bytes that read the same.
            np.testing.assert_array_equal(unpack(pack(on_grid, grid), grid, weights.shape), on_grid)
        groups = weights.reshape(*scales.scales.shape, -1)
        # The error is half a step, or up to a step if the code was clipped, plus the error of rounding the scale.
        clipped = grid.divisor != 127 and grid.offset != "minimum"
        size = max(1, grid.levels / 128) * np.abs(groups).max(axis=-1, keepdims=True)
        rounded = 2.0**-8 * size + 2.0**-24 * 128
        steps = np.abs(scales.scales)[..., None] * (1.01 if clipped else 0.51) + rounded
        assert (np.abs(on_grid.reshape(groups.shape) - groups) <= steps).all()

    check()


def test_one_added_is_taken_off_exactly() -> None:
    dice = np.random.default_rng(0)
    weights = (dice.normal(size=4000) * 2.0 ** dice.integers(-30, 8, 4000)).astype(np.float32)
    weights[:4] = [0, -1, -0.5, 3e-8]
    seen = deployed(weights, "f32_plus_1")
    np.testing.assert_allclose(seen, weights, rtol=0, atol=2.0**-17)
    # A norm multiplies by the same factors, and storing the result again changes nothing.
    np.testing.assert_array_equal(np.float32(1) + seen, np.float32(1) + weights)
    np.testing.assert_array_equal(deployed(seen, "f32_plus_1"), seen)
    stored = pack(weights, "f32_plus_1")
    np.testing.assert_array_equal(stored["data"], (torch.from_numpy(weights) + 1).numpy())
    np.testing.assert_array_equal(unpack(stored, "f32_plus_1", weights.shape), seen)
    np.testing.assert_array_equal(deploy_tensor(torch.from_numpy(weights), "f32_plus_1").numpy(), seen)
