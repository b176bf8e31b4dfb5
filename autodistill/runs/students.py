"""Trained students on disk: a float32 folder for each trial, which transformers loads."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from autodistill.errors import DamagedError
from autodistill.runs.events import RunEvent, RungReached, StudentKept
from autodistill.runs.results.row import Row
from autodistill.utils.checksums import check_list
from autodistill.utils.storage import Storage


def kept_after(row: Row) -> int | None:
    """Return the tokens after which the student of a row is kept, or None if the row has full fidelity."""
    return None if row.full else row.train_tokens


def student_folder(trial: Path, tokens: int | None = None) -> Path:
    """Return the folder of a trial's float32 student at full fidelity, or as judged at a rung after `tokens` tokens."""
    return trial / ("student" if tokens is None else f"student-{tokens}")


def student_key(trial: Path, tokens: int | None = None) -> str:
    """Return the key under which a storage keeps a student."""
    return f"students/{trial.name}" + ("" if tokens is None else f"-{tokens}")


def send_student(trial: Path, storage: Storage, tokens: int | None = None) -> None:
    """Send a trial's student to the storage.

    It replaces what an earlier attempt of the trial may have sent, whose tokens or bits may differ.

    Args:
        trial: The trial's folder.
        storage: The run's storage.
        tokens: See `student_folder`.
    """
    storage.replace_folder(student_folder(trial, tokens), student_key(trial, tokens))


def listed(events: Iterable[RunEvent]) -> dict[tuple[str, int | None], str]:
    """Return the hashes of students' lists of files in a run's log, by trial and the tokens of `student_folder`."""
    found: dict[tuple[str, int | None], str] = {}
    for event in events:
        if isinstance(event, RungReached | StudentKept) and event.student is not None:
            found[event.trial, event.tokens if isinstance(event, StudentKept) else None] = event.student
    return found


def trained_student(trial: Path, storage: Storage | None, tokens: int | None = None, known: str | None = None) -> Path:
    """Return the folder of a student, which may not exist.

    If another node trained the student, or trained it again, it is fetched from the storage. Its files are checked
    against their checksums, if there are any. A damaged copy is fetched once more.

    Args:
        trial: The trial's folder.
        storage: The run's storage, or None.
        tokens: See `student_folder`.
        known: The student's hash from `listed`, or None.

    Raises:
        DamagedError: The files are not as they were written.
    """
    folder, key = student_folder(trial, tokens), student_key(trial, tokens)
    stored = storage is not None and storage.has_folder(key)
    for last in (False, True):
        if storage is not None and stored:
            storage.fetch_folder(key, folder)
        if not folder.is_dir():
            return folder
        try:
            check_list(folder, known)
        except DamagedError:
            if last or not stored:
                raise
            shutil.rmtree(folder)
        else:
            break
    return folder


def has_student(trial: Path, storage: Storage | None, tokens: int | None = None) -> bool:
    """Return whether a trial's student is on this machine or on the storage."""
    if student_folder(trial, tokens).is_dir():
        return True
    return storage is not None and storage.has_folder(student_key(trial, tokens))


def student_bytes(checkpoints: Path, storage: Storage | None) -> dict[str, int]:
    """Return the bytes of each student of full fidelity in a run, by trial.

    Args:
        checkpoints: The run's folder of trained weights.
        storage: The run's storage, or None. If there is one, only the students on it are counted.
    """
    if storage is not None:
        found: Counter[str] = Counter()
        for key, size in storage.list("students").items():
            trial = key.split("/")[1]
            # The key of a student that was kept before the end has its tokens after a dash.
            if "-" not in trial:
                found[trial] += size
        return dict(found)
    folders = [folder for folder in checkpoints.glob("*/student") if folder.is_dir()]
    return {folder.parent.name: sum(file.stat().st_size for file in folder.iterdir()) for folder in sorted(folders)}


def remove_student(trial: Path, storage: Storage | None) -> None:
    """Remove a trial's student of full fidelity from this machine and the storage, without ever leaving a part of it.

    Args:
        trial: The trial's folder.
        storage: The run's storage, or None.
    """
    if storage is not None:
        storage.remove_folder(student_key(trial))
    folder, gone = student_folder(trial), trial / ".student.removed"
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(FileNotFoundError):
        os.replace(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)
