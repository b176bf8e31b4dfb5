"""References to data: each kind, and each fault."""

from __future__ import annotations

import json
import platform
import socket
from pathlib import Path
from pydoc_data.topics import topics
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from autodistill.data.conversations import Conversation, Turn, single_turn
from autodistill.data.documents import resolve_data, resolve_prompts
from autodistill.errors import InputError


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def _jsonl(path: Path, *records: object) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return str(path)


def test_pydoc_has_each_topic_and_states_the_version_of_python() -> None:
    source = resolve_data("pydoc")
    assert sorted(source.documents) == sorted(topics.values())
    assert source.fingerprint.startswith(f"python-{platform.python_version()}-")
    assert source.license == "PSF-2.0"


def test_a_folder_gives_its_text_files_in_the_order_of_their_paths(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name, text in (("b/one.md", "first in b"), ("a.txt", "a"), ("c.rst", "c"), ("d.py", "code"), ("e.txt", " \n")):
        (tmp_path / name).write_text(text)
    source = resolve_data(str(tmp_path))
    assert source.documents == ("a", "first in b", "c")
    assert source.kind == "folder"


def test_a_text_file_is_one_document_without_its_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_bytes(b"\xef\xbb\xbfGr\xc3\xbc\xc3\x9fe\n")
    assert resolve_data(str(tmp_path / "long.txt")).documents == ("Grüße\n",)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        ({"text": "t", "content": "c"}, "t"),
        ({"content": "c", "prompt": "p", "answer": "a"}, "c"),
        ({"prompt": "p", "answer": "a"}, single_turn("p", "a")),
        ({"question": "q", "response": "a"}, single_turn("q", "a")),
        ({"instruction": "do", "completion": "done", "title": "t"}, single_turn("do", "done")),
        ({"instruction": "do", "context": "it", "response": "done"}, single_turn("do\nit", "done")),
        ({"instruction": "do", "input": "", "output": "done"}, single_turn("do", "done")),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
            single_turn("hi", "ho"),
        ),
    ],
)
def test_records_give_their_document_from_jsonl_and_parquet_alike(
    tmp_path: Path, record: dict[str, object], text: object
) -> None:
    assert resolve_data(_jsonl(tmp_path / "d.jsonl", record)).documents == (text,)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([record]), tmp_path / "d.parquet")
    assert resolve_data(str(tmp_path / "d.parquet")).documents == (text,)


def test_blank_records_are_left_out(tmp_path: Path) -> None:
    ref = _jsonl(tmp_path / "d.jsonl", {"text": "x", "body": "one"}, {"text": None}, {"text": ""}, {"text": "y"})
    assert resolve_data(ref).documents == ("x", "y")


