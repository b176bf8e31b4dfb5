"""Read a reference to data as documents or conversations. Local references need no network."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from autodistill.data import reasoning_gym as tasks
from autodistill.data.conversations import (
    ANSWERS,
    MESSAGES,
    PROMPTS,
    Conversation,
    Record,
    Turn,
    read_prompt,
    readers,
    text_of,
)
from autodistill.errors import InputError
from autodistill.models.model_folder import stated_license
from autodistill.utils.input_files import check_file

if TYPE_CHECKING:
    from datasets import Dataset

_FOLDER_SUFFIXES = (".txt", ".md", ".rst")
_FILE_SUFFIXES = (".txt", ".jsonl", ".parquet")
_KINDS = (
    "pydoc, a folder of .txt, .md or .rst files, a .txt, .jsonl or .parquet file, reasoning-gym:TASK, "
    "or a hub id like owner/name, or of one revision owner/name@commit"
)
TEXTS = ("text", "content")
USABLE = f"{', '.join(TEXTS)}, {'|'.join(PROMPTS)} with {'|'.join(ANSWERS)}, {MESSAGES}"
# One half of a UTF-16 surrogate pair, which JSON can contain. Alone it is no text and cannot be tokenized.
_HALF = re.compile("[\ud800-\udfff]")
_HUB_ID = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@(\w[\w.-]*(?:/\w[\w.-]*)*))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")

Document = str | Conversation


def usable(fields: Sequence[str]) -> bool:
    """Return whether records with these fields can be read as text or as conversations."""
    return any(name in fields for name in TEXTS) or next(readers(fields), None) is not None


@dataclass(frozen=True, kw_only=True)
class DataSource:
    """Documents and where they come from.

    Attributes:
        name: Short name for a person.
        kind: "pydoc", "folder", "txt", "jsonl", "parquet", "task" or "hub".
        documents: Texts or conversations, none of them blank. A .txt file is a single text.
        license: The licence, if it is known.
        fingerprint: Hash of the documents in their order. For pydoc it begins with the version of Python, since each
            version has its own text.
        task: Reference of the task that made the conversations and can mark answers, or None.
        blank: Number of further files or records from which nothing can be learned.
        revision: Commit of the hub's data set that was read, if it is known. None for local data.
    """

    name: str
    kind: str
    documents: tuple[str, ...] | tuple[Conversation, ...]
    license: str | None
    fingerprint: str
    task: str | None = None
    blank: int = 0
    revision: str | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences that the user must read about the documents."""
        if not self.blank:
            return ()
        count, of = self.blank, len(self.documents) + self.blank
        are, they, have = ("are", "they", "have") if count > 1 else ("is", "it", "has")
        things = "files" if self.kind == "folder" else "records"
        why = "no prompt, or no answer" if self.conversations else "no text"
        return (f"{count:,} of {of:,} {things} {are} left out: {they} {have} {why}",)

    @property
    def conversations(self) -> tuple[Conversation, ...]:
        """The documents if they are conversations, else ()."""
        return tuple(document for document in self.documents if isinstance(document, Conversation))


def resolve_data(ref: str) -> DataSource:
    """Find and read the documents that `ref` names.

    Args:
        ref: "pydoc" (Python's language reference, each topic a document), a folder (each .txt, .md or .rst file in it
            a document), a .txt file (one long text), a .jsonl or .parquet file (each record a document),
            "reasoning-gym:TASK?option=value&..." (see `tasks.read_task`), or a hub id "owner/name", which may name a
            revision ("owner/name@commit"), read whole through `datasets`. Records are read from the first of these
            fields that gives any document: text; content; a prompt (or question, or instruction) with an answer (or
            response, completion, output); messages. The last two make conversations.

    Raises:
        InputError: The data are missing, of an unsupported kind, malformed, not UTF-8, or have no usable field or text.
    """
    check_data_reference(ref)
    if ref == "pydoc":
        return _pydoc()
    if tasks.is_task(ref):
        task = tasks.read_task(ref)
        source = _source(task.name, "task", task.conversations, ref, license=tasks.LICENSE)
        return replace(source, task=ref)
    expanded = os.path.expanduser(ref)  # os.path accepts any text, but pathlib may raise and reads "" as "."
    path = Path(expanded)
    if os.path.isdir(expanded):
        return _source(path.resolve().name, "folder", _read_folder(path), ref)
    if not os.path.exists(expanded):
        return _hub(ref)
    suffix = path.suffix.lower()
    if suffix == ".txt":
        return _source(path.stem, "txt", [_read_text(path)], ref)
    records = read_records(path)
    return _source(path.stem, suffix[1:], _record_documents(records, ref), ref)


