"""Solutions that `autodistill solve` found, kept by teacher, so that `pick` can name them next to stored students."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict

from autodistill.errors import InputError
from autodistill.utils.file_locks import exclusive
from autodistill.utils.json_files import read_json, write_json
from autodistill.utils.typed_data import check_typed

_MOST = 256  # number of a teacher's newest solutions that are kept


class Solved(TypedDict):
    """A solution for a budget.

    Attributes:
        teacher, data: The names that the user gave.
        budget_bytes, context, batch, on_gpu: What it was solved for.
        name, bytes: The solution's name, and the memory that it takes.
        kl, nll, accuracy: Figures on held-out tokens of the data.
        tokens: Number of these held-out tokens.
    """

    teacher: str
    data: str
    budget_bytes: int
    context: int
    batch: int
    on_gpu: bool
    name: str
    bytes: int
    kl: float
    nll: float
    accuracy: float
    tokens: int


def keep_solved(cache: Path, fingerprint: str, solutions: Iterable[Solved]) -> None:
    """Add solutions to those of a teacher, in place of older ones for the same budget."""
    path = _path(cache, fingerprint)
    with exclusive(path):
        kept = {_asked(one): one for one in _read(path)}
        for one in solutions:
            kept.pop(_asked(one), None)
            kept[_asked(one)] = one
        write_json(path, {"solutions": list(kept.values())[-_MOST:]})


def solved_within(
    cache: Path, fingerprint: str, limit: int, *, context: int, batch: int, on_gpu: bool
) -> Solved | None:
    """Return the stored solution with the least KL that takes no more than a limit, or None. Nothing is solved.

    If there are solutions on several texts, only those on the text of the newest one are compared.

    Args:
        cache: Root folder of caches.
        fingerprint: The teacher's fingerprint.
        limit: Most memory, in bytes.
        context, batch, on_gpu: The load, and whether a discrete GPU serves it.
    """
    alike = [one for one in _read(_path(cache, fingerprint)) if one["bytes"] <= limit]
    alike = [one for one in alike if (one["context"], one["batch"], one["on_gpu"]) == (context, batch, on_gpu)]
    if not alike:
        return None
    text = (alike[-1]["data"], alike[-1]["tokens"])
    return min((one for one in alike if (one["data"], one["tokens"]) == text), key=lambda one: one["kl"])


def _path(cache: Path, fingerprint: str) -> Path:
    return cache / "solve" / "found" / f"{fingerprint}.json"


def _asked(one: Solved) -> tuple[Any, ...]:
    return (one["data"], one["tokens"], one["budget_bytes"], one["context"], one["batch"], one["on_gpu"])


def _read(path: Path) -> list[Solved]:
    """Return the kept solutions, or [] if the file is missing or damaged."""
    if not path.exists():
        return []
    try:
        held: Mapping[str, Any] = read_json(path)
        check_typed(held.get("solutions"), list[Solved], "solutions")
    except InputError:
        return []
    found: list[Solved] = held["solutions"]
    return found
