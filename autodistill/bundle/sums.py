"""The list of checksums of a bundle, in the format of `sha256sum -c`, and the check of a bundle against it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from autodistill.errors import DamagedError, InputError
from autodistill.utils.hashing import file_hash
from autodistill.utils.input_files import read_file

FILE = "SHA256SUMS"
_MOST_BYTES = 4_000_000
_LINE = re.compile(r"(?P<digest>[0-9a-f]{64}) [ *](?P<name>[^\\]+)\Z")


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The result of checking files against their checksums.

    Attributes:
        files: Number of files that are as they were written.
        other_files: Names of files that do not belong to the bundle, for example a key that somebody put there.
    """

    files: int
    other_files: tuple[str, ...]


def write_sums(folder: Path) -> None:
    """Write the list of all files of a folder, by name."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    lines = (f"{file_hash(folder / name)}  {name}\n" for name in names if name != FILE)
    (folder / FILE).write_text("".join(lines), encoding="utf-8")


def check_sums(folder: Path) -> Checked:
    """Check every file of a bundle against its checksum.

    Args:
        folder: The bundle, which may come from anywhere.

    Raises:
        InputError: There is no list, or the list is malformed.
        DamagedError: A file is missing or altered. The message names the first one.
    """
    path = folder / FILE
    if not path.is_file():
        raise InputError(f"{folder} has no {FILE}: name a folder that autodistill bundle wrote")
    known: dict[str, str] = {}
    for number, line in enumerate(read_file(path, _MOST_BYTES).decode("utf-8", "replace").splitlines(), start=1):
        found = _LINE.match(line)
        if found is None or not _inside(found["name"]):
            raise InputError(f"line {number} of {path} is no checksum of a file of the bundle")
        known[found["name"]] = found["digest"]
    if not known:
        raise InputError(f"{path} names no file")
    for name, digest in known.items():
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"{file} is missing")
        try:
            same = file_hash(file) == digest
        except OSError as error:
            raise DamagedError(f"{file} cannot be read: {error.strerror}") from error
        if not same:
            raise DamagedError(f"{file} has changed since it was written: its checksum differs")
    present = (one.relative_to(folder).as_posix() for one in folder.rglob("*") if one.is_file())
    return Checked(files=len(known), other_files=tuple(sorted(set(present) - {*known, FILE})))


def _inside(name: str) -> bool:
    """Return whether a name refers to a file below the folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts
