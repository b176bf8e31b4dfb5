"""Packing of whole records into sequences of one length, so that an answer always has its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from autodistill.data.chat_template import Rendered
from autodistill.data.conversations import Likeliest


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Sequences of whole records, with padding behind the last record of each.

    Attributes:
        tokens: int32 [sequences, length]; padding repeats the last token.
        documents: int32 [sequences, length], the owner of the record each token belongs to; -1 for padding.
        answers: bool [sequences, length], whether the token is part of an answer; False for padding.
        told: [sequences, length, k], the likeliest tokens in each place, as far as any were told; None where none were.
        shared: bool [sequences, length], the answers' tokens that all renderings have; False where there is but one.
    """

    tokens: npt.NDArray[np.int32]
    documents: npt.NDArray[np.int32]
    answers: npt.NDArray[np.bool_]
    told: Likeliest | None = None
    shared: npt.NDArray[np.bool_]


def cut(record: Rendered, length: int) -> Rendered | None:
    """Return the record shortened at its end to one sequence; None if no answer token would be left."""
    answers = record.answers[:length]
    if not answers[1:].any():
        return None
    told = None if record.told is None else record.told.first(length)
    spots = None if record.spots is None else record.spots[:length]
    return replace(record, tokens=record.tokens[:length], answers=answers, told=told, spots=spots)


def fill(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Choose the records of each sequence: longest first, each where it leaves the least room (best-fit decreasing).

    Args:
        sizes: Tokens of each record, `length` at the most.
        length: Tokens of a sequence.
    """
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(length + 1)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        size = sizes[index]
        room = next((room for room in range(size, length + 1) if by_room[room]), None)
        if room is None:
            rows.append([])
            row, room = len(rows) - 1, length
        else:
            row = by_room[room].pop()
        rows[row].append(index)
        by_room[room - size].append(row)
    return rows


def pack(
    records: Sequence[Rendered], owners: Sequence[int], length: int, rows: Sequence[Sequence[int]] | None = None
) -> Packed:
    """Put records into sequences, one after the other.

    Args:
        records: None longer than `length`.
        owners: The document of each.
        length: Tokens of a sequence.
        rows: Which records each sequence holds, as `fill` gives them for the sizes of these records, or where they are
            one rendering of several, for the longest of each: then all have the same records in the same sequences.
    """
    rows = fill([len(record.tokens) for record in records], length) if rows is None else rows
    shape = (len(rows), length)
    tokens, documents = np.empty(shape, np.int32), np.full(shape, -1, np.int32)
    answers, shared = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    widest = max((record.told.ids.shape[1] for record in records if record.told is not None), default=0)
    told = Likeliest(np.full((*shape, widest), -1, np.int32), np.zeros((*shape, widest), np.float32))
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            end = start + len(records[index].tokens)
            # Each record's last token also fills what follows; the next record overwrites it.
            tokens[row, start:] = records[index].tokens[-1]
            documents[row, start:end] = owners[index]
            tokens[row, start:end] = records[index].tokens
            answers[row, start:end] = records[index].answers
            if (common := records[index].shared) is not None:
                shared[row, start:end] = common
            own = records[index].told
            for values, whole in zip(own or (), told, strict=False):
                whole[row, start:end, : values.shape[1]] = values
            start = end
    return Packed(tokens=tokens, documents=documents, answers=answers, told=told if widest else None, shared=shared)
