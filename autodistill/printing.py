"""A result on stdout, as text or as one JSON document, also where an error ended the work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

from autodistill.calls import Boards
from autodistill.console import leaderboard_table
from autodistill.errors import AutoDistillError
from autodistill.options import Format
from autodistill.records.json_files import strict_json
from autodistill.streams import stdout_reserved

T = TypeVar("T")


def show(output: Format, work: Callable[[], T], document: Callable[[T], Any], text: Callable[[T], str]) -> T:
    """Does the work with stdout held free, and prints its result there; with JSON also the error that ended it."""
    try:
        with stdout_reserved():
            result = work()
            shown = _dumps(document(result)) if output is Format.JSON else text(result)
    except AutoDistillError as error:
        if output is Format.JSON:
            print(_dumps({"error": str(error), "exit_code": error.exit_code}), flush=True)
        raise
    print(shown, flush=True)
    return result


def _dumps(document: Any) -> str:
    strict = [strict_json(item) for item in document] if isinstance(document, list) else strict_json(document)
    return json.dumps(strict, indent=2, allow_nan=False)


def line_width() -> int:
    """Characters of a line: the terminal's, where stdout is one that is wide enough."""
    return max(100, shutil.get_terminal_size((120, 24)).columns)


def rows(boards: Boards) -> list[dict[str, Any]]:
    """Leaderboards as plain data."""
    return [
        {"run": name, "place": one.place, "tied": one.tied, "front": one.front, **one.row.to_json()}
        for name, (ranked, _) in boards
        for one in ranked
    ]


def tables(boards: Boards) -> str:
    """Leaderboards for a person."""
    return "\n\n".join(
        f"{name}\n{leaderboard_table(ranked, metric, line_width())}" for name, (ranked, metric) in boards
    )


def lines(paths: dict[str, str]) -> str:
    """Paths by name, one a line."""
    return "\n".join(f"{name}: {path}" for name, path in paths.items())
