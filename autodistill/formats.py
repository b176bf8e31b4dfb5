"""The one truth on packing, free of torch: each format's grids, layouts and bytes, and what each tensor is stored as.

A grid says how a group of weights becomes integer codes and a scale, precisely enough that codes and scales equal, bit
for bit, those of the format's own tools: `gguf.quants` (and so llama.cpp) and the `compressed-tensors` package.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from autodistill.errors import InputError

Floats: TypeAlias = npt.NDArray[np.float32]
Codes: TypeAlias = npt.NDArray[np.int8]
Arrays: TypeAlias = dict[str, npt.NDArray[Any]]


class Role(StrEnum):
    """What a tensor does in its model, as far as its storage depends on it."""

    EMBEDDING = "embedding"
    HEAD = "head"
    LINEAR = "linear"
    NORM = "norm"
    BIAS = "bias"


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One stored tensor.

    Attributes:
        name: transformers' name, like "model.layers.0.mlp.up_proj.weight".
        role: What it does. A tied table is stored once, as the embedding.
        shape: A linear is [out, in].
    """

    name: str
    role: Role
    shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """How `group_size` consecutive weights of a row become integer codes and one scale.

    The scale is m / `divisor`, stored in `scale_dtype`; m is the group's largest magnitude ("absmax"), or the first
    value that has it, with its sign ("signed_absmax").

    - "gguf": a code is the rounded product of weight and 1/scale, both in float32, with the scale *before* its rounding
      to `scale_dtype`; a weight is read as code * stored scale in float32.
    - "compressed-tensors": a code is the rounded quotient of weight and *stored* scale in float32, where a stored scale
      of 0 becomes bfloat16's epsilon; a weight is read as code * stored scale rounded to bfloat16. Quantising what was
      read again would move it (the largest weight lies half a step off the codes): weights are quantised once.

    Attributes:
        name: Like "gguf-q4_0" or "compressed-tensors-int4-g64".
        container: The container whose arithmetic and layout it follows.
        bits: Width of a code.
        group_size: Weights that share a scale.
        qmin, qmax: The codes used; what rounds beyond them is clipped.
        scale_dtype: Of the stored scale.
        scale_rule, divisor: How the scale follows from the group.
        rounding: Where a tie goes: "half_up" (to the larger), "half_away" (from zero) or "half_even".
    """

    name: str
    container: Literal["gguf", "compressed-tensors"]
    bits: int
    group_size: int
    qmin: int
    qmax: int
    scale_dtype: Literal["f16", "bf16"]
    scale_rule: Literal["absmax", "signed_absmax"]
    divisor: float
    rounding: Literal["half_up", "half_away", "half_even"]


Storage: TypeAlias = Grid | Literal["f32", "f16", "bf16"]

BF16_EPSILON = 2.0**-7
"""bfloat16's epsilon: the scale that compressed-tensors gives to a group whose own would be 0."""

Q4_0 = Grid(
    name="gguf-q4_0",
    container="gguf",
    bits=4,
    group_size=32,
    qmin=-8,
    qmax=7,
    scale_dtype="f16",
    scale_rule="signed_absmax",
    divisor=-8.0,
    rounding="half_up",
)
Q8_0 = Grid(
    name="gguf-q8_0",
    container="gguf",
    bits=8,
    group_size=32,
    qmin=-127,
    qmax=127,
    scale_dtype="f16",
    scale_rule="absmax",
    divisor=127.0,
    rounding="half_away",
)


def _symmetric(bits: int, group_size: int) -> Grid:
    # compressed-tensors' `calculate_qparams` for symmetric integers: absmax / ((qmax - qmin) / 2).
    levels = 2**bits
    return Grid(
        name=f"compressed-tensors-int{bits}-g{group_size}",
        container="compressed-tensors",
        bits=bits,
        group_size=group_size,
        qmin=-levels // 2,
        qmax=levels // 2 - 1,
        scale_dtype="bf16",
        scale_rule="absmax",
        divisor=(levels - 1) / 2,
        rounding="half_even",
    )


def _key(storage: Storage) -> tuple[int, int]:
    return (storage.bits, storage.group_size) if isinstance(storage, Grid) else (16, 0)


def _describe(bits: int, group_size: int) -> str:
    return f"{bits} bits in groups of {group_size}" if group_size else f"{bits} bits without groups"


