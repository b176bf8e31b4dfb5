"""Preparation of data: from a reference to tokenised, packed, fingerprinted splits in Arrow files.

Documents are split before they are packed, so no document and no prompt of a conversation is in two splits. One long
text is cut into three contiguous parts, with a gap of one sequence between them. If the tokenizer begins every text
with a token, each sequence of text begins with it too. It is never scored, since nothing predicts the first token.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autodistill.data.chat_template import Rendered, Renderer, Template
from autodistill.data.conversations import Conversation
from autodistill.data.dataset import (
    ENDS,
    INDEX,
    SPLITS,
    TOKENIZER,
    TOLD,
    Prepared,
    Question,
    RenderingInfo,
    SplitInfo,
    Tokens,
    column_of,
    file_hashes,
    open_prepared,
    questions_file,
    rendering_folder,
)
from autodistill.data.documents import DataSource
from autodistill.data.packing import cut, fill, pack
from autodistill.data.splits import assign, contiguous, differ_in_blanks, first_occurrences, in_a_row, join
from autodistill.data.student_template import share, write_text
from autodistill.data.tokenization import beginning, encode, load_tokenizer, save_tokenizer
from autodistill.errors import InputError
from autodistill.utils.durable import make_folder, put
from autodistill.utils.file_locks import exclusive
from autodistill.utils.hashing import content_hash
from autodistill.utils.json_files import unwritable

if TYPE_CHECKING:
    import pyarrow

_RULE = 1  # part of the fingerprint; raise it with any change of how data are split, tokenised or packed


def prepare(
    source: DataSource,
    tokenizer_folder: Path,
    tokenizer_fingerprint: str,
    sequence_length: int,
    cache: Path,
    seed: int = 0,
    templates: Sequence[Template] = (),
) -> Prepared:
    """Split, tokenise and pack the documents, or open the result of an earlier call in `cache`.

    Args:
        source: The documents.
        tokenizer_folder: A folder that transformers' AutoTokenizer can load.
        tokenizer_fingerprint: Identifies the tokenizer in the fingerprint of the data.
        sequence_length: Number of tokens in a sequence, at least 2.
        cache: Folder under which the data are kept. If they are incomplete or altered there, they are made again.
        seed: Seed for the choice of documents for the splits, and for the order of the sequences.
        templates: Further templates in which conversations are rendered; see `student_template.own_template`. A
            conversation whose answers share no token in all renderings is left out.

    Raises:
        InputError: There is too little text for one sequence in each split, or the cache cannot be written.
    """
    if sequence_length < 2:
        raise InputError(f"a sequence needs at least 2 tokens to predict one from another, not {sequence_length}")
    conversations = source.conversations
    renderer = Renderer(tokenizer_folder) if conversations else None
    tokenizer = renderer.tokenizer if renderer is not None else load_tokenizer(tokenizer_folder)
    parts = [source.fingerprint, tokenizer_fingerprint, sequence_length, seed, _RULE]
    own = {template.name: Renderer(tokenizer_folder, template) for template in templates if conversations}
    if renderer is not None:
        names = sorted(name + one.further_rule for name, one in own.items())
        parts += [renderer.rule, source.task, *([names] if own else [])]
        parts += _blanks_rule([one.opening for one in conversations])
    else:
        parts += _further_rules(_texts(source), tokenizer)
    fingerprint = content_hash(parts, digits=16)
    folder = cache / "data" / fingerprint
    with exclusive(folder):
        with contextlib.suppress(InputError):  # if they are missing, incomplete or altered, they are made below
            # The same text may have been prepared before under another name.
            return replace(open_prepared(folder), name=source.name, license=source.license)
        if renderer is not None:
            renderers = {"": renderer} | {name: own[name] for name in sorted(own)}
            return _prepare_conversations(folder, source, renderers, tokenizer_folder, sequence_length, seed)
        return _prepare_texts(folder, source, tokenizer, sequence_length, seed)


def _texts(source: DataSource) -> tuple[str, ...]:
    return tuple(text for text in source.documents if isinstance(text, str))


def _is_one_text(places: Sequence[int]) -> bool:
    """Return whether there are too few distinct documents for the splits, given `first_occurrences`."""
    return len(set(places)) < len(SPLITS)


def _further_rules(texts: Sequence[str], tokenizer: Any) -> list[str]:
    """Return the parts of the fingerprint about special handling of some texts and tokenizers; [] for all others."""
    places = first_occurrences(texts)
    rules = [] if beginning(tokenizer) is None else ["sequences begin as texts do"]
    if _is_one_text(places):
        rules += ["sequences in a row are a document", *(["without copies"] if len(set(places)) < len(places) else [])]
    return rules + _blanks_rule(texts)


def _blanks_rule(texts: Sequence[str]) -> list[str]:
    """Return the rule for data with texts that differ only in whitespace; earlier versions took them as distinct."""
    return ["equal but for blanks is equal"] if differ_in_blanks(texts) else []


def _prepare_texts(folder: Path, source: DataSource, tokenizer: Any, sequence_length: int, seed: int) -> Prepared:
    """Split documents of plain text, or one long text into blocks if there are too few documents."""
    texts, begin = _texts(source), beginning(tokenizer)
    documents, places = _tokenize(texts, tokenizer), first_occurrences(texts)
    length = sequence_length - (begin is not None)
    one = _is_one_text(places)
    if one:
        # Leave copies out: a copy of the text in one block could be in another block.
        packed = contiguous(np.concatenate([documents[place] for place in sorted(set(places))]), length)
    else:
        packed = join(documents, places, assign(texts, documents, places, length, seed))
    tables = {}
    for split, (tokens, owners) in packed.items():
        rows, of = _sequences(tokens, length), _sequences(owners, length)
        if begin is not None:
            rows, of = np.insert(rows, 0, begin, axis=1), np.concatenate([of[:, :1], of], axis=1)
        tables[split] = _table({"tokens": rows, "documents": of}, seed)
    blocks = {split: {"in_a_row": in_a_row(len(table))} for split, table in tables.items()} if one else None
    copies = len(places) - len(set(places))
    notes = (_copies_note(copies, len(places), left_out=one),) if copies else ()
    return _write(folder, source, sequence_length, tables, counts=blocks, notes=notes)


def _copies_note(copies: int, documents: int, *, left_out: bool) -> str:
    """Return the note about documents that repeat others: left out, or in the split of the document they repeat."""
    if copies == 1:
        what, said = "is a copy of another one", "is left out" if left_out else "stands in its split"
    else:
        what, said = "are copies of others", "are left out" if left_out else "stand in the split of the first one"
    return f"{copies} of {documents} documents {what}, apart from blanks, and {said}"


def _prepare_conversations(
    folder: Path, source: DataSource, renderers: Mapping[str, Renderer], teacher: Path, length: int, seed: int
) -> Prepared:
    """Split by opening prompt and pack whole records; keep the questions of the held-out splits.

    Args:
        folder: Folder to write.
        source: The conversations.
        renderers: Renderers by name. The teacher's is first, and its name is "".
        teacher: Folder of the teacher's tokenizer.
        length: Number of tokens in a sequence.
        seed: As for `prepare`.
    """
    renderer, conversations = renderers[""], source.conversations
    whole = {"": renderer.render(conversations)}
    for name, other in renderers.items():
        if name:  # reported log-probabilities are only stored with the teacher's rendering
            whole[name] = other.render([replace(one, writer_logprobs=None) for one in conversations])
    records, notes = _kept(whole, [one.end for one in renderers.values()], length)
    places = list(records)
    openings = [conversations[place].opening for place in places]
    owners = {place: places[first] for place, first in zip(places, first_occurrences(openings), strict=True)}
    tokens = [record[0].tokens for record in records.values()]
    texts = {place: conversations[place].opening for place in owners.values()}
    chosen = assign(texts, tokens, list(owners.values()), length, seed)
    tables, counts = {}, {}
    questions: dict[str, dict[str, str]] = {name: {} for name in renderers}
    for split, firsts in chosen.items():
        inside = set(firsts)
        members = [place for place, owner in owners.items() if owner in inside]
        chunk = [records[place] for place in members]
        columns, counts[split] = _columns(chunk, [owners[place] for place in members], list(renderers), length)
        tables[split] = _table(columns, seed)
        if split != "train":
            for name, one in renderers.items():
                entries = [_question(place, conversations[place], whole[name][place], one) for place in sorted(inside)]
                asking = {"task": source.task, "stops": one.stops, "entries": [asdict(entry) for entry in entries]}
                questions[name][split] = json.dumps(asking)
    if any(one.writer_logprobs for one in conversations):
        learnt, told = counts["train"]["answers"], counts["train"]["told"]
        notes += (
            f"{told:,} of {learnt:,} answer tokens to learn from have their writer's log-probabilities, and "
            f"{learnt - told:,} have their text alone",
        )
    infos = {
        name: _rendering_info([record[number] for record in records.values()], renderer, renderers[name])
        for number, name in enumerate(renderers)
        if name
    }
    add = partial(_write_texts, teacher, renderers, questions)
    return _write(folder, source, length, tables, add, notes, counts, infos)


def _columns(
    records: Sequence[Sequence[Rendered]], owners: Sequence[int], names: Sequence[str], length: int
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, int]]:
    """Return the sequences of a split by column, with further renderings under their names, and answer counts.

    Args:
        records: The records of the split, each in all renderings.
        owners: The document of each record.
        names: Names of the renderings. The teacher's is first, and its name is "".
        length: Number of tokens in a sequence.
    """
    rows = fill([max(len(one.tokens) for one in record) for record in records], length)
    columns: dict[str, npt.NDArray[Any]] = {}
    counts: dict[str, int] = {}
    for number, name in enumerate(names):
        packed = pack([record[number] for record in records], owners, length, rows)
        found: dict[str, npt.NDArray[Any]] = {"tokens": packed.tokens, "documents": packed.documents}
        # Arrow stores a bool as a bit, which cannot be memory-mapped as an array.
        found["answers"] = packed.answers.view(np.uint8)
        if len(names) > 1:
            found["shared"] = packed.shared.view(np.uint8)
        columns |= {f"{name}/{column}" if name else column: values for column, values in found.items()}
        if not name:
            counts = {"answers": int(packed.answers[:, 1:].sum()), "told": 0}
        if not name and packed.writer_logprobs is not None:
            columns |= {
                column: part.reshape(len(part), -1) for column, part in zip(TOLD, packed.writer_logprobs, strict=True)
            }
            counts["told"] = int((packed.writer_logprobs.ids[:, 1:, 0] >= 0).sum())
    return columns, counts


def _write_texts(
    teacher: Path, renderers: Mapping[str, Renderer], questions: Mapping[str, Mapping[str, str]], folder: Path
) -> None:
    """Write everything except tokens into a folder of data: tokenizer, other renderings and questions.

    Args:
        teacher: Folder of the teacher's tokenizer.
        renderers: Renderers by name. The teacher's is first, and its name is "".
        questions: The questions as JSON, by name of the rendering and by split.
        folder: Folder of the data.
    """
    save_tokenizer(renderers[""].tokenizer, folder / TOKENIZER)
    for name, texts in questions.items():
        if name:
            own = rendering_folder(folder, name)
            write_text(teacher, renderers[name], own)
            (own / ENDS).write_text(json.dumps([renderers[""].end, renderers[name].end]), encoding="utf-8")
        for split, text in texts.items():
            path = questions_file(folder, split, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")


def _kept(
    whole: Mapping[str, Sequence[Rendered]], ends: Sequence[int], length: int
) -> tuple[dict[int, list[Rendered]], tuple[str, ...]]:
    """Return the usable records, each in all renderings and cut to a sequence, by place in the source; and notes."""
    together = list(zip(*whole.values(), strict=True))
    records: dict[int, list[Rendered]] = {}
    for place, renderings in enumerate(together):
        short = [part for record in renderings if (part := cut(record, length)) is not None]
        if len(short) == len(renderings):
            records[place] = short
    notes = _notes([max(len(record.tokens) for record in one) for one in together], set(records), length)
    if not records:
        raise InputError(f"the data cannot be used: {notes[0]}; give shorter prompts")
    notes += _dropped(together)
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


def _notes(sizes: list[int], kept: set[int], length: int) -> tuple[str, ...]:
    """Return notes on records that are longer than a sequence."""
    cut_off = sum(size > length for place, size in enumerate(sizes) if place in kept)
    lost = len(sizes) - len(kept)
    notes = []
    if lost:
        notes.append(f"{lost} of {len(sizes)} records are left out: their prompt fills a sequence of {length} tokens")
    if cut_off:
        notes.append(f"{cut_off} of {len(sizes)} records are longer than {length} tokens and cut at their end")
    return tuple(notes)


def _dropped(together: Sequence[Sequence[Rendered]]) -> tuple[str, ...]:
    """Return notes on answers that a template rewrites."""
    counts = [sum(record.dropped for record in records) for records in zip(*together, strict=True)]
    whose = ("the teacher's", *["a pretrained student's"] * (len(counts) - 1))
    return tuple(
        f"{count:,} of the answers that are followed by others are not learned from: {template} chat template writes "
        "them differently from the data, for example without thoughts; to learn from them, add records that end with "
        "each of them"
        for count, template in zip(counts, whose, strict=True)
        if count
    )


def _question(place: int, conversation: Conversation, record: Rendered, renderer: Renderer) -> Question:
    prompt = renderer.question_tokens(conversation.prompt, conversation.answer)
    # The text that the template puts before the answer's content counts as an answer in training. If it is part of the
    # prompt of the question, it does not count as a token of the expected answer.
    begun = record.tokens[: len(prompt)].tolist() == prompt
    given = max(0, len(prompt) - record.last_start) if begun else 0
    return Question(
        document=place,
        prompt=tuple(prompt),
        answer=conversation.answer,
        answer_tokens=record.last_answer - given,
        item=conversation.item,
    )


def _tokenize(documents: Sequence[str], tokenizer: Any) -> list[Tokens]:
    """Return the token ids of each document, with EOS at the end, or BOS if the tokenizer has no EOS."""
    end = tokenizer.bos_token_id if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    if end is None:
        raise InputError(
            f"the tokenizer in {tokenizer.name_or_path} has neither an EOS nor a BOS token to put between documents"
        )
    return [np.append(ids, np.int32(end)) for ids in encode(tokenizer, documents)]


def _sequences(values: Tokens, length: int) -> Tokens:
    count = len(values) // length
    return values[: count * length].reshape(count, length)


def _table(columns: Mapping[str, npt.NDArray[Any]], seed: int) -> pyarrow.Table:
    """Return columns of sequences, [sequences, length] each, as an Arrow table in a shuffled order."""
    import pyarrow

    lists = {}
    for name, values in columns.items():
        count, length = values.shape
        rows = values[np.random.default_rng(seed).permutation(count)]
        lists[name] = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), length)
    return pyarrow.table(lists)


def _write(
    folder: Path,
    source: DataSource,
    length: int,
    tables: dict[str, pyarrow.Table],
    add: Callable[[Path], None] = lambda temporary: None,
    notes: tuple[str, ...] = (),
    counts: Mapping[str, Mapping[str, int]] | None = None,
    renderings: Mapping[str, RenderingInfo] | None = None,
) -> Prepared:
    """Write all splits under a temporary name, then rename the folder, so that the final name is always complete.

    Args:
        folder: The final folder.
        source: Gives name and licence.
        length: Number of tokens in a sequence.
        tables: The sequences of each split.
        add: Writes all other files into the folder that it is given.
        notes: As in `Prepared`.
        counts: Further fields of `SplitInfo` for each split.
        renderings: Renderings other than the teacher's.
    """
    import datasets

    fingerprint = folder.name
    temporary = folder.with_name(f".{fingerprint}-{uuid.uuid4().hex}")
    try:
        make_folder(folder.parent)
        temporary.mkdir()
        splits = {}
        for split, table in tables.items():
            with _quiet():
                datasets.Dataset(table).save_to_disk(temporary / split)
            distinct = len(np.unique(column_of(table, "documents")))
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
            "licence": source.license,
            "sequence_length": length,
            "notes": list(notes),
            **({"renderings": {name: asdict(info) for name, info in renderings.items()}} if renderings else {}),
        }
        index = head | {
            "splits": {split: asdict(info) for split, info in splits.items()},
            "files": file_hashes(temporary),
        }
        text = json.dumps({"checksum": content_hash(index), **index}, indent=1)
        (temporary / INDEX).write_text(text, encoding="utf-8")
        _replace(temporary, folder)
    except OSError as error:
        raise unwritable(folder.parent, error, "--cache") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return open_prepared(folder)


def _replace(temporary: Path, folder: Path) -> None:
    if folder.exists():
        # Another process may just have written the same data. Keep them unless they are damaged.
        with contextlib.suppress(InputError):
            open_prepared(folder)
            return
        shutil.rmtree(folder)
    try:
        put(temporary, folder)
    except OSError:
        if not folder.exists():
            raise
        open_prepared(folder)  # another process was first; this raises if its data are not complete


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of `datasets`, and restore its setting afterwards."""
    import datasets

    hidden = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not hidden:
            datasets.enable_progress_bars()
