"""A Markdown parser reads text that `plain` and `fenced` put into a page as the same letters."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
from markdown_it import MarkdownIt

from autodistill.runs.markdown import fenced, paragraph, plain

PARSER = MarkdownIt("commonmark", {"html": True}).enable("table")
SIGNS = st.text(st.sampled_from("ab1 \\`*_[]()<>&#!|~+-.:;/\n\t'\"é"), max_size=30)


def read(text: str) -> str:
    """Return the letters of a page's only paragraph, which must have no markup."""
    opened, inline, closed = PARSER.parse(text)
    assert (opened.type, closed.type) == ("paragraph_open", "paragraph_close")
    assert {child.type for child in inline.children or []} <= {"text", "text_special"}
    return "".join(child.content for child in inline.children or [])


@hypothesis.given(SIGNS)
@hypothesis.settings(max_examples=300, deadline=None)
def test_text_stays_what_it_is(text: str) -> None:
    words = " ".join(text.split())
    assert read(f"It is {plain(text)} here") == f"It is {words} here"
    if words:
        assert read(paragraph(text)) == words


@hypothesis.given(SIGNS)
@hypothesis.settings(max_examples=100, deadline=None)
def test_a_cell_holds_it(text: str) -> None:
    tokens = PARSER.parse(f"| a | b |\n| --- | --- |\n| {plain(text)} | end |\n")
    cells = [token for token in tokens if token.type == "inline"]
    assert len(cells) == 4
    assert {child.type for child in cells[2].children or []} <= {"text", "text_special"}


@pytest.mark.parametrize("text", ["a", "```\nb", "````\n<b>\n```", ""])
def test_a_fence_ends_where_it_is_to(text: str) -> None:
    (fence, after, *_) = PARSER.parse(f"{fenced(text, 'json')}\n\nafter\n")
    assert (fence.type, fence.info, fence.content.rstrip("\n")) == ("fence", "json", text)
    assert after.type == "paragraph_open"