@dataclass(frozen=True, kw_only=True)
class Format:
    """A way to pack a model, and the rule that says what each of its tensors is stored as.

    Attributes:
        name: Its name in strategies, deployments and on the command line.
        container: "gguf", "compressed-tensors" or "huggingface".
        runtimes: The engines that serve it, the usual one first.
        linears: What the weights of linear layers may be stored as; a deployment's bits and group size pick one.
        tables: What the embedding and an untied head are stored as.
        vectors: What norms and biases are stored as.
    """

    name: str
    container: Literal["gguf", "compressed-tensors", "huggingface"]
    runtimes: tuple[str, ...]
    linears: tuple[Storage, ...]
    tables: Storage
    vectors: Storage

    @property
    def packings(self) -> tuple[tuple[int, int], ...]:
        """The pairs of bits and group size that it can hold; (16, 0) where nothing is quantised."""
        return tuple(_key(storage) for storage in self.linears)

    def check(self, bits: int, group_size: int) -> None:
        """Refuses bits and group sizes that it cannot hold.

        Raises:
            InputError: It cannot hold this pair; the message lists those it can.
        """
        if (bits, group_size) not in self.packings:
            held = ", ".join(_describe(*packing) for packing in self.packings)
            raise InputError(f"{self.name} cannot hold {_describe(bits, group_size)}; it holds {held}")

    def label(self, bits: int, group_size: int) -> str:
        """Short readable name, like "gguf-q4_0" or "compressed-tensors-int4-g64"."""
        return self.name if len(self.linears) == 1 else f"{self.name}-int{bits}-g{group_size}"

    def storage(self, tensor: TensorSpec, bits: int, group_size: int) -> Storage:
        """What `tensor` is stored as in a deployment of `bits` and `group_size`.

        Raises:
            InputError: The format cannot hold this pair, or the tensor cannot be cut into the groups.
        """
        self.check(bits, group_size)
        if tensor.role in (Role.NORM, Role.BIAS):
            return self.vectors
        storage = self.tables
        if tensor.role is Role.LINEAR:
            storage = self.linears[self.packings.index((bits, group_size))]
        check_tensor(tensor, storage)
        return storage


def check_tensor(tensor: TensorSpec, storage: Storage) -> None:
    """Refuses a tensor whose rows the grid's groups do not divide, so that training it is never begun.

    Raises:
        InputError: Not two-dimensional, or a row that is no multiple of the group.
    """
    if not isinstance(storage, Grid):
        return
    if len(tensor.shape) != 2:
        raise InputError(f"{tensor.name} of shape {list(tensor.shape)} is no matrix: {storage.name} cannot hold it")
    if tensor.shape[1] % storage.group_size:
        raise InputError(
            f"{tensor.name} has rows of {tensor.shape[1]} weights, which the groups of {storage.group_size} of "
            f"{storage.name} do not divide: choose a smaller group, or a format without groups"
        )


def _gguf(name: str, linears: Storage, tables: Storage) -> Format:
    return Format(
        name=name, container="gguf", runtimes=("llama.cpp",), linears=(linears,), tables=tables, vectors="f32"
    )


FORMATS: Mapping[str, Format] = {
    packing.name: packing
    for packing in (
        _gguf("gguf-f16", "f16", "f16"),
        _gguf("gguf-q8_0", Q8_0, Q8_0),
        # The table stays at 8 bits: tied, it is also the output head, and llama.cpp's own Q4_0 files keep it above 4.
        _gguf("gguf-q4_0", Q4_0, Q8_0),
        Format(
            name="compressed-tensors",
            container="compressed-tensors",
            runtimes=("vllm", "transformers"),
            linears=tuple(_symmetric(bits, group_size) for bits in (8, 4) for group_size in (32, 64)),
            tables="bf16",
            vectors="bf16",
        ),
        Format(
            name="huggingface",
            container="huggingface",
            runtimes=("transformers", "vllm"),
            linears=("bf16",),
            tables="bf16",
            vectors="bf16",
        ),
    )
}


