"""Reference to tokenised, packed, fingerprinted train, validation and test sets, kept in Arrow.

Documents are split before they are packed, so no document is in two splits, and no prompt of a conversation. One long
text is cut into three contiguous blocks, with a gap of one sequence between them.

Conversations may lie there in several renderings, the teacher's and those of students with templates of their own: the
same records in the same sequences, so that the n-th shared token of a sequence is the n-th in every rendering.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autodistill.conversations import Conversation, Likeliest
from autodistill.documents import Source, resolve_data
from autodistill.errors import InputError
from autodistill.packing import cut, fill, pack
from autodistill.records.store import alone
from autodistill.rendering import Rendered, Renderer, Template
from autodistill.strategy import content_hash
from autodistill.templates import share, write_text

if TYPE_CHECKING:
    import pyarrow

__all__ = [
    "Prepared",
    "Question",
    "Questions",
    "RenderingInfo",
    "Source",
    "SplitInfo",
    "TokenSet",
    "load_split",
    "open_prepared",
    "prepare",
    "rendering_folder",
    "resolve_data",
]

SPLITS = ("train", "validation", "test")
_HELD_OUT = 0.1  # share of the tokens that validation gets, and test
_RULE = 1  # part of the fingerprint: to be raised with any change of how data are split, tokenised or packed
_INDEX = "prepared.json"
_QUESTIONS, _TOKENIZER, _RENDERINGS, _ENDS = "questions.json", "tokenizer", "renderings", "ends.json"
_TOLD = ("told_ids", "told_log_p")

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class SplitInfo:
    """What a split holds.

    Attributes:
        sequences: Whole ones.
        tokens: In them.
        documents: Distinct ones that they come from.
        answers: Tokens that are part of answers; 0 for plain text, of which all count.
        told: Those of them whose likeliest tokens their writer told.
    """

    sequences: int
    tokens: int
    documents: int
    answers: int = 0
    told: int = 0


@dataclass(frozen=True, kw_only=True)
class RenderingInfo:
    """What a rendering other than the teacher's holds, in all splits.

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
    """Data on disk, ready to be trained on.

    Attributes:
        folder: Where they lie; `open_prepared` needs no more.
        fingerprint: Hash of text, tokenizer, sequence length, seed and split rule, and of what renders conversations.
        name: That of the source.
        licence: Of the text, where it is known.
        sequence_length: Tokens of a sequence.
        splits: "train", "validation" and "test".
        notes: What a person must know of the data, in sentences.
        renderings: By the names of their templates, those beside the teacher's.
    """

    folder: Path
    fingerprint: str
    name: str
    licence: str | None
    sequence_length: int
    splits: dict[str, SplitInfo]
    notes: tuple[str, ...] = ()
    renderings: Mapping[str, RenderingInfo] = field(default_factory=dict)


@dataclass(frozen=True)
class Question:
    """A question to be answered in writing.

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
    """The questions of a held-out split, and what it takes to ask them.

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


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenSet:
    """The sequences of a split, in a fixed shuffled order, so that the first of them come from many documents.

    Attributes:
        tokens: int32 [sequences, sequence_length], read-only.
        documents: int32 [sequences, sequence_length], the document each token belongs to, by its place in the source;
            equal documents, and conversations that begin with the same prompt, share the place of the first. Of one
            long text, each sequence counts as a document.
        answers: bool [sequences, sequence_length], whether a token is part of an answer and so counts as a label in
            losses, and in scores where nothing is shared; None where all tokens count.
        told: [sequences, sequence_length, k], the likeliest tokens in each place, as the answers' writer told them;
            None where nothing was told of any.
        questions: Those of the documents, in a held-out split of conversations; else None.
        shared: bool [sequences, sequence_length], the answers' tokens that all renderings of the data have, which alone
            are scored: the n-th of a sequence is the n-th in every rendering. None where there is but one.
        teacher: The same sequences as the teacher reads them, where this is another rendering; else None.
        ends: The tokens that end an answer, the teacher's and this rendering's, where they differ; else None.
    """

    tokens: Tokens
    documents: Tokens
    answers: npt.NDArray[np.bool_] | None = None
    told: Likeliest | None = None
    questions: Questions | None = None
    shared: npt.NDArray[np.bool_] | None = None
    teacher: TokenSet | None = None
    ends: tuple[int, int] | None = None

    @property
    def scored(self) -> npt.NDArray[np.bool_] | None:
        """bool [sequences, sequence_length], the tokens that scores count; None where all do."""
        return self.answers if self.shared is None else self.shared

    @property
    def predicted(self) -> int:
        """Number of tokens that are predicted from those before them and scored."""
        return self.tokens[:, 1:].size if self.scored is None else int(self.scored[:, 1:].sum())

    def head(self, tokens: int) -> TokenSet:
        """The first sequences that together hold at most this many tokens, but at least one of them."""
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
        )


