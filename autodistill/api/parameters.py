"""A decorator that gives a function the parameters of a request."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar, get_type_hints

from autodistill.options import options_of
from autodistill.strategy.domains import near

P = ParamSpec("P")
R = TypeVar("R")


def takes(request: Callable[P, object], verb: str) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a function the parameters that a request declares for a verb: names, types, defaults and help."""

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        """Add the fields of the request to the signature, the annotations and the docstring of a function."""
        declared = inspect.signature(request).parameters
        taken = options_of(request, verb)
        own = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
        hints, full = get_type_hints(request), get_type_hints(request, include_extras=True)
        shared = [
            declared[name].replace(annotation=hints[name]) for name in taken if not any(one.name == name for one in own)
        ]
        signature = inspect.Signature(sorted([*own, *shared], key=lambda one: one.kind))

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            unknown = [name for name in kwargs if name not in signature.parameters]
            if unknown:
                raise TypeError(f"{verb}() takes no {unknown[0]!r}; {near(unknown[0], signature.parameters)}")
            return function(**signature.bind(*args, **kwargs).arguments)

        call.__signature__ = signature  # type: ignore[attr-defined]
        call.__annotations__ = function.__annotations__ | {one.name: full[one.name] for one in shared}
        told = (f"    {name}: {option.helps.get(verb, option.help)}" for name, option in taken.items())
        call.__doc__ = "\n".join([f"{inspect.getdoc(function)}", "", "Args:", *told])
        return call

    return decorate
