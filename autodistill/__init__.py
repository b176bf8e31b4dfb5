"""AutoDistill: finds the distilled and quantised student with the highest measured accuracy that fits your hardware."""

from importlib.metadata import version

from autodistill.errors import AutoDistillError, InputError, NothingFitsError
from autodistill.strategy import Deployment, Strategy
from autodistill.units import Budget, parse_bytes, parse_duration

__version__ = version("autodistill-search")
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