def prepare(
    source: Source,
    tokenizer_folder: Path,
    tokenizer_fingerprint: str,
    sequence_length: int,
    cache: Path,
    seed: int = 0,
    templates: Sequence[Template] = (),
) -> Prepared:
    """Splits, tokenises and packs the documents, or opens what an earlier call left in `cache`.

    Args:
        source: The documents.
        tokenizer_folder: A folder that transformers' AutoTokenizer can load.
        tokenizer_fingerprint: Identifies the tokenizer in the fingerprint of the data.
        sequence_length: Tokens of a sequence, at least 2.
        cache: Folder under which the data are kept; a torn or altered copy in it is made again.
        seed: Of the choice of documents for the splits, and of the order of the sequences.
        templates: By which conversations are rendered as well; see `templates.own_template`. Of a conversation whose
            answers share no token in all renderings nothing is kept.

    Raises:
        InputError: Too little text for one sequence in each split.
    """
    if sequence_length < 2:
        raise InputError(f"a sequence needs at least 2 tokens to predict one from another, not {sequence_length}")
    conversations = source.conversations
    renderer = Renderer(tokenizer_folder) if conversations else None
    parts = [source.fingerprint, tokenizer_fingerprint, sequence_length, seed, _RULE]
    own = {template.name: Renderer(tokenizer_folder, template) for template in templates if conversations}
    if renderer is not None:
        parts += [renderer.rule, source.task, *([sorted(own)] if own else [])]
    fingerprint = content_hash(parts, digits=16)
    folder = cache / "data" / fingerprint
    with alone(folder):
        with contextlib.suppress(InputError):  # missing, torn or altered: made below
            return open_prepared(folder)
        if renderer is not None:
            renderers = {"": renderer} | {name: own[name] for name in sorted(own)}
            return _prepare_conversations(folder, source, renderers, tokenizer_folder, sequence_length, seed)
        return _prepare_texts(folder, source, tokenizer_folder, sequence_length, seed)


def _prepare_texts(folder: Path, source: Source, tokenizer_folder: Path, sequence_length: int, seed: int) -> Prepared:
    """Splits documents of plain text, or one long text into blocks where there are too few."""
    texts = tuple(text for text in source.documents if isinstance(text, str))
    documents = _tokenise(texts, tokenizer_folder)
    places = _places(texts)
    if len(set(places)) < len(SPLITS):
        packed = _cut(np.concatenate(documents), sequence_length)
    else:
        packed = _pack(documents, places, _assign(texts, documents, places, sequence_length, seed))
    tables = {}
    for split, (tokens, owners) in packed.items():
        columns = {"tokens": tokens, "documents": owners}
        whole = {name: _sequences(values, sequence_length) for name, values in columns.items()}
        tables[split] = _table(whole, seed)
    return _write(folder, source, sequence_length, tables)


