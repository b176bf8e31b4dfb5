"""Prepared data on disk: what the folder contains, and memory-mapped sequences of a split.

Conversations may lie there in several renderings, the teacher's and those of students with templates of their own: the
same records in the same sequences, so that the n-th shared token of a sequence is the n-th in every rendering.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autodistill.data.conversations import Likeliest
from autodistill.errors import InputError
from autodistill.utils.hashing import content_hash, file_hash

if TYPE_CHECKING:
    import pyarrow


SPLITS = ("train", "validation", "test")

# Files and columns that whoever prepares data writes.
INDEX = "prepared.json"

QUESTIONS, TOKENIZER, ENDS = "questions.json", "tokenizer", "ends.json"

TOLD = ("told_ids", "told_log_p")

_RENDERINGS = "renderings"

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """The contents of a split, counted.

    Attributes:
        sequences: Whole ones.
        tokens: In them.
        documents: Distinct ones that they come from.
        answers: Tokens that are part of answers; 0 for plain text, of which all count.
        told: Those of them whose likeliest tokens their writer told.
        in_a_row: Of one long text, how many sequences that follow each other count as one document; else 0.
    """

    sequences: int
    tokens: int
    documents: int
    answers: int = 0
    told: int = 0
    in_a_row: int = 0


@dataclass(frozen=True, kw_only=True)
class RenderingInfo:
    """What a rendering other than the teacher's contains, over all splits.

    Attributes:
        answers: Tokens that are part of answers.
        shared: Those of them that all renderings share.
        records: Of conversations.
        differing: Those of them whose answers, up to their ends, are cut into other tokens than in some rendering.
        ends: The tokens that end an answer, the teacher's and the rendering's.
    """

    answers: int
    shared: int
    records: int
    differing: int
    ends: tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Data on disk that are ready for training.

    Attributes:
        folder: Where they lie; `open_prepared` needs no more.
        fingerprint: Hash of text, tokenizer, sequence length, seed and split rule, and of what renders conversations.
        name: That of the source.
        license: Of the text, where it is known.
        sequence_length: Tokens of a sequence.
        splits: "train", "validation" and "test".
        notes: What a person must know of the data, in sentences.
        renderings: By the names of their templates, those beside the teacher's.
    """

    folder: Path
    fingerprint: str
    name: str
    license: str | None
    sequence_length: int
    splits: dict[str, SplitInfo]
    notes: tuple[str, ...] = ()
    renderings: Mapping[str, RenderingInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A question that is answered in writing.

    Attributes:
        document: Its place in the source, as in `TokenSet.documents`.
        prompt: Token ids after which the answer is to be written.
        answer: The one expected.
        answer_tokens: Its tokens, with the one that ends it.
        item: Number of the item in the task that made it.
    """

    document: int
    prompt: tuple[int, ...]
    answer: str
    answer_tokens: int
    item: int | None


@dataclass(frozen=True, kw_only=True)
class Questions:
    """The questions of a held-out split, with everything needed to ask them.

    Attributes:
        task: Reference of the task that marks the answers, or None.
        stops: Ids of the tokens that end an answer.
        tokenizer: Folder of the tokenizer that the prompts are of.
        entries: The questions.
    """

    task: str | None
    stops: tuple[int, ...]
    tokenizer: Path
    entries: tuple[Question, ...]

    def within(self, context: int) -> list[int]:
        """Return the places of the questions that fit so many tokens together with the expected answer."""
        return [place for place, one in enumerate(self.entries) if len(one.prompt) + one.answer_tokens <= context]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSet:
    """The sequences of a split in a fixed shuffled order, so that the first ones come from many documents.

    Attributes:
        tokens: int32 [sequences, sequence_length], read-only.
        documents: int32 [sequences, sequence_length], the document each token belongs to, by its place in the source;
            equal documents, and conversations that begin with the same prompt, share the place of the first. Of one
            long text, some sequences in a row count as a document.
        answers: bool [sequences, sequence_length], whether a token is part of an answer and so counts as a label in
            losses, and in scores where nothing is shared; None where all tokens count.
        told: [sequences, sequence_length, k], the likeliest tokens in each place, as the answers' writer told them;
            None where nothing was told of any.
        questions: Those of the documents, in a held-out split of conversations; else None.
        shared: bool [sequences, sequence_length], the answers' tokens that all renderings of the data have, which alone
            are scored: the n-th of a sequence is the n-th in every rendering. None where there is but one.
        teacher: The same sequences as the teacher reads them, where this is another rendering; else None.
        ends: The tokens that end an answer, the teacher's and this rendering's, where they differ; else None.
        in_a_row: As `SplitInfo` has it.
    """

    tokens: Tokens
    documents: Tokens
    answers: npt.NDArray[np.bool_] | None = None
    told: Likeliest | None = None
    questions: Questions | None = None
    shared: npt.NDArray[np.bool_] | None = None
    teacher: TokenSet | None = None
    ends: tuple[int, int] | None = None
    in_a_row: int = 0

    @property
    def scored(self) -> npt.NDArray[np.bool_] | None:
        """bool [sequences, sequence_length], the tokens that scores count; None if all count."""
        return self.answers if self.shared is None else self.shared

    @property
    def predicted(self) -> int:
        """Number of tokens that are predicted and scored."""
        return self.tokens[:, 1:].size if self.scored is None else int(self.scored[:, 1:].sum())

    def head(self, tokens: int) -> TokenSet:
        """Return the first sequences that together hold at most this many tokens, but at least one."""
        count = max(1, tokens // self.tokens.shape[1])
        documents, questions = self.documents[:count], self.questions
        if questions is not None:
            known = set(np.unique(documents).tolist())
            questions = replace(questions, entries=tuple(one for one in questions.entries if one.document in known))
        return TokenSet(
            tokens=self.tokens[:count],
            documents=documents,
            answers=None if self.answers is None else self.answers[:count],
            told=None if self.told is None else self.told.first(count),
            questions=questions,
            shared=None if self.shared is None else self.shared[:count],
            teacher=None if self.teacher is None else self.teacher.head(tokens),
            ends=self.ends,
            in_a_row=self.in_a_row,
        )


def rendering_folder(folder: Path, name: str) -> Path:
    """Return the folder of prepared data with the teacher's tokenizer and files, under another template.

    Args:
        folder: That of `Prepared`.
        name: Of the template.
    """
    return folder / _RENDERINGS / name


def questions_file(folder: Path, split: str, rendering: str) -> Path:
    """Return the file of a split's questions in one rendering."""
    return (rendering_folder(folder, rendering) if rendering else folder) / split / QUESTIONS


def open_prepared(folder: Path) -> Prepared:
    """Open prepared data, after checking every file against its checksum.

    Raises:
        InputError: No prepared data in the folder, or torn or altered ones.
    """
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        checksum = index.pop("checksum")
        whole = checksum == content_hash(index) and index["files"] == file_hashes(folder)
        splits = {split: SplitInfo(**info) for split, info in index["splits"].items()}
        found: dict[str, Any] = index.get("renderings", {})
        renderings = {name: RenderingInfo(**info | {"ends": tuple(info["ends"])}) for name, info in found.items()}
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no prepared data: prepare them first") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the prepared data in {folder} cannot be read ({error}): delete the folder") from error
    if not whole:
        raise InputError(f"the prepared data in {folder} have been altered: delete the folder")
    fields = {name: index[name] for name in ("fingerprint", "name", "sequence_length")}
    notes = tuple(index.get("notes", ()))
    license = index["licence"]
    return Prepared(folder=folder, splits=splits, notes=notes, renderings=renderings, license=license, **fields)


