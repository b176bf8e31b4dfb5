"""Parts of a page as HTML, with everything that is not the page's own text escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import zip_longest
from typing import Any, NamedTuple

_LONG = 24  # characters: a longer cell is made wide enough for several words in a line


class Cell(NamedTuple):
    """A cell of a table: its text, the number by which it is sorted, and whether it is a command."""

    text: str
    number: float | None = None
    command: bool = False


def text(value: Any) -> str:
    """Return a value as text of a page."""
    return escape(str(value))


def section(name: str, title: str, *parts: str) -> str:
    """Return a section with its heading, or "" if it has no part."""
    held = "".join(part for part in parts if part)
    if not held:
        return ""
    return f'<section id="{escape(name)}"><h2>{text(title)}</h2>{held}</section>'


def paragraph(value: Any) -> str:
    """Return a paragraph, or "" if there is no text."""
    return f"<p>{text(value)}</p>" if value else ""


def items(values: Iterable[Any]) -> str:
    """Return a list, or "" if there are no values."""
    lines = "".join(f"<li>{text(value)}</li>" for value in values)
    return f"<ul>{lines}</ul>" if lines else ""


def pairs(label: str, values: Mapping[str, Any]) -> str:
    """Return names and values as a table of two columns, or "" if there are none."""
    lines = "".join(f"<tr><th scope=row>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in values.items())
    return _scrolled(label, f"<table>{lines}</table>") if lines else ""


def table(
    label: str, titles: Sequence[str], lines: Iterable[Sequence[Any]], name: str = "", fits: Sequence[bool] = ()
) -> str:
    """Return a table, or "" if it has no lines.

    Args:
        label: What the table holds, for screen readers.
        titles: Titles of the columns.
        lines: Lines of cells, each a `Cell` or a text.
        name: The table's id. A table with an id can be sorted.
        fits: For each line, whether its student is within the budget, if lines can be filtered by that.
    """
    marks = [' data-fits="yes"' if one else ' data-fits="no"' for one in fits]
    rows = "".join(
        f"<tr{mark}>{''.join(map(_cell, line))}</tr>" for line, mark in zip_longest(lines, marks, fillvalue="")
    )
    if not rows:
        return ""
    head = "".join(_title(title, sortable=bool(name)) for title in titles)
    opened = f'<table id="{escape(name)}">' if name else "<table>"
    return _scrolled(label, f"{opened}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>")


def data(name: str, value: Any) -> str:
    """Return plain data for the page's program, in a script element that no browser runs."""
    # Escaping "<" is enough: "</script" would end the element, and "<!--" would hide its end.
    said = json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="{escape(name)}">{said}</script>'


def _title(title: str, *, sortable: bool) -> str:
    inside = (
        f'<button type="button">{text(title)}<span aria-hidden="true"></span></button>' if sortable else text(title)
    )
    return f"<th scope=col>{inside}</th>"


def _cell(value: Any) -> str:
    if not isinstance(value, Cell):
        return f"<td{' class=long' if len(str(value)) > _LONG else ''}>{text(value)}</td>"
    shown = f"<code>{text(value.text)}</code>" if value.command else text(value.text)
    number = "" if value.number is None else f' data-n="{value.number!r}"'
    return f"<td{number}>{shown}</td>"


def _scrolled(label: str, inside: str) -> str:
    """Return a part that scrolls by itself if it is wider than the page, also with the keyboard."""
    return f'<div class=wide role=region tabindex=0 aria-label="{escape(label)}">{inside}</div>'
