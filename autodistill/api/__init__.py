"""What a Python user calls, and the command line too: an argument is declared here or in a request, once."""

from autodistill.api.estimates import RUN_SHAPE, estimate
from autodistill.api.known_devices import devices
from autodistill.api.measuring import measure
from autodistill.api.picks import pick
from autodistill.api.searches import distill, load_run, plan, search
from autodistill.api.solving import solve
from autodistill.api.writing import write

__all__ = [
    "RUN_SHAPE",
    "devices",
    "distill",
    "estimate",
    "load_run",
    "measure",
    "pick",
    "plan",
    "search",
    "solve",
    "write",
]
