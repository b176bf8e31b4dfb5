"""The samplers by name; nothing of Optuna is imported."""

from __future__ import annotations

from autodistill.errors import InputError

SAMPLERS = ("tpe", "random")
_REMOVED = ("gp", "nsga2")


def check_sampler(name: str) -> None:
    """Refuse a name that no sampler has.

    Raises:
        InputError: Names what takes its place.
    """
    if name in _REMOVED:
        raise InputError(f"the sampler {name} was removed: take tpe, which learns from several objectives too")
    if name not in SAMPLERS:
        raise InputError(f"there is no sampler {name!r}; the samplers are {', '.join(SAMPLERS)}")
