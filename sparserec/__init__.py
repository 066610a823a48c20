"""L0-constrained optimisation in JAX: sparse recovery and network pruning.

A loss and its data become a local quadratic model; a budget says how many weights
may stay; a solver chooses the support and the values; the answer is a `Solution`.
"""

import importlib.metadata

from sparserec import plot, problems, quadratic, select, structure, theory, training
from sparserec._report import report
from sparserec._run import Incumbent, Solver, State, run
from sparserec._solution import History, Solution, SolveError, check
from sparserec._types import Status
from sparserec.budget import Budget, keep, make_budget, matrices
from sparserec.select import apply_mask
from sparserec.solvers._descent import Descent
from sparserec.solvers.iht import iht, iht_solver
from sparserec.solvers.iobs import iobs
from sparserec.solvers.one_shot import obd, obs

__version__ = importlib.metadata.version("sparserec")

__all__ = [
    "Budget",
    "Descent",
    "History",
    "Incumbent",
    "Solution",
    "SolveError",
    "Solver",
    "State",
    "Status",
    "apply_mask",
    "check",
    "iht",
    "iht_solver",
    "iobs",
    "keep",
    "make_budget",
    "matrices",
    "obd",
    "obs",
    "plot",
    "problems",
    "quadratic",
    "report",
    "run",
    "select",
    "structure",
    "theory",
    "training",
]
