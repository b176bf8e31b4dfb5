"""Bit packing, without torch: from weights to integer codes, scales and stored bytes, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError
from autodistill.quantization.grids import Floats, FloatType, Grid, Scales, Storage
from autodistill.quantization.k_quant_bytes import Block, from_bytes, to_bytes
from autodistill.quantization.k_quants import fitted, held_on_block_grid, nearest_codes

Codes: TypeAlias = npt.NDArray[np.int8]
Arrays: TypeAlias = dict[str, npt.NDArray[Any]]

BF16_EPSILON = 2.0**-7
"""bfloat16's epsilon: the scale of a group in compressed-tensors whose own scale would be 0."""


def to_bf16_bits(values: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """Round float32 to bfloat16, to nearest with ties to even, and return its bits; NaN stays NaN."""
    array = np.ascontiguousarray(values, dtype=np.float32)
    bits = array.view(np.uint32)
    # Add half a unit of the last kept place, minus 1 if that place is even; the carry does the rounding. A NaN could
    # carry into infinity, so it gets the quiet bit instead.
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
        np.uint16
    )
    return np.where(np.isnan(array), ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16), rounded)


def from_bf16_bits(bits: npt.NDArray[np.uint16]) -> Floats:
    """Return the float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to(values: Floats, dtype: FloatType) -> Floats:
    """Round values to `dtype` and return them as float32; values beyond float16's range become infinite."""
    if dtype == "bf16":
        return from_bf16_bits(to_bf16_bits(values))
    if dtype == "f32_plus_1":
        # Subtracting 1 again is exact, and so is adding it once more: a model computes the same from both.
        return (values.astype(np.float32) + np.float32(1)) - np.float32(1)
    with np.errstate(over="ignore"):
        return values.astype(np.float16 if dtype == "f16" else np.float32).astype(np.float32)


def quantize(weights: Floats, grid: Grid, scales: Scales | None = None) -> tuple[Codes, Scales]:
    """Put weights on a grid.

    A scale that float16 cannot hold becomes infinite, as in llama.cpp; `pack` refuses it.

    Args:
        weights: float32 [out, in], `in` a multiple of the group size.
        grid: The grid.
        scales: Scales and offsets to use, as stored, such as learned ones; by default they follow from the weights.
            Under a scale of 0 every weight of the group is read as 0, or as the minimum.

    Returns:
        Codes, int8 [out, in], and the scales and offsets that are stored with them.
    """
    columns = weights.shape[1]
    groups = np.asarray(weights, dtype=np.float32).reshape(weights.shape[0], -1, grid.group(columns))
    with np.errstate(all="ignore"):
        if scales is None:
            scales, steps = _fitted(groups, grid)
            rounded = _round(steps, grid)
        else:
            rounded = _nearest(_steps(groups, scales, grid), grid)
        codes = rounded.clip(grid.qmin, grid.qmax).astype(np.int8)
    return codes.reshape(weights.shape), scales


def _fitted(groups: Floats, grid: Grid) -> tuple[Scales, Floats]:
    """Return the scales and offsets of groups [out, groups, group], and the weights in grid steps."""
    offsets = None
    if grid.searched:
        found, minima = fitted(groups.reshape(-1, groups.shape[-1]), grid, np)
        shape = groups.shape[:2]
        given = Scales(found.reshape(shape), None if minima is None else minima.reshape(shape))
        return given, _steps(groups, given, grid)
    if grid.scale_rule == "range":
        low, high = groups.min(axis=-1, keepdims=True), groups.max(axis=-1, keepdims=True)
        if grid.offset == "zero_point":
            low, high = np.minimum(low, 0), np.maximum(high, 0)
        extent = high - low
    elif grid.scale_rule == "signed_absmax":
        extent = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)
    else:
        extent = np.abs(groups).max(axis=-1, keepdims=True)
    scales = extent / np.float32(grid.divisor)
    assert grid.scale_dtype != "e8m0", "powers of two are searched for"
    stored = round_to(scales, grid.scale_dtype)
    if grid.container == "gguf":
        inverse = np.float32(1) / scales
        # A scale is 0, or so small that its reciprocal overflows: every weight is read as 0, whatever its code.
        inverse[np.isinf(inverse)] = 0
        if grid.offset == "minimum":
            offsets = round_to(low, grid.scale_dtype)[..., 0]
            steps = (groups - low) * inverse
        else:
            steps = groups * inverse
        return Scales(stored[..., 0], offsets), steps
    stored[stored == 0] = BF16_EPSILON
    if grid.offset == "zero_point":
        # In a group of zeros the quotient is NaN, and the zero point becomes 0.
        zero_points = np.rint(np.nan_to_num(np.float32(grid.qmin) - low / scales).clip(grid.qmin, grid.qmax))
        offsets = zero_points[..., 0]
    given = Scales(stored[..., 0], offsets)
    return given, _steps(groups, given, grid)