def test_the_fingerprint_follows_the_text_and_its_division(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    for name, parts in zip(names, (("one", "two"), ("onetwo",), ("one", "two")), strict=True):
        _jsonl(tmp_path / f"{name}.jsonl", *({"text": part} for part in parts))
    first, second, third = (resolve_data(str(tmp_path / f"{name}.jsonl")).fingerprint for name in names)
    assert first == third != second


def test_a_conversation_ends_with_its_last_answer_and_keeps_its_system_turn(tmp_path: Path) -> None:
    turns = [("system", "be kind"), ("user", "hi"), ("assistant", "ho"), ("user", "go"), ("assistant", "no")]
    messages = [{"role": role, "content": content} for role, content in (*turns, ("user", "why?"))]
    source = resolve_data(_jsonl(tmp_path / "d.jsonl", {"messages": messages}, {"messages": None}))
    assert source.documents == (Conversation(tuple(Turn(*turn) for turn in turns)),) == source.conversations
    assert source.documents[0].opening == "be kind\nhi"
    assert (source.documents[0].answer, len(source.documents[0].prompt)) == ("no", 4)


def test_records_without_prompt_or_answer_are_left_out(tmp_path: Path) -> None:
    records = [{"prompt": "p", "answer": answer} for answer in ("a", "", None, "b")] + [{"prompt": " ", "answer": "c"}]
    assert resolve_data(_jsonl(tmp_path / "d.jsonl", *records)).documents == (
        single_turn("p", "a"),
        single_turn("p", "b"),
    )


def test_a_task_is_data_with_a_license_and_a_fingerprint_by_its_content() -> None:
    first, again, other = (
        resolve_data(f"reasoning-gym:chain_sum?size=8&seed={seed}") for seed in ("0", "0&worked=true", "100")
    )
    assert (first.kind, first.name, first.license) == ("task", "chain_sum", "Apache-2.0")
    assert first.task == "reasoning-gym:chain_sum?size=8&seed=0"
    assert len(first.conversations) == 8
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_prompts_come_from_records_lines_and_tasks_once_each(tmp_path: Path) -> None:
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "be kind"}
    records = [
        {"prompt": "p", "answer": "a"},
        {"question": "q"},
        {"messages": [system, user, {"role": "assistant", "content": "ho"}]},
        {"prompt": "p"},
    ]
    hello = (Turn("system", "be kind"), Turn("user", "hi"))
    assert resolve_prompts(_jsonl(tmp_path / "p.jsonl", *records)) == (
        (Turn("user", "p"),),
        (Turn("user", "q"),),
        hello,
    )
    (tmp_path / "p.txt").write_text("one\n\n two \none\n")
    assert resolve_prompts(str(tmp_path / "p.txt")) == ((Turn("user", "one"),), (Turn("user", "two"),))
    task = "reasoning-gym:chain_sum?size=3"
    assert resolve_prompts(task) == tuple(one.prompt for one in resolve_data(task).conversations)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("p.csv", "a", "not a file of prompts"),
        ("p.txt", " \n", "holds no prompt"),
        ("p.jsonl", '{"title": "x"}', "line 1 of .* has no prompt .* the fields found are title"),
        ("p.jsonl", '{"prompt": ""}', "line 1 of .* has a blank prompt"),
        ("p.jsonl", '{"prompt": 3}', "line 1 of .* field prompt that is not text"),
        ("nowhere", None, "there are no prompts at"),
    ],
)
def test_faulty_prompts_are_refused(tmp_path: Path, name: str, text: str | None, said: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        resolve_prompts(str(tmp_path / name))


def _bad(tmp_path: Path) -> None:
    files = {
        "table.csv": "a,b",
        "blank.txt": " \n\t",
        "latin.txt": b"caf\xe9",
        "latin.jsonl": b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "caf\xe9"}\r\n',
        "mixed.jsonl": '{"prompt": "x", "answer": "y"}\n{"text": "z"}',
        "torn.jsonl": '{"text": "a"}\n\n{"text": "b"',
        "list.jsonl": "[1]",
        "empty.jsonl": "\n",
        "fields.jsonl": '{"title": "x", "score": 3}',
        "number.jsonl": '{"text": "x"}\n{"text": 3}',
        "partial.jsonl": '{"text": "x"}\n{"title": "y"}',
        "nulls.jsonl": '{"text": null}',
        "chat.jsonl": '{"messages": [{"role": "user"}]}',
        "chats.jsonl": '{"messages": "hello"}',
        "monologue.jsonl": '{"messages": [{"role": "user", "content": "hello"}]}',
        "unanswered.jsonl": '{"prompt": "x", "score": 3}',
        "answers.jsonl": '{"prompt": "x", "answer": "y"}\n{"prompt": "x"}',
        "choices.jsonl": '{"prompt": "x", "answer": ["y"]}',
        "half.jsonl": '{"text": "whole \\ud83d\\ude00"}\n{"text": "document \\uD83D and more"}',
        "half-chat.jsonl": '{"messages": [{"role": "user", "content": "\\ude00"}]}',
        "broken.parquet": b"PAR1 and no more",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("x = 1")
    pyarrow.parquet.write_table(pyarrow.table({"title": ["x"], "score": [3]}), tmp_path / "fields.parquet")
    pyarrow.parquet.write_table(
        pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), tmp_path / "empty.parquet"
    )


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nowhere.txt", ["there is no data at", "pydoc"]),
        ("nowhere", ["there is no data at", "pydoc"]),
        ("table.csv", ["unsupported kind", ".parquet"]),
        ("blank.txt", ["holds no text"]),
        ("latin.txt", ["not UTF-8", "line 1", "byte 3"]),
        ("latin.jsonl", ["not UTF-8", "line 3"]),
        ("torn.jsonl", ["line 3", "not JSON"]),
        ("list.jsonl", ["line 1", "not a JSON object"]),
        ("empty.jsonl", ["holds no record"]),
        ("fields.jsonl", ["no field with usable text", "title, score"]),
        ("fields.parquet", ["no field with usable text", "title, score"]),
        ("number.jsonl", ["line 2", "not text"]),
        ("partial.jsonl", ["line 2", "lacks the field text, which other records have (it has title)"]),
        ("mixed.jsonl", ["line 1", "lacks the field text, which other records have (it has prompt, answer)"]),
        ("nulls.jsonl", ["no field with usable text", "text"]),
        ("chat.jsonl", ["line 1", "role"]),
        ("chats.jsonl", ["line 1", "messages"]),
        ("monologue.jsonl", ["line 1", "no assistant message"]),
        ("unanswered.jsonl", ["no field with usable text", "prompt, score"]),
        ("answers.jsonl", ["line 2", "lacks the field answer"]),
        ("choices.jsonl", ["line 1", "answer that is not text"]),
        ("half.jsonl", ["line 2", "half of a character", r"\ud83d"]),
        ("half-chat.jsonl", ["line 1", "half of a character", r"\ude00"]),
        ("broken.parquet", ["cannot read", "Parquet"]),
        ("empty.parquet", ["no field with usable text"]),
        ("code", ["holds no .txt, .md, .rst file"]),
    ],
)
def test_each_fault_is_said_in_one_line(tmp_path: Path, name: str, said: list[str]) -> None:
    _bad(tmp_path)
    with pytest.raises(InputError) as caught:
        resolve_data(str(tmp_path / name))
    message = str(caught.value)
    assert "\n" not in message
    for part in [*said, name]:
        assert part in message


