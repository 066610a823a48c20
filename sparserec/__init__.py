"""L0-constrained optimisation in JAX: sparse recovery and network pruning.

A loss and its data become a local quadratic model; a budget says how many weights
may stay; a solver chooses the support and the values; the answer is a `Solution`.
"""

from sparserec import quadratic
from sparserec._run import Solver, State, run
from sparserec._solution import History, Solution, SolveError, check
from sparserec._types import Status
from sparserec.budget import keep, matrices
from sparserec.solvers.iht import iht, iht_solver
from sparserec.solvers.iobs import iobs, iobs_solver

__all__ = [
    "History",
    "Solution",
    "SolveError",
    "Solver",
    "State",
    "Status",
    "check",
    "iht",
    "iht_solver",
    "iobs",
    "iobs_solver",
    "keep",
    "matrices",
    "quadratic",
    "run",
]
