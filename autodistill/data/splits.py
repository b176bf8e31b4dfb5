"""Assign data to splits: whole documents, or contiguous blocks of one long text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from autodistill.data.dataset import SPLITS, Tokens
from autodistill.errors import InputError

_HELD_OUT = 0.1  # share of the tokens for each of validation and test


def first_occurrences(documents: Sequence[str]) -> list[int]:
    """Return, for each document, the index of the first one with the same text, apart from whitespace between words."""
    first: dict[str, int] = {}
    return [first.setdefault(" ".join(text.split()), place) for place, text in enumerate(documents)]


def differ_in_blanks(documents: Sequence[str]) -> bool:
    """Return whether some documents differ only in the whitespace between their words."""
    return len({text.strip() for text in documents}) > len(set(first_occurrences(documents)))


def in_a_row(sequences: int) -> int:
    """Return how many sequences of one long text count as one document: the cube root of their number, rounded up.

    Neighbouring sequences are similar, so standard errors over single sequences would be too small. With blocks of this
    order of size, a block bootstrap estimates a variance best (Hall, Horowitz and Jing, Biometrika 82, 1995).
    """
    return math.ceil(sequences ** (1 / 3) - 1e-9)


def contiguous(tokens: Tokens, length: int) -> dict[str, tuple[Tokens, Tokens]]:
    """Cut one long text into contiguous parts of whole sequences, with a gap of one sequence between them.

    Returns:
        For each split its tokens, and the document of each token. A document is a block of consecutive sequences, and
        its number is that of the first sequence.
    """
    sequences = len(tokens) // length
    needed = len(SPLITS) + 2  # one for each split and two for the gaps
    if sequences < needed:
        raise _too_short(f"{len(tokens)} tokens in one long text", length, needed * length)
    held_out = max(1, round((sequences - 2) * _HELD_OUT))
    counts = {"train": sequences - 2 - 2 * held_out, "validation": held_out, "test": held_out}
    blocks, start = {}, 0
    for split in SPLITS:
        rows = np.arange(start, start + counts[split], dtype=np.int32)
        block = tokens[rows[0] * length : (rows[-1] + 1) * length]
        documents = rows - (rows - start) % in_a_row(counts[split])
        blocks[split] = (block, np.repeat(documents, length))
        start += counts[split] + 1
    return blocks


def assign(
    texts: Sequence[str] | Mapping[int, str], documents: list[Tokens], places: list[int], length: int, seed: int
) -> dict[str, list[int]]:
    """Choose the split of every distinct document, in an order that depends only on their texts and the seed.

    Each document goes to the split that is furthest from its share of the tokens and has room for it. A document that
    is too large for validation and test goes to train. At the end, documents move from train to a split that has less
    than one whole sequence.

    Returns:
        For each split the places of its documents.
    """
    sizes: dict[int, int] = {}
    for place, tokens in zip(places, documents, strict=True):
        sizes[place] = sizes.get(place, 0) + len(tokens)
    total = sum(sizes.values())
    share = max(int(total * _HELD_OUT), length)
    target = {"train": max(total - 2 * share, 1), "validation": share, "test": share}
    order = sorted(sizes, key=lambda place: hashlib.sha256(f"{seed}:{texts[place].strip()}".encode()).digest())
    small = {place for place in order if sizes[place] <= share}
    if len(small) < 2:
        small = set(sorted(order, key=lambda place: (sizes[place], order.index(place)))[:2])
    chosen: dict[str, list[int]] = {
        "train": [place for place in order if place not in small],
        "validation": [],
        "test": [],
    }
    filled = {split: sum(sizes[place] for place in chosen[split]) for split in SPLITS}

    def put(place: int, split: str) -> None:
        chosen[split].append(place)
        filled[split] += sizes[place]

    for place in order:
        if place in small:
            # If no split has room, the document goes to train.
            room = (split for split in SPLITS if filled[split] + sizes[place] <= target[split] or not filled[split])
            put(place, min(room, key=lambda split: filled[split] / target[split], default="train"))
    for split in ("validation", "test"):
        while filled[split] < length and len(chosen["train"]) > 1:
            place = min(chosen["train"], key=lambda place: sizes[place])
            chosen["train"].remove(place)
            filled["train"] -= sizes[place]
            put(place, split)
    if min(filled.values()) < length:
        counts = ", ".join(f"{filled[split]} in {split}" for split in SPLITS)
        raise _too_short(f"{total} tokens in {len(sizes)} documents ({counts})", length, len(SPLITS) * length)
    return chosen


def join(documents: list[Tokens], places: list[int], chosen: dict[str, list[int]]) -> dict[str, tuple[Tokens, Tokens]]:
    """Return the joined tokens of each split and their documents; copies of a document follow it."""
    copies: dict[int, list[int]] = {}
    for index, place in enumerate(places):
        copies.setdefault(place, []).append(index)
    packed = {}
    for split, members in chosen.items():
        parts = [documents[index] for place in members for index in copies[place]]
        owners = [places[index] for place in members for index in copies[place]]
        packed[split] = (np.concatenate(parts), np.repeat(np.array(owners, np.int32), [len(part) for part in parts]))
    return packed


def _too_short(found: str, length: int, needed: int) -> InputError:
    return InputError(
        f"the data are too short: {found}, but one sequence of {length} tokens in each of {', '.join(SPLITS)} needs "
        f"at least {needed}: give more text or a shorter sequence"
    )
