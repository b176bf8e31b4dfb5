"""The samplers by name. This module imports nothing of Optuna."""

from __future__ import annotations

from autodistill.errors import InputError

SAMPLERS = ("tpe", "random")
_REMOVED = ("gp", "nsga2")


def check_sampler(name: str) -> None:
    """Refuse a name that belongs to no sampler.

    Raises:
        InputError: There is no such sampler; the message names what to use instead.
    """
    if name in _REMOVED:
        raise InputError(f"the sampler {name} was removed: take tpe, which learns from several objectives too")
    if name not in SAMPLERS:
        raise InputError(f"there is no sampler {name!r}; the samplers are {', '.join(SAMPLERS)}")
