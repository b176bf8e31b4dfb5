"""Solves for a budget before anything is trained: which types of matrices, tables and cache fit, and their cost."""

from autodistill.search.solve.run import plan_solve, solve
from autodistill.search.solve_request import SolveRequest

__all__ = ["SolveRequest", "plan_solve", "solve"]
