"""GGUF files: metadata of wrong kinds, counts and lengths beyond the file, tensors that overlap or are misplaced."""

from __future__ import annotations

import copy
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.hostile.cases import Case, Kit

_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9


@dataclass
class _File:
    """A GGUF file in parts, which can be spoilt and written again without any check.

    Attributes:
        entries: [key, type, value]; an array's value is [type, values].
        tensors: [name, dimensions as stored, type, offset].
        counts: Numbers of tensors and entries, if the header should give wrong ones.
    """

    version: int
    entries: list[list[Any]]
    tensors: list[list[Any]]
    data: bytes
    counts: tuple[int, int] | None = None
    magic: bytes = b"GGUF"
    raw: dict[str, bytes] = field(default_factory=dict)  # of an entry's value, instead of the real ones

    def write(self, path: Path) -> None:
        tensors, entries = self.counts or (len(self.tensors), len(self.entries))
        out = self.magic + struct.pack("<IQQ", self.version, tensors, entries)
        for key, kind, value in self.entries:
            out += _text(key) + struct.pack("<I", kind) + (self.raw[key] if key in self.raw else _value(kind, value))
        for name, dims, kind, offset in self.tensors:
            out += _text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
        path.write_bytes(out + bytes(-len(out) % 32) + self.data)

    def entry(self, end: str) -> list[Any]:
        """Return the entry whose key ends with this text."""
        return next(entry for entry in self.entries if entry[0].endswith(end))


def _text(text: str | bytes) -> bytes:
    encoded = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(encoded)) + encoded


def _value(kind: int, value: Any) -> bytes:
    if kind == _TEXT:
        return _text(value)
    if kind == _ARRAY:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(_value(inner, one) for one in values)
    return struct.pack(f"<{_CODES[kind]}", value)


