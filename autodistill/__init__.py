"""AutoDistill: finds the distilled and quantised student with the highest measured accuracy that fits your hardware."""

import inspect
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from autodistill.errors import AutoDistillError, InputError, NothingFitsError

if TYPE_CHECKING:
    from autodistill.api import (
        cascade,
        devices,
        distill,
        estimate,
        load_run,
        measure,
        pick,
        plan,
        profile,
        search,
        search_budgets,
        solve,
        write,
    )
    from autodistill.evaluation.base import Evaluator, Measurement, Quantity, Subject, register_evaluator
    from autodistill.hardware.budget import Budget
    from autodistill.objects.answers import Estimate, Pick
    from autodistill.objects.budgets import BudgetSearch
    from autodistill.objects.run import Run, SearchResult
    from autodistill.objects.solutions import Rival, Solution, Solutions
    from autodistill.objects.student import Metric, Student
    from autodistill.search.callbacks import (
        Callback,
        Exported,
        RungReached,
        SearchFinished,
        SearchStarted,
        Step,
        TrialFinished,
        TrialStarted,
    )
    from autodistill.strategy.deployment import Deployment
    from autodistill.strategy.divergence import register_divergence
    from autodistill.strategy.domains import Choice, Float, Int
    from autodistill.strategy.named import load_strategy
    from autodistill.strategy.space import Space, load_space
    from autodistill.strategy.strategy import Strategy
    from autodistill.units import parse_bytes, parse_duration

    __version__: str

__all__ = [
    "AutoDistillError",
    "Budget",
    "BudgetSearch",
    "Callback",
    "Choice",
    "Deployment",
    "Estimate",
    "Evaluator",
    "Exported",
    "Float",
    "InputError",
    "Int",
    "Measurement",
    "Metric",
    "NothingFitsError",
    "Pick",
    "Quantity",
    "Rival",
    "Run",
    "RungReached",
    "SearchFinished",
    "SearchResult",
    "SearchStarted",
    "Solution",
    "Solutions",
    "Space",
    "Step",
    "Strategy",
    "Student",
    "Subject",
    "TrialFinished",
    "TrialStarted",
    "__version__",
    "cascade",
    "devices",
    "distill",
    "estimate",
    "load_run",
    "load_space",
    "load_strategy",
    "measure",
    "parse_bytes",
    "parse_duration",
    "pick",
    "plan",
    "profile",
    "register_divergence",
    "register_evaluator",
    "search",
    "search_budgets",
    "solve",
    "write",
]

# The module of each public name. It is imported at the first access.
_MODULES = {
    "api": (
        *("cascade", "devices", "distill", "estimate", "load_run", "measure", "pick", "plan", "profile"),
        *("search_budgets", "solve", "write"),
    ),
    "hardware.budget": ("Budget",),
    "objects.answers": ("Estimate", "Pick"),
    "objects.budgets": ("BudgetSearch",),
    "objects.run": ("Run", "SearchResult"),
    "objects.solutions": ("Rival", "Solution", "Solutions"),
    "objects.student": ("Metric", "Student"),
    "search.callbacks": (
        *("Callback", "SearchStarted", "TrialStarted", "Step", "RungReached", "TrialFinished"),
        *("Exported", "SearchFinished"),
    ),
    "evaluation.base": ("Evaluator", "Measurement", "Quantity", "Subject", "register_evaluator"),
    "strategy.deployment": ("Deployment",),
    "strategy.divergence": ("register_divergence",),
    "strategy.domains": ("Choice", "Float", "Int"),
    "strategy.named": ("load_strategy",),
    "strategy.space": ("Space", "load_space"),
    "strategy.strategy": ("Strategy",),
    "units": ("parse_bytes", "parse_duration"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import and return a public name at its first access."""
    if name == "__version__":
        from importlib.metadata import version

        return version("autodistill-search")
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"autodistill.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Search(ModuleType):
    """The module `autodistill.search`, made callable because the public function has the same name."""

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(import_module("autodistill.api").search)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return import_module("autodistill.api").search(*args, **options)


# `help` and notebooks show the docstring of the function.
_Search.__doc__ = property(lambda self: import_module("autodistill.api").search.__doc__)  # type: ignore[assignment]
# Importing any file of autodistill.search binds `search` here to the module, which would hide the function. So the
# module is imported now and made callable.
import_module("autodistill.search")
sys.modules["autodistill.search"].__class__ = _Search