def get_format(name: str) -> Format:
    """Looks a format up by name.

    Raises:
        InputError: Unknown; the message lists the known ones.
    """
    if name not in FORMATS:
        raise InputError(f"there is no format {name!r}; the formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def to_bf16_bits(values: npt.ArrayLike) -> npt.NDArray[np.uint16]:
    """Rounds float32 to bfloat16, to nearest with ties to even, and gives its bits; NaN stays NaN."""
    array = np.ascontiguousarray(values, dtype=np.float32)
    bits = array.view(np.uint32)
    # Half a unit of the last kept place, less one where that place is even: a carry is the rounding. A NaN could carry
    # into infinity, so it gets the quiet bit instead.
    rounded = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype(
        np.uint16
    )
    return np.where(np.isnan(array), ((bits >> np.uint32(16)) | np.uint32(0x40)).astype(np.uint16), rounded)


def from_bf16_bits(bits: npt.NDArray[np.uint16]) -> Floats:
    """The float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def round_to(values: Floats, dtype: Literal["f32", "f16", "bf16"]) -> Floats:
    """Values as `dtype` holds them, in float32; beyond float16's range they become infinite."""
    if dtype == "bf16":
        return from_bf16_bits(to_bf16_bits(values))
    with np.errstate(over="ignore"):
        return values.astype(np.float16 if dtype == "f16" else np.float32).astype(np.float32)


def quantize(weights: Floats, grid: Grid) -> tuple[Codes, Floats]:
    """Puts weights on a grid.

    A scale that float16 cannot hold becomes infinite, as in llama.cpp; `pack` refuses it.

    Args:
        weights: float32 [out, in], `in` a multiple of the group size.
        grid: The grid.

    Returns:
        Codes, int8 [out, in], and scales, float32 [out, in / group size], already rounded to the grid's scale dtype.
    """
    groups = np.asarray(weights, dtype=np.float32).reshape(weights.shape[0], -1, grid.group_size)
    with np.errstate(all="ignore"):
        scales = _scales(groups, grid)
        stored = round_to(scales, grid.scale_dtype)
        if grid.container == "gguf":
            inverse = np.float32(1) / scales
            # A scale of 0 or so small that its reciprocal overflows: every weight is read as 0 whatever its code.
            inverse[np.isinf(inverse)] = 0
            steps = groups * inverse
        else:
            stored[stored == 0] = BF16_EPSILON
            steps = groups / stored
        codes = _round(steps, grid).clip(grid.qmin, grid.qmax).astype(np.int8)
    return codes.reshape(weights.shape), stored[..., 0]


def _scales(groups: Floats, grid: Grid) -> Floats:
    if grid.scale_rule == "signed_absmax":
        largest = np.take_along_axis(groups, np.abs(groups).argmax(axis=-1, keepdims=True), axis=-1)
    else:
        largest = np.abs(groups).max(axis=-1, keepdims=True)
    return largest / np.float32(grid.divisor)


def _round(steps: Floats, grid: Grid) -> Floats:
    if grid.rounding == "half_even":
        return np.rint(steps)
    if grid.rounding == "half_up":
        # llama.cpp truncates the sum of step, offset and a half, and that sum is rounded to float32 first.
        offset = np.float32(-grid.qmin)
        return np.trunc(steps + (offset + np.float32(0.5))) - offset
    whole = np.trunc(steps)
    return whole + np.trunc(2 * (steps - whole))


def dequantize(codes: Codes, scales: Floats, grid: Grid) -> Floats:
    """The float32 weights [out, in] that the runtime computes from codes [out, in] and scales [out, in / group]."""
    groups = codes.reshape(codes.shape[0], -1, grid.group_size).astype(np.float32)
    with np.errstate(invalid="ignore"):
        groups *= scales[..., None]
    if grid.container == "compressed-tensors":
        groups = round_to(groups, "bf16")
    return groups.reshape(codes.shape)


def deployed(weights: Floats, storage: Storage) -> Floats:
    """The float32 values that the runtime will see of `weights`."""
    if isinstance(storage, Grid):
        return dequantize(*quantize(weights, storage), storage)
    return round_to(weights, storage)


def pack(weights: Floats, storage: Storage) -> Arrays:
    """The arrays that stand on disk for `weights`.

    Args:
        weights: float32, [out, in] for a grid.
        storage: A grid or a float type.

    Returns:
        GGUF: `data`, uint8 [out, bytes per row], in blocks of a float16 scale and the codes. compressed-tensors:
        `weight_packed` int32 [out, in * bits / 32], `weight_scale` [out, in / group size] and `weight_shape` int64 [2].
        Floats: `data`. bfloat16 stands as its bits in uint16.

    Raises:
        InputError: A weight is not finite, or it or its scale is beyond float16.
    """
    if isinstance(storage, Grid):
        codes, scales = quantize(weights, storage)
        _finite(scales, weights, storage.name)
        return _pack_codes(codes, scales, storage)
    _finite(round_to(weights, storage), weights, storage)
    if storage == "bf16":
        return {"data": to_bf16_bits(weights)}
    return {"data": weights.astype(np.float16 if storage == "f16" else np.float32)}


def _finite(stored: Floats, weights: Floats, name: str) -> None:
    if not np.isfinite(weights).all():
        raise InputError(f"weights that are not finite cannot be packed as {name}: train the student again")
    if not np.isfinite(stored).all():
        largest = np.abs(weights).max()
        raise InputError(f"{name} cannot hold a weight of {largest:.4g}: choose a format without float16")


def _pack_codes(codes: Codes, scales: Floats, grid: Grid) -> Arrays:
    rows, columns = codes.shape
    if grid.container == "gguf":
        blocks = codes.reshape(rows, -1, grid.group_size)
        if grid.bits == 4:
            # A block's first half lies in the low nibbles, its second half in the high ones.
            nibbles = (blocks - np.int8(grid.qmin)).view(np.uint8)
            half = grid.group_size // 2
            packed = nibbles[..., :half] | (nibbles[..., half:] << np.uint8(4))
        else:
            packed = blocks.view(np.uint8)
        head = scales.astype("<f2")[..., None].view(np.uint8)
        return {"data": np.concatenate([head, packed], axis=-1).reshape(rows, -1)}
    # Codes are stored above their least, the first one in the lowest bits of a little-endian word.
    unsigned = (codes.astype(np.int16) - grid.qmin).astype(np.uint8)
    if grid.bits == 4:
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << np.uint8(4))
    return {
        "weight_packed": np.ascontiguousarray(unsigned).view("<i4"),
        "weight_scale": to_bf16_bits(scales),
        "weight_shape": np.array([rows, columns], dtype=np.int64),
    }