def _steps(groups: Floats, given: Scales, grid: Grid) -> Floats:
    """Return groups [out, groups, group] in steps of the stored scales."""
    scales = given.scales[..., None]
    scales = np.where(scales == 0, np.float32(np.inf), scales)
    if given.offsets is None:
        return groups / scales
    offsets = given.offsets[..., None]
    return (groups - offsets) / scales if grid.offset == "minimum" else groups / scales + offsets


def _nearest(steps: Floats, grid: Grid) -> Floats:
    """Return the nearest codes; of two equally near, the even one, or the larger one of a codebook."""
    found: Floats = nearest_codes(steps, grid, np) if grid.codebook else np.rint(steps)
    return found


def _round(steps: Floats, grid: Grid) -> Floats:
    if grid.rounding == "half_even":
        return _nearest(steps, grid)
    if grid.rounding == "half_up":
        # llama.cpp truncates the sum of step, offset and a half. That sum is rounded to float32 first.
        offset = np.float32(-grid.qmin)
        return np.trunc(steps + (offset + np.float32(0.5))) - offset
    whole = np.trunc(steps)
    return whole + np.trunc(2 * (steps - whole))


def dequantize(codes: Codes, scales: Scales, grid: Grid) -> Floats:
    """Return the float32 weights [out, in] that a runtime computes from codes [out, in] and their scales."""
    groups = codes.reshape(codes.shape[0], -1, grid.group(codes.shape[1])).astype(np.float32)
    with np.errstate(invalid="ignore"):
        if scales.offsets is not None and grid.offset == "zero_point":
            groups -= scales.offsets[..., None]
        groups *= scales.scales[..., None]
        if scales.offsets is not None and grid.offset == "minimum":
            groups += scales.offsets[..., None]
    if grid.container == "compressed-tensors":
        groups = round_to(groups, "bf16")
    return groups.reshape(codes.shape)


def deployed(weights: Floats, storage: Storage, scales: Scales | None = None) -> Floats:
    """Return the float32 values that the runtime will use for `weights`; `scales` are as for `quantize`."""
    if isinstance(storage, Grid):
        return dequantize(*quantize(weights, storage, scales), storage)
    return round_to(weights, storage)


def pack(weights: Floats, storage: Storage, scales: Scales | None = None) -> Arrays:
    """Return the arrays that are stored on disk for `weights`.

    Args:
        weights: float32, [out, in] for a grid.
        storage: A grid or a float type.
        scales: As for `quantize`.

    Returns:
        GGUF: `data`, uint8 [out, bytes per row], in blocks of a float16 scale, possibly a float16 minimum, and codes;
        or in super-blocks (see `k_quant_bytes`).
        compressed-tensors: `weight_packed` int32 [out, words], `weight_scale` [out, groups], `weight_shape` int64 [2],
        and for an asymmetric grid `weight_zero_point` int32 [words, groups]. Float types: `data`. bfloat16 is held as
        its bits in uint16.

    Raises:
        InputError: A weight or a given scale is not finite, or a weight or its scale is beyond float16.
    """
    if isinstance(storage, Grid):
        if scales is not None and not np.isfinite(scales.scales).all():
            _finite(weights, weights, storage.name)
            raise InputError(
                f"a learned scale is not finite, or beyond float16, and cannot be packed as {storage.name}: train the "
                "student again with a lower learning rate, or with finishing.scales absmax"
            )
        codes, scales = quantize(weights, storage, scales)
        _finite(scales.scales, weights, storage.name)
        if storage.offset == "minimum" and scales.offsets is not None:
            _finite(scales.offsets, weights, storage.name)
        return _pack_codes(codes, scales, storage)
    _finite(round_to(weights, storage), weights, storage)
    if storage == "bf16":
        return {"data": to_bf16_bits(weights)}
    if storage == "f32_plus_1":
        return {"data": weights.astype(np.float32) + np.float32(1)}
    return {"data": weights.astype(np.float16 if storage == "f16" else np.float32)}


def _finite(stored: Floats, weights: Floats, name: str) -> None:
    if not np.isfinite(weights).all():
        raise InputError(f"weights that are not finite cannot be packed as {name}: train the student again")
    if not np.isfinite(stored).all():
        largest = np.abs(weights).max()
        raise InputError(f"{name} cannot hold a weight of {largest:.4g}: choose a format without float16")


