"""Trained students on disk: float32 folders that transformers loads, kept by trial."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autodistill.storage import Storage
from autodistill.templates import copy_text


def student_folder(trial: Path) -> Path:
    """Where a trial at full fidelity keeps its float32 student."""
    return trial / "student"


def student_key(trial: Path) -> str:
    """Where a storage keeps it."""
    return f"students/{trial.name}"


def trained_student(trial: Path, storage: Storage | None) -> Path:
    """The folder of a student at full fidelity, fetched where another node trained it; it may not be there."""
    folder = student_folder(trial)
    if storage is not None and not folder.is_dir() and has_student(trial, storage):
        storage.fetch_folder(student_key(trial), folder)
    return folder


def has_student(trial: Path, storage: Storage | None) -> bool:
    """Whether a trial's student was kept, here or on the storage."""
    return student_folder(trial).is_dir() or (storage is not None and storage.has_folder(student_key(trial)))


def save_student(model: Any, text: Path, folder: Path) -> None:
    """Writes a model as a transformers folder, with the tokenizer and all else that describes its text.

    Args:
        model: Of transformers.
        text: The teacher's folder, or `data.rendering_folder` of a student that learnt another template.
        folder: To be written.
    """
    model.save_pretrained(folder)
    copy_text(text, folder)