def unpack(arrays: Mapping[str, npt.NDArray[Any]], storage: Storage, shape: tuple[int, ...]) -> Floats:
    """The float32 weights of `shape` that a runtime reads from the arrays of `pack`."""
    if isinstance(storage, Grid):
        return dequantize(*_unpack_codes(arrays, storage, shape), storage)
    data = arrays["data"].reshape(shape)
    return from_bf16_bits(data) if storage == "bf16" else data.astype(np.float32)


def _unpack_codes(arrays: Mapping[str, npt.NDArray[Any]], grid: Grid, shape: tuple[int, ...]) -> tuple[Codes, Floats]:
    if grid.container == "gguf":
        blocks = arrays["data"].reshape(shape[0], shape[1] // grid.group_size, -1)
        scales = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
        packed = blocks[..., 2:]
        if grid.bits == 4:
            nibbles = np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
            codes = nibbles.astype(np.int8) + np.int8(grid.qmin)
        else:
            codes = np.ascontiguousarray(packed).view(np.int8)
        return codes.reshape(shape), scales
    packed = np.ascontiguousarray(arrays["weight_packed"], dtype="<i4").view(np.uint8)
    if grid.bits == 4:
        packed = np.stack([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)
    codes = (packed.reshape(shape).astype(np.int16) + grid.qmin).astype(np.int8)
    return codes, from_bf16_bits(arrays["weight_scale"])


def tensor_bytes(tensor: TensorSpec, packing: Format, bits: int, group_size: int) -> int:
    """Bytes that one tensor takes in a deployment, scales included: what `pack` writes, no padding.

    Raises:
        InputError: As `Format.storage`.
    """
    storage = packing.storage(tensor, bits, group_size)
    count = math.prod(tensor.shape)
    if not isinstance(storage, Grid):
        return count * (4 if storage == "f32" else 2)
    shape_bytes = 16 if storage.container == "compressed-tensors" else 0
    return count * storage.bits // 8 + count // storage.group_size * 2 + shape_bytes


def weights_bytes(tensors: Iterable[TensorSpec], packing: Format, bits: int, group_size: int) -> int:
    """Bytes that all of a model's tensors take in a deployment.

    Raises:
        InputError: As `Format.storage`.
    """
    return sum(tensor_bytes(tensor, packing, bits, group_size) for tensor in tensors)