def test_what_is_left_out_is_counted(tmp_path: Path) -> None:
    single_turn = [{"prompt": "a?", "answer": "b"}, {"prompt": "c?", "answer": None}, {"prompt": " ", "answer": "d"}]
    assert resolve_data(_jsonl(tmp_path / "qa.jsonl", *single_turn)).notes == (
        "2 of 3 records are left out: they have no prompt, or no answer",
    )
    texts = [{"text": "a"}, {"text": None}]
    assert resolve_data(_jsonl(tmp_path / "texts.jsonl", *texts)).notes == (
        "1 of 2 records is left out: it has no text",
    )
    assert resolve_data(_jsonl(tmp_path / "whole.jsonl", texts[0])).notes == ()
    for name, text in (("a.txt", "words"), ("b.md", " \n"), ("c.txt", "")):
        (tmp_path / "folder" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "folder" / name).write_text(text, encoding="utf-8")
    assert resolve_data(str(tmp_path / "folder")).notes == ("2 of 3 files are left out: they have no text",)


def test_both_halves_of_a_character_are_that_character(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(r'{"text": "a \ud83d\ude00 b"}' + "\n" + r'{"text": "a \\ud83d b"}')
    assert resolve_data(str(tmp_path / "a.jsonl")).documents == ("a \N{GRINNING FACE} b", r"a \ud83d b")


@pytest.mark.parametrize("ref", ["", "~nobody-of-this-name/x.txt", "x" * 5000])
def test_a_name_that_no_file_can_have_is_missing_data(ref: str) -> None:
    with pytest.raises(InputError, match="there is no data at"):
        resolve_data(ref)


def test_a_hub_id_is_asked_of_datasets_and_its_failure_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    def load(name: str, revision: str | None) -> datasets.DatasetDict:
        assert revision == "a" * 40
        if name != "somebody/stories":
            raise ConnectionError(f"Couldn't reach '{name}' on the Hub")
        train = datasets.Dataset.from_dict({"text": ["one", "two"]})
        return datasets.DatasetDict({"test": datasets.Dataset.from_dict({"text": ["no"]}), "train": train})

    monkeypatch.setattr(datasets, "load_dataset", load)
    info = SimpleNamespace(sha="a" * 40)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda self, ref, revision, timeout: info)
    source = resolve_data("somebody/stories")
    assert (source.kind, source.documents, source.revision) == ("hub", ("one", "two"), "a" * 40)
    with pytest.raises(InputError, match=r"no data at nobody/nothing here, and the hub .*Couldn't reach"):
        resolve_data("nobody/nothing")


class Hub:
    """A hub with one data set, whose main revision may change, and the cache of `datasets` on this machine."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        import datasets
        import huggingface_hub

        self.commit, self.reached = "a" * 40, True
        self._root = root
        monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", self._info)
        monkeypatch.setattr(datasets, "load_dataset", self._load)

    def _info(self, name: str, *, revision: str | None, timeout: int) -> Any:
        from huggingface_hub.errors import OfflineModeIsEnabled

        assert name == "somebody/stories"
        if not self.reached:
            raise OfflineModeIsEnabled("offline")
        return SimpleNamespace(sha=self.commit if revision in (None, "main") else revision)

    def _load(self, name: str, *, revision: str | None) -> Any:
        """Load as `datasets` does: without a connection, the newest cached revision, whatever was asked for."""
        import datasets

        commit = revision if self.reached else max(path.name for path in (self._root / "0.0.0").iterdir())
        assert commit is not None
        folder = self._root / "0.0.0" / commit
        if not folder.is_dir():
            datasets.Dataset.from_dict({"text": [f"one of {commit[0]}", "two"]}).save_to_disk(str(folder))
        return {"train": datasets.load_from_disk(str(folder))}


def test_the_commit_of_a_hub_s_data_is_known_and_may_be_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(tmp_path, monkeypatch)
    first = resolve_data("somebody/stories")
    assert (first.revision, first.documents[0]) == ("a" * 40, "one of a")
    hub.commit = "b" * 40
    assert resolve_data("somebody/stories@main").revision == "b" * 40
    pinned = resolve_data("somebody/stories@" + "a" * 40)
    assert (pinned.name, pinned.revision, pinned.documents) == ("somebody/stories", "a" * 40, first.documents)
    hub.reached = False
    assert resolve_data("somebody/stories").revision == "b" * 40
    with pytest.raises(InputError, match=r"is here at commit bbb.* only, but aaa.* is asked for: connect to the hub"):
        resolve_data("somebody/stories@" + "a" * 40)
    for wrong in ("somebody/stories@", "somebody/stories@a@b", "somebody/stories@../x", "@a"):
        with pytest.raises(InputError, match="there is no data at"):
            resolve_data(wrong)


def test_a_dead_connection_is_said_at_once() -> None:
    with pytest.raises(InputError, match=r"the hub did not give the data set somebody/stories.*check the name"):
        resolve_data("somebody/stories")
