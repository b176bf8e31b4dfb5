"""Reference to tokenised, packed, fingerprinted train, validation and test sets, kept in Arrow.

Documents are split before they are packed, so no document is in two splits. One long text is cut into three contiguous
blocks, with a gap of one sequence between them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autodistill.documents import Source, resolve_data
from autodistill.errors import InputError
from autodistill.strategy import content_hash

if TYPE_CHECKING:
    import pyarrow

__all__ = ["Prepared", "Source", "SplitInfo", "TokenSet", "load_split", "open_prepared", "prepare", "resolve_data"]

SPLITS = ("train", "validation", "test")
_HELD_OUT = 0.1  # share of the tokens that validation gets, and test
_RULE = 1  # part of the fingerprint: to be raised with any change of how data are split, tokenised or packed
_INDEX = "prepared.json"

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """What a split holds: whole sequences, their tokens, and the distinct documents these come from."""

    sequences: int
    tokens: int
    documents: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data on disk, ready to be trained on.

    Attributes:
        folder: Where they lie; `open_prepared` needs no more.
        fingerprint: Hash of text, tokenizer, sequence length, seed and split rule.
        name: That of the source.
        licence: Of the text, where it is known.
        sequence_length: Tokens of a sequence.
        splits: "train", "validation" and "test".
    """

    folder: Path
    fingerprint: str
    name: str
    licence: str | None
    sequence_length: int
    splits: dict[str, SplitInfo]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSet:
    """The sequences of a split, in a fixed shuffled order, so that the first of them come from many documents.

    Attributes:
        tokens: int32 [sequences, sequence_length], read-only.
        documents: int32 [sequences, sequence_length], the document each token belongs to, by its place in the source;
            equal documents share the place of the first. Of one long text, each sequence counts as a document.
    """

    tokens: Tokens
    documents: Tokens

    def head(self, tokens: int) -> TokenSet:
        """The first sequences that together hold at most this many tokens, but at least one of them."""
        count = max(1, tokens // self.tokens.shape[1])
        return TokenSet(tokens=self.tokens[:count], documents=self.documents[:count])


def prepare(
    source: Source, tokenizer_folder: Path, tokenizer_fingerprint: str, sequence_length: int, cache: Path, seed: int = 0
) -> Prepared:
    """Splits, tokenises and packs the documents, or opens what an earlier call left in `cache`.

    Args:
        source: The documents.
        tokenizer_folder: A folder that transformers' AutoTokenizer can load.
        tokenizer_fingerprint: Identifies the tokenizer in the fingerprint of the data.
        sequence_length: Tokens of a sequence, at least 2.
        cache: Folder under which the data are kept; a torn or altered copy in it is made again.
        seed: Of the choice of documents for the splits, and of the order of the sequences.

    Raises:
        InputError: Too little text for one sequence in each split.
    """
    if sequence_length < 2:
        raise InputError(f"a sequence needs at least 2 tokens to predict one from another, not {sequence_length}")
    parts = [source.fingerprint, tokenizer_fingerprint, sequence_length, seed, _RULE]
    fingerprint = content_hash(parts, digits=16)
    folder = cache / "data" / fingerprint
    with contextlib.suppress(InputError):  # missing, torn or altered: made below
        return open_prepared(folder)

    documents = _tokenise(source.documents, tokenizer_folder)
    places = _places(source.documents)
    if len(set(places)) < len(SPLITS):
        packed = _cut(np.concatenate(documents), sequence_length)
    else:
        packed = _pack(documents, places, _assign(source.documents, documents, places, sequence_length, seed))
    tables = {split: _table(*packed[split], sequence_length, seed) for split in SPLITS}
    return _write(folder, fingerprint, source, sequence_length, tables)


def _tokenise(documents: tuple[str, ...], folder: Path) -> list[Tokens]:
    """Token ids of each document, each ended by EOS, or by BOS where the tokenizer has no EOS."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    end = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if end is None:
        raise InputError(f"the tokenizer in {folder} has neither an EOS nor a BOS token to put between documents")
    # Not verbose: the model never sees a document longer than a sequence.
    encoded = tokenizer(list(documents), add_special_tokens=False, return_attention_mask=False, verbose=False)
    return [np.array([*ids, end], dtype=np.int32) for ids in encoded["input_ids"]]


def _places(documents: tuple[str, ...]) -> list[int]:
    """For each document the place of the first one with the same text."""
    first: dict[str, int] = {}
    return [first.setdefault(text.strip(), place) for place, text in enumerate(documents)]


def _too_short(found: str, length: int, needed: int) -> InputError:
    return InputError(
        f"the data are too short: {found}, but one sequence of {length} tokens in each of {', '.join(SPLITS)} needs "
        f"at least {needed}: give more text or a shorter sequence"
    )


def _cut(tokens: Tokens, length: int) -> dict[str, tuple[Tokens, Tokens]]:
    """Cuts one long text into contiguous blocks of whole sequences, with a gap of one sequence between them."""
    sequences = len(tokens) // length
    needed = len(SPLITS) + 2  # two of them are the gaps
    if sequences < needed:
        raise _too_short(f"{len(tokens)} tokens in one long text", length, needed * length)
    held_out = max(1, round((sequences - 2) * _HELD_OUT))
    counts = {"train": sequences - 2 - 2 * held_out, "validation": held_out, "test": held_out}
    blocks, start = {}, 0
    for split in SPLITS:
        rows = np.arange(start, start + counts[split], dtype=np.int32)
        block = tokens[rows[0] * length : (rows[-1] + 1) * length]
        blocks[split] = (block, np.repeat(rows, length))
        start += counts[split] + 1
    return blocks


def _assign(
    texts: tuple[str, ...], documents: list[Tokens], places: list[int], length: int, seed: int
) -> dict[str, list[int]]:
    """Chooses the split of every distinct document, in an order that only its text and the seed decide.

    Each document goes to the split that is furthest from its share of the tokens and has room for it. One that would by
    itself overfill validation or test goes to train. At the end, train gives to a split that lacks a whole sequence.

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
            # Train takes what would overfill the others.
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


def _pack(documents: list[Tokens], places: list[int], chosen: dict[str, list[int]]) -> dict[str, tuple[Tokens, Tokens]]:
    """Joins the documents of each split; copies of a document follow it."""
    copies: dict[int, list[int]] = {}
    for index, place in enumerate(places):
        copies.setdefault(place, []).append(index)
    packed = {}
    for split, members in chosen.items():
        parts = [documents[index] for place in members for index in copies[place]]
        owners = [places[index] for place in members for index in copies[place]]
        packed[split] = (np.concatenate(parts), np.repeat(np.array(owners, np.int32), [len(part) for part in parts]))
    return packed


def _table(tokens: Tokens, documents: Tokens, length: int, seed: int) -> pyarrow.Table:
    """Whole sequences in a shuffled order, as Arrow; what is left over at the end is dropped."""
    import pyarrow

    count = len(tokens) // length
    order = np.random.default_rng(seed).permutation(count)
    columns = {}
    for name, values in (("tokens", tokens), ("documents", documents)):
        rows = values[: count * length].reshape(count, length)[order]
        columns[name] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), length)
    return pyarrow.table(columns)


