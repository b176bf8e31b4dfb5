"""AutoDistill: finds the distilled and quantised student with the highest measured accuracy that fits your hardware."""

from typing import Any

from autodistill.errors import AutoDistillError, InputError, NothingFitsError
from autodistill.hardware.budget import Budget
from autodistill.strategy.deployment import Deployment
from autodistill.strategy.strategy import Strategy
from autodistill.units import parse_bytes, parse_duration

__all__ = [
    "AutoDistillError",
    "Budget",
    "Deployment",
    "InputError",
    "NothingFitsError",
    "Strategy",
    "__version__",
    "parse_bytes",
    "parse_duration",
]


def __getattr__(name: str) -> Any:
    """The version, which is looked up once somebody asks."""
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("autodistill-search")