def _pack_codes(codes: Codes, scales: Scales, grid: Grid) -> Arrays:
    rows, columns = codes.shape
    if grid.block_size:
        return {"data": _pack_blocks(codes, scales, grid)}
    if grid.container == "gguf":
        blocks = codes.reshape(rows, -1, grid.group_size)
        head = [_scale_bytes(values, grid) for values in scales if values is not None]
        return {"data": np.concatenate([*head, *_gguf_codes(blocks, grid)], axis=-1).reshape(rows, -1)}
    arrays: Arrays = {
        "weight_packed": _pack_words(codes, grid),
        "weight_scale": to_bf16_bits(scales.scales),
        "weight_shape": np.array([rows, columns], dtype=np.int64),
    }
    if scales.offsets is not None:
        # Packed along the matrix's rows, not along its groups.
        arrays["weight_zero_point"] = np.ascontiguousarray(_pack_words(scales.offsets.T.astype(np.int8), grid).T)
    return arrays


def _scale_bytes(values: Floats, grid: Grid) -> npt.NDArray[np.uint8]:
    """Return the bytes of scales or minima that GGUF stores one by one, uint8 [out, groups, bytes]."""
    if grid.scale_dtype == "e8m0":
        bits = np.ascontiguousarray(values).view(np.uint32)
        exponents = bits >> np.uint32(23)
        # A byte means half the power of two that its exponent names. So bytes 0 and 1 are subnormal in float32.
        return np.where(exponents > 0, exponents + 1, bits >> np.uint32(22)).astype(np.uint8)[..., None]
    return values.astype("<f2")[..., None].view(np.uint8)


def _scales_of(data: npt.NDArray[np.uint8], grid: Grid) -> Floats:
    """Read scales and minima from the bytes that `_scale_bytes` wrote: float32 [out, groups, 1 or 2]."""
    if grid.scale_dtype == "e8m0":
        wide = data.astype(np.uint32)
        bits = np.where(wide < 2, np.uint32(0x200000) << wide, (wide - 1) << np.uint32(23))
        return bits.astype(np.uint32).view(np.float32)
    return np.ascontiguousarray(data).view("<f2").astype(np.float32)


def _pack_blocks(codes: Codes, scales: Scales, grid: Grid) -> npt.NDArray[np.uint8]:
    """Pack codes [out, in] with stored scales into super-blocks, uint8 [out, bytes per row]."""
    units, multipliers = held_on_block_grid(scales.scales, grid, np)
    minima = None
    if scales.offsets is not None:
        unit, of_minima = held_on_block_grid(-scales.offsets, grid, np)
        units, minima = np.concatenate([units, unit], axis=-1), of_minima.astype(np.uint8)
    unsigned = (codes - np.int8(grid.qmin)).view(np.uint8).reshape(-1, grid.block_size)
    block = Block(unsigned, units.astype(np.float16), multipliers.astype(np.int8), minima)
    return to_bytes(block, grid).reshape(len(codes), -1)


