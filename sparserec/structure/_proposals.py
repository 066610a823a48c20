"""What competes in one stage of the joint choice: gates within a budget of cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparserec._solution import Solution
from sparserec.quadratic import LowRank, QuadraticModel, low_rank, mean_curvature
from sparserec.quadratic._chunked import chunks
from sparserec.saliency import magnitude
from sparserec.structure._apply import gate, unit_scores
from sparserec.structure._costs import Term
from sparserec.structure._eliminate import Units, eliminate
from sparserec.structure._gate_model import gate_scores
from sparserec.structure._groups import Groups
from sparserec.structure._select import Cost, select

SHRINKAGES = (0.1, 0.5, 0.9)
"""Weights of the diagonal that compete: from all units together to each by itself."""

_RIDGE = 1e-3  # of the mean curvature, for units that no example has moved

GateSolver = Callable[..., Solution]
"""`solver(model, start, k) -> Solution`, such as `sparserec.iobs`."""

Gates = dict[str, np.ndarray]
"""Group name -> float64 gates, zero where a unit is gone."""


@jax.jit
def _loss(loss_fn: Any, params: Any, piece: tuple) -> Array:
    return loss_fn(params, *piece)


class Problem(NamedTuple):
    """What stays the same through all stages."""

    loss_fn: Any
    params: Any
    groups: Groups
    units: Units
    terms: tuple[Term, ...]
    cost: Cost
    allowed: Mapping[str, np.ndarray]
    multiple_of: int
    batch_size: int
    build: Callable[..., QuadraticModel]
    solver: GateSolver | None
    repair: Callable[[Any], Any] | None

    def folded(self, gates: Mapping[str, Any]) -> Any:
        """Params with the gates in them, put right by the caller."""
        shaped = {n: jnp.asarray(m) for n, m in gates.items()}
        params = gate(self.params, self.groups, shaped)
        return params if self.repair is None else self.repair(params)

    def loss(self, gates: Mapping[str, Any], data: tuple) -> float:
        """The true loss of gated params, in pieces."""
        params = self.folded(gates)
        return sum(
            share * float(_loss(self.loss_fn, params, piece))
            for piece, share in chunks(data, self.batch_size)
        )


class Candidate(NamedTuple):
    """Gates with the shrinkage they come from and their true loss."""

    gates: Gates
    shrinkage: float
    loss: float


def arrays(
    units: Units, model: QuadraticModel
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Center, gradient and matrix of a gate model, in float64."""
    center = np.asarray(units.flat(model.center), np.float64)
    gradient = np.asarray(units.flat(model.gradient), np.float64)
    rows = np.asarray(_rows(model), np.float64)
    return center, gradient, rows.T @ rows


def shrunk(matrix: np.ndarray, shrinkage: float) -> np.ndarray:
    """The matrix drawn towards its diagonal, and definite.

    With fewer rows than units what is off the diagonal is mostly noise, and the
    matrix is singular: units would seem free because others make up for them.
    """
    diagonal = np.diag(matrix)
    ridge = _RIDGE * (float(np.mean(diagonal)) or 1.0)
    return (1 - shrinkage) * matrix + np.diag(shrinkage * diagonal + ridge)


def _rows(model: QuadraticModel) -> Array:
    assert isinstance(model.curvature, LowRank)
    return model.curvature.rows


def proposals(
    problem: Problem, model: QuadraticModel, budget: float
) -> list[tuple[Gates, float]]:
    """Gates within the budget, with the shrinkage they come from."""
    units = problem.units
    center, gradient, matrix = arrays(units, model)
    alive = {n: m != 0 for n, m in units.split(center).items()}
    found = []

    def add(keep: Mapping[str, np.ndarray], values: np.ndarray, share: float) -> None:
        on = units.flat(keep)
        # Gates that stay as they are, and gates refitted on the model.
        found.append((units.split(np.where(on, center, 0)), share))
        found.append((units.split(np.where(on, values, 0)), share))

    for share in SHRINKAGES:
        left = eliminate(
            problem.groups,
            problem.terms,
            problem.allowed,
            shrunk(matrix, share),
            gradient,
            center,
            budget,
        )
        add(left.keep, left.gates, share)
    # Units by themselves, and the largest weights: what nothing may be worse than.
    share = SHRINKAGES[1]
    middle = shrunk(matrix, share)
    squares = unit_scores(problem.groups, _squares(problem))
    for scores in (gate_scores(model), squares):
        keep = _select_alive(problem, scores, alive, budget)
        if keep is not None:
            add(keep, refit(middle, gradient, center, units.flat(keep)), share)
    return found


def _squares(problem: Problem) -> Any:
    """Squared weights; zeros for arrays that only follow (batch statistics)."""
    reading = {
        member.leaf
        for group in problem.groups.groups
        for member in group.members
        if member.reads
    }
    leaves, structure = jax.tree.flatten(magnitude(problem.params))
    kept = [x if i in reading else jnp.zeros_like(x) for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, kept)


def _select_alive(
    problem: Problem,
    scores: Mapping[str, Any],
    alive: Mapping[str, np.ndarray],
    budget: float,
) -> dict[str, np.ndarray] | None:
    """Units by their own scores; `None` where that would bring back dead ones."""
    scores = {n: np.asarray(s, np.float64) for n, s in scores.items()}
    lowest = min(float(s.min()) for s in scores.values()) - 1
    scores = {n: np.where(alive[n], s, lowest) for n, s in scores.items()}
    keep = select(
        problem.groups,
        scores,
        budget,
        cost=problem.cost,
        min_keep={name: int(each[0]) for name, each in problem.allowed.items()},
        multiple_of=problem.multiple_of,
    )
    return None if any((keep[n] & ~alive[n]).any() for n in keep) else keep


def refit(
    matrix: np.ndarray, gradient: np.ndarray, center: np.ndarray, on: np.ndarray
) -> np.ndarray:
    """Minimizer of the model over the gates on a support, zero elsewhere."""
    at = np.flatnonzero(on)
    target = (matrix @ center - gradient)[at]
    values = np.zeros_like(center)
    values[at] = np.linalg.solve(matrix[np.ix_(at, at)], target)
    return values


def polished(
    problem: Problem, model: QuadraticModel, best: Candidate
) -> dict[str, np.ndarray]:
    """Units exchanged within their groups by a solver of the package."""
    assert problem.solver is not None
    counts = {n: int((m != 0).sum()) for n, m in best.gates.items()}
    ridge = best.shrinkage * mean_curvature(model.curvature)
    damped = low_rank(
        _rows(model), model.center, model.gradient, model.value, ridge=ridge
    )
    solution = problem.solver(damped, damped.center, counts)
    return {n: np.asarray(m, np.float64) for n, m in solution.params.items()}