def _prepare_conversations(
    folder: Path, source: Source, renderers: Mapping[str, Renderer], teacher: Path, length: int, seed: int
) -> Prepared:
    """Splits by opening prompt and packs whole records; questions are kept of the splits that are held out.

    Args:
        renderers: By name; the teacher's, whose name is empty, first.
        teacher: Folder of its tokenizer.
    """
    renderer, conversations = renderers[""], source.conversations
    whole = {"": renderer.render(conversations)}
    for name, other in renderers.items():
        if name:  # what was told of an answer's tokens is read beside the teacher's
            whole[name] = other.render([replace(one, told=None) for one in conversations])
    records, notes = _kept(whole, [one.end for one in renderers.values()], length)
    openings = [conversations[place].opening for place in records]
    owners = dict(zip(records, (list(records)[first] for first in _places(openings)), strict=True))
    tokens = [record[0].tokens for record in records.values()]
    texts = {place: conversations[place].opening for place in owners.values()}
    chosen = _assign(texts, tokens, list(owners.values()), length, seed)
    tables, counts = {}, {}
    questions: dict[str, dict[str, str]] = {name: {} for name in renderers}
    for split, firsts in chosen.items():
        inside = set(firsts)
        members = [place for place, owner in owners.items() if owner in inside]
        rows = fill([max(len(record.tokens) for record in records[place]) for place in members], length)
        columns: dict[str, npt.NDArray[Any]] = {}
        for number, name in enumerate(renderers):
            chunk = [records[place][number] for place in members]
            packed = pack(chunk, [owners[place] for place in members], length, rows)
            found: dict[str, npt.NDArray[Any]] = {"tokens": packed.tokens, "documents": packed.documents}
            # Arrow keeps a bool in a bit, which cannot be mapped.
            found["answers"] = packed.answers.view(np.uint8)
            if len(renderers) > 1:
                found["shared"] = packed.shared.view(np.uint8)
            columns |= {f"{name}/{column}" if name else column: values for column, values in found.items()}
            if name:
                continue
            told = 0
            if packed.told is not None:
                columns |= {name: part.reshape(len(part), -1) for name, part in zip(_TOLD, packed.told, strict=True)}
                told = int((packed.told.ids[:, 1:, 0] >= 0).sum())
            counts[split] = {"answers": int(packed.answers[:, 1:].sum()), "told": told}
        tables[split] = _table(columns, seed)
        if split != "train":
            for name, one in renderers.items():
                entries = [_question(place, conversations[place], whole[name][place], one) for place in sorted(inside)]
                asking = {"task": source.task, "stops": one.stops, "entries": [asdict(entry) for entry in entries]}
                questions[name][split] = json.dumps(asking)

    def add(temporary: Path) -> None:
        renderer.tokenizer.save_pretrained(temporary / _TOKENIZER)
        for name, texts in questions.items():
            if name:
                own = rendering_folder(temporary, name)
                write_text(teacher, renderers[name], own)
                (own / _ENDS).write_text(json.dumps([renderer.end, renderers[name].end]), encoding="utf-8")
            for split, text in texts.items():
                path = _questions_file(temporary, split, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")

    if any(one.told for one in conversations):
        learnt, told = counts["train"]["answers"], counts["train"]["told"]
        notes += (
            f"of {learnt:,} answer tokens to learn from, {told:,} have their writer's log-probabilities, and "
            f"{learnt - told:,} their text alone",
        )
    infos = {
        name: _rendering_info([record[number] for record in records.values()], renderer, renderers[name])
        for number, name in enumerate(renderers)
        if name
    }
    return _write(folder, source, length, tables, add, notes, counts, infos)


def _kept(
    whole: Mapping[str, Sequence[Rendered]], ends: Sequence[int], length: int
) -> tuple[dict[int, list[Rendered]], tuple[str, ...]]:
    """The records that can be used, cut to a sequence, by place in the source and each in all renderings, and notes.

    Args:
        whole: The renderings.
        ends: The token that each ends an answer with.
        length: Tokens of a sequence.

    Raises:
        InputError: There is none.
    """
    together = list(zip(*whole.values(), strict=True))
    records: dict[int, list[Rendered]] = {}
    for place, renderings in enumerate(together):
        short = [part for record in renderings if (part := cut(record, length)) is not None]
        if len(short) == len(renderings):
            records[place] = short
    notes = _notes([max(len(record.tokens) for record in one) for one in together], set(records), length)
    if not records:
        raise InputError(f"the data cannot be used: {notes[0]}; give shorter prompts")
    if len(ends) == 1:
        return records, notes
    common = {place: share(short, ends) for place, short in records.items()}
    records = {place: found for place, found in common.items() if found[0].shared is not None and found[0].shared.any()}
    if lost := len(common) - len(records):
        notes += (f"{lost} of {len(together)} records are left out: their answers share no token in all templates",)
    if not records:
        raise InputError(
            f"the data cannot be used: {notes[-1]}; take the chat template out of the pretrained model's folder, so "
            "that it learns the teacher's"
        )
    return records, notes


def _rendering_info(records: Sequence[Rendered], teacher: Renderer, renderer: Renderer) -> RenderingInfo:
    end = renderer.end
    shared = [record.shared for record in records if record.shared is not None]
    own = [record.answers & ~found & (record.tokens != end) for record, found in zip(records, shared, strict=True)]
    names = [str(one.tokenizer.convert_ids_to_tokens(one.end)) for one in (teacher, renderer)]
    return RenderingInfo(
        answers=sum(int(record.answers.sum()) for record in records),
        shared=sum(int(found.sum()) for found in shared),
        records=len(records),
        differing=sum(bool(found.any()) for found in own),
        ends=(names[0], names[1]),
    )


def rendering_folder(folder: Path, name: str) -> Path:
    """Where prepared data keep the teacher's tokenizer, and all else that describes text, with another template.

    Args:
        folder: That of `Prepared`.
        name: Of the template.
    """
    return folder / _RENDERINGS / name


def _questions_file(folder: Path, split: str, rendering: str) -> Path:
    return (rendering_folder(folder, rendering) if rendering else folder) / split / _QUESTIONS


def _notes(sizes: list[int], kept: set[int], length: int) -> tuple[str, ...]:
    """What became of records that are longer than a sequence."""
    cut_off = sum(size > length for place, size in enumerate(sizes) if place in kept)
    lost = len(sizes) - len(kept)
    notes = []
    if lost:
        notes.append(f"{lost} of {len(sizes)} records are left out: their prompt fills a sequence of {length} tokens")
    if cut_off:
        notes.append(f"{cut_off} of {len(sizes)} records are longer than {length} tokens and cut at their end")
    return tuple(notes)


def _question(place: int, conversation: Conversation, record: Rendered, renderer: Renderer) -> Question:
    return Question(
        document=place,
        prompt=tuple(renderer.prompt(conversation.prompt)),
        answer=conversation.answer,
        answer_tokens=record.last_answer,
        item=conversation.item,
    )


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


def _places(documents: Sequence[str]) -> list[int]:
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
    texts: Sequence[str] | Mapping[int, str], documents: list[Tokens], places: list[int], length: int, seed: int
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


def _sequences(values: Tokens, length: int) -> Tokens:
    """Whole sequences; what is left over at the end is dropped."""
    count = len(values) // length
    return values[: count * length].reshape(count, length)


def _table(columns: Mapping[str, npt.NDArray[Any]], seed: int) -> pyarrow.Table:
    """Sequences, [sequences, length] in each column, in a shuffled order, as Arrow."""
    import pyarrow

    lists = {}
    for name, values in columns.items():
        count, length = values.shape
        rows = values[np.random.default_rng(seed).permutation(count)]
        lists[name] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), length)
    return pyarrow.table(lists)