def fingerprint_of(folder: Path) -> str:
    """Return the fingerprint of prepared data, as in `Prepared`, without reading the other files.

    Raises:
        InputError: No prepared data in the folder.
    """
    return str(_index(folder)["fingerprint"])


def _index(folder: Path) -> dict[str, Any]:
    """Read the index of prepared data."""
    try:
        index: dict[str, Any] = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        return {name: index[name] for name in ("fingerprint", "splits")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder} holds no prepared data: prepare them first") from error


def load_split(folder: Path, split: str, rendering: str = "") -> TokenSet:
    """Open the sequences of one split, memory-mapped if they are contiguous.

    Args:
        folder: That of `Prepared`.
        split: "train", "validation" or "test".
        rendering: Name of a template that conversations are rendered by as well; the teacher's rendering where it is
            empty.

    Raises:
        InputError: An unknown split, or no prepared data in the folder.
    """
    if split not in SPLITS:
        raise InputError(f"there is no split {split!r}; the splits are {', '.join(SPLITS)}")
    if not (folder / split).is_dir():
        raise InputError(f"{folder} holds no prepared data: prepare them first")
    table = _table(folder / split)
    teacher = _token_set(folder, split, table)
    if not rendering:
        return replace(teacher, in_a_row=_index(folder)["splits"][split].get("in_a_row", 0))
    ends = json.loads((rendering_folder(folder, rendering) / ENDS).read_text(encoding="utf-8"))
    own = _token_set(folder, split, table, rendering)
    return replace(own, teacher=teacher, ends=None if ends[0] == ends[1] else (ends[0], ends[1]))


