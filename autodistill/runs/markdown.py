"""Text of others' making in Markdown pages: it stays text, whatever it looks like."""

from __future__ import annotations

import re
from typing import Any

# A backslash takes each of these its meaning; underscores within words have none.
_MARKS = re.compile(r"[\\`*\[\]|~]|(?<!\w)_|_(?!\w)")
_FENCES = re.compile("`{3,}")


def plain(value: Any) -> str:
    """A value as text on one line that can neither end a table's cell nor begin markup or HTML of its own."""
    line = " ".join(str(value).split())
    return _MARKS.sub(r"\\\g<0>", line).replace("&", "&amp;").replace("<", "&lt;")


def paragraph(value: Any) -> str:
    """The same at the beginning of a line, where a heading, a quotation, a list or a rule could begin."""
    return re.sub(r"^(\d*)([#>+=.)-])", r"\1\\\2", plain(value))


def fenced(text: str, language: str = "") -> str:
    """Return text as a block of code, which no line of it ends."""
    longest = max(map(len, _FENCES.findall(text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
