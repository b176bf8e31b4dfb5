"""Print a result on stdout, as text or as one JSON document, also if an error ended the work."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

from autodistill.advisor.merged import Board, explain_split
from autodistill.cli.commands import Boards, Merged
from autodistill.cli.streams import stdout_reserved, terminal_width
from autodistill.cli.summary import headline
from autodistill.cli.tables import leaderboard_table, wrapped
from autodistill.errors import AutoDistillError, InputError, InterruptedSearchError
from autodistill.utils.json_files import strict_json
from autodistill.utils.process_exit import ended_by, replying

T = TypeVar("T")
# Errors of the operating system for paths that cannot be used as the file or folder that was named.
_NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EEXIST)


def show(as_json: bool, work: Callable[[], T], document: Callable[[T], Any], text: Callable[[T], str]) -> T:
    """Do the work with stdout reserved, and print its result there. With JSON, also print the error that ended it."""
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
    """Return an error's message and exit code. The traceback of an unexpected error goes to stderr."""
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
    """Return the characters of a line: from COLUMNS, or the terminal on stdout, or else 120. The minimum is 80."""
    told = os.environ.get("COLUMNS", "")
    return max(80, int(told) if told.isdecimal() and int(told) else terminal_width() or 120)


def table_width() -> int | None:
    """Return the characters of a line of a table. None means no terminal: a program reads, and gets every column."""
    return None if terminal_width() is None else line_width()


def rows(boards: Boards | Merged) -> list[dict[str, Any]]:
    """Return leaderboards as plain data. Merged ones have the number of their table."""
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
    """Return leaderboards as text for a person."""
    if isinstance(boards, Merged):
        said = explain_split(boards.boards)
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
    """Return paths by name, one a line."""
    return "\n".join(f"{name}: {path}" for name, path in paths.items())


def bundle_text(document: dict[str, Any]) -> str:
    """Return text about what `bundle` did."""
    if "whole" in document:
        others = f"; not of the bundle: {', '.join(document['others'])}" if document["others"] else ""
        return f"{document['bundle']}: its {document['whole']} files are as they were written{others}"
    return (
        f"{document['bundle']}: {len(document['files'])} files for {document['student']} in {document['runtime']}; "
        "README.md says how it is started"
    )


def packaged_text(document: dict[str, Any]) -> str:
    """Return the YAML of one packaged space or strategy, or the list of all of them with descriptions."""
    if "yaml" in document:
        return str(document["yaml"]).rstrip()
    known = document["known"]
    return "\n".join(line for name, about in known.items() for line in wrapped(f"{name}: {about}", line_width()))
