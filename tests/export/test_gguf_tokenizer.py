"""The tokenizer that llama.cpp is told of."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import gguf
import pytest
from transformers import AutoTokenizer

from autodistill.errors import InputError
from autodistill.export.gguf_tokenizer import add_tokenizer, guess_pre_tokenizer
from autodistill.testing import save_tiny_teacher, tiny_tokenizer

LLAMA3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
QWEN2 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+"


def written(folder: Path, path: Path, vocabulary: int = 300) -> dict[str, object]:
    writer = gguf.GGUFWriter(path, "llama")
    add_tokenizer(writer, folder, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    return {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_tokens_types_and_merges(folder: Path, tmp_path: Path) -> None:
    keys = written(folder, tmp_path / "t.gguf", vocabulary=304)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens, kinds = keys["tokenizer.ggml.tokens"], keys["tokenizer.ggml.token_type"]
    assert isinstance(tokens, list)
    assert tokens[:300] == tokenizer.convert_ids_to_tokens(list(range(300)))
    assert tokens[300:] == ["[PAD300]", "[PAD301]", "[PAD302]", "[PAD303]"]
    assert kinds == [3] * 3 + [1] * 297 + [5] * 4  # control, normal, unused
    merges = json.loads((folder / "tokenizer.json").read_text())["model"]["merges"]
    assert keys["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="300 tokens"):
        written(folder, tmp_path / "t.gguf", vocabulary=299)


def test_what_a_gguf_teacher_said_holds(folder: Path, tmp_path: Path) -> None:
    inherited = {"pre": "smollm", "model": "gpt2", "add_bos_token": True, "eos_token_id": 2, "unknown_token_id": 0}
    (folder / "gguf_tokenizer.json").write_text(json.dumps(inherited))
    keys = written(folder, tmp_path / "t.gguf")
    for key, value in inherited.items():
        assert keys[f"tokenizer.ggml.{key}"] == value
    assert keys["tokenizer.ggml.bos_token_id"] == 0


def test_the_chat_template_is_taken_along(folder: Path, tmp_path: Path) -> None:
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    assert written(folder, tmp_path / "t.gguf")["tokenizer.chat_template"] == template


@pytest.mark.parametrize(
    ("description", "name"),
    [
        (None, "gpt-2"),
        ({"type": "ByteLevel", "use_regex": True}, "gpt-2"),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]}, "smollm"),
        (
            {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex": LLAMA3}}]},
            "llama-bpe",
        ),
        ({"type": "Split", "pattern": {"Regex": QWEN2}}, "qwen2"),
    ],
)
def test_known_ways_to_cut_text(description: dict[str, object] | None, name: str) -> None:
    assert guess_pre_tokenizer(description) == name


def test_an_unknown_way_to_cut_text_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert guess_pre_tokenizer({"type": "Split", "pattern": {"Regex": r"\w+"}}) == "default"
    assert "not known" in caplog.text


def test_other_kinds_of_tokenizer_are_refused(tmp_path: Path) -> None:
    teacher = save_tiny_teacher(tmp_path / "teacher", layers=1)
    path = teacher / "tokenizer.json"
    description = json.loads(path.read_text())
    description["decoder"] = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}]}
    path.write_text(json.dumps(description))
    with pytest.raises(InputError, match="byte-level BPE"):
        written(teacher, tmp_path / "t.gguf")
    path.unlink()
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        written(teacher, tmp_path / "t.gguf")