def check_data_reference(ref: str) -> None:
    """Refuse a reference that cannot be data, by its form and by what is at its path. No file is read.

    Raises:
        InputError: Nothing is there, or it is a file of an unsupported kind.
    """
    expanded = os.path.expanduser(ref)
    if ref == "pydoc" or tasks.is_task(ref) or os.path.isdir(expanded):
        return
    if not os.path.exists(expanded):
        if not _is_hub_id(ref):
            raise InputError(f"there is no data at {ref!r}: give {_KINDS}")
    elif Path(expanded).suffix.lower() not in _FILE_SUFFIXES:
        raise InputError(f"{ref} is a file of an unsupported kind: give {_KINDS}")


def resolve_prompts(ref: str) -> tuple[tuple[Turn, ...], ...]:
    """Return the prompts that `ref` names, each as turns to answer, without repetitions.

    Args:
        ref: A .jsonl file (each record with a prompt, question or instruction, or with messages), a .txt file (each
            line a prompt), or "reasoning-gym:TASK".

    Raises:
        InputError: The prompts are missing, of another kind or malformed, or there are none.
    """
    check_prompts_reference(ref)
    path = Path(os.path.expanduser(ref))
    if tasks.is_task(ref):
        prompts = [conversation.prompt for conversation in tasks.read_task(ref).conversations]
    elif path.suffix.lower() == ".jsonl":
        prompts = [read_prompt(record, f"{where} of {ref}") for where, record in _read_jsonl(path)]
    else:
        prompts = [(Turn("user", line.strip()),) for line in _read_text(path).splitlines() if line.strip()]
    if not prompts:
        raise InputError(f"{ref} holds no prompt: give one at least")
    return tuple(dict.fromkeys(prompts))


def check_prompts_reference(ref: str) -> None:
    """Refuse a reference that cannot be prompts, as `check_data_reference` does for data.

    Raises:
        InputError: Nothing is there, or it is a file of an unsupported kind.
    """
    path = os.path.expanduser(ref)
    if tasks.is_task(ref):
        return
    if not os.path.exists(path):
        raise InputError(f"there are no prompts at {ref!r}: give a .jsonl or .txt file, or reasoning-gym:TASK")
    if Path(path).suffix.lower() not in (".jsonl", ".txt"):
        raise InputError(f"{ref} is not a file of prompts: give a .jsonl or .txt file, or reasoning-gym:TASK")


def read_records(path: Path) -> list[tuple[str, Record]]:
    """Return the records of a .jsonl or .parquet file, each with its place, like "line 3".

    Raises:
        InputError: The file is missing, of another kind, or malformed.
    """
    check_file(path)
    if not os.path.isfile(path):
        raise InputError(f"there is no file {path}: give a .jsonl or .parquet file")
    if path.suffix.lower() == ".parquet":
        return _read_parquet(path)
    if path.suffix.lower() == ".jsonl":
        return _read_jsonl(path)
    raise InputError(f"{path} is a file of an unsupported kind: give a .jsonl or .parquet file")


def _source(name: str, kind: str, found: Sequence[Document | None], ref: str, license: str | None = None) -> DataSource:
    documents = tuple(one for one in found if isinstance(one, Conversation) or (one and one.strip()))
    if not documents:
        raise InputError(f"{ref} holds no text: give data with some")
    digest = hashlib.sha256()
    for document in documents:
        text = document if isinstance(document, str) else json.dumps(document.turns)
        encoded = text.encode("utf-8", "surrogatepass")
        if isinstance(document, Conversation) and document.writer_logprobs is not None:
            writer_logprobs = document.writer_logprobs
            encoded += writer_logprobs.vocabulary.encode() + b"".join(
                part.tobytes() for part in (writer_logprobs.tokens, *writer_logprobs.likeliest)
            )
        # With the length, two documents have another hash than their concatenation.
        digest.update(f"{len(encoded)}:".encode())
        digest.update(encoded)
    fingerprint = digest.hexdigest()[:16]
    # All documents are of one kind: each way to read records gives either texts or conversations.
    return DataSource(
        name=name,
        kind=kind,
        documents=documents,  # type: ignore[arg-type]
        license=license,
        fingerprint=fingerprint,
        blank=len(found) - len(documents),
    )


def _pydoc() -> DataSource:
    from pydoc_data.topics import topics

    version = platform.python_version()
    texts = [topics[topic] for topic in sorted(topics)]
    source = _source(f"pydoc of Python {version}", "pydoc", texts, "pydoc", license="PSF-2.0")
    return replace(source, fingerprint=f"python-{version}-{source.fingerprint}")


def _read_text(path: Path) -> str:
    check_file(path)
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = bytes(error.object[: error.start]).count(b"\n") + 1
        raise InputError(f"{path} is not UTF-8 text (line {line}, byte {error.start}): convert it to UTF-8") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error


