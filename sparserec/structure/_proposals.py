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

DAMPINGS = (0.01, 0.1, 1.0)
"""Relative dampings that compete: from trust in the model to hardly any refit."""

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
    """Gates with the relative damping they come from and their true loss."""

    gates: Gates
    damping: float
    loss: float


def arrays(
    units: Units, model: QuadraticModel
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Center, gradient, matrix and mean curvature of a gate model, in float64."""
    center = np.asarray(units.flat(model.center), np.float64)
    gradient = np.asarray(units.flat(model.gradient), np.float64)
    rows = np.asarray(_rows(model), np.float64)
    matrix = rows.T @ rows
    return center, gradient, matrix, float(np.mean(np.diag(matrix))) or 1.0


def _rows(model: QuadraticModel) -> Array:
    assert isinstance(model.curvature, LowRank)
    return model.curvature.rows


def proposals(
    problem: Problem, model: QuadraticModel, budget: float
) -> list[tuple[Gates, float]]:
    """Gates within the budget, with the relative damping they come from."""
    units = problem.units
    center, gradient, matrix, scale = arrays(units, model)
    alive = {n: m != 0 for n, m in units.split(center).items()}
    found = []

    def add(keep: Mapping[str, np.ndarray], values: np.ndarray, damping: float) -> None:
        on = units.flat(keep)
        # Gates that stay as they are, and gates refitted on the model.
        found.append((units.split(np.where(on, center, 0)), damping))
        found.append((units.split(np.where(on, values, 0)), damping))

    for damping in DAMPINGS:
        damped = matrix + damping * scale * np.eye(units.size)
        left = eliminate(
            problem.groups,
            problem.terms,
            problem.allowed,
            damped,
            gradient,
            center,
            budget,
        )
        add(left.keep, left.gates, damping)
    # Units by themselves, and the largest weights: what nothing may be worse than.
    damping = DAMPINGS[1]
    damped = matrix + damping * scale * np.eye(units.size)
    squares = unit_scores(problem.groups, _squares(problem))
    for scores in (gate_scores(model), squares):
        keep = _select_alive(problem, scores, alive, budget)
        if keep is not None:
            add(keep, refit(damped, gradient, center, units.flat(keep)), damping)
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
    ridge = best.damping * mean_curvature(model.curvature)
    damped = low_rank(
        _rows(model), model.center, model.gradient, model.value, ridge=ridge
    )
    solution = problem.solver(damped, damped.center, counts)
    return {n: np.asarray(m, np.float64) for n, m in solution.params.items()}
