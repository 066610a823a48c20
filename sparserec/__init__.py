"""L0-constrained optimisation in JAX: sparse recovery and network pruning.

A loss and its data become a local quadratic model; a budget says how many weights
may stay; a solver chooses the support and the values; the answer is a `Solution`.
"""

import importlib.metadata

from sparserec import (
    losses,
    plot,
    problems,
    quadratic,
    recovery,
    saliency,
    select,
    structure,
    theory,
    training,
)
from sparserec._prune import prune
from sparserec._report import report
from sparserec._run import Incumbent, Solver, State, run
from sparserec._solution import History, Solution, SolveError, check
from sparserec._types import Status
from sparserec.budget import Budget, keep, make_budget, matrices
from sparserec.select import apply_mask
from sparserec.solvers._chita_path import chita_path, compress_rows
from sparserec.solvers._descent import Descent
from sparserec.solvers.certificate import Certificate, certificate
from sparserec.solvers.chita import chita
from sparserec.solvers.greedy import foba, omp
from sparserec.solvers.iht import iht, iht_solver
from sparserec.solvers.iobs import iobs
from sparserec.solvers.l0cd import l0cd
from sparserec.solvers.oba import oba
from sparserec.solvers.one_shot import obd, obs
from sparserec.solvers.pursuit import cosamp, grasp, htp, splicing, subspace_pursuit

__version__ = importlib.metadata.version("sparserec")

__all__ = [
    "Budget",
    "Certificate",
    "Descent",
    "History",
    "Incumbent",
    "Solution",
    "SolveError",
    "Solver",
    "State",
    "Status",
    "apply_mask",
    "certificate",
    "check",
    "chita",
    "chita_path",
    "compress_rows",
    "cosamp",
    "foba",
    "grasp",
    "htp",
    "iht",
    "iht_solver",
    "iobs",
    "keep",
    "l0cd",
    "losses",
    "make_budget",
    "matrices",
    "oba",
    "obd",
    "obs",
    "omp",
    "plot",
    "problems",
    "prune",
    "quadratic",
    "recovery",
    "report",
    "run",
    "saliency",
    "select",
    "splicing",
    "structure",
    "subspace_pursuit",
    "theory",
    "training",
]
