"""A result on stdout, as text or as one JSON document, also where an error ended the work."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from typing import Any, TypeVar

from autodistill.cli.commands import Boards
from autodistill.cli.streams import stdout_reserved
from autodistill.cli.summary import headline
from autodistill.cli.tables import leaderboard_table, wrapped
from autodistill.errors import AutoDistillError, InputError, InterruptedSearchError
from autodistill.utils.json_files import strict_json
from autodistill.utils.process_exit import ended_by, replying

T = TypeVar("T")
# What a path is told that no file or folder can have, wherever it is met first.
_NO_PATH = (errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP, errno.EISDIR, errno.EEXIST)


def show(as_json: bool, work: Callable[[], T], document: Callable[[T], Any], text: Callable[[T], str]) -> T:
    """Does the work with stdout held free, and prints its result there; with JSON also the error that ended it."""
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
    """What ended the work, and the exit code that it leads to; what nobody foresaw has its traceback on stderr."""
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
    """Characters of a line: the terminal's where stdout is one, but no fewer than 80."""
    return max(80, shutil.get_terminal_size((120, 24)).columns)


def rows(boards: Boards) -> list[dict[str, Any]]:
    """Leaderboards as plain data."""
    return [
        {"run": run.name, "place": one.place, "tied": one.tied, "front": one.front, **one.row.to_json()}
        for run, (ranked, _) in boards
        for one in ranked
    ]


def tables(boards: Boards) -> str:
    """Leaderboards for a person."""
    return "\n\n".join(
        "\n".join([*wrapped(headline(run), line_width()), leaderboard_table(ranked, metric, line_width())])
        for run, (ranked, metric) in boards
    )


def lines(paths: dict[str, str]) -> str:
    """Paths by name, one a line."""
    return "\n".join(f"{name}: {path}" for name, path in paths.items())


def packaged_text(document: dict[str, Any]) -> str:
    """The text of a packaged space or strategy, or all of them, each with what it is."""
    if "yaml" in document:
        return str(document["yaml"]).rstrip()
    known = document["known"]
    return "\n".join(line for name, about in known.items() for line in wrapped(f"{name}: {about}", line_width()))
