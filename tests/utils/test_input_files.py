"""Files that a user names, and other things in their place: pipes, sockets, folders, devices, loops."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from autodistill.data.chat_template import Renderer
from autodistill.data.conversations import single_turn
from autodistill.data.documents import resolve_data, resolve_prompts
from autodistill.data.tokenization import check_ids, encode, load_tokenizer
from autodistill.errors import InputError, shortened
from autodistill.models.gguf_reader import read_gguf
from autodistill.testing import tiny_tokenizer
from autodistill.utils.input_files import check_file, read_file
from autodistill.utils.yaml_files import read_yaml


def _socket(path: Path) -> None:
    made = socket.socket(socket.AF_UNIX)
    made.bind(os.path.relpath(path))
    made.close()


_KINDS: dict[str, Callable[[Path], object]] = {
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "a folder": Path.mkdir,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to a missing file": lambda path: path.symlink_to("nothing"),
    "cannot be read": lambda path: path.symlink_to(path.name),  # a loop
}


@pytest.mark.parametrize("kind", _KINDS)
def test_what_is_no_file_is_named_for_what_it_is(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x"
    _KINDS[kind](path)
    with pytest.raises(InputError, match=kind):
        check_file(path)


@pytest.mark.parametrize(
    ("name", "read"),
    [
        ("x.gguf", read_gguf),
        ("x.yaml", read_yaml),
        ("x.txt", lambda path: resolve_data(str(path))),
        ("x.jsonl", lambda path: resolve_data(str(path))),
        ("x.parquet", lambda path: resolve_data(str(path))),
        ("p.txt", lambda path: resolve_prompts(str(path))),
        ("p.jsonl", lambda path: resolve_prompts(str(path))),
    ],
)
def test_whoever_reads_a_file_waits_for_no_pipe(name: str, read: Callable[[Path], object], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(InputError, match="is a pipe: give a file"):
        read(tmp_path / name)


def test_a_file_is_read_as_far_as_it_may_go(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"12345")
    assert read_file(tmp_path / "x", 5) == b"12345"
    with pytest.raises(InputError, match="larger than 4 B"):
        read_file(tmp_path / "x", 4)
    with pytest.raises(InputError, match="No such file"):
        read_file(tmp_path / "y", 4)


def test_a_long_message_keeps_its_beginning_and_its_advice() -> None:
    said = str(InputError("a" + "x" * 100_000 + ": give another"))
    assert len(said) < 1_000
    assert said.startswith("ax")
    assert said.endswith(": give another")
    assert shortened("short") == "short"


def test_dates_that_python_has_none_of_are_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"text": pyarrow.array([2**31 - 1], pyarrow.date32())})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    with pytest.raises(InputError, match="as Parquet"):
        resolve_data(str(tmp_path / "d.parquet"))


@pytest.mark.parametrize(
    "text", ["", "{}", "[" * 9_999, '{"model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}']
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(text: str, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be read"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_that_fails_on_a_text_is_one_line() -> None:
    def fails(*given: object, **options: object) -> None:
        raise Exception("no token for what is unknown")

    with pytest.raises(InputError, match=r"the tokenizer fails on these texts .no token"):
        encode(fails, ["a"])


def test_tokens_beyond_a_table_are_refused() -> None:
    check_ids(int(np.int32(299)), 300, "m")
    with pytest.raises(InputError, match="makes the token 300 from these texts, but its embedding table has 300 rows"):
        check_ids(300, 300, "m")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 // 0 }}", "division"),
        ("{% for a in range(10**9) %}{% endfor %}", "may never end"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "may never end"),
        ("{% if", "refuses a conversation"),
        ("", "remove the whole answer"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "remove the whole answer"),
    ],
)
def test_a_template_that_fails_or_writes_nothing_is_one_line(template: str, said: str, tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(template or "{# nothing #}")
    with pytest.raises(InputError, match=said):
        Renderer(tmp_path).render([single_turn("Who?", "The miller.")])
