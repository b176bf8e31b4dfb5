"""The registry of divergences by name, with the facts that strategies need. It does not load torch."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, TypeVar

from autodistill import plugins
from autodistill.errors import InputError
from autodistill.utils.plain_dataclass import check

_Function = TypeVar("_Function", bound=Callable[..., Any])
_ABOUT = "_autodistill_about"


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """A measure of how far the student's distribution is from the teacher's.

    Attributes:
        name: The name in strategies.
        function: Takes log-probabilities of the teacher and of the student, [rows, outcomes] each. A third parameter,
            if it has one, is `distillation.mixture`. It returns the divergence of each row, [rows], and autograd
            computes the slope. With `gives_slope` it returns the slope too: see `losses.divergence.DivergenceAndSlope`.
        gives_slope: Whether `function` returns the slope itself.
        unbiased_when_sampled: Whether a weighted sum over tokens drawn from the teacher estimates it without bias. Only
            such divergences may be used with the signal "sampled". It needs the share of each outcome, so
            `gives_slope` must be set.
        moving_target: Whether the target moves from the student to the teacher during training. `mixture` is then the
            teacher's share at the start.
        nonnegative: Whether it is 0 or more for any two distributions. Its conformance suite then checks this.
    """

    name: str
    function: Callable[..., Any]
    gives_slope: bool = False
    unbiased_when_sampled: bool = False
    moving_target: bool = False
    nonnegative: bool = False

    def __post_init__(self) -> None:
        if self.unbiased_when_sampled and not self.gives_slope:
            raise InputError(f"the divergence {self.name!r} is for sampled tokens: let it give terms and slope")
        if self._parameters not in (2, 3):
            raise InputError(
                f"the divergence {self.name!r} takes {self._parameters} arguments: it must take log_p and log_q, and "
                "may take the mixture as a third one"
            )

    @cached_property
    def _parameters(self) -> int:
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError) as error:
            raise InputError(f"the divergence {self.name!r} is no function: {error}") from error
        return sum(one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD) for one in parameters)

    @property
    def mixes(self) -> bool:
        """Whether the function takes a mixture, a number between 0 and 1."""
        return self._parameters == 3


def about(**facts: bool) -> Callable[[_Function], _Function]:
    """Declare facts about a divergence of an entry point that its code does not show.

    Args:
        facts: Fields of `Divergence`: `gives_slope`, `unbiased_when_sampled`, `moving_target`, `nonnegative`.
    """

    def noted(function: _Function) -> _Function:
        setattr(function, _ABOUT, facts)
        return function

    return noted


def register_divergence(name: str, **facts: bool) -> Callable[[_Function], _Function]:
    """Register a function as a divergence of this Python session, for `distillation.divergence` in spaces.

    Ray's own serialiser takes it to the workers. It is never written to disk: rows record its name and a hash of its
    source. A run can be resumed only if the same function is registered.

    Args:
        name: Its name in strategies.
        facts: As for `about`.

    Raises:
        InputError: There is no name, an installed divergence has it, or the function does not take a divergence's
            arguments.

    Example:
        >>> @register_divergence("total_variation", nonnegative=True)
        ... def total_variation(log_p, log_q):
        ...     return (log_p.exp() - log_q.exp()).abs().sum(dim=1) / 2
        >>> "total_variation" in divergence_names()
        True
    """

    # Without the check, a decorator without parentheses would register nothing, silently.
    check(isinstance(name, str), 'give the divergence a name, as in @register_divergence("total_variation")')

    def registered(function: _Function) -> _Function:
        made = Divergence(name=name, function=function, **facts)
        plugins.register("divergences", name, made, written_as=function)
        return function

    return registered


def divergence_names() -> tuple[str, ...]:
    """Return the sorted names of the installed and registered divergences, without importing them."""
    return plugins.names("divergences")


def get_divergence(name: str) -> Divergence:
    """Return the installed or registered divergence of a name.

    Raises:
        InputError: As `plugins.load`, or the function is no divergence.
    """
    found = plugins.load("divergences", name)
    if isinstance(found, Divergence):
        return found
    return _made_once(name, found) if inspect.isroutine(found) else _made(name, found)


def _made(name: str, function: Callable[..., Any]) -> Divergence:
    return Divergence(name=name, function=function, **getattr(function, _ABOUT, {}))


# Every strategy asks for its divergence, and it takes long to look at a function's parameters.
_made_once = cache(_made)


def known_divergence(name: str) -> Divergence | None:
    """Return the divergence of a name as `get_divergence` does, or None if there is none of this name."""
    return get_divergence(name) if name in divergence_names() else None
