"""Checks of divergences and evaluators that are registered in a Python session, and the hashes that record them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from autodistill import plugins
from autodistill.distillation.losses.divergence import check_divergence
from autodistill.errors import InputError
from autodistill.strategy.divergence import Divergence, get_divergence

_HOW: Mapping[plugins.Kind, str] = {"divergences": "register_divergence", "evaluators": "evaluators="}


def sources(kind: plugins.Kind, used: Iterable[str]) -> dict[str, str]:
    """Return the source hash of each used object that is registered, by name."""
    known = plugins.registered(kind)
    return {name: known[name].source for name in sorted(set(used)) if name in known}


def check_again(before: Mapping[str, Any], to: Literal["resume", "reproduce"]) -> None:
    """Refuse to continue with a run if one of its registered objects is missing now or has another source.

    Args:
        before: What the run asked for, from its `search.json`: names and source hashes.
        to: What the user wants to do with the run, or with one of its rows.

    Raises:
        InputError: The message names the first object that differs.
    """
    kinds: tuple[plugins.Kind, ...] = ("divergences", "evaluators")
    for kind in kinds:
        now = plugins.registered(kind)
        for name, source in before.get(kind, {}).items():
            if not source:  # an installed object has no recorded source
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
    """Return advice on how to give the same object again."""
    if to == "resume":
        return f"resume it from Python, with the same one given again by {_HOW[kind]}"
    return f"reproduce its rows from Python by Run.reproduce, with the same one given again by register_{kind[:-1]}"


def check_divergences(used: Iterable[str]) -> tuple[Divergence, ...]:
    """Try all divergences that a search may use, and return those that its workers must register.

    Raises:
        InputError: A name is unknown, or a divergence does not work.
    """
    found = [get_divergence(name) for name in used]
    for one in found:
        check_divergence(one)
    here = plugins.registered("divergences")
    return tuple(one for one in found if one.name in here)
