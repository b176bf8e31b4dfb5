"""What is said of loaded data before a search is planned."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autodistill.conversations import asked
from autodistill.data import prepare
from autodistill.documents import Source
from autodistill.errors import InputError
from autodistill.search.prepare import _unasked
from autodistill.testing import tiny_tokenizer
from autodistill.token_sets import load_split


def test_questions_that_no_student_can_be_asked_are_counted_and_all_of_them_refused(tmp_path: Path) -> None:
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    chats = tuple(asked(f"Question {number}: " + "which? " * (number % 2 * 40), "Yes.") for number in range(80))
    source = Source(name="chats", kind="jsonl", documents=chats, licence=None, fingerprint="chats")
    data = prepare(source, tmp_path / "tokenizer", "tiny", 512, tmp_path)
    questions = load_split(data.folder, "validation").questions
    assert questions is not None
    sizes = sorted(len(one.prompt) + one.answer_tokens for one in questions.entries)
    longest, count = sizes[-1], len(sizes)

    def said(context: int, written: str = "exact_match") -> tuple[str, ...]:
        request: Any = SimpleNamespace(budget=SimpleNamespace(context=context))
        checked: Any = SimpleNamespace(request=request, asked=SimpleNamespace(written=written))
        loaded: Any = SimpleNamespace(data=data)
        return _unasked(checked, loaded)

    assert said(longest) == said(1, written="") == ()
    long = sum(size > 100 for size in sizes)
    assert 0 < long < count
    assert said(100) == (
        f"{long} of {count} questions of the validation split do not fit a context of 100 with their answers, and "
        "count as not answered",
    )
    with pytest.raises(InputError, match=f"{count} of {count} questions .* give a larger --context"):
        said(5)
