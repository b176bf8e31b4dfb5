"""Escape foreign text for Markdown pages, so that it never acts as markup."""

from __future__ import annotations

import re
from typing import Any

# Characters that need a backslash to lose their meaning. Underscores within words have no meaning.
_MARKS = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)")
_FENCES = re.compile("`{3,}")


def plain(value: Any) -> str:
    """Return a value as text on one line that cannot end a table's cell and cannot begin markup or HTML."""
    line = " ".join(str(value).split())
    return _MARKS.sub(r"\\\g<0>", line).replace("&", "&amp;").replace("<", "&lt;")


def paragraph(value: Any) -> str:
    """Return a value as `plain` does, for the start of a line, where headings, quotations, lists or rules begin."""
    return re.sub(r"^(\d*)([#>+=.)-])", r"\1\\\2", plain(value))


def fenced(text: str, language: str = "") -> str:
    """Return text as a block of code; no line of the text can end the block."""
    longest = max(map(len, _FENCES.findall(text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