def _read_folder(folder: Path) -> list[str]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _FOLDER_SUFFIXES and path.is_file())
    if not files:
        raise InputError(
            f"the folder {folder} holds no {', '.join(_FOLDER_SUFFIXES)} file: give a folder with text files"
        )
    return [_read_text(path) for path in files]


def _read_jsonl(path: Path) -> list[tuple[str, Record]]:
    records: list[tuple[str, Record]] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"line {number} of {path} is not JSON ({error}): correct or remove it") from error
        if not isinstance(record, dict):
            raise InputError(f'line {number} of {path} is not a JSON object with fields, like {{"text": "..."}}')
        if "\\ud" in line.lower() and (half := _HALF.search(json.dumps(record, ensure_ascii=False))):
            raise InputError(
                f"line {number} of {path} has half of a character, \\u{ord(half[0]):04x}: write the other half too, or "
                "\\ufffd, or remove the record"
            )
        records.append((f"line {number}", record))
    return records


def _read_parquet(path: Path) -> list[tuple[str, Record]]:
    import pyarrow
    import pyarrow.parquet

    check_file(path)
    try:
        table = pyarrow.parquet.read_table(path)
        records = table.to_pylist()
    except (pyarrow.ArrowException, OSError, OverflowError, ValueError) as error:  # also dates beyond Python's range
        raise InputError(f"cannot read {path} as Parquet: {str(error).splitlines()[0]}") from error
    if not table.num_rows:
        # Without rows the fields are known from the schema only, so return one record with all fields null.
        return [("the schema", dict.fromkeys(table.column_names))] if table.column_names else []
    return [(f"row {number}", record) for number, record in enumerate(records, start=1)]


def _is_hub_id(ref: str) -> bool:
    """Return whether `ref` can only be a hub id: "owner/name" that does not look like a local path."""
    known = (*_FOLDER_SUFFIXES, *_FILE_SUFFIXES, ".json", ".csv", ".arrow", ".gz", ".zip")
    return bool(_HUB_ID.fullmatch(ref)) and not ref.lower().endswith(known) and not os.path.isdir(Path(ref).parent)


def _hub(ref: str) -> DataSource:
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import OfflineModeIsEnabled

    named = _HUB_ID.fullmatch(ref)
    assert named is not None
    name, asked = named.groups()
    revision: str | None = asked
    try:
        # Ask the hub first, because load_dataset tries a dead connection for half a minute. In the hub's offline mode
        # load_dataset opens what was downloaded before.
        with contextlib.suppress(OfflineModeIsEnabled):
            revision = huggingface_hub.HfApi().dataset_info(name, revision=asked, timeout=10).sha or asked
        loaded = datasets.load_dataset(name, revision=revision)
    except Exception as error:  # the hub's client and its HTTP library raise many kinds of errors
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"there is no data at {ref} here, and the hub did not give the data set {ref}: {reason}; "
            "check the name and the connection, or give local data"
        ) from error
    splits = dict(loaded)
    split = splits["train"] if "train" in splits else next(iter(splits.values()))
    # Without a connection the library returns the newest local copy, even if another commit was requested.
    read = _commit_of(split)
    if read and revision and _COMMIT.fullmatch(revision) and read != revision:
        raise InputError(
            f"the hub's data set {name} is here at commit {read} only, but {revision} is asked for: connect to the "
            "hub, or give the data of that commit as a local file"
        )
    records = [(f"record {number}", record) for number, record in enumerate(split, start=1)]
    source = _source(name, "hub", _record_documents(records, ref), ref, stated_license(split.info.license))
    return replace(source, revision=read or revision)


def _commit_of(split: Dataset) -> str | None:
    """Return the commit of a data set's files in the cache of `datasets`, which is the name of their folder."""
    folders = [Path(file["filename"]).parent.name for file in split.cache_files]
    return next((name for name in folders if _COMMIT.fullmatch(name)), None)


def _record_documents(records: list[tuple[str, Record]], ref: str) -> list[Document | None]:
    """Return the document of each record, or None for a blank record. At least one is not blank.

    Args:
        records: The records, each with its place in the data for error messages.
    """
    found = list(dict.fromkeys(name for _, record in records for name in record))
    if not records:
        raise InputError(f"{ref} holds no record: give data with some")
    ways: list[Callable[[Record, str], Document | None]] = [_text_reader(name) for name in TEXTS if name in found]
    for read in (*ways, *readers(found)):
        documents = [read(record, f"{where} of {ref}") for where, record in records]
        if any(documents):
            return documents
    fields = f"the fields found are {', '.join(found)}" if found else "no fields were found"
    raise InputError(f"{ref} has no field with usable text ({USABLE}): {fields}")


def _text_reader(name: str) -> Callable[[Record, str], str | None]:
    def read(record: Record, where: str) -> str | None:
        """Return the text of a record, or None if it has none."""
        text = text_of(name, record, where)
        return text if text.strip() else None

    return read
