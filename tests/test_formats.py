"""Packing against the tools that own the formats: `gguf.quants` and the `compressed-tensors` package."""

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme, QuantizationStrategy
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from autodistill.errors import InputError
from autodistill.formats import (
    FORMATS,
    Q4_0,
    Q8_0,
    Grid,
    Role,
    TensorSpec,
    deployed,
    dequantize,
    from_bf16_bits,
    get_format,
    pack,
    quantize,
    tensor_bytes,
    to_bf16_bits,
    unpack,
    weights_bytes,
)

SYMMETRIC = get_format("compressed-tensors").linears
GRIDS = [Q4_0, Q8_0, *SYMMETRIC]
CHOICES = [(packing, *pair) for packing in FORMATS.values() for pair in packing.packings]
QTYPES = {Q4_0.name: gguf.GGMLQuantizationType.Q4_0, Q8_0.name: gguf.GGMLQuantizationType.Q8_0}


def _weights():
    random = np.random.default_rng(0)
    normal = random.standard_normal((16, 128)).astype(np.float32)
    ties = random.integers(-4, 5, (16, 128)).astype(np.float32)
    zeros = np.zeros((4, 64), np.float32)
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
        "odd row": normal[:, :96][:3],
    }


WEIGHTS = _weights()


def _bits(values):
    return np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)


@pytest.mark.parametrize("weights", WEIGHTS.values(), ids=WEIGHTS)
@pytest.mark.parametrize("grid", [Q4_0, Q8_0], ids=lambda grid: grid.name)
def test_gguf_blocks_are_those_of_gguf_quants(grid, weights):
    packed = pack(weights, grid)["data"]
    np.testing.assert_array_equal(packed, gguf.quants.quantize(weights, QTYPES[grid.name]))
    expected = gguf.quants.dequantize(packed, QTYPES[grid.name])
    np.testing.assert_array_equal(_bits(unpack({"data": packed}, grid, weights.shape)), _bits(expected))
    np.testing.assert_array_equal(_bits(deployed(weights, grid)), _bits(expected))


def _their_scheme(grid):
    args = QuantizationArgs(
        num_bits=grid.bits,
        group_size=grid.group_size,
        strategy=QuantizationStrategy.GROUP,
        symmetric=True,
        scale_dtype=torch.bfloat16,
    )
    return QuantizationScheme(targets=["Linear"], weights=args)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "odd row"])
@pytest.mark.parametrize("grid", SYMMETRIC, ids=lambda grid: grid.name)
def test_compressed_tensors_are_those_of_its_package(grid, name):
    weights, scheme = WEIGHTS[name], _their_scheme(grid)
    tensor = torch.from_numpy(weights)
    scale, _ = compute_dynamic_scales_and_zp(tensor, scheme.weights, torch.nn.Identity())
    state = {"weight": tensor, "weight_scale": scale.to(torch.bfloat16)}
    theirs = PackedQuantizationCompressor.compress(state, scheme)

    ours = pack(weights, grid)
    np.testing.assert_array_equal(ours["weight_packed"], theirs["weight_packed"].numpy())
    np.testing.assert_array_equal(ours["weight_scale"], theirs["weight_scale"].view(torch.uint16).numpy())
    np.testing.assert_array_equal(ours["weight_shape"], theirs["weight_shape"].numpy())

    read = PackedQuantizationCompressor.decompress(theirs, scheme)["weight"]
    assert read.dtype == torch.bfloat16
    np.testing.assert_array_equal(_bits(unpack(ours, grid, weights.shape)), _bits(read.float().numpy()))
    np.testing.assert_array_equal(_bits(deployed(weights, grid)), _bits(read.float().numpy()))


def test_a_row_of_odd_groups_is_no_matter_to_compressed_tensors():
    weights = WEIGHTS["odd row"]
    grid = next(grid for grid in SYMMETRIC if (grid.bits, grid.group_size) == (4, 32))
    assert pack(weights, grid)["weight_packed"].shape == (3, 12)
    with pytest.raises(ValueError):
        quantize(weights, next(grid for grid in SYMMETRIC if grid.group_size == 64))


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


@pytest.mark.parametrize("storage", [Q4_0, Q8_0, "f16"], ids=str)
def test_what_float16_cannot_hold_is_refused(storage):
    with pytest.raises(InputError, match=r"cannot hold a weight of 1e\+09"):
        pack(np.full((1, 32), 1e9, np.float32), storage)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(grid, value):
    weights = np.ones((2, 64), np.float32)
    weights[1, 5] = value
    with pytest.raises(InputError, match="not finite cannot be packed"):
        pack(weights, grid)


def _matrices(grid):
    sizes = st.tuples(st.integers(1, 3), st.integers(1, 3).map(lambda groups: groups * grid.group_size))
    # Up to where float16 still holds Q4_0's scale.
    return npst.arrays(np.float32, sizes, elements=st.floats(-5e5, 5e5, width=32))


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.name)
def test_packing_and_unpacking_are_inverse_on_the_grid(grid):
    @settings(max_examples=60, deadline=None)
    @given(_matrices(grid), st.integers(0, 2**32 - 1))
    def check(weights, seed):
        codes, scales = quantize(weights, grid)
        assert codes.min() >= grid.qmin
        assert codes.max() <= grid.qmax
        on_grid = dequantize(codes, scales, grid)
        np.testing.assert_array_equal(unpack(pack(weights, grid), grid, weights.shape), on_grid)
        if grid.container == "gguf":
            # What was read packs to bytes that read the same.
            np.testing.assert_array_equal(unpack(pack(on_grid, grid), grid, weights.shape), on_grid)
        # The error is half a step, or up to a step where the code was clipped, and what rounding the scale adds.
        rounded = 2.0**-8 * np.abs(weights).reshape(*scales.shape, grid.group_size).max(axis=-1, keepdims=True)
        steps = np.abs(scales)[..., None] * (1.01 if grid.divisor != 127 else 0.51) + rounded + 2.0**-24 * 128
        assert (np.abs(on_grid - weights).reshape(*scales.shape, -1) <= steps).all()

    check()


