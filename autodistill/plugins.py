"""Names to plug-ins by entry point; an unknown or a doubled name raises and lists the known ones."""

from __future__ import annotations

import sys
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

from autodistill.errors import InputError

Kind = Literal["evaluators", "exporters"]


def names(kind: Kind) -> tuple[str, ...]:
    """Names of all installed plug-ins of a kind, sorted."""
    return tuple(sorted({entry.name for entry in _entries(kind, tuple(sys.path))}))


def load(kind: Kind, name: str) -> Any:
    """Makes the plug-in of a name, of whatever type: `load_evaluator` and `load_exporter` say which.

    Args:
        kind: "evaluators" or "exporters": the entry-point group `autodistill.` followed by it.
        name: As declared.

    Raises:
        InputError: No plug-in of this name (the message lists the known ones), two distributions that declare it, or
            one that cannot be imported.
    """
    found = [entry for entry in _entries(kind, tuple(sys.path)) if entry.name == name]
    if not found:
        raise InputError(f"there is no {kind[:-1]} {name!r}; the {kind} are {', '.join(names(kind)) or 'none'}")
    if len(found) > 1:
        owners = " and ".join(sorted(_owner(entry) for entry in found))
        raise InputError(f"the {kind[:-1]} {name!r} is declared by {owners}: uninstall all but one of them")
    try:
        plugin = found[0].load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"the {kind[:-1]} {name!r} of {_owner(found[0])} cannot be loaded: {error}") from error
    return plugin()


# Reading every distribution's metadata takes longer than most evaluations, so it is done once for each search path.
@lru_cache(maxsize=8)
def _entries(kind: Kind, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=f"autodistill.{kind}"))


def _owner(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value