def _table(folder: Path) -> pyarrow.Table:
    """Read the rows that `datasets` saved in a folder, memory-mapped, and without that library: no worker loads it."""
    import pyarrow as pa

    names = [
        file["filename"] for file in json.loads((folder / "state.json").read_text(encoding="utf-8"))["_data_files"]
    ]
    return pa.concat_tables(pa.ipc.open_stream(pa.memory_map(str(folder / name))).read_all() for name in names)


def _token_set(folder: Path, split: str, table: pyarrow.Table, rendering: str = "") -> TokenSet:

    def column(name: str) -> npt.NDArray[Any] | None:
        whole = f"{rendering}/{name}" if rendering else name
        return column_of(table, whole) if whole in table.column_names else None

    tokens, documents, answers, shared = map(column, ("tokens", "documents", "answers", "shared"))
    assert tokens is not None
    assert documents is not None
    told = [part.reshape(*tokens.shape, -1) for name in TOLD if (part := column(name)) is not None]
    return TokenSet(
        tokens=tokens,
        documents=documents,
        answers=None if answers is None else answers.view(np.bool_),
        told=Likeliest(*told) if told else None,
        questions=_read_questions(folder, split, rendering),
        shared=None if shared is None else shared.view(np.bool_),
    )


def _read_questions(folder: Path, split: str, rendering: str) -> Questions | None:
    path = questions_file(folder, split, rendering)
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    entries = tuple(Question(**(entry | {"prompt": tuple(entry["prompt"])})) for entry in found["entries"])
    tokenizer = rendering_folder(folder, rendering) if rendering else folder / TOKENIZER
    return Questions(task=found["task"], stops=tuple(found["stops"]), tokenizer=tokenizer, entries=entries)


def column_of(table: pyarrow.Table, name: str) -> npt.NDArray[Any]:
    """Return a column of lists as an array [rows, length]: a view into the file if the column is one chunk."""
    column = table.column(name)
    pieces = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
    flat = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    values: npt.NDArray[Any] = flat.reshape(-1, column.type.list_size)
    values.flags.writeable = False
    return values


def file_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file except the index, by its path within the folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != INDEX)
    return {path.relative_to(folder).as_posix(): file_hash(path) for path in files}


# Tokens of a training or evaluation sequence.
SEQUENCE_LENGTH = 256
