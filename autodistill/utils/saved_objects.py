"""Objects in memory, each saved once under the hash of its content, so that a path can refer to it."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from autodistill.errors import DamagedError
from autodistill.utils.checksums import check_list, write_list
from autodistill.utils.durable import put
from autodistill.utils.file_locks import alone


def saved_once(cache: Path, key: str, name: str, save: Callable[[Path], None]) -> Path:
    """Returns where an object is saved; it is saved anew only where it is not there whole, by its checksums.

    Args:
        cache: Folder of everything that later searches may use again.
        key: Hash of the object's content.
        name: Of its file or folder.
        save: Writes it to a path of that name.
    """
    folder = (cache / "objects" / key).resolve()
    with alone(folder):
        with suppress(DamagedError):
            if check_list(folder):
                return folder / name
        temporary = folder.with_name(f".{key}-{uuid.uuid4().hex}")
        temporary.mkdir()
        try:
            save(temporary / name)
            write_list(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            put(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder / name
