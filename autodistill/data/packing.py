"""Pack whole records into sequences of one length, so that an answer always has its prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from autodistill.data.chat_template import Rendered
from autodistill.data.conversations import Likeliest


@dataclass(frozen=True, kw_only=True, eq=False)
class Packed:
    """Sequences of whole records, with padding after the last record of each.

    Attributes:
        tokens: int32 [sequences, length]; padding repeats the last token.
        documents: int32 [sequences, length], the document of each token's record; -1 for padding.
        answers: bool [sequences, length], whether the token is part of an answer; False for padding.
        writer_logprobs: [sequences, length, k], the likeliest tokens at each position, as far as they were reported, or
            None if none were.
        shared: bool [sequences, length], the answer tokens that all renderings have; all False if there is only one.
    """

    tokens: npt.NDArray[np.int32]
    documents: npt.NDArray[np.int32]
    answers: npt.NDArray[np.bool_]
    writer_logprobs: Likeliest | None = None
    shared: npt.NDArray[np.bool_]


def cut(record: Rendered, length: int) -> Rendered | None:
    """Return the record cut to the length of one sequence, or None if no answer token would be left."""
    answers = record.answers[:length]
    if not answers[1:].any():
        return None
    writer_logprobs = None if record.writer_logprobs is None else record.writer_logprobs.first(length)
    spots = None if record.spots is None else record.spots[:length]
    return replace(record, tokens=record.tokens[:length], answers=answers, writer_logprobs=writer_logprobs, spots=spots)


def fill(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Choose the records of each sequence by best-fit decreasing.

    The longest records are placed first, each into the sequence in which it leaves the least room.

    Args:
        sizes: Number of tokens of each record, at most `length`.
        length: Number of tokens in a sequence.

    Returns:
        The indices of the records in each sequence.
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
        records: The records. None may be longer than `length`.
        owners: The document of each record.
        length: Number of tokens in a sequence.
        rows: The indices of the records in each sequence. By default, `fill` chooses them for the sizes of these
            records. With several renderings they must be given, chosen by the longest rendering of each record, so that
            all renderings have the same records in the same sequences.
    """
    rows = fill([len(record.tokens) for record in records], length) if rows is None else rows
    shape = (len(rows), length)
    tokens, documents = np.empty(shape, np.int32), np.full(shape, -1, np.int32)
    answers, shared = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=bool)
    widest = max(
        (record.writer_logprobs.ids.shape[1] for record in records if record.writer_logprobs is not None), default=0
    )
    writer_logprobs = Likeliest(np.full((*shape, widest), -1, np.int32), np.zeros((*shape, widest), np.float32))
    for row, members in enumerate(rows):
        start = 0
        for index in members:
            end = start + len(records[index].tokens)
            # Each record's last token also fills the rest of the row. The next record overwrites it.
            tokens[row, start:] = records[index].tokens[-1]
            documents[row, start:end] = owners[index]
            tokens[row, start:end] = records[index].tokens
            answers[row, start:end] = records[index].answers
            if (common := records[index].shared) is not None:
                shared[row, start:end] = common
            own = records[index].writer_logprobs
            for values, whole in zip(own or (), writer_logprobs, strict=False):
                whole[row, start:end, : values.shape[1]] = values
            start = end
    return Packed(
        tokens=tokens,
        documents=documents,
        answers=answers,
        writer_logprobs=writer_logprobs if widest else None,
        shared=shared,
    )
