"""General text, which is never trained on: it shows what a student has forgotten while it learned from other text."""

from __future__ import annotations

from itertools import zip_longest
from pathlib import Path
from typing import cast

import numpy as np

from autodistill.data.dataset import TokenSet
from autodistill.data.documents import DataSource, resolve_data
from autodistill.data.tokenization import beginning, encode, load_tokenizer
from autodistill.errors import InputError
from autodistill.utils.hashing import content_hash

PACKAGED = "packaged"
"""Reference of the text that ships with the package: sixty-three short pieces of prose, code, reference pages, talk and
other languages. They were written for this project. The kinds alternate, so that the first pieces include all kinds."""

_FILE = Path(__file__).with_name("general.txt")
_BETWEEN = "\n----\n"
_LONGEST = 128  # tokens of a sequence at most, so that sequences come from many documents


def resolve_general(ref: str) -> DataSource:
    """Find and read general text.

    Args:
        ref: `PACKAGED`, or a reference to text as for `resolve_data`.

    Raises:
        InputError: As `resolve_data`, or the reference has conversations.
    """
    if ref == PACKAGED:
        texts = tuple(text.strip() for text in _FILE.read_text(encoding="utf-8").split(_BETWEEN))
        return DataSource(
            name="general text", kind="txt", documents=texts, license="Apache-2.0", fingerprint=content_hash(texts)
        )
    source = resolve_data(ref)
    if source.conversations:
        raise InputError(f"--general-text is plain text, and {ref} has conversations: name a folder or a file of text")
    return source


def general_sequences(source: DataSource, tokenizer_folder: Path, sequence_length: int, tokens: int) -> TokenSet | None:
    """Cut text into sequences: first one from each document, then a second one from each, and so on.

    Args:
        source: The text, from `resolve_general`.
        tokenizer_folder: A folder that transformers' AutoTokenizer can load.
        sequence_length: The most tokens of a sequence. Sequences are never longer than 128 tokens.
        tokens: The most tokens in total. At least one sequence is returned.

    Returns:
        The sequences, or None if no document is as long as a sequence.
    """
    length, tokenizer = min(sequence_length, _LONGEST), load_tokenizer(tokenizer_folder)
    begin = beginning(tokenizer)
    head = [] if begin is None else [begin]
    step = length - len(head)
    # Cut long documents, which saves tokenization of text that is not needed.
    texts = [cast(str, text)[: 64 * tokens] for text in source.documents]
    parts = []
    for place, ids in enumerate(encode(tokenizer, texts)):
        starts = range(0, len(ids) - step + 1, step)
        parts.append([(place, np.array([*head, *ids[start : start + step]], np.int32)) for start in starts])
    ordered = [part for turn in zip_longest(*parts) for part in turn if part is not None]
    chosen = ordered[: max(1, tokens // length)]
    if not chosen:
        return None
    documents = np.repeat(np.array([place for place, _ in chosen], np.int32)[:, None], length, axis=1)
    return TokenSet(tokens=np.stack([ids for _, ids in chosen]), documents=documents)
