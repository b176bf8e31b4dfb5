"""Which sequences and documents belong to which split, counted by hand."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from autodistill.data.dataset import SPLITS
from autodistill.data.splits import assign, contiguous, differ_in_blanks
from autodistill.errors import InputError


@pytest.mark.parametrize(
    ("sequences", "firsts"),
    [
        # The number of the document of each sequence. A gap lies between the numbers of two splits.
        (5, ([0], [2], [4])),
        (7, ([0, 0, 2], [4], [6])),
        (16, ([0, 0, 0, 3, 3, 3, 6, 6, 6, 9, 9, 9], [13], [15])),
        # Two tenths of 20 sequences. From here on the shares of validation and test are above one sequence.
        (22, ([0] * 3 + [3] * 3 + [6] * 3 + [9] * 3 + [12] * 3 + [15], [17, 17], [20, 20])),
    ],
)
@pytest.mark.parametrize("rest", [0, 3])
def test_parts_of_a_long_text_are_whole_sequences_with_one_between_two_parts(
    sequences: int, firsts: tuple[list[int], ...], rest: int
) -> None:
    found = contiguous(np.arange(4 * sequences + rest, dtype=np.int32), 4)
    begins = (0, len(firsts[0]) + 1, sequences - len(firsts[2]))
    for split, begin, documents in zip(SPLITS, begins, firsts, strict=True):
        tokens, of_tokens = found[split]
        assert tokens.tolist() == list(range(4 * begin, 4 * (begin + len(documents))))
        assert of_tokens.tolist() == [document for document in documents for _ in range(4)]


def test_four_sequences_are_too_few_for_three_parts_and_the_gaps() -> None:
    with pytest.raises(InputError, match=r"19 tokens in one long text.* needs at least 20:"):
        contiguous(np.arange(19, dtype=np.int32), 4)


def test_blanks_around_a_text_are_none_of_it_and_those_between_its_words_are_all_alike() -> None:
    assert differ_in_blanks(["a b", "a  b", "c"])
    assert not differ_in_blanks(["a b", "a b", "c", " c\n"])


def test_a_split_gets_the_next_document_where_it_is_furthest_from_its_share() -> None:
    """By hand, for 20 documents of 10 tokens: shares of 160, 20 and 20. On a tie the first split is served."""
    texts = [f"text {place}" for place in range(20)]
    order = sorted(range(20), key=lambda place: hashlib.sha256(f"7:{texts[place]}".encode()).digest())
    documents: list[Any] = [np.zeros(10, np.int32)] * 20
    # Validation and test get their first document before train has any second one. They get their last one when train
    # has more than a half of its share, which are nine documents.
    chosen = assign(texts, documents, list(range(20)), 10, 7)
    assert chosen["validation"] == [order[1], order[11]]
    assert chosen["test"] == [order[2], order[12]]
    assert chosen["train"] == [order[0], *order[3:11], *order[13:]]


def test_the_last_document_stays_in_train_and_what_each_split_has_is_told() -> None:
    documents: list[Any] = [np.zeros(size, np.int32) for size in (100, 3, 3)]
    with pytest.raises(InputError, match=r"\(100 in train, 3 in validation, 3 in test\)"):
        assign(["a", "b", "c"], documents, [0, 1, 2], 10, 0)
    # Validation takes the smaller of two documents from train. Test may not take the last one.
    documents = [np.zeros(size, np.int32) for size in (5, 5, 12, 20)]
    with pytest.raises(InputError, match=r"\(20 in train, 17 in validation, 5 in test\)"):
        assign(list("abcd"), documents, [0, 1, 2, 3], 10, 0)


def test_documents_that_are_enough_for_a_sequence_stay_in_their_split() -> None:
    documents: list[Any] = [np.zeros(size, np.int32) for size in (100, 3, 3)]
    chosen = assign(list("abcd"), [*documents[:1] * 2, *documents[1:]], [0, 1, 2, 3], 3, 0)
    assert [len(places) for places in chosen.values()] == [2, 1, 1]


def test_of_large_documents_alone_the_two_smallest_are_held_out_in_their_order() -> None:
    texts = [f"text {place}" for place in range(4)]
    order = sorted(range(4), key=lambda place: hashlib.sha256(f"3:{texts[place]}".encode()).digest())
    for sizes in ((90, 95, 200, 210), (95, 90, 200, 210), (200, 95, 210, 90)):
        documents: list[Any] = [np.zeros(sizes[order.index(place)], np.int32) for place in range(4)]
        first, second = (place for place in order if len(documents[place]) < 100)
        chosen = assign(texts, documents, list(range(4)), 10, 3)
        assert (chosen["validation"], chosen["test"]) == ([first], [second])
        assert sorted(len(documents[place]) for place in chosen["train"]) == [200, 210]