def _read(path: Path) -> _File:
    data, place = path.read_bytes(), 24

    def take(code: str) -> Any:
        nonlocal place
        place += struct.calcsize(f"<{code}")
        return struct.unpack_from(f"<{code}", data, place - struct.calcsize(f"<{code}"))[0]

    def text() -> str:
        nonlocal place
        length = take("Q")
        place += length
        return data[place - length : place].decode()

    def value(kind: int) -> Any:
        if kind == _TEXT:
            return text()
        if kind == _ARRAY:
            inner, count = take("I"), take("Q")
            return [inner, [value(inner) for _ in range(count)]]
        return take(_CODES[kind])

    version, tensor_count, entry_count = struct.unpack_from("<IQQ", data, 4)
    entries = []
    for _ in range(entry_count):
        key, kind = text(), take("I")
        entries.append([key, kind, value(kind)])
    tensors = [[text(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")] for _ in range(tensor_count)]
    return _File(version, entries, tensors, data[-(-place // 32) * 32 :])


# A value of each kind, and numbers that programs often fail on.
_VALUES: list[tuple[int, Any]] = [
    (0, 255),
    (1, -1),
    (2, 65535),
    (3, -3),
    (4, 0),
    (4, 1),
    (4, 7),
    (4, 2**32 - 1),
    (5, -1),
    (5, -(2**31)),
    (6, 0.0),
    (6, -1.0),
    (6, 1e38),
    (6, float("nan")),
    (6, float("inf")),
    (7, True),
    (8, ""),
    (8, "word"),
    (8, "\x00\n\x1b[31m" * 3),
    (8, "long" * 50_000),
    (8, b"\xff\xfe\x80"),
    (9, [4, []]),
    (9, [4, [1, 2, 3]]),
    (9, [5, [-1] * 300]),
    (9, [8, ["a", "b"]]),
    (9, [8, [""] * 300]),
    (9, [6, [float("nan")] * 300]),
    (9, [9, [[4, [1]], [4, [2]]]]),
    (9, [7, [True] * 5]),
    (10, 2**64 - 1),
    (10, 2**60),
    (11, -(2**63)),
    (12, float("nan")),
    (12, 1e308),
]
_EDGES = (0, 1, 3, 31, 33, 2**16, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1)


def cases(kit: Kit, dice: random.Random) -> Iterator[Case]:
    whole = _read(kit.gguf)

    def case(name: str, spoil: Callable[[_File], object]) -> Iterator[Case]:
        def make(folder: Path) -> None:
            file = copy.deepcopy(whole)
            spoil(file)
            file.write(folder / "m.gguf")

        yield from _cases(name, make, kit, dice)

    for entry in whole.entries:
        key = entry[0]
        for number, (kind, value) in enumerate(dice.sample(_VALUES, 5)):
            yield from case(f"{key}-as-{kind}-{number}", partial(_set_entry, key=key, kind=kind, value=value))
        yield from case(f"{key}-left-out", partial(_drop_entry, key=key))
    for key in dice.sample([entry[0] for entry in whole.entries], 6):
        yield from case(f"{key}-twice", partial(_twice, key=key))
    for number in range(60):
        yield from case(f"tensor-{number}", partial(_spoil_tensor, seed=dice.random()))
    for number in range(25):
        yield from case(f"token-list-{number}", partial(_spoil_tokens, seed=dice.random()))
    for number, counts in enumerate([(0, 0), (2**60, 5), (5, 2**60), (2**64 - 1, 2**64 - 1), (0, 30), (10**6, 10**6)]):
        yield from case(f"counts-{number}", lambda file, counts=counts: setattr(file, "counts", counts))
    for version in (0, 1, 4, 2**32 - 1, 3 << 24):
        yield from case(f"version-{version}", lambda file, version=version: setattr(file, "version", version))
    for name, bytes_ in _LENGTHS.items():
        yield from case(f"length-{name}", partial(_raw, bytes_=bytes_, seed=dice.random()))
    for number in range(40):
        yield from _cases(f"flip-{number}", partial(_flip, source=kit.gguf, seed=dice.random()), kit, dice)
    for number in range(12):
        yield from _cases(f"cut-{number}", partial(_cut, source=kit.gguf, seed=dice.random()), kit, dice)
    for number, content in enumerate(
        (b"", b"GGUF", b"GGUF\x03\x00\x00\x00", b"FUGG" + bytes(100), bytes(10_000), b"\xff" * 999)
    ):
        yield from _cases(f"content-{number}", lambda folder, c=content: (folder / "m.gguf").write_bytes(c), kit, dice)


# With an array's type and count, or a text's length: lengths that no file has.
_LENGTHS = {
    "text-2^60": (_TEXT, struct.pack("<Q", 2**60)),
    "text-2^64": (_TEXT, struct.pack("<Q", 2**64 - 1)),
    "array-2^60-of-bytes": (_ARRAY, struct.pack("<IQ", 0, 2**60)),
    "array-2^60-of-numbers": (_ARRAY, struct.pack("<IQ", 12, 2**60)),
    "array-2^64-of-texts": (_ARRAY, struct.pack("<IQ", 8, 2**64 - 1)),
    "array-of-arrays": (_ARRAY, struct.pack("<IQ", 9, 1) * 5_000),
    "array-of-nothing-known": (_ARRAY, struct.pack("<IQ", 77, 3)),
    "array-of-empty-texts": (_ARRAY, struct.pack("<IQ", 8, 3_000_000) + bytes(24_000_000)),
    "type-13": (13, b""),
    "type-2^32": (2**32 - 1, b""),
}


def _cases(
    name: str, make: Callable[[Path], object], kit: Kit, dice: random.Random, codes: tuple[int, ...] = (0, 2)
) -> Iterator[Case]:
    # One of the commands may not read a spoilt part, and a changed bit of a weight may not matter.
    ways = [("estimate", ("estimate", "m.gguf")), ("write", kit.write("m.gguf"))]
    ways += [("plan", kit.plan(teacher="m.gguf"))] if dice.random() < 0.05 else []
    for way, argv in ways:
        # A bit may make weights huge. Only the written text shows this, so it is not only the input's fault.
        own = (*codes, 1) if way == "write" and name.startswith(("tensor", "flip")) else codes
        yield Case(area="gguf", name=f"{name}-{way}", argv=argv, make=make, codes=own)


def _set_entry(file: _File, key: str, kind: int, value: Any) -> None:
    file.entry(key)[1:] = [kind, value]


def _drop_entry(file: _File, key: str) -> None:
    file.entries.remove(file.entry(key))


def _twice(file: _File, key: str) -> None:
    file.entries.append([key, 4, 1])


def _raw(file: _File, bytes_: tuple[int, bytes], seed: float) -> None:
    dice = random.Random(seed)
    entry = dice.choice(file.entries)
    entry[1] = bytes_[0]
    file.raw[entry[0]] = bytes_[1]


def _spoil_tensor(file: _File, seed: float) -> None:
    dice = random.Random(seed)
    tensor, other = dice.sample(file.tensors, 2)
    way = dice.randrange(12)
    if way == 0:
        tensor[3] = other[3]
    elif way == 1:
        tensor[3] += dice.choice((1, 4, 16, 31))
    elif way == 2:
        tensor[3] = dice.choice(_EDGES)
    elif way == 3:
        tensor[2] = dice.choice((0, 1, 2, 3, 4, 5, 10, 14, 16, 24, 30, 34, 39, 99, 2**32 - 1))
    elif way == 4:
        tensor[1][dice.randrange(len(tensor[1]))] = dice.choice(_EDGES)
    elif way == 5:
        tensor[1] = [dice.choice(_EDGES) for _ in range(dice.choice((0, 1, 2, 3, 4, 5, 100)))]
    elif way == 6:
        tensor[0] = dice.choice(
            ("", other[0], "blk.999999999999.attn_q.weight", "blk.-1.ffn_up.weight", b"\xff", "x" * 99_999)
        )
    elif way == 7:
        file.tensors.remove(tensor)
    elif way == 8:
        file.tensors.append(list(tensor))
    elif way == 9:
        tensor[1].reverse()
    elif way == 10:
        file.tensors = file.tensors[: dice.randrange(len(file.tensors))]
    else:
        table = next(one for one in file.tensors if one[0] == "token_embd.weight")
        table[1][1] = dice.choice((1, 32, 256, 299))


def _spoil_tokens(file: _File, seed: float) -> None:
    dice = random.Random(seed)
    kind, values = (entry := file.entry(dice.choice(("ggml.tokens", "ggml.merges", "ggml.token_type"))))[2]
    way = dice.randrange(9)
    if way == 0:
        values.clear()
    elif way == 1:
        del values[dice.randrange(len(values)) :]
    elif way == 2:
        values += values * 3
    elif way == 3:
        values[:] = [values[0]] * len(values)
    elif way == 4 and kind == _TEXT:
        values[dice.randrange(len(values))] = dice.choice(
            ("", " ", "a", "one two three", "\x00", b"\xff\x80", "x" * 100_000)
        )
    elif way == 5 and kind == _TEXT:
        values[:] = [str(place) for place in range(len(values))]
    elif way == 6 and kind == _TEXT:
        values[:] = ["word without end " * 3] * len(values)
    elif way == 7:
        values.reverse()
    elif kind == _TEXT:
        dice.shuffle(values)
    else:
        values[:] = [dice.choice((-1, 0, 1, 3, 4, 5, 6, 99)) for _ in values]
    entry[2] = [kind, values]


def _flip(folder: Path, source: Path, seed: float) -> None:
    dice = random.Random(seed)
    data = bytearray(source.read_bytes())
    for _ in range(dice.choice((1, 1, 3, 20))):
        # In headers, bits matter. Weights are numbers, whatever their bits are.
        data[dice.randrange(min(len(data), 12_000))] ^= 1 << dice.randrange(8)
    (folder / "m.gguf").write_bytes(data)


def _cut(folder: Path, source: Path, seed: float) -> None:
    dice = random.Random(seed)
    data = source.read_bytes()
    (folder / "m.gguf").write_bytes(
        data[: dice.randrange(len(data)) if dice.random() < 0.5 else dice.randrange(12_000)]
    )