def _write(folder: Path, fingerprint: str, source: Source, length: int, tables: dict[str, pyarrow.Table]) -> Prepared:
    """Writes all splits under a temporary name, then renames: a folder of the final name is whole or was damaged."""
    import datasets

    temporary = folder.with_name(f".{fingerprint}-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        splits = {}
        for split, table in tables.items():
            with _quiet():
                datasets.Dataset(table).save_to_disk(temporary / split)
            distinct = len(np.unique(_column(table, "documents")))
            splits[split] = SplitInfo(sequences=len(table), tokens=len(table) * length, documents=distinct)
        head = {"fingerprint": fingerprint, "name": source.name, "licence": source.licence, "sequence_length": length}
        index = head | {"splits": {split: asdict(info) for split, info in splits.items()}, "files": _hashes(temporary)}
        text = json.dumps({"checksum": content_hash(index), **index}, indent=1)
        (temporary / _INDEX).write_text(text, encoding="utf-8")
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_prepared(folder)


def _replace(temporary: Path, folder: Path) -> None:
    if folder.exists():
        # Another process may just have finished the same data; keep those unless they are damaged.
        with contextlib.suppress(InputError):
            open_prepared(folder)
            return
        shutil.rmtree(folder)
    try:
        os.rename(temporary, folder)
    except OSError:
        open_prepared(folder)  # another process was first; raises if what stands there is not whole


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the progress bars of `datasets` away, and leaves its setting as it was."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()


def _hashes(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _INDEX)
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def open_prepared(folder: Path) -> Prepared:
    """Opens prepared data, after checking every file against its checksum.

    Raises:
        InputError: No prepared data in the folder, or torn or altered ones.
    """
    try:
        index: dict[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
        checksum = index.pop("checksum")
        whole = checksum == content_hash(index) and index["files"] == _hashes(folder)
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no prepared data: prepare them first") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the prepared data in {folder} cannot be read ({error}): delete the folder") from error
    if not whole:
        raise InputError(f"the prepared data in {folder} have been altered: delete the folder")
    splits = {split: SplitInfo(**info) for split, info in index["splits"].items()}
    fields = {name: index[name] for name in ("fingerprint", "name", "licence", "sequence_length")}
    return Prepared(folder=folder, splits=splits, **fields)


def load_split(folder: Path, split: str) -> TokenSet:
    """Opens the sequences of one split, memory-mapped where they lie in one piece.

    Args:
        folder: That of `Prepared`.
        split: "train", "validation" or "test".

    Raises:
        InputError: An unknown split, or no prepared data in the folder.
    """
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}")
    if not (folder / split).is_dir():
        raise InputError(f"{folder} holds no prepared data: prepare them first")
    import datasets

    table = datasets.load_from_disk(str(folder / split)).data.table
    return TokenSet(tokens=_column(table, "tokens"), documents=_column(table, "documents"))


def _column(table: pyarrow.Table, name: str) -> Tokens:
    """A column of lists as int32 [rows, length]: a view into the file where the column is one chunk."""
    column = table.column(name)
    pieces = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
    flat = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    values: Tokens = flat.reshape(-1, column.type.list_size)
    values.flags.writeable = False
    return values
