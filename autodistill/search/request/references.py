"""References to models, texts and files that a run stores, so that it finds them from every working folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autodistill.data.documents import check_data_reference
from autodistill.data.general_text import PACKAGED
from autodistill.distillation.teacher.resolve import locate
from autodistill.errors import InputError
from autodistill.options import DEFAULT_DATA, DEFAULT_TEACHER
from autodistill.strategy.named import is_file
from autodistill.strategy.space import Space

_NAMES = (DEFAULT_TEACHER, DEFAULT_DATA, PACKAGED)


def absolute(reference: str, folder: str = "") -> str:
    """Return a reference that means the same in every working folder.

    Files and folders become absolute paths. Hub ids, and models and texts that have a name of their own, stay as they
    are.

    Args:
        reference: The reference.
        folder: The folder that a relative path is relative to. By default the working folder.
    """
    path = os.path.join(folder, os.path.expanduser(reference))
    if reference in ("", *_NAMES) or not os.path.exists(path):
        return reference
    return os.path.abspath(path)


def absolute_file(reference: str | Path) -> str:
    """Return the name of a space or strategy as it is, and the file of one as an absolute path."""
    return absolute(str(reference)) if is_file(reference) else str(reference)


def with_models(space: Space, folder: str) -> Space:
    """Return a space whose pretrained models are given by absolute paths, or by their ids on a hub.

    Args:
        space: The space.
        folder: See `absolute`.
    """

    def read(data: Any, key: str) -> Any:
        if isinstance(data, Mapping):
            return {name: read(value, key if key == "init.model" else name) for name, value in data.items()}
        if isinstance(data, list | tuple):
            return [read(item, key) for item in data]
        return absolute(data, folder) if key in ("model", "init.model") and isinstance(data, str) else data

    return Space.from_json(read(space.to_json(), "")) if space.models else space


def is_gone(reference: str, what: str = "teacher") -> bool:
    """Return whether a stored reference is a path at which nothing is any more.

    Args:
        reference: The reference.
        what: What it refers to. The forms of "data" and "general text" are those of data, others' those of a model.
    """
    if reference in _NAMES or os.path.exists(os.path.expanduser(reference)):
        return False
    try:
        (check_data_reference if what in ("data", "general text") else locate)(reference)
    except InputError:
        return True
    return False


def check_there(reference: str, what: str, option: str = "") -> None:
    """Refuse a reference of a run if what it names was moved away.

    Args:
        reference: The stored reference.
        what: What it refers to.
        option: The option that says where it is now, or "" if there is none.

    Raises:
        InputError: Nothing is there any more.
    """
    if is_gone(reference, what):
        remedy = f"give it by {option}, wherever it lies now" if option else "put it back, or a link to it"
        raise InputError(f"the run's {what} is not at {reference}: {remedy}")


def with_teacher(settings: dict[str, Any], teacher: str | Path | None) -> dict[str, Any]:
    """Return the settings of a run with the place of its teacher, if that was moved."""
    moved = {} if teacher is None else {"reference": absolute(str(teacher))}
    return {**settings, "teacher": {**settings["teacher"], **moved}}
