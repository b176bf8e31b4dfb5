"""General text is cut so that every document is used once before any is used twice."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from autodistill.data.documents import resolve_data
from autodistill.data.general_text import PACKAGED, general_sequences, resolve_general
from autodistill.data.tokenization import load_tokenizer
from autodistill.errors import InputError
from autodistill.testing import save_tiny_teacher


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_teacher(tmp_path_factory.mktemp("teacher") / "teacher", layers=2)


def test_the_text_that_ships_is_of_many_subjects_and_none_of_the_default_data(teacher: Path) -> None:
    source = resolve_general(PACKAGED)
    texts = [str(text) for text in source.documents]
    assert len(set(texts)) == 63
    assert source.license
    # Each is long enough for a sequence: a token of a large vocabulary is about four bytes of English.
    assert min(len(text.encode()) for text in texts) > 500
    # The first two dozen include code, a language other than English, and prose.
    first = texts[:24]
    assert any("{\n" in text for text in first)
    assert any(re.search("[ãçéüñ]", text) for text in first)
    assert any("lighthouse keeper" in text for text in first)
    shown = set(map(str, resolve_data("pydoc").documents))
    assert not shown & set(map(str, source.documents))


def test_every_document_has_a_sequence_before_any_has_two(teacher: Path, tmp_path: Path) -> None:
    for name, words in (("a", 300), ("b", 90), ("c", 5)):
        (tmp_path / f"{name}.txt").write_text(" ".join(f"{name}{number}" for number in range(words)))
    source = resolve_general(str(tmp_path))
    found = general_sequences(source, teacher, 32, 32 * 5)
    assert found is not None
    assert found.tokens.shape == found.documents.shape == (5, 32)
    assert found.documents[:, 0].tolist()[:2] == [0, 1]
    # Computed with the tokenizer itself: the first sequence of the second document, and the second of the first.
    tokenizer = load_tokenizer(teacher)
    for row, (place, start) in enumerate([(0, 0), (1, 0), (0, 32)]):
        ids = tokenizer(str(source.documents[place]), add_special_tokens=False)["input_ids"]
        assert found.tokens[row].tolist() == ids[start : start + 32]
    assert (np.diff(found.documents, axis=1) == 0).all()
    (tmp_path / "short").mkdir()
    (tmp_path / "short" / "d.txt").write_text("too short")
    assert general_sequences(resolve_general(str(tmp_path / "short")), teacher, 64, 1000) is None


def test_conversations_are_no_general_text(tmp_path: Path) -> None:
    (tmp_path / "chat.jsonl").write_text('{"prompt": "hello", "response": "hello"}\n')
    with pytest.raises(InputError, match="--general-text is plain text"):
        resolve_general(str(tmp_path / "chat.jsonl"))
    with pytest.raises(InputError, match="there is no data at"):
        resolve_general(str(tmp_path / "none.txt"))
