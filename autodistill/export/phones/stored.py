"""How a file for phones stores a tensor, as values or as codes of blocks, and how tensors are found in the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np
import numpy.typing as npt

from autodistill.errors import VerificationError
from autodistill.export.graphs.onnx_graph import Blocks, narrow
from autodistill.export.student_reader import StudentFiles
from autodistill.quantization.grids import Floats, Grid, Scales, Storage
from autodistill.quantization.packing import unpack_codes
from autodistill.utils.typed_data import check_typed

Raw = npt.NDArray[Any]
_WORD = 8  # bytes by which a tensor is searched for
_SIGN = {
    4: np.uint8(0x88),
    8: np.uint8(0x80),
}  # converts between ONNX's codes, which begin at 0, and the signed codes of phones


class Part(TypedDict):
    """The byte where an array begins, its numpy type, and its shape."""

    begin: int
    type: str
    shape: tuple[int, ...]


class Place(TypedDict):
    """Where a tensor lies, as the list of places records it.

    Attributes:
        shape: Shape of the tensor.
        parts: The arrays that make up the tensor, by name.
        blocks: Bits, weights per block and shift (`Blocks`), if the tensor is stored as codes.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, Part]
    blocks: NotRequired[tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor in the form in which a file stores it.

    Attributes:
        shape: Shape of the tensor.
        parts: "values", in float32 or float16; or "codes" in signed bytes, "scales" and perhaps "minima", each [blocks,
            some].
        form: How codes are stored; None for values.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, Raw]
    form: Blocks | None = None

    @classmethod
    def plain(cls, values: Floats) -> Stored:
        """Return float32 values that are stored unchanged."""
        return cls(shape=values.shape, parts={"values": values})

    @classmethod
    def narrowed(cls, values: Floats) -> Stored:
        """Return values stored in 16 bits if float16 represents each of them exactly, else unchanged."""
        return cls(shape=values.shape, parts={"values": narrow(values)})

    @classmethod
    def of_codes(cls, files: StudentFiles, name: str, storage: Storage) -> Stored | None:
        """Return a matrix on one of GGUF's grids as its codes, or None for other storage."""
        if not isinstance(storage, Grid) or storage.container != "gguf":
            return None
        shape, form = files.specs[name].shape, Blocks.of(storage)
        codes, scales = unpack_codes(files.pack(name), storage, shape)
        parts: dict[str, Raw] = {"codes": form.pack(codes).reshape(codes.size // form.block, -1) ^ _SIGN[form.bits]}
        parts["scales"] = narrow(scales.scales).reshape(-1, 1)
        if scales.offsets is not None:
            parts["minima"] = narrow(scales.offsets).reshape(-1, 1)
        return cls(shape=shape, parts=parts, form=form)

    def values(self) -> Floats:
        """Return the float32 weights that it stands for."""
        if self.form is None:
            plain: Floats = self.parts["values"].astype(np.float32).reshape(self.shape)
            return plain
        rows = self.shape[0]
        codes = self.form.unpack((self.parts["codes"] ^ _SIGN[self.form.bits]).reshape(rows, -1))
        scales, minima = (
            None if part is None else part.astype(np.float32).reshape(rows, -1)
            for part in (self.parts["scales"], self.parts.get("minima"))
        )
        assert scales is not None
        return self.form.weights(codes, Scales(scales, minima))


def places_of(path: Path, stored: Mapping[str, Stored]) -> dict[str, Place]:
    """Find each tensor by its bytes in a file that was just written.

    Raises:
        VerificationError: The file lacks a tensor in its given form; the message names it.
    """
    begins = located(path, {(name, part): raw for name, one in stored.items() for part, raw in one.parts.items()})
    found: dict[str, Place] = {}
    for name, one in stored.items():
        parts: dict[str, Part] = {
            part: {"begin": begins[name, part], "type": raw.dtype.name, "shape": raw.shape}
            for part, raw in one.parts.items()
        }
        found[name] = {"shape": one.shape, "parts": parts}
        if one.form is not None:
            found[name]["blocks"] = (one.form.bits, one.form.block, one.form.shift)
    return found


def read_at(data: npt.NDArray[np.uint8], place: Any, where: str) -> Stored:
    """Return the tensor that a file's bytes hold at a place, which may be any JSON value.

    Raises:
        InputError: The value is not a place.
        ValueError, TypeError, KeyError: It names bytes outside the file, or a wrong number or type of bytes.
    """
    check_typed(place, Place, where)
    parts = {}
    for part, told in place["parts"].items():
        begin, dtype, shape = told["begin"], np.dtype(told["type"]), told["shape"]
        count = int(np.prod(shape))
        if begin < 0 or dtype.kind not in "uf":
            raise ValueError(f"{where} names no bytes of the file")
        parts[part] = np.frombuffer(data[begin : begin + dtype.itemsize * count].tobytes(), dtype).reshape(shape)
    form = None
    if "blocks" in place:
        bits, block, shift = place["blocks"]
        form = Blocks(bits=bits, block=block, shift=shift, offset="minima" in parts)
    return Stored(shape=tuple(place["shape"]), parts=parts, form=form)


def located(path: Path, arrays: Mapping[tuple[str, str], Raw]) -> dict[tuple[str, str], int]:
    """Find arrays in a file by their bytes, and return where each begins.

    Args:
        path: The file.
        arrays: Arrays of at least 8 bytes each, by the names of tensor and part.

    Raises:
        VerificationError: The file lacks one of them; the message names its tensor.
    """
    data = np.memmap(path, np.uint8, "r")
    keys = {name: _key(values) for name, values in arrays.items()}
    wanted = np.array(sorted({word for word, _ in keys.values()}), np.uint64)
    places: dict[int, list[int]] = {}
    for shift in range(0, _WORD, 4):  # a file may hold values at any multiple of 4 bytes
        words = data[shift : shift + (len(data) - shift) // _WORD * _WORD].view(np.uint64)
        for place in np.flatnonzero(np.isin(words, wanted)):
            places.setdefault(int(words[place]), []).append(shift + _WORD * int(place))
    found = {}
    for name, values in arrays.items():
        raw, (word, ahead) = np.ascontiguousarray(values).view(np.uint8).ravel(), keys[name]
        begins = (place - ahead for place in places.get(word, ()) if place >= ahead)
        begin = next((one for one in begins if np.array_equal(data[one : one + len(raw)], raw)), None)
        if begin is None:
            raise VerificationError(f"{path} does not have {name[0]} as it was evaluated: the converter changed it")
        found[name] = begin
    return found


def _key(values: Raw) -> tuple[int, int]:
    """Return the first 8 bytes of an array that are not all zeros, as a number, and the number of bytes before them."""
    raw = np.ascontiguousarray(values).view(np.uint8).ravel()
    words = raw[: len(raw) // _WORD * _WORD].view(np.uint64)
    place = int(np.argmax(words != 0))
    return int(words[place]), _WORD * place
