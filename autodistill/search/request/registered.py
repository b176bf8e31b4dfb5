"""Divergences and evaluators that are registered in a Python session: checked, and recorded by hash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from autodistill import plugins
from autodistill.distillation.losses.divergence import check_divergence
from autodistill.errors import InputError
from autodistill.strategy.divergence import Divergence, get_divergence

_HOW: Mapping[plugins.Kind, str] = {"divergences": "register_divergence", "evaluators": "evaluators="}


def sources(kind: plugins.Kind, used: Iterable[str]) -> dict[str, str]:
    """Return the hashes of the source code of those that are registered, by name."""
    known = plugins.registered(kind)
    return {name: known[name].source for name in sorted(set(used)) if name in known}


def check_again(before: Mapping[str, Any], to: Literal["resume", "reproduce"]) -> None:
    """Refuse to go on with a run whose registered objects are not registered now, or are others.

    Args:
        before: What the run asked for, as its `search.json` has it: names and hashes of source.
        to: What is to be done with the run, or with a row of it.

    Raises:
        InputError: Names the first one that is not the same.
    """
    kinds: tuple[plugins.Kind, ...] = ("divergences", "evaluators")
    for kind in kinds:
        now = plugins.registered(kind)
        for name, source in before.get(kind, {}).items():
            if not source:  # it is installed
                continue
            said = f"the run used the {kind[:-1]} {name!r} of a Python session (source {source})"
            if name not in now:
                raise InputError(f"{said}: {_how(kind, to)}")
            if now[name].source != source:
                instead = ", or start a new run under another name" if to == "resume" else ""
                raise InputError(
                    f"{said}, and the one given now has another source ({now[name].source}): give the same one{instead}"
                )


def _how(kind: plugins.Kind, to: Literal["resume", "reproduce"]) -> str:
    """Return how a person gives the same object again."""
    if to == "resume":
        return f"resume it from Python, with the same one given again by {_HOW[kind]}"
    return f"reproduce its rows from Python by Run.reproduce, with the same one given again by register_{kind[:-1]}"


def check_divergences(used: Iterable[str]) -> tuple[Divergence, ...]:
    """Try all divergences that a search may use, and return those that its workers must register.

    Raises:
        InputError: There is none of a name, or it does not work.
    """
    found = [get_divergence(name) for name in used]
    for one in found:
        check_divergence(one)
    here = plugins.registered("divergences")
    return tuple(one for one in found if one.name in here)
