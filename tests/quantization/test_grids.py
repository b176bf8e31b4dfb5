"""The grids' ends, steps and sizes, against llama.cpp's and compressed-tensors' own tables and by hand."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils.helpers import calculate_range

from autodistill.errors import InputError
from autodistill.models.tensors import Role, TensorSpec
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
    Grid,
    check_tensor,
    integer_grid,
)

SINGLE, BLOCKS = (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, MXFP4), (Q2_K, Q3_K, Q4_K, Q5_K, Q6_K)


def _named(grid: Grid) -> str:
    return grid.name


@pytest.mark.parametrize("grid", SINGLE + BLOCKS, ids=_named)
def test_a_block_holds_as_many_weights_and_bytes_as_in_ggml(grid: Grid) -> None:
    """Bytes of codes, of scales and possibly minima, and of the units of super-blocks."""
    kind = gguf.GGMLQuantizationType[grid.name.removeprefix("gguf-").upper()]
    weights, size = gguf.GGML_QUANT_SIZES[kind]
    assert (grid.block_size or grid.group_size) == weights
    parts = 1 if grid.symmetric else 2
    if grid.block_size:
        beside = grid.groups_per_block * grid.multiplier_bits * parts // 8 + grid.scale_bytes * parts
    else:
        beside = grid.scale_bytes * parts
        assert grid.groups_per_block == 1
    assert grid.bits * weights // 8 + beside == size


def test_codebooks_are_ggml_s() -> None:
    for grid, theirs in ((IQ4_NL, gguf.quants.IQ4_NL), (MXFP4, gguf.quants.MXFP4)):
        assert grid.codebook == tuple(theirs.kvalues)
        assert (grid.qmin, grid.qmax) == (min(theirs.kvalues), max(theirs.kvalues))


@pytest.mark.parametrize("grid", [IQ4_NL, MXFP4], ids=_named)
def test_the_nearest_code_of_each_half_step_is_found_by_hand(grid: Grid) -> None:
    steps = [grid.qmin + half / 2 for half in range(2 * (grid.qmax - grid.qmin) + 1)]
    # Of two codes that are equally near the larger one counts.
    assert grid.nearest.tolist() == [min(grid.codebook, key=lambda code: (abs(code - at), -code)) for at in steps]
    assert grid.nearest.dtype == np.float32


@pytest.mark.parametrize(
    ("grid", "reach"),
    [
        (Q4_0, (-8.5, 7.5)),
        (Q4_1, (-0.5, 15.5)),
        (Q8_0, (-127.5, 127.5)),
        (Q6_K, (-32.5, 31.5)),
        (IQ4_NL, (-127 - 23 / 2, 113 + 24 / 2)),
        (MXFP4, (-14, 14)),
    ],
    ids=lambda one: one.name if isinstance(one, Grid) else "",
)
def test_weights_are_clipped_half_a_step_beyond_the_ends(grid: Grid, reach: tuple[float, float]) -> None:
    assert grid.reach == reach


def test_codes_of_a_scale_s_own_rule_have_the_ends_of_llama_cpp() -> None:
    """llama.cpp's quantisers: the value with the largest magnitude becomes the lowest code, or the whole range counts.

    K-quants with minima count from 0, and those without from the lowest code.
    """
    ends = {
        Q4_0: (-8, 7, -8.0),
        Q4_1: (0, 15, 15.0),
        Q5_0: (-16, 15, -16.0),
        Q5_1: (0, 31, 31.0),
        Q8_0: (-127, 127, 127.0),
        Q2_K: (0, 3, 3.0),
        Q3_K: (-4, 3, -4.0),
        Q4_K: (0, 15, 15.0),
        Q5_K: (0, 31, 31.0),
        Q6_K: (-32, 31, -32.0),
    }
    assert {grid: (grid.qmin, grid.qmax, grid.divisor) for grid in ends} == ends
    assert {grid: grid.levels for grid in (Q4_0, Q5_0, Q8_0, Q3_K, Q4_1, Q2_K)} == {
        Q4_0: 7,
        Q5_0: 15,
        Q8_0: 127,
        Q3_K: 3,
        Q4_1: 15,
        Q2_K: 3,
    }


def test_multiples_of_a_unit_use_all_their_bits_and_one_for_the_sign() -> None:
    largest = {Q2_K: 15, Q3_K: 31, Q4_K: 63, Q5_K: 63, Q6_K: 127}
    assert {grid: grid.largest_multiplier for grid in largest} == largest


def test_rows_that_super_blocks_do_not_divide_go_where_llama_cpp_puts_them() -> None:
    """llama.cpp's `tensor_type_fallback`, with Q4_0 in place of IQ4_NL."""
    instead = {Q2_K: Q4_0, Q3_K: Q4_0, Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0}
    assert {grid: grid.fallback for grid in instead} == instead
    assert all(grid.fallback is None for grid in SINGLE)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_integer_codes_have_the_range_of_compressed_tensors(bits: int, symmetric: bool) -> None:
    low, high = (int(one) for one in calculate_range(QuantizationArgs(num_bits=bits, symmetric=symmetric), "cpu"))
    grid = integer_grid(bits, 64, symmetric)
    assert (grid.qmin, grid.qmax) == (low, high)
    # Its `calculate_qparams` divides the absolute maximum by half of the range's length, or the range by the whole.
    assert grid.divisor == (high - low) / 2 if symmetric else high - low
    assert grid.levels == (high if symmetric else high - low)
    assert grid.symmetric == symmetric
    # Its scales are in 16 bits. A whole row is one group.
    assert (grid.scale_bytes, grid.group(96), integer_grid(bits, 0, symmetric).group(96)) == (2, 64, 96)


def test_names_say_bits_groups_and_offsets() -> None:
    asked = [(4, 64, True), (8, 0, True), (3, 128, False)]
    names = ["int4-g64", "int8-row", "int3-g128-asym"]
    assert [integer_grid(*one).name for one in asked] == [f"compressed-tensors-{name}" for name in names]


def _matrix(columns: int) -> TensorSpec:
    return TensorSpec(name="up.weight", role=Role.LINEAR, shape=(8, columns))


def test_rows_are_of_whole_groups_or_super_blocks() -> None:
    assert [Q4_0.divides(columns) for columns in (32, 48, 64)] == [True, False, True]
    assert [Q4_K.divides(columns) for columns in (32, 256, 512, 544)] == [False, True, True, False]
    assert all(integer_grid(4, 0, True).divides(columns) for columns in (1, 31, 256))
    check_tensor(_matrix(48), "f16")
    check_tensor(_matrix(256), Q4_K)
    for grid, columns, said in (
        (Q4_0, 48, "the groups of 32 of gguf-q4_0 do not divide: choose a smaller group, or a format without groups"),
        (
            Q4_K,
            48,
            "the blocks of 256 of gguf-q4_k, nor the groups of 32 that stand in for them, do not divide: choose a "
            "format without groups",
        ),
    ):
        with pytest.raises(InputError) as refused:
            check_tensor(_matrix(columns), grid)
        assert str(refused.value) == f"up.weight has rows of {columns} weights, which {said}"
    vector = TensorSpec(name="norm.weight", role=Role.NORM, shape=(256,))
    check_tensor(vector, "f32")
    with pytest.raises(InputError, match=r"norm\.weight of shape \[256\] is no matrix: gguf-q8_0 cannot hold it"):
        check_tensor(vector, Q8_0)
