"""Damaged or forged GGUF files: each gives one line that says what is wrong with the file."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from autodistill.errors import InputError
from autodistill.models.gguf_reader import read_gguf
from autodistill.models.gguf_to_transformers import convert_text
from tests.hostile.cases import Kit
from tests.hostile.gguf import _File, _read


@pytest.fixture(scope="module")
def kit(tmp_path_factory: pytest.TempPathFactory) -> Kit:
    return Kit(tmp_path_factory.mktemp("kit"))


@pytest.fixture
def file(kit: Kit) -> _File:
    """A valid file, to be spoilt."""
    return _read(kit.gguf)


def _saved(file: _File, folder: Path) -> Path:
    file.write(folder / "m.gguf")
    return folder / "m.gguf"


def test_the_whole_file_is_read_and_its_text_made_a_folder(file: _File, tmp_path: Path) -> None:
    read = read_gguf(_saved(file, tmp_path))
    convert_text(read, tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()


def _set(end: str, kind: int, value: Any) -> Callable[[_File], object]:
    def spoil(file: _File) -> None:
        file.entry(end)[1:] = [kind, value]

    return spoil


def _tensor(place: int, value: Any) -> Callable[[_File], object]:
    def spoil(file: _File) -> None:
        tensor = next(one for one in file.tensors if one[0] == "blk.0.ffn_up.weight")
        tensor[place] = value(tensor, file) if callable(value) else value

    return spoil


def _twice(file: _File) -> None:
    file.tensors.append(list(file.tensors[0]))


def _huge(file: _File) -> None:
    file.entry("general.type")[1] = 9
    file.raw["general.type"] = struct.pack("<IQ", 8, 2**60)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_twice, "is there twice"),
        (lambda file: file.entries.append(["general.type", 4, 1]), "the key general.type is there twice"),
        (_tensor(3, lambda tensor, file: file.tensors[0][3] if file.tensors[0] is not tensor else 0), "overlap"),
        (_tensor(3, lambda tensor, _: tensor[3] + 4), "does not begin at a multiple of 32"),
        (_tensor(1, []), "has 0 dimensions"),
        (_tensor(1, [64] * 5), "has 5 dimensions"),
        (_tensor(1, [64, 0]), "rows of"),
        (_tensor(1, [33, 128]), "rows of 33 weights in blocks of 32"),
        (_tensor(1, [2**40, 2**40]), "ends beyond the file"),
        (_tensor(2, 77), "truncated or damaged"),
        (_huge, "truncated or damaged"),
        (lambda file: file.entries.append(["general.alignment", 9, [4, [1]]]), "general.alignment is no number"),
        (lambda file: file.entries.append(["general.alignment", 4, 0]), "general.alignment is no number"),
    ],
)
def test_a_header_that_readers_would_trip_over_is_refused(
    spoil: Callable[[_File], object], said: str, file: _File, tmp_path: Path
) -> None:
    spoil(file)
    with pytest.raises(InputError, match=re.escape(said)):
        read_gguf(_saved(file, tmp_path))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_set("rms_epsilon", 4, 0), "must be a number above 0"),
        (_set("rms_epsilon", 6, float("nan")), "must be a number above 0"),
        (_set("rms_epsilon", 8, "x" * 10_000), "must be a number above 0"),
        (_set("eos_token_id", 6, 2.0), "none of its 300 tokens"),
        (_set("eos_token_id", 4, 300), "none of its 300 tokens"),
        (_set("padding_token_id", 5, -1), "none of its 300 tokens"),
        (_set("bos_token_id", 9, [4, [1]]), "none of its 300 tokens"),
        (_set("ggml.merges", 9, [4, [1, 2]]), "tokenizer.ggml.merges of another kind"),
        (_set("ggml.merges", 9, [8, ["z z"] * 3]), "cannot be read"),
        (_set("ggml.tokens", 9, [8, []]), "has 0 tokens"),
        (
            _set("ggml.tokens", 9, [8, [str(n) for n in range(301)]]),
            "has 301 tokens, and an embedding table of 300 rows",
        ),
        (_set("ggml.token_type", 9, [5, [1, 1]]), "has 2 tokenizer.ggml.token_type of 300 tokens"),
        (_set("ggml.pre", 9, [8, ["a"]]), "no text as tokenizer.ggml.pre"),
        (_set("embedding_length", 4, 65), "makes no model of the header"),
    ],
)
def test_metadata_of_a_wrong_kind_is_refused_where_the_folder_is_made(
    spoil: Callable[[_File], object], said: str, file: _File, tmp_path: Path
) -> None:
    spoil(file)
    with pytest.raises(InputError, match=re.escape(said)):
        convert_text(read_gguf(_saved(file, tmp_path)), tmp_path)


def test_weights_that_are_no_numbers_are_refused(file: _File, tmp_path: Path) -> None:
    tensor = next(one for one in file.tensors if one[0] == "output_norm.weight")
    data = bytearray(file.data)
    data[tensor[3] : tensor[3] + 4] = struct.pack("<f", float("nan"))
    file.data = bytes(data)
    read = read_gguf(_saved(file, tmp_path))
    found = next(one for one in read.tensors if one.name == "output_norm.weight")
    with pytest.raises(InputError, match=r"output_norm\.weight has weights that are no numbers"):
        read.values(found)
