"""Functions that Python users and the command line call. Each argument is declared once, here or in a request."""

from autodistill.api.bundling import bundle, dashboards
from autodistill.api.cascading import cascade
from autodistill.api.estimates import RUN_SHAPE, estimate
from autodistill.api.known_devices import devices
from autodistill.api.measuring import measure, profile
from autodistill.api.picks import pick
from autodistill.api.searches import distill, load_run, plan, search, search_budgets
from autodistill.api.solving import solve
from autodistill.api.writing import write

__all__ = [
    "RUN_SHAPE",
    "bundle",
    "cascade",
    "dashboards",
    "devices",
    "distill",
    "estimate",
    "load_run",
    "measure",
    "pick",
    "plan",
    "profile",
    "search",
    "search_budgets",
    "solve",
    "write",
]
