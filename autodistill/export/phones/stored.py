"""How a tensor lies in a file for phones: as its values, or as the codes of its blocks; and how it is found there."""

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
_WORD = 8  # bytes that a tensor is looked for by
_SIGN = {
    4: np.uint8(0x88),
    8: np.uint8(0x80),
}  # between codes that begin at 0, of ONNX, and those with a sign, of a phone


class Part(TypedDict):
    """The byte where an array begins, its numpy type, and its shape."""

    begin: int
    type: str
    shape: tuple[int, ...]


class Place(TypedDict):
    """Where a tensor lies, as the list of places has it.

    Attributes:
        shape: Of the tensor.
        parts: The arrays that it is made of, by name.
        blocks: Bits, weights of a block and shift (`Blocks`), if it is stored as codes.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, Part]
    blocks: NotRequired[tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor as it was found in a file.

    Attributes:
        shape: Of the tensor.
        parts: "values", float32 or float16; or "codes" in bytes with a sign, "scales" and perhaps "minima", each
            [blocks, some].
        form: How codes are stored; None of values.
    """

    shape: tuple[int, ...]
    parts: Mapping[str, Raw]
    form: Blocks | None = None

    @classmethod
    def plain(cls, values: Floats) -> Stored:
        """Return how float32 values lie as they are."""
        return cls(shape=values.shape, parts={"values": values})

    @classmethod
    def narrowed(cls, values: Floats) -> Stored:
        """Return the same in 16 bits, if float16 has each of them exactly."""
        return cls(shape=values.shape, parts={"values": narrow(values)})

    @classmethod
    def of_codes(cls, files: StudentFiles, name: str, storage: Storage) -> Stored | None:
        """Return a matrix on one of GGUF's grids as its codes; None of what is on no such grid."""
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
    """Find each tensor in a file that was just written, by its bytes.

    Raises:
        VerificationError: The file does not have one of them, as it was given; names it.
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
    """Return what a file's bytes have at a place, which may be anything that JSON holds.

    Raises:
        InputError: It is no place.
        ValueError, TypeError, KeyError: It names bytes outside the file, or of another number or kind.
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
    """Find arrays in a file, by their bytes: where each begins.

    Args:
        path: The file.
        arrays: Of at least 8 bytes each, by the name of a tensor and that of its part.

    Raises:
        VerificationError: The file does not have one of them; names its tensor.
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
    """Return the first bytes of an array that are not all zeros, as a number, and how many lie ahead of them."""
    raw = np.ascontiguousarray(values).view(np.uint8).ravel()
    words = raw[: len(raw) // _WORD * _WORD].view(np.uint64)
    place = int(np.argmax(words != 0))
    return int(words[place]), _WORD * place