def _write(
    folder: Path,
    source: Source,
    length: int,
    tables: dict[str, pyarrow.Table],
    add: Callable[[Path], None] = lambda temporary: None,
    notes: tuple[str, ...] = (),
    counts: Mapping[str, Mapping[str, int]] | None = None,
    renderings: Mapping[str, RenderingInfo] | None = None,
) -> Prepared:
    """Writes all splits under a temporary name, then renames: a folder of the final name is whole or was damaged.

    Args:
        add: Writes what else belongs there, given the folder.
        notes: Of `Prepared`.
        counts: "answers" and "told" of each split of conversations.
        renderings: Those beside the teacher's.
    """
    import datasets

    fingerprint = folder.name
    temporary = folder.with_name(f".{fingerprint}-{uuid.uuid4().hex}")
    temporary.mkdir(parents=True)
    try:
        splits = {}
        for split, table in tables.items():
            with _quiet():
                datasets.Dataset(table).save_to_disk(temporary / split)
            distinct = len(np.unique(_column(table, "documents")))
            splits[split] = SplitInfo(
                sequences=len(table),
                tokens=len(table) * length,
                documents=distinct,
                **(counts[split] if counts else {}),
            )
        add(temporary)
        head = {
            "fingerprint": fingerprint,
            "name": source.name,
            "licence": source.licence,
            "sequence_length": length,
            "notes": list(notes),
            **({"renderings": {name: asdict(info) for name, info in renderings.items()}} if renderings else {}),
        }
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
        splits = {split: SplitInfo(**info) for split, info in index["splits"].items()}
        found: dict[str, Any] = index.get("renderings", {})
        renderings = {name: RenderingInfo(**info | {"ends": tuple(info["ends"])}) for name, info in found.items()}
    except FileNotFoundError as error:
        raise InputError(f"{folder} holds no prepared data: prepare them first") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"the prepared data in {folder} cannot be read ({error}): delete the folder") from error
    if not whole:
        raise InputError(f"the prepared data in {folder} have been altered: delete the folder")
    fields = {name: index[name] for name in ("fingerprint", "name", "licence", "sequence_length")}
    notes = tuple(index.get("notes", ()))
    return Prepared(folder=folder, splits=splits, notes=notes, renderings=renderings, **fields)


