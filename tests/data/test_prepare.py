"""Splitting, packing and storing data."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autodistill.data import prepare as data_module
from autodistill.data.conversations import Conversation, Turn, single_turn
from autodistill.data.dataset import SPLITS, Prepared, load_split, open_prepared
from autodistill.data.documents import DataSource, resolve_data
from autodistill.data.prepare import prepare
from autodistill.data.splits import in_a_row
from autodistill.errors import InputError
from autodistill.evaluation.statistics import clustered_mean
from autodistill.testing import tiny_text, tiny_tokenizer
from autodistill.utils.hashing import content_hash

LENGTH = 32


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DataSource:
    folder = tiny_text(tmp_path_factory.mktemp("text"), documents=40, sentences=12)
    (folder / "copy.txt").write_text((folder / "007.txt").read_text())
    return resolve_data(str(folder))


@pytest.fixture(scope="module")
def prepared(source: DataSource, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    return prepare(source, tokenizer, "tiny", LENGTH, tmp_path_factory.mktemp("cache"))


def _long_text(folder: Path, tokenizer: Path, sequences: int) -> tuple[DataSource, list[int]]:
    """Return a single text of `sequences` and a half sequences, and its tokens."""
    text = " ".join(path.read_text() for path in sorted(tiny_text(folder / "parts", documents=6).iterdir()))
    ids = tiny_tokenizer()(text, verbose=False)["input_ids"]
    text = tiny_tokenizer().decode(ids[: sequences * LENGTH + LENGTH // 2])
    (folder / "long.txt").write_text(text)
    source = resolve_data(str(folder / "long.txt"))
    return source, [*tiny_tokenizer()(text, verbose=False)["input_ids"], tiny_tokenizer().eos_token_id]


def test_no_document_is_in_two_splits_and_copies_stay_together(source: DataSource, prepared: Prepared) -> None:
    members = {split: set(load_split(prepared.folder, split).documents.flat) for split in SPLITS}
    for split in SPLITS:
        assert len(members[split]) == prepared.splits[split].documents > 0
        for other in SPLITS:
            assert split == other or not members[split] & members[other]
    texts = {split: {source.documents[place].strip() for place in members[split]} for split in SPLITS}
    copy = source.documents[-1].strip()
    assert source.documents[7].strip() == copy
    assert sum(copy in found for found in texts.values()) == 1
    assert len(source.documents) - 1 not in set.union(*members.values())


def test_the_shares_are_about_80_10_10(prepared: Prepared) -> None:
    total = sum(info.tokens for info in prepared.splits.values())
    assert {split: info.tokens / total for split, info in prepared.splits.items()} == pytest.approx(
        {"train": 0.8, "validation": 0.1, "test": 0.1}, abs=0.05
    )


def test_each_sequence_is_a_piece_of_its_documents_joined_by_eos(source: DataSource, prepared: Prepared) -> None:
    encode = tiny_tokenizer()
    for split in SPLITS:
        sequences = load_split(prepared.folder, split)
        assert sequences.tokens.dtype == sequences.documents.dtype == np.int32
        assert sequences.tokens.shape == sequences.documents.shape == (prepared.splits[split].sequences, LENGTH)
        for tokens, documents in zip(sequences.tokens, sequences.documents, strict=True):
            for place in set(documents.tolist()) - {-1}:
                own = tokens[documents == place].tolist()
                whole = [*encode(source.documents[place], verbose=False)["input_ids"], encode.eos_token_id]
                text = " ".join(map(str, whole * 2))  # twice, because a document may also have a copy
                assert f" {' '.join(map(str, own))} " in f" {text} "


def test_the_first_sequences_come_from_many_documents(prepared: Prepared) -> None:
    train = load_split(prepared.folder, "train")
    head = train.head(16 * LENGTH)
    assert len(head.tokens) == 16
    assert len(set(head.documents.flat)) >= 8  # in text order, they would come from 3 or 4
    assert len(train.head(3 * LENGTH - 1).tokens) == 2
    assert len(train.head(1).tokens) == 1


@pytest.mark.slow
def test_another_process_prepares_the_same(
    source: DataSource, prepared: Prepared, tokenizer: Path, tmp_path: Path
) -> None:
    (tmp_path / "source.json").write_text(json.dumps(source.documents))
    program = f"""if True:
        import json, pathlib
        from autodistill.data.documents import DataSource
        from autodistill.data.prepare import prepare
        documents = tuple(json.loads(pathlib.Path({str(tmp_path / "source.json")!r}).read_text()))
        source = DataSource(
            name="x", kind="folder", documents=documents, license=None, fingerprint={source.fingerprint!r}
        )
        tokenizer, cache = pathlib.Path({str(tokenizer)!r}), pathlib.Path({str(tmp_path)!r})
        print(prepare(source, tokenizer, "tiny", {LENGTH}, cache).folder)
    """
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    folder = Path(done.stdout.strip())
    assert done.stderr == ""  # neither progress bars nor warnings
    assert open_prepared(folder).fingerprint == prepared.fingerprint
    for split in SPLITS:
        ours, theirs = load_split(prepared.folder, split), load_split(folder, split)
        assert np.array_equal(ours.tokens, theirs.tokens)
        assert np.array_equal(ours.documents, theirs.documents)


def test_what_makes_other_data_makes_another_fingerprint(
    source: DataSource, prepared: Prepared, tokenizer: Path
) -> None:
    cache = prepared.folder.parent.parent
    others = [
        prepare(source, tokenizer, "tiny", LENGTH, cache, seed=1),
        prepare(source, tokenizer, "tiny", 2 * LENGTH, cache),
        prepare(source, tokenizer, "other", LENGTH, cache),
    ]
    assert len({prepared.fingerprint, *(other.fingerprint for other in others)}) == 4
    by_seed = [set(load_split(data.folder, "test").documents.flat) for data in (prepared, others[0])]
    assert by_seed[0] != by_seed[1]
    assert {path.name for path in cache.iterdir()} == {"data"}
    assert not [path for path in prepared.folder.parent.iterdir() if path.name.startswith(".")]


def test_a_long_text_is_cut_into_contiguous_blocks_with_gaps(tokenizer: Path, tmp_path: Path) -> None:
    source, ids = _long_text(tmp_path, tokenizer, 42)
    data = prepare(source, tokenizer, "tiny", LENGTH, tmp_path / "cache")
    rows: dict[str, set[int]] = {}
    for split in SPLITS:
        sequences = load_split(data.folder, split)
        assert all(len(set(documents)) == 1 for documents in sequences.documents)
        rows[split] = set()
        for tokens, document in zip(sequences.tokens, sequences.documents[:, 0], strict=True):
            (row,) = (row for row in range(42) if tokens.tolist() == ids[row * LENGTH : (row + 1) * LENGTH])
            rows[split].add(row)
            # Sequences in a row, as many as the cube root of all, form one document, which has the number of the first.
            first = {"train": 0, "validation": 33, "test": 38}[split]
            together = 4 if split == "train" else 2
            assert document == first + (row - first) // together * together
        assert sequences.in_a_row == sequences.head(LENGTH).in_a_row == data.splits[split].in_a_row == together
        assert data.splits[split].documents == len(rows[split]) // together
    # 42 whole sequences minus two gaps: 32, 4 and 4.
    assert rows == {"train": set(range(32)), "validation": set(range(33, 37)), "test": set(range(38, 42))}


def test_documents_of_their_own_are_no_sequences_in_a_row(prepared: Prepared) -> None:
    assert {load_split(prepared.folder, split).in_a_row for split in SPLITS} == {0}


def test_errors_of_sequences_in_a_row_are_those_of_a_text_whose_neighbors_are_alike() -> None:
    """Over many random texts, the mean scatters as blocks predict, and far more than single sequences predict."""
    dice, sequences = np.random.default_rng(0), 200
    # Each sequence shares a part of its value with the one before.
    drawn = dice.normal(size=(sequences, 2000))
    for place in range(1, sequences):
        drawn[place] = 0.3 * drawn[place - 1] + np.sqrt(1 - 0.3**2) * drawn[place]
    rows = np.arange(sequences, dtype=np.int32)
    blocked, single = (
        np.mean([clustered_mean(values, documents)[1] for values in drawn.T])
        for documents in (rows // in_a_row(sequences), rows)
    )
    scatter = drawn.mean(axis=0).std()
    assert blocked == pytest.approx(scatter, rel=0.1)
    assert single < 0.8 * scatter


@pytest.mark.parametrize("harm", ["cut", "alter", "index", "remove", "half", "another version"])
def test_a_harmed_copy_is_found_and_made_again(source: DataSource, tokenizer: Path, tmp_path: Path, harm: str) -> None:
    first = prepare(source, tokenizer, "tiny", LENGTH, tmp_path)
    tokens = load_split(first.folder, "train").tokens.tolist()
    arrow = next((first.folder / "train").glob("*.arrow"))
    data = arrow.read_bytes()
    if harm == "cut":
        arrow.write_bytes(data[: len(data) // 2])
    elif harm == "alter":
        middle = len(data) // 2
        arrow.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    elif harm == "remove":
        arrow.unlink()
    elif harm == "half":
        (first.folder / "prepared.json").write_text((first.folder / "prepared.json").read_text()[:100])
    else:
        index = json.loads((first.folder / "prepared.json").read_text())
        index["splits"]["train"]["documents"] += 1
        if harm == "another version":
            del index["checksum"]
            index["splits"]["train"]["lines"] = index["splits"]["train"].pop("documents")
            index["checksum"] = content_hash(index)
        (first.folder / "prepared.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="delete the folder"):
        open_prepared(first.folder)
    again = prepare(source, tokenizer, "tiny", LENGTH, tmp_path)
    assert again == first
    assert load_split(again.folder, "train").tokens.tolist() == tokens


def test_prepared_data_are_used_again(
    source: DataSource, prepared: Prepared, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(data_module, "encode", None)  # no text is tokenised again
    again = prepare(source, tokenizer, "tiny", LENGTH, prepared.folder.parent.parent)
    assert again == prepared == open_prepared(prepared.folder)
    other = dataclasses.replace(source, name="other", license="MIT")
    named = prepare(other, tokenizer, "tiny", LENGTH, prepared.folder.parent.parent)
    assert (named.name, named.license, named.fingerprint) == ("other", "MIT", prepared.fingerprint)


@pytest.fixture(scope="module")
def beginning(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that begins every text with BOS."""
    folder = tmp_path_factory.mktemp("beginning")
    tiny_tokenizer(begins=True).save_pretrained(folder)
    return folder


