"""What fits a budget and what it costs, before anything is trained: types by tensor, tables and cache, solved."""

from autodistill.search.solve.run import plan_solve, solve
from autodistill.search.solve_request import SolveRequest

__all__ = ["SolveRequest", "plan_solve", "solve"]
