"""The bytes of K-quants: conversion between codes with multipliers and a GGUF file's super-blocks.

The layouts are ggml's, as `gguf.quants` reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from autodistill.quantization.grids import Grid

Bytes: TypeAlias = npt.NDArray[np.uint8]


class Block(NamedTuple):
    """The contents of super-blocks.

    Attributes:
        codes: uint8 [blocks, 256], counted from the smallest code.
        units: float16 [blocks, 1] or [blocks, 2]: the unit of the scales, and that of the minima.
        scales: int8 [blocks, groups], in units.
        minima: uint8 [blocks, groups], in units, or None on a symmetric grid.
    """

    codes: Bytes
    units: npt.NDArray[np.float16]
    scales: npt.NDArray[np.int8]
    minima: Bytes | None


class _Plane(NamedTuple):
    """Some bits of each code: `bits` of them, starting at `shift`. Codes that lie `run` apart share a byte."""

    shift: int
    bits: int
    run: int


_Part: TypeAlias = Literal["units", "multipliers"] | _Plane
_LAYOUTS: Mapping[str, tuple[_Part, ...]] = {
    "gguf-q2_k": ("multipliers", _Plane(0, 2, 32), "units"),
    "gguf-q3_k": (_Plane(2, 1, 32), _Plane(0, 2, 32), "multipliers", "units"),
    "gguf-q4_k": ("units", "multipliers", _Plane(0, 4, 32)),
    "gguf-q5_k": ("units", "multipliers", _Plane(4, 1, 32), _Plane(0, 4, 32)),
    "gguf-q6_k": (_Plane(0, 4, 64), _Plane(4, 2, 32), "multipliers", "units"),
}


def to_bytes(block: Block, grid: Grid) -> Bytes:
    """Return super-blocks as they are stored in the file, uint8 [blocks, bytes]."""
    parts: list[Bytes] = []
    for part in _LAYOUTS[grid.name]:
        if part == "units":
            parts.append(np.ascontiguousarray(block.units, dtype="<f2").view(np.uint8))
        elif part == "multipliers":
            parts.append(_MULTIPLIERS[grid.multiplier_bits, grid.symmetric][0](block.scales, block.minima))
        else:
            field = (block.codes >> np.uint8(part.shift)) & np.uint8(2**part.bits - 1)
            parts.append(_fold(field, part.bits, part.run))
    return np.concatenate(parts, axis=-1)


def from_bytes(data: Bytes, grid: Grid) -> Block:
    """Read the super-blocks that `to_bytes` wrote."""
    codes = np.zeros((len(data), grid.block_size), np.uint8)
    rest, parts = data, dict[str, Bytes]()
    for part in _LAYOUTS[grid.name]:
        if isinstance(part, str):
            # A unit has 2 bytes. There is one for the scales and possibly one for the minima.
            count = 2 if part == "units" else grid.groups_per_block * grid.multiplier_bits // 8
            size = count * (1 if grid.symmetric else 2)
            parts[part] = rest[:, :size]
        else:
            size = grid.block_size * part.bits // 8
            codes |= _unfold(rest[:, :size], part.bits, part.run) << np.uint8(part.shift)
        rest = rest[:, size:]
    scales, minima = _MULTIPLIERS[grid.multiplier_bits, grid.symmetric][1](parts["multipliers"])
    return Block(codes, np.ascontiguousarray(parts["units"]).view("<f2"), scales, minima)


def _fold(values: Bytes, bits: int, run: int) -> Bytes:
    """Pack values [blocks, count] of a few bits: 8 / bits values that lie `run` apart share a byte."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    planes = values.reshape(len(values), -1, 8 // bits, run) << shifts
    return np.bitwise_or.reduce(planes, axis=2).reshape(len(values), -1)


def _unfold(data: Bytes, bits: int, run: int) -> Bytes:
    """Unpack the values that `_fold` packed."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    planes = (data.reshape(len(data), -1, 1, run) >> shifts) & np.uint8(2**bits - 1)
    return planes.reshape(len(data), -1)


def _to_pairs_of_6(scales: npt.NDArray[np.int8], minima: Bytes | None) -> Bytes:
    """Pack eight 6-bit scales and minima into 12 bytes; the first four also hold the high two bits of the last four."""
    assert minima is not None
    both = np.stack([scales.view(np.uint8), minima], axis=1)
    first, last = both[..., :4], both[..., 4:]
    nibbles = (last[:, 0] & np.uint8(15)) | (last[:, 1] << np.uint8(4))
    heads = first | ((last >> np.uint8(4)) << np.uint8(6))
    return np.concatenate([heads.reshape(len(both), -1), nibbles], axis=-1)


def _from_pairs_of_6(data: Bytes) -> tuple[npt.NDArray[np.int8], Bytes]:
    heads, nibbles = data[:, :8].reshape(-1, 2, 4), data[:, 8:]
    low = np.stack([nibbles & np.uint8(15), nibbles >> np.uint8(4)], axis=1)
    last = low | ((heads >> np.uint8(6)) << np.uint8(4))
    both = np.concatenate([heads & np.uint8(63), last], axis=-1)
    return both[:, 0].view(np.int8), np.ascontiguousarray(both[:, 1])


def _to_signed_6(scales: npt.NDArray[np.int8], minima: Bytes | None) -> Bytes:
    """Pack sixteen 6-bit scales, counted from -32, into 12 bytes: eight of low bits and four of high ones."""
    counted = (scales + np.int8(32)).view(np.uint8)
    return np.concatenate([_fold(counted & np.uint8(15), 4, 8), _fold(counted >> np.uint8(4), 2, 4)], axis=-1)


def _from_signed_6(data: Bytes) -> tuple[npt.NDArray[np.int8], None]:
    counted = _unfold(data[:, :8], 4, 8) | (_unfold(data[:, 8:], 2, 4) << np.uint8(4))
    return counted.view(np.int8) - np.int8(32), None


def _to_pairs_of_4(scales: npt.NDArray[np.int8], minima: Bytes | None) -> Bytes:
    assert minima is not None
    return scales.view(np.uint8) | (minima << np.uint8(4))


def _from_pairs_of_4(data: Bytes) -> tuple[npt.NDArray[np.int8], Bytes]:
    return (data & np.uint8(15)).view(np.int8), data >> np.uint8(4)


def _to_signed_8(scales: npt.NDArray[np.int8], minima: Bytes | None) -> Bytes:
    return scales.view(np.uint8)


def _from_signed_8(data: Bytes) -> tuple[npt.NDArray[np.int8], None]:
    return np.ascontiguousarray(data).view(np.int8), None


# Functions from multipliers to bytes and back, by the multipliers' width and whether they have a sign.
_MULTIPLIERS: Mapping[tuple[int, bool], tuple[Callable[..., Bytes], Callable[[Bytes], tuple[Any, Any]]]] = {
    (6, False): (_to_pairs_of_6, _from_pairs_of_6),
    (4, False): (_to_pairs_of_4, _from_pairs_of_4),
    (6, True): (_to_signed_6, _from_signed_6),
    (8, True): (_to_signed_8, _from_signed_8),
}