def test_sequences_begin_as_the_tokenizer_begins_texts(
    source: DataSource, tokenizer: Path, beginning: Path, tmp_path: Path
) -> None:
    begun = prepare(source, beginning, "tiny", LENGTH + 1, tmp_path)
    bare = prepare(source, tokenizer, "tiny", LENGTH, tmp_path)
    assert begun.fingerprint != prepare(source, tokenizer, "tiny", LENGTH + 1, tmp_path).fingerprint
    for split in SPLITS:
        ours, theirs = load_split(begun.folder, split), load_split(bare.folder, split)
        assert set(ours.tokens[:, 0].tolist()) == {tiny_tokenizer().bos_token_id}
        # The predicted tokens are the whole text.
        assert np.array_equal(ours.tokens[:, 1:], theirs.tokens)
        assert np.array_equal(ours.documents[:, 1:], theirs.documents)
        assert np.array_equal(ours.documents[:, 0], theirs.documents[:, 0])
        assert ours.predicted == theirs.tokens.size
        assert begun.splits[split].documents == bare.splits[split].documents


def test_a_begun_sequence_is_what_the_tokenizer_makes_of_its_text(beginning: Path, tmp_path: Path) -> None:
    source, _ = _long_text(tmp_path, beginning, 12)
    train = load_split(prepare(source, beginning, "tiny", LENGTH, tmp_path / "cache").folder, "train")
    first = train.tokens[train.documents[:, 0] == 0][0]
    expected = tiny_tokenizer(begins=True)(source.documents[0], verbose=False)["input_ids"][:LENGTH]
    assert first.tolist() == expected


