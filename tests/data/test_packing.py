"""Whole records in sequences: each record once and in one piece, with little padding."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from autodistill.data.chat_template import Rendered
from autodistill.data.conversations import Likeliest
from autodistill.data.packing import cut, pack


def _record(number: int, size: int) -> Rendered:
    """Return tokens that encode the record and the position in it. The second half is the answer."""
    return Rendered(np.arange(size, dtype=np.int32) + 100 * number, np.arange(size) >= size // 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 16), min_size=1, max_size=40))
def test_each_record_is_there_once_and_in_one_piece(sizes: list[int]) -> None:
    records = [_record(number, size) for number, size in enumerate(sizes)]
    packed = pack(records, list(range(len(sizes))), 16)
    assert packed.tokens.shape == packed.documents.shape == packed.answers.shape
    assert packed.tokens.shape[1] == 16
    for number, record in enumerate(records):
        (row,) = np.unique(np.nonzero(packed.tokens == 100 * number)[0])
        begin = int(np.flatnonzero(packed.tokens[row] == 100 * number)[0])
        place = slice(begin, begin + len(record.tokens))
        assert np.array_equal(packed.tokens[row, place], record.tokens)
        assert np.array_equal(packed.answers[row, place], record.answers)
        assert (packed.documents[row, place] == number).all()
    # Everything else is padding, which never counts.
    assert packed.answers.sum() == sum(record.answers.sum() for record in records)
    # Best fit never leaves two sequences whose records would fit in one.
    used = [len(set(row.tolist())) for row in packed.tokens]
    assert len(used) < 2 or sorted(used)[0] + sorted(used)[1] > 16


def test_padding_repeats_the_last_token_and_has_no_owner() -> None:
    packed = pack([_record(0, 5), _record(1, 4)], [7, 9], 12)
    assert packed.tokens.tolist() == [[0, 1, 2, 3, 4, 100, 101, 102, 103, 103, 103, 103]]
    assert packed.documents.tolist() == [[7] * 5 + [9] * 4 + [-1] * 3]
    assert packed.answers.astype(int).tolist() == [[0, 0, 1, 1, 1, 0, 0, 1, 1, 0, 0, 0]]


def test_a_long_record_is_cut_at_its_end_or_left_out() -> None:
    short = cut(_record(0, 10), 10)
    assert short is not None
    assert len(short.tokens) == 10
    half = cut(_record(0, 10), 7)
    assert half is not None
    assert half.answers.sum() == 2
    assert cut(_record(0, 10), 5) is None
    # The first token of a sequence is predicted from nothing.
    assert cut(Rendered(np.arange(3, dtype=np.int32), np.array([True, False, False])), 3) is None


def _told(number: int, size: int, count: int) -> Rendered:
    """Return a record with likeliest tokens that encode record, position and rank."""
    ids = 1000 * number + 10 * np.arange(size)[:, None] + np.arange(count)
    return replace(_record(number, size), writer_logprobs=Likeliest(ids.astype(np.int32), -ids.astype(np.float32)))


def test_what_was_told_of_a_token_stays_with_it() -> None:
    records = [_record(0, 4), _told(1, 5, 1), _told(2, 3, 2)]
    packed = pack(records, [0, 1, 2], 12)
    assert packed.writer_logprobs is not None
    assert packed.writer_logprobs.ids.shape == packed.writer_logprobs.log_p.shape == (1, 12, 2)
    for place, token in enumerate(packed.tokens[0].tolist()):
        number, own = divmod(token, 100)
        counted = packed.documents[0, place] >= 0
        told = [1000 * number + 10 * own + rank for rank in range((0, 1, 2)[number])] if counted else []
        assert packed.writer_logprobs.ids[0, place].tolist() == told + [-1] * (2 - len(told))
        assert packed.writer_logprobs.log_p[0, place].tolist() == [-one for one in told] + [0] * (2 - len(told))
    assert pack([_record(0, 4)], [0], 12).writer_logprobs is None


def test_what_all_renderings_share_stays_with_its_record() -> None:
    common = np.array([False, True, False, True])
    records = [_record(0, 5), replace(_record(1, 4), shared=common)]
    packed = pack(records, [0, 1], 12)
    assert packed.shared is not None
    begin = packed.tokens[0].tolist().index(100)
    assert packed.shared[0, begin : begin + 4].tolist() == common.tolist()
    assert packed.shared.sum() == 2


def test_a_cut_record_keeps_what_was_told_of_what_is_left() -> None:
    half = cut(_told(1, 10, 2), 7)
    assert half is not None
    assert half.writer_logprobs is not None
    assert half.writer_logprobs.ids[:, 0].tolist() == [1000, 1010, 1020, 1030, 1040, 1050, 1060]
