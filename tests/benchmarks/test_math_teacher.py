"""The math teacher's tokenizer encodes every record of its task, one token per digit, within a sequence's length."""

from __future__ import annotations

import re
from pathlib import Path

from autodistill.data.chat_template import Renderer
from autodistill.data.reasoning_gym import read_task
from benchmarks.common import math_teacher


def test_records_are_written_whole(tmp_path: Path) -> None:
    renderer = Renderer(math_teacher.new_model(tmp_path / "new"))
    conversations = read_task(re.sub(r"size=\d+", "size=300", math_teacher.TASK)).conversations
    for conversation, record in zip(conversations, renderer.render(conversations), strict=True):
        prompt, answer = (turn.content for turn in conversation.turns)
        assert len(record.tokens) <= math_teacher.LENGTH
        assert renderer.tokenizer.decode(record.tokens) == f"{prompt}\n{answer}</s>"
        learnt = renderer.tokenizer.convert_ids_to_tokens(record.tokens[record.answers])
        assert "".join(learnt) == f"{answer}</s>"
        digits = re.findall(r"\d", prompt + answer)
        assert [token for token in renderer.tokenizer.convert_ids_to_tokens(record.tokens) if token.isdigit()] == digits


def test_the_longest_record_fits() -> None:
    signs = "10 - 99 - 99 =\n10 - 99 = -89\n-89 - 99 = -188\n#### -188</s>"
    text = f"State the final answer to the following arithmetic problem: {signs}"
    tokenizer = math_teacher.math_tokenizer()
    assert len(tokenizer(text)["input_ids"]) == 39 <= math_teacher.LENGTH