@pytest.mark.parametrize("distinct", [1, 2])
def test_copies_of_one_long_text_bring_no_block_into_another(tokenizer: Path, tmp_path: Path, distinct: int) -> None:
    texts = [" ".join(f"Apple {name}{number}." for number in range(1000)) for name in "ab"[:distinct]]
    data = {}
    for name, copies in (("alone", 1), ("copied", 3)):
        folder = tmp_path / name
        folder.mkdir()
        for place, text in enumerate(texts * copies):
            (folder / f"{place}.md").write_text(text + " " * place)
        data[name] = prepare(resolve_data(str(folder)), tokenizer, "tiny", LENGTH, tmp_path / "cache")
    seen = {split: {tuple(row) for row in load_split(data["copied"].folder, split).tokens.tolist()} for split in SPLITS}
    assert not seen["train"] & (seen["validation"] | seen["test"])
    # The result is the same as without the copies, which end in other whitespace.
    alone, copied = (load_split(data[name].folder, "train").tokens for name in ("alone", "copied"))
    assert np.array_equal(alone, copied)
    assert data["alone"].fingerprint != data["copied"].fingerprint


def test_a_full_disk_is_told_in_a_line_and_leaves_nothing(
    source: DataSource, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def full(table: Any, folder: Path) -> None:
        folder.mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(datasets.Dataset, "save_to_disk", full)
    with pytest.raises(InputError, match="No space left on device; choose another folder with --cache"):
        prepare(source, tokenizer, "tokenizer", 32, tmp_path)
    assert [one for one in (tmp_path / "data").iterdir() if one.is_dir()] == []


def test_too_little_text_says_how_much_is_needed(tokenizer: Path, tmp_path: Path) -> None:
    long, ids = _long_text(tmp_path, tokenizer, 4)
    with pytest.raises(InputError, match=f"{len(ids)} tokens in one long text.* needs at least {5 * LENGTH}"):
        prepare(long, tokenizer, "tiny", LENGTH, tmp_path)
    short = resolve_data(str(tiny_text(tmp_path / "short", documents=3, sentences=1)))
    with pytest.raises(InputError, match=r"too short: \d+ tokens in 3 documents .* needs at least 1536"):
        prepare(short, tokenizer, "tiny", 512, tmp_path)
    with pytest.raises(InputError, match="at least 2 tokens"):
        prepare(short, tokenizer, "tiny", 1, tmp_path)


def test_one_large_document_leaves_something_for_each_split(tokenizer: Path, tmp_path: Path) -> None:
    folder = tiny_text(tmp_path / "text", documents=3, sentences=12)
    (folder / "large.txt").write_text((tiny_text(tmp_path / "other", 1, 500, seed=1) / "000.txt").read_text())
    source = resolve_data(str(folder))
    data = prepare(source, tokenizer, "tiny", LENGTH, tmp_path)
    large = next(place for place, text in enumerate(source.documents) if len(text) > 10_000)
    assert large in load_split(data.folder, "train").documents
    assert all(info.sequences >= 1 for info in data.splits.values())


def test_the_sequences_cannot_be_written_to(prepared: Prepared) -> None:
    train = load_split(prepared.folder, "train")
    with pytest.raises(ValueError, match="read-only"):
        train.tokens[0, 0] = 1


def test_unknown_splits_and_folders_are_refused(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the splits are train, validation, test"):
        load_split(prepared.folder, "dev")
    with pytest.raises(InputError, match="no prepared data"):
        load_split(tmp_path, "train")
    with pytest.raises(InputError, match="no prepared data"):
        open_prepared(tmp_path)


def test_importing_loads_no_heavy_package() -> None:
    program = "import autodistill.data.prepare, sys; print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def _chats(count: int, words: int = 3) -> tuple[Conversation, ...]:
    """Return `count` questions with answers. The first three are asked twice, with two answers."""
    found = [single_turn(f"Question {number}: " + "which? " * words, f"Answer {number}.") for number in range(count)]
    return (
        *found,
        *(single_turn(one.prompt[0].content + " ", f"Or {number}.") for number, one in enumerate(found[:3])),
    )


def _source(documents: tuple[Conversation, ...], **changes: object) -> DataSource:
    fields = {"name": "chats", "kind": "jsonl", "license": None, "fingerprint": str(hash(documents))}
    return DataSource(documents=documents, **(fields | changes))  # type: ignore[arg-type]


def test_conversations_stay_whole_and_their_answers_are_marked(tokenizer: Path, tmp_path: Path) -> None:
    chats = _chats(120)
    data = prepare(_source(chats), tokenizer, "tiny", 64, tmp_path)
    encode, found = tiny_tokenizer(), {}
    for split in SPLITS:
        sequences = load_split(data.folder, split)
        assert sequences.answers is not None
        assert sequences.answers.dtype == bool
        assert sequences.answers.shape == sequences.tokens.shape
        assert sequences.predicted == sequences.answers[:, 1:].sum()
        assert sequences.answers.any(axis=1).all()
        for tokens, documents, answers in zip(sequences.tokens, sequences.documents, sequences.answers, strict=True):
            text = encode.decode(tokens)
            for place in set(documents.tolist()) - {-1}:
                prompt = chats[place].prompt[0].content.strip()
                assert prompt in text
                # The two answers to one question belong to one document.
                said = encode.decode(tokens[(documents == place) & answers])
                found.setdefault(place, []).append((split, said))
    assert set(found) == set(range(120))
    for place, parts in found.items():
        assert len({split for split, _ in parts}) == 1
        expected = {f"Answer {place}.", f"Or {place}."} if place < 3 else {f"Answer {place}."}
        assert {one for _, said in parts for one in said.split("</s>") if one} == expected


def test_the_records_are_gone_through_no_more_often_where_there_are_more(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Counted(dict[int, Any]):
        """Counts how often it is iterated over."""

        passes = 0

        def __iter__(self) -> Iterator[int]:
            Counted.passes += 1
            return super().__iter__()

    def kept(*given: Any) -> tuple[Counted, tuple[str, ...]]:
        records, notes = genuine(*given)
        return Counted(records), notes

    genuine, passes = data_module._kept, []
    monkeypatch.setattr(data_module, "_kept", kept)
    for count in (60, 120):
        Counted.passes = 0
        prepare(_source(_chats(count)), tokenizer, "tiny", 64, tmp_path)
        passes.append(Counted.passes)
    assert passes[0] == passes[1] > 0


def test_questions_are_kept_of_the_splits_that_are_held_out(tokenizer: Path, tmp_path: Path) -> None:
    chats = _chats(120)
    data = prepare(_source(chats), tokenizer, "tiny", 64, tmp_path)
    assert load_split(data.folder, "train").questions is None
    for split in ("validation", "test"):
        sequences = load_split(data.folder, split)
        questions = sequences.questions
        assert questions is not None
        assert {one.document for one in questions.entries} == set(np.unique(sequences.documents).tolist()) - {-1}
        assert questions.stops == (tiny_tokenizer().eos_token_id,)
        for one in questions.entries:
            assert tiny_tokenizer().decode(one.prompt) == chats[one.document].prompt[0].content + "\n"
            assert one.answer == f"Answer {one.document}."
            assert one.answer_tokens == len(tiny_tokenizer()(one.answer)["input_ids"]) + 1
        few = sequences.head(64)
        assert few.questions is not None
        assert {one.document for one in few.questions.entries} == set(np.unique(few.documents).tolist()) - {-1}
        assert len(few.answers) == 1


def test_questions_give_what_a_template_puts_before_answers_and_lost_answers_are_counted(tmp_path: Path) -> None:
    rendered = tiny_tokenizer()
    rendered.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n"
        "{% endif %}{{ m.content.split('</think>')[-1] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    rendered.save_pretrained(tmp_path / "chat")
    thought = [Turn("user", "Who?"), Turn("assistant", "<think>Hm.</think>The fox."), *single_turn("So?", "Go.").turns]
    chats = (*_chats(120), Conversation(tuple(thought)))
    data = prepare(_source(chats), tmp_path / "chat", "tiny", 128, tmp_path)
    assert [note.partition(":")[0] for note in data.notes] == [
        "1 of the answers that are followed by others are not learned from"
    ]
    questions = load_split(data.folder, "validation").questions
    assert questions is not None
    for one in questions.entries:
        assert rendered.decode(one.prompt).endswith("<s>assistant\n<think>\n\n</think>\n\n")
        # Only the answer and its end are left to be written.
        assert one.answer_tokens == len(rendered(f"{one.answer}</s>", add_special_tokens=False)["input_ids"])


def test_records_that_do_not_fit_are_cut_or_left_out_with_their_count(tokenizer: Path, tmp_path: Path) -> None:
    long = single_turn("short", "word " * 100), single_turn("word " * 100, "short")
    data = prepare(_source((*_chats(60), *long)), tokenizer, "tiny", 64, tmp_path)
    assert data.notes == (
        "1 of 65 records are left out: their prompt fills a sequence of 64 tokens",
        "1 of 65 records are longer than 64 tokens and cut at their end",
    )
    assert open_prepared(data.folder) == data
    with pytest.raises(InputError, match="the data cannot be used: 65 of 65 records are left out"):
        prepare(_source((*_chats(60), *long)), tokenizer, "tiny", 4, tmp_path)
    with pytest.raises(InputError, match=r"too short: .* in 2 documents"):
        prepare(_source(_chats(2)), tokenizer, "tiny", 64, tmp_path)


def test_another_template_makes_another_fingerprint(tokenizer: Path, tmp_path: Path) -> None:
    source, chat = _source(_chats(60)), tmp_path / "chat"
    rendered = tiny_tokenizer()
    rendered.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    rendered.save_pretrained(chat)
    plain, templated = (prepare(source, folder, "tiny", 64, tmp_path) for folder in (tokenizer, chat))
    assert plain.fingerprint != templated.fingerprint
    assert prepare(source, chat, "tiny", 64, tmp_path) == templated
    marked = prepare(_source(_chats(60), task="reasoning-gym:chain_sum"), tokenizer, "tiny", 64, tmp_path)
    assert marked.fingerprint != plain.fingerprint


def test_a_single_copy_is_named_in_the_singular(tokenizer: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for place in range(41):
        (folder / f"{place:03}.txt").write_text(" ".join(f"Word {number} of {place % 40}." for number in range(60)))
    found = prepare(resolve_data(str(folder)), tokenizer, "tiny", LENGTH, tmp_path / "cache")
    assert found.notes == ("1 of 41 documents is a copy of another one, apart from blanks, and stands in its split",)


def test_documents_that_differ_in_blanks_alone_are_one_and_are_counted(tokenizer: Path, tmp_path: Path) -> None:
    """A copy with other line ends or indents must not be tested after another copy was trained on."""
    texts = [" ".join(f"Word {number} of {place}." for number in range(60)) for place in range(40)]
    copies = [texts[3].replace(" ", "\n"), f"\t{texts[5]}  ", texts[9].replace(". ", ".\r\n  ")]
    folder = tmp_path / "data"
    folder.mkdir()
    for place, text in enumerate([*texts, *copies]):
        (folder / f"{place:03}.txt").write_text(text)
    source = resolve_data(str(folder))
    for seed in range(5):
        found = prepare(source, tokenizer, "tiny", LENGTH, tmp_path / "cache", seed=seed)
        members = {split: set(load_split(found.folder, split).documents.flat) for split in SPLITS}
        words = {split: {" ".join(source.documents[place].split()) for place in members[split]} for split in SPLITS}
        assert not words["train"] & (words["validation"] | words["test"])
        assert not words["validation"] & words["test"]
        assert not {40, 41, 42} & set.union(*members.values()), "they count as the first one"
        assert found.notes == (
            "3 of 43 documents are copies of others, apart from blanks, and stand in the split of the first one",
        )
