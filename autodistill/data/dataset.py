"""Prepared data on disk: the contents of the folder, and memory-mapped sequences of a split.

Conversations may be stored in several renderings: the teacher's, and those of students with templates of their own. All
renderings have the same records in the same sequences, so the n-th shared token of a sequence is the n-th in each.
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

# Files and columns that preparation writes.
INDEX = "prepared.json"

QUESTIONS, TOKENIZER, ENDS = "questions.json", "tokenizer", "ends.json"

TOLD = ("told_ids", "told_log_p")

_RENDERINGS = "renderings"

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """The size of a split.

    Attributes:
        sequences: Number of whole sequences.
        tokens: Number of tokens in the sequences.
        documents: Number of distinct documents that they come from.
        answers: Number of tokens that are part of answers; 0 for plain text, in which all tokens count.
        told: Number of answer tokens for which the writer reported the likeliest tokens.
        in_a_row: For one long text, the number of consecutive sequences that count as one document; else 0.
    """

    sequences: int
    tokens: int
    documents: int
    answers: int = 0
    told: int = 0
    in_a_row: int = 0


@dataclass(frozen=True, kw_only=True)
class RenderingInfo:
    """The size of a rendering other than the teacher's, over all splits.

    Attributes:
        answers: Number of tokens that are part of answers.
        shared: Number of answer tokens that all renderings share.
        records: Number of conversations.
        differing: Number of conversations whose answers, up to their ends, have other tokens than in some rendering.
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
        folder: Folder of the data; `open_prepared` needs nothing else.
        fingerprint: Hash of text, tokenizer, sequence length, seed and split rule, and of the rule that renders
            conversations.
        name: Name of the source.
        license: Licence of the text, if it is known.
        sequence_length: Number of tokens in a sequence.
        splits: "train", "validation" and "test".
        notes: Sentences that a person must read about the data.
        renderings: Renderings other than the teacher's, by the names of their templates.
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
        prompt: Token ids after which the answer is written.
        answer: The expected answer.
        answer_tokens: Number of tokens of the expected answer, including the one that ends it.
        item: Number of the item in the task that made it, or None.
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
        tokenizer: Folder of the tokenizer of the prompts.
        entries: The questions.
    """

    task: str | None
    stops: tuple[int, ...]
    tokenizer: Path
    entries: tuple[Question, ...]

    def within(self, context: int) -> list[int]:
        """Return the indices of the questions that fit into `context` tokens together with the expected answer."""
        return [place for place, one in enumerate(self.entries) if len(one.prompt) + one.answer_tokens <= context]


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSet:
    """The sequences of a split in a fixed shuffled order, so that the first ones come from many documents.

    Attributes:
        tokens: int32 [sequences, sequence_length], read-only.
        documents: int32 [sequences, sequence_length], the document of each token, by its place in the source. Equal
            documents, and conversations that begin with the same prompt, have the place of the first. In one long text,
            some consecutive sequences count as a document.
        answers: bool [sequences, sequence_length], whether a token is part of an answer. Only such tokens are labels in
            losses, and in scores unless `shared` is given. None if all tokens count.
        writer_logprobs: [sequences, sequence_length, k], the likeliest tokens at each position, as reported by the
            answers' writer. None if none were reported.
        questions: The questions of the documents, in a held-out split of conversations; else None.
        shared: bool [sequences, sequence_length], the answer tokens that all renderings of the data have. Only these
            are scored: the n-th of a sequence is the n-th in every rendering. None if there is only one rendering.
        teacher: The same sequences in the teacher's rendering, if this is another one; else None.
        ends: The tokens that end an answer, the teacher's and this rendering's, if they differ; else None.
        in_a_row: As in `SplitInfo`.
    """

    tokens: Tokens
    documents: Tokens
    answers: npt.NDArray[np.bool_] | None = None
    writer_logprobs: Likeliest | None = None
    questions: Questions | None = None
    shared: npt.NDArray[np.bool_] | None = None
    teacher: TokenSet | None = None
    ends: tuple[int, int] | None = None
    in_a_row: int = 0

    @property
    def scored(self) -> npt.NDArray[np.bool_] | None:
        """bool [sequences, sequence_length], the tokens that are scored, or None if all are."""
        return self.answers if self.shared is None else self.shared

    @property
    def predicted(self) -> int:
        """Number of tokens that are predicted and scored."""
        return self.tokens[:, 1:].size if self.scored is None else int(self.scored[:, 1:].sum())

    def head(self, tokens: int) -> TokenSet:
        """Return the first sequences with at most `tokens` tokens together, but at least one sequence."""
        count = max(1, tokens // self.tokens.shape[1])
        documents, questions = self.documents[:count], self.questions
        if questions is not None:
            known = set(np.unique(documents).tolist())
            questions = replace(questions, entries=tuple(one for one in questions.entries if one.document in known))
        return TokenSet(
            tokens=self.tokens[:count],
            documents=documents,
            answers=None if self.answers is None else self.answers[:count],
            writer_logprobs=None if self.writer_logprobs is None else self.writer_logprobs.first(count),
            questions=questions,
            shared=None if self.shared is None else self.shared[:count],
            teacher=None if self.teacher is None else self.teacher.head(tokens),
            ends=self.ends,
            in_a_row=self.in_a_row,
        )


def rendering_folder(folder: Path, name: str) -> Path:
    """Return the folder, within prepared data, of the teacher's tokenizer with another template.

    Args:
        folder: As in `Prepared`.
        name: Name of the template.
    """
    return folder / _RENDERINGS / name


def questions_file(folder: Path, split: str, rendering: str) -> Path:
    """Return the file of a split's questions in one rendering; "" is the teacher's."""
    return (rendering_folder(folder, rendering) if rendering else folder) / split / QUESTIONS


def open_prepared(folder: Path) -> Prepared:
    """Open prepared data, after checking every file against its checksum.

    Raises:
        InputError: The folder has no prepared data, or they are incomplete or were altered.
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
        InputError: The folder has no prepared data.
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
        folder: As in `Prepared`.
        split: "train", "validation" or "test".
        rendering: Name of another template in which the conversations are stored; "" is the teacher's rendering.

    Raises:
        InputError: The split is unknown, or the folder has no prepared data.
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
    """Read the rows that `datasets` saved in a folder, memory-mapped.

    This does not import `datasets`, so that workers need not load it.
    """
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
    writer_logprobs = [part.reshape(*tokens.shape, -1) for name in TOLD if (part := column(name)) is not None]
    return TokenSet(
        tokens=tokens,
        documents=documents,
        answers=None if answers is None else answers.view(np.bool_),
        writer_logprobs=Likeliest(*writer_logprobs) if writer_logprobs else None,
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
    """Return a column of lists as an array [rows, length]. It is a view of the file if the column is one chunk."""
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


# Number of tokens in a training or evaluation sequence.
SEQUENCE_LENGTH = 256
