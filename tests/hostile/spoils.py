"""Ways to spoil a file of a valid folder, for several areas."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

Spoil = Callable[[Path], object]


def write(folder: Path, file: str, content: bytes) -> None:
    """Write other bytes into a file."""
    (folder / file).write_bytes(content)


def without(folder: Path, file: str) -> None:
    """Remove a file."""
    (folder / file).unlink()


def as_folder(folder: Path, file: str) -> None:
    """Put a folder in place of a file."""
    without(folder, file)
    (folder / file).mkdir()


def as_pipe(folder: Path, file: str) -> None:
    """Put a pipe that nobody writes to in place of a file."""
    without(folder, file)
    os.mkfifo(folder / file)


def paths(value: Any, depth: int, before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the path of each field of an object, including nested ones, down to `depth` levels."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (*before, key)
        if len(before) + 1 < depth:
            yield from paths(inner, depth, (*before, key))


def change(
    folder: Path, file: str, path: Sequence[str], value: Any = None, lost: bool = False, line: int | None = None
) -> None:
    """Set or remove a field of a JSON document. `line` is the document's line; by default it is the whole file."""
    text = (folder / file).read_text()
    lines = [text] if line is None else text.splitlines()
    document = json.loads(lines[line or 0])
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    if lost:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    lines[line or 0] = json.dumps(document)
    (folder / file).write_text("\n".join(lines) + "\n")