def load_split(folder: Path, split: str, rendering: str = "") -> TokenSet:
    """Opens the sequences of one split, memory-mapped where they lie in one piece.

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
    import datasets

    table = datasets.load_from_disk(str(folder / split)).data.table
    teacher = _token_set(folder, split, table)
    if not rendering:
        return teacher
    ends = json.loads((rendering_folder(folder, rendering) / _ENDS).read_text(encoding="utf-8"))
    own = _token_set(folder, split, table, rendering)
    return replace(own, teacher=teacher, ends=None if ends[0] == ends[1] else (ends[0], ends[1]))


def _token_set(folder: Path, split: str, table: pyarrow.Table, rendering: str = "") -> TokenSet:
    """One rendering of a split."""

    def column(name: str) -> npt.NDArray[Any] | None:
        whole = f"{rendering}/{name}" if rendering else name
        return _column(table, whole) if whole in table.column_names else None

    tokens, documents, answers, shared = map(column, ("tokens", "documents", "answers", "shared"))
    assert tokens is not None
    assert documents is not None
    told = [part.reshape(*tokens.shape, -1) for name in _TOLD if (part := column(name)) is not None]
    return TokenSet(
        tokens=tokens,
        documents=documents,
        answers=None if answers is None else answers.view(np.bool_),
        told=Likeliest(*told) if told else None,
        questions=_read_questions(folder, split, rendering),
        shared=None if shared is None else shared.view(np.bool_),
    )


def _read_questions(folder: Path, split: str, rendering: str) -> Questions | None:
    path = _questions_file(folder, split, rendering)
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    entries = tuple(Question(**(entry | {"prompt": tuple(entry["prompt"])})) for entry in found["entries"])
    tokenizer = rendering_folder(folder, rendering) if rendering else folder / _TOKENIZER
    return Questions(task=found["task"], stops=tuple(found["stops"]), tokenizer=tokenizer, entries=entries)


def _column(table: pyarrow.Table, name: str) -> npt.NDArray[Any]:
    """A column of lists as an array [rows, length]: a view into the file where the column is one chunk."""
    column = table.column(name)
    pieces = [chunk.flatten().to_numpy(zero_copy_only=True) for chunk in column.chunks]
    flat = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
    values: npt.NDArray[Any] = flat.reshape(-1, column.type.list_size)
    values.flags.writeable = False
    return values