def _unpack_blocks(data: npt.NDArray[np.uint8], grid: Grid, shape: tuple[int, ...]) -> tuple[Codes, Scales]:
    """Unpack codes and stored scales from the super-blocks that `_pack_blocks` wrote."""
    block = from_bytes(data.reshape(shape[0] * shape[1] // grid.block_size, -1), grid)
    units = block.units.astype(np.float32)
    codes = (block.codes.view(np.int8) + np.int8(grid.qmin)).reshape(shape)
    with np.errstate(invalid="ignore"):
        scales = (units[:, :1] * block.scales).reshape(shape[0], -1)
        if block.minima is None:
            return codes, Scales(scales)
        return codes, Scales(scales, -(units[:, 1:] * block.minima).reshape(shape[0], -1))


def _gguf_codes(blocks: Codes, grid: Grid) -> list[npt.NDArray[np.uint8]]:
    """Return the bytes of codes [out, blocks, 32]."""
    if grid.bits == 8:
        return [blocks.view(np.uint8)]
    if grid.codebook:
        # Look up each code's place by the code as a byte. If a code has two places, the first one counts.
        places = np.zeros(256, np.uint8)
        for place in reversed(range(len(grid.codebook))):
            places[grid.codebook[place]] = place
        unsigned = places[blocks.view(np.uint8)]
    else:
        unsigned = (blocks - np.int8(grid.qmin)).view(np.uint8)
    # A block's first half lies in the low nibbles and its second half in the high ones. Fifth bits come before them.
    low, high = np.split(unsigned & np.uint8(15), 2, axis=-1)
    nibbles = low | (high << np.uint8(4))
    return [np.packbits(unsigned >> np.uint8(4), axis=-1, bitorder="little"), nibbles] if grid.bits == 5 else [nibbles]


def _pack_words(codes: Codes, grid: Grid) -> npt.NDArray[np.int32]:
    """Pack codes [rows, columns] as a bit stream in little-endian words, int32 [rows, words]."""
    # Codes are stored as their distance from the smallest code, the first one in the lowest bits.
    unsigned = (codes.astype(np.int16) - grid.qmin).astype(np.uint8)
    if grid.bits == 4 and unsigned.shape[1] % 2 == 0:
        packed = unsigned[:, 0::2] | (unsigned[:, 1::2] << np.uint8(4))
    elif grid.bits == 8:
        packed = unsigned
    else:
        rows = max(1, _BIT_CHUNK // unsigned.shape[1])
        packed = np.concatenate(
            [_pack_bits(unsigned[start : start + rows], grid.bits) for start in range(0, len(unsigned), rows)]
        )
    padded = np.pad(packed, ((0, 0), (0, -packed.shape[1] % 4)))
    return np.ascontiguousarray(padded).view("<i4")


# Number of codes that are unpacked to single bits, one byte a bit, at once.
_BIT_CHUNK = 2**20


def _pack_bits(unsigned: npt.NDArray[np.uint8], bits: int) -> npt.NDArray[np.uint8]:
    single = np.unpackbits(unsigned[..., None], axis=-1, bitorder="little", count=bits)
    return np.packbits(single.reshape(len(unsigned), -1), axis=-1, bitorder="little")


def _unpack_words(words: npt.NDArray[np.int32], columns: int, grid: Grid) -> Codes:
    """Unpack the codes that `_pack_words` wrote."""
    packed = np.ascontiguousarray(words, dtype="<i4").view(np.uint8)
    if grid.bits == 4:
        unsigned = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1).reshape(len(packed), -1)
    elif grid.bits == 8:
        unsigned = packed
    else:
        rows = max(1, _BIT_CHUNK // columns)
        unsigned = np.concatenate(
            [_unpack_bits(packed[start : start + rows], columns, grid.bits) for start in range(0, len(packed), rows)]
        )
    return (unsigned[:, :columns].astype(np.int16) + grid.qmin).astype(np.int8)


def _unpack_bits(packed: npt.NDArray[np.uint8], columns: int, bits: int) -> npt.NDArray[np.uint8]:
    single = np.unpackbits(packed, axis=-1, bitorder="little", count=columns * bits)
    return np.packbits(single.reshape(len(packed), columns, bits), axis=-1, bitorder="little")[..., 0]


def unpack(arrays: Mapping[str, npt.NDArray[Any]], storage: Storage, shape: tuple[int, ...]) -> Floats:
    """Return the float32 weights of `shape` that a runtime reads from the arrays of `pack`."""
    if isinstance(storage, Grid):
        return dequantize(*unpack_codes(arrays, storage, shape), storage)
    if storage == "bf16":  # given as numbers of 16 bits, or as bytes
        return from_bf16_bits(np.ascontiguousarray(arrays["data"]).view(np.uint16).reshape(shape))
    data = arrays["data"].reshape(shape)
    return data - np.float32(1) if storage == "f32_plus_1" else data.astype(np.float32)


def unpack_codes(arrays: Mapping[str, npt.NDArray[Any]], grid: Grid, shape: tuple[int, ...]) -> tuple[Codes, Scales]:
    """Return codes and scales from the arrays of `pack`, in the form that `quantize` returns."""
    if grid.block_size:
        return _unpack_blocks(arrays["data"], grid, shape)
    if grid.container == "gguf":
        blocks = arrays["data"].reshape(shape[0], shape[1] // grid.group_size, -1)
        count = grid.scale_bytes * (1 if grid.symmetric else 2)
        head = _scales_of(blocks[..., :count], grid)
        codes = _gguf_blocks(np.ascontiguousarray(blocks[..., count:]), grid)
        return codes.reshape(shape), Scales(*np.moveaxis(head, -1, 0))
    scales = from_bf16_bits(arrays["weight_scale"])
    offsets = None
    if not grid.symmetric:
        offsets = _unpack_words(arrays["weight_zero_point"].T, shape[0], grid).T.astype(np.float32)
    return _unpack_words(arrays["weight_packed"], shape[1], grid), Scales(scales, offsets)


def _gguf_blocks(packed: npt.NDArray[np.uint8], grid: Grid) -> Codes:
    """Return the codes [out, blocks, 32] from the bytes of `_gguf_codes`."""
    if grid.bits == 8:
        return packed.view(np.int8)
    nibbles = packed[..., -grid.group_size // 2 :]
    unsigned = np.concatenate([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=-1)
    if grid.bits == 5:
        unsigned |= np.unpackbits(packed[..., :4], axis=-1, bitorder="little") << np.uint8(4)
    if grid.codebook:
        return np.array(grid.codebook, np.int8)[unsigned]
    return unsigned.astype(np.int8) + np.int8(grid.qmin)
