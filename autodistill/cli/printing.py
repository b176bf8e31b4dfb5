"""A result on stdout, as text or as one JSON document, also where an error ended the work."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

from autodistill.advisor.merged import Board, split_because
from autodistill.cli.commands import Boards, Merged
from autodistill.cli.streams import stdout_reserved, terminal_width
from autodistill.cli.summary import headline
from autodistill.cli.tables import leaderboard_table, wrapped
from autodistill.errors import AutoDistillError, InputError, InterruptedSearchError
from autodistill.utils.json_files import strict_json
from autodistill.utils.process_exit import ended_by, replying

T = TypeVar("T")
# What a path is told that no file or folder can have, wherever it is met first.
_NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EEXIST)


def show(as_json: bool, work: Callable[[], T], document: Callable[[T], Any], text: Callable[[T], str]) -> T:
    """Do the work with stdout held free, and print its result there; with JSON also the error that ended it."""
    with replying(as_json) as reply:
        try:
            with stdout_reserved():
                try:
                    result = work()
                except OSError as error:
                    if error.errno in _NO_PATH and error.filename is not None:
                        raise InputError(f"{error.filename}: {error.strerror}: name another place") from error
                    raise
                shown = _dumps(document(result)) if as_json else text(result)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            reply.give_error(*_told(error))
            raise
        reply.give(shown)
    return result


def _told(error: BaseException) -> tuple[str, int]:
    """Return what ended the work, and the exit code that it leads to; what nobody foresaw has its traceback on
    stderr.
    """
    if isinstance(error, AutoDistillError):
        return str(error), ended_by(error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return "stopped", ended_by(InterruptedSearchError.exit_code)
    if isinstance(error, SystemExit):
        return str(error), error.code if isinstance(error.code, int) else AutoDistillError.exit_code
    return f"{type(error).__name__}: {error}", AutoDistillError.exit_code


def _dumps(document: Any) -> str:
    strict = [strict_json(item) for item in document] if isinstance(document, list) else strict_json(document)
    return json.dumps(strict, indent=2, allow_nan=False)


def line_width() -> int:
    """Characters of a line: what COLUMNS says, or the terminal has that stdout is, or else 120; no fewer than 80."""
    told = os.environ.get("COLUMNS", "")
    return max(80, int(told) if told.isdecimal() and int(told) else terminal_width() or 120)


def table_width() -> int | None:
    """Characters of a line of a table; None where stdout is no terminal, and programs read every column."""
    return None if terminal_width() is None else line_width()


def rows(boards: Boards | Merged) -> list[dict[str, Any]]:
    """Leaderboards as plain data, merged ones with the number of their table."""
    if isinstance(boards, Merged):
        return [
            {"table": number, "metric": board.metric, "on": board.on, "place": one.place, "tied": one.tied}
            | dict(zip(("run", "row_id"), one.row.row_id.split("/", 1), strict=True))
            | {key: value for key, value in one.row.to_json().items() if key != "row_id"}
            for number, board in enumerate(boards.boards, start=1)
            for one in board.ranked
        ]
    return [
        {"run": run.name, "place": one.place, "tied": one.tied, "front": one.front, **one.row.to_json()}
        for run, (ranked, _) in boards
        for one in ranked
    ]


def tables(boards: Boards | Merged) -> str:
    """Leaderboards for a person."""
    if isinstance(boards, Merged):
        said = split_because(boards.boards)
        parts = [*(["\n".join(wrapped(said, line_width()))] if said else []), *map(_board, boards.boards)]
        return "\n\n".join(parts)
    return "\n\n".join(
        "\n".join(
            [
                *wrapped(headline(run), line_width()),
                leaderboard_table(ranked, metric, line_width()) if ranked else "no row yet",
            ]
        )
        for run, (ranked, metric) in boards
    )


def _board(board: Board) -> str:
    runs = ", ".join(board.runs[:8]) + (f" and {len(board.runs) - 8} more" if len(board.runs) > 8 else "")
    shown = f"the best {len(board.ranked)} of {board.count:,} rows" if len(board.ranked) < board.count else "all rows"
    title = (
        f"{board.metric} ({'more' if board.direction == 'max' else 'less'} is better), {board.on}: {shown} of {runs}"
    )
    return "\n".join([*wrapped(title, line_width()), leaderboard_table(board.ranked, board.metric, line_width())])


def lines(paths: dict[str, str]) -> str:
    """Paths by name, one a line."""
    return "\n".join(f"{name}: {path}" for name, path in paths.items())


def bundle_text(document: dict[str, Any]) -> str:
    """Return what `bundle` did, for a person."""
    if "whole" in document:
        others = f"; not of the bundle: {', '.join(document['others'])}" if document["others"] else ""
        return f"{document['bundle']}: its {document['whole']} files are as they were written{others}"
    return (
        f"{document['bundle']}: {len(document['files'])} files for {document['student']} in {document['runtime']}; "
        "README.md says how it is started"
    )


def packaged_text(document: dict[str, Any]) -> str:
    """The text of a packaged space or strategy, or all of them, each with what it is."""
    if "yaml" in document:
        return str(document["yaml"]).rstrip()
    known = document["known"]
    return "\n".join(line for name, about in known.items() for line in wrapped(f"{name}: {about}", line_width()))