@pytest.mark.parametrize(("packing", "bits", "group_size"), CHOICES, ids=[c[0].label(*c[1:]) for c in CHOICES])
@pytest.mark.parametrize("role", list(Role))
def test_bytes_counted_are_bytes_packed(packing, bits, group_size, role):
    @settings(max_examples=15, deadline=None)
    @given(st.integers(1, 4), st.integers(1, 4))
    def check(rows, groups):
        shape = (rows, 64 * groups) if role not in (Role.NORM, Role.BIAS) else (64 * groups,)
        tensor = TensorSpec(name="t", role=role, shape=shape)
        weights = np.random.default_rng(2).standard_normal(shape).astype(np.float32)
        arrays = pack(weights, packing.storage(tensor, bits, group_size))
        assert tensor_bytes(tensor, packing, bits, group_size) == sum(array.nbytes for array in arrays.values())

    check()


def test_a_models_bytes_are_those_of_its_tensors():
    tensors = [
        TensorSpec(name="embed", role=Role.EMBEDDING, shape=(100, 64)),
        TensorSpec(name="up", role=Role.LINEAR, shape=(128, 64)),
        TensorSpec(name="norm", role=Role.NORM, shape=(64,)),
    ]
    # 34 bytes a block of 32 at 8 bits, 18 at 4 bits, norms at 4 bytes each.
    assert weights_bytes(tensors, get_format("gguf-q4_0"), 4, 32) == 200 * 34 + 256 * 18 + 64 * 4
    assert weights_bytes(tensors, get_format("gguf-q8_0"), 8, 32) == 200 * 34 + 256 * 34 + 64 * 4
    assert weights_bytes(tensors, get_format("gguf-f16"), 16, 0) == 6400 * 2 + 8192 * 2 + 64 * 4
    assert weights_bytes(tensors, get_format("huggingface"), 16, 0) == (6400 + 8192 + 64) * 2
    int4 = weights_bytes(tensors, get_format("compressed-tensors"), 4, 64)
    assert int4 == 6400 * 2 + 8192 // 2 + 128 * 2 + 16 + 64 * 2


def test_each_tensor_has_its_storage():
    def held(name, role, bits, group_size, shape=(64, 64)):
        storage = get_format(name).storage(TensorSpec(name="t", role=role, shape=shape), bits, group_size)
        return storage.name if isinstance(storage, Grid) else storage

    assert held("gguf-q4_0", Role.LINEAR, 4, 32) == "gguf-q4_0"
    assert held("gguf-q4_0", Role.EMBEDDING, 4, 32) == "gguf-q8_0"
    assert held("gguf-q4_0", Role.HEAD, 4, 32) == "gguf-q8_0"
    assert held("gguf-q4_0", Role.NORM, 4, 32, (64,)) == "f32"
    assert held("gguf-f16", Role.LINEAR, 16, 0) == "f16"
    assert held("gguf-f16", Role.BIAS, 16, 0, (64,)) == "f32"
    assert held("compressed-tensors", Role.LINEAR, 4, 64) == "compressed-tensors-int4-g64"
    assert held("compressed-tensors", Role.EMBEDDING, 8, 32) == "bf16"
    assert held("huggingface", Role.NORM, 16, 0, (64,)) == "bf16"


def test_labels_name_the_choice_where_there_is_one():
    labels = [packing.label(bits, group_size) for packing, bits, group_size in CHOICES]
    assert len(set(labels)) == len(labels) == 8
    assert "gguf-q4_0" in labels
    assert "compressed-tensors-int4-g64" in labels


def test_impossible_choices_are_refused_with_the_possible_ones():
    with pytest.raises(InputError, match="no format 'q4'; the formats are gguf-f16, gguf-q8_0"):
        get_format("q4")
    with pytest.raises(InputError, match=r"cannot hold 4 bits in groups of 64; it holds 4 bits in groups of 32$"):
        get_format("gguf-q4_0").check(4, 64)
    with pytest.raises(InputError, match="huggingface cannot hold 8 bits in groups of 32; it holds 16 bits without"):
        get_format("huggingface").check(8, 32)


def test_a_tensor_that_the_groups_do_not_divide_is_refused_by_name():
    tensor = TensorSpec(name="layers.0.down.weight", role=Role.LINEAR, shape=(64, 96))
    get_format("compressed-tensors").storage(tensor, 4, 32)
    with pytest.raises(InputError, match=r"layers.0.down.weight has rows of 96 weights, which the groups of 64"):
        get_format("compressed-tensors").storage(tensor, 4, 64)
    with pytest.raises(InputError, match="is no matrix"):
        get_format("gguf-q8_0").storage(TensorSpec(name="conv", role=Role.LINEAR, shape=(4, 4, 32)), 8, 32)
