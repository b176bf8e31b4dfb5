"""What fits a budget and what it costs, before anything is trained: types by tensor, tables and cache, solved."""

from autodistill.search.solve.call.request import SolveRequest
from autodistill.search.solve.run import plan_solve, solve

__all__ = ["SolveRequest", "plan_solve", "solve"]
