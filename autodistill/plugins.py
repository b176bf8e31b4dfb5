"""Registry of plug-ins by name, declared by an entry point or registered in this process."""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from types import CodeType
from typing import Any, Literal, NamedTuple, get_args

from autodistill.errors import InputError

Kind = Literal["evaluators", "exporters", "divergences"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""The entry-point groups, without their prefix `autodistill.`."""

_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*")


class Registered(NamedTuple):
    """A plug-in registered in this process, and the hash of its source code at that time."""

    plugin: Any
    source: str


_registered: dict[tuple[Kind, str], Registered] = {}


def names(kind: Kind) -> tuple[str, ...]:
    """Return the sorted names of all plug-ins of a kind, without importing any."""
    declared = {entry.name for entry in _entries(kind, tuple(sys.path))}
    return tuple(sorted(declared | set(registered(kind))))


def foreign_names(kind: Kind) -> tuple[str, ...]:
    """Return the sorted names of all plug-ins of a kind that are not this project's own, without importing any."""
    own = {entry.name for entry in _entries(kind, tuple(sys.path)) if entry.module.startswith("autodistill.")}
    return tuple(name for name in names(kind) if name not in own)


def load(kind: Kind, name: str) -> Any:
    """Return the plug-in of a name. If its entry point is a class, return an instance made without arguments.

    The result has no static type: `load_evaluator`, `load_exporter` and `get_divergence` add it.

    Args:
        kind: The entry-point group without its prefix `autodistill.`.
        name: The declared or registered name.

    Raises:
        InputError: No plug-in has this name (the message lists the known ones), two distributions declare it, or it
            cannot be imported.
    """
    if (kind, name) in _registered:
        return _registered[kind, name].plugin
    plugin = _imported(kind, name, tuple(sys.path))
    return plugin() if isinstance(plugin, type) else plugin


def register(kind: Kind, name: str, plugin: Any, *, written_as: Any = None) -> None:
    """Register a plug-in in this process. It replaces a registered plug-in of the same name.

    Args:
        kind, name: See `load`.
        plugin: The object that `load` returns.
        written_as: The function or object whose source is hashed, if it is not the plug-in itself.

    Raises:
        InputError: The name is invalid, or an installed plug-in has it.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InputError(f"{name!r} is no name of {_one(kind)}: write small letters, digits, '_', '-' and '.'")
    owner = next((entry for entry in _entries(kind, tuple(sys.path)) if entry.name == name), None)
    if owner is not None:
        raise InputError(f"{_owner(owner)} has {_one(kind)} {name!r} already: choose another name")
    _registered[kind, name] = Registered(plugin, source_hash(plugin if written_as is None else written_as))


def registered(kind: Kind) -> Mapping[str, Registered]:
    """Return the plug-ins of a kind that were registered in this process, by name."""
    return {name: found for (of, name), found in _registered.items() if of == kind}


def forget(kind: Kind, name: str) -> None:
    """Remove a registered plug-in, if there is one of this name."""
    _registered.pop((kind, name), None)


def source_hash(plugin: Any) -> str:
    """Return a hash of the source code of a function, or of an object's class, and of the values it was made with.

    These values are the variables that the function closes over, or the object's attributes. If there is no source,
    for example for code typed into a plain interpreter, the compiled code is hashed instead.
    """
    coded = plugin if inspect.isroutine(plugin) or isinstance(plugin, type) else type(plugin)
    try:
        source: Any = inspect.getsource(coded)
    except (OSError, TypeError):
        source = [_compiled(one) for one in _functions(coded)]
    cells = getattr(plugin, "__closure__", None) or ()
    values = [cell.cell_contents for cell in cells] if coded is plugin else getattr(plugin, "__dict__", {})
    made_with = json.loads(json.dumps(values, default=lambda value: type(value).__qualname__, skipkeys=True))
    return hashlib.sha256(json.dumps([source, made_with], sort_keys=True).encode()).hexdigest()[:12]


def _functions(coded: Any) -> list[Any]:
    found = vars(coded).values() if isinstance(coded, type) else [coded]
    return [one for one in found if hasattr(one, "__code__")]


def _compiled(function: Any) -> list[Any]:
    def plain(code: CodeType) -> list[Any]:
        inner = [plain(one) if isinstance(one, CodeType) else repr(one) for one in code.co_consts]
        return [code.co_code.hex(), inner, list(code.co_names)]

    return plain(function.__code__)


@lru_cache(maxsize=64)
def _imported(kind: Kind, name: str, path: tuple[str, ...]) -> Any:
    found = [entry for entry in _entries(kind, path) if entry.name == name]
    if not found:
        raise InputError(f"there is no {kind[:-1]} {name!r}; the {kind} are {', '.join(names(kind)) or 'none'}")
    if len(found) > 1:
        owners = " and ".join(sorted(_owner(entry) for entry in found))
        raise InputError(f"the {kind[:-1]} {name!r} is declared by {owners}: uninstall all but one of them")
    try:
        return found[0].load()
    except (ImportError, AttributeError) as error:
        raise InputError(f"the {kind[:-1]} {name!r} of {_owner(found[0])} cannot be loaded: {error}") from error


# Reading the metadata of all distributions takes longer than most evaluations, so it is cached for each search path.
@lru_cache(maxsize=8)
def _entries(kind: Kind, path: tuple[str, ...]) -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=f"autodistill.{kind}"))


def _owner(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _one(kind: Kind) -> str:
    return f"{'an' if kind[0] in 'aeiou' else 'a'} {kind[:-1]}"
