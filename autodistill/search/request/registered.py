"""Divergences and evaluators that are registered in a Python session: checked, and recorded by hash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from autodistill import plugins
from autodistill.distillation.losses.divergence import check_divergence
from autodistill.errors import InputError
from autodistill.strategy.divergence import Divergence, get_divergence

_HOW: Mapping[plugins.Kind, str] = {"divergences": "register_divergence", "evaluators": "evaluators="}


def sources(kind: plugins.Kind, used: Iterable[str]) -> dict[str, str]:
    """Return the hashes of the source code of those that are registered, by name."""
    known = plugins.registered(kind)
    return {name: known[name].source for name in sorted(set(used)) if name in known}


def check_again(kind: plugins.Kind, before: Mapping[str, str]) -> None:
    """Refuse to resume a run whose registered objects are not registered now, or are others.

    Args:
        kind: Of the objects.
        before: Their names and hashes of source, as the run's `search.json` has them.

    Raises:
        InputError: Names the first one that is not the same.
    """
    now = plugins.registered(kind)
    for name, source in before.items():
        said = f"the run used the {kind[:-1]} {name!r} of a Python session (source {source})"
        if name not in now:
            raise InputError(f"{said}: resume it from Python, with the same one given again by {_HOW[kind]}")
        if now[name].source != source:
            raise InputError(
                f"{said}, and the one given now has another source ({now[name].source}): give the same one, or start "
                "a new run under another name"
            )


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
