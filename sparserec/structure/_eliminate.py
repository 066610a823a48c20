"""Backward elimination of units on a quadratic model, each at its price."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from sparserec.structure._costs import Term, evaluate, marginal
from sparserec.structure._groups import Groups


class Elimination(NamedTuple):
    """What elimination leaves.

    Attributes:
      keep: group name -> kept units, bool, shape `(units,)`.
      gates: minimizer of the model on them, zero elsewhere, shape `(all units,)`.
      change: value of the model there less that at its center.
    """

    keep: dict[str, np.ndarray]
    gates: np.ndarray
    change: float


class Units(NamedTuple):
    """The columns of a gate model: groups in the order of a flattened dict.

    Attributes:
      names: group of every span, sorted as `jax.tree` sorts keys.
      spans: where the units of each group sit.
      size: number of units in all.
    """

    names: tuple[str, ...]
    spans: tuple[slice, ...]
    size: int

    def split(self, flat: np.ndarray) -> dict[str, np.ndarray]:
        """Group name -> entries."""
        return {n: flat[s] for n, s in zip(self.names, self.spans, strict=True)}

    def flat(self, by_group: Mapping[str, np.ndarray]) -> np.ndarray:
        """Entries of all groups as one vector."""
        return np.concatenate([np.asarray(by_group[name]) for name in self.names])


def units_of(groups: Groups) -> Units:
    """The order of the units in a flattened dict of gates."""
    names = tuple(sorted(groups.sizes))
    ends = np.cumsum([groups.sizes[name] for name in names])
    starts = ends - [groups.sizes[name] for name in names]
    spans = tuple(slice(int(a), int(b)) for a, b in zip(starts, ends, strict=True))
    return Units(names, spans, int(ends[-1]))


class _Front:
    """Inverse curvature and minimizer on the units alive, downdated as they go."""

    def __init__(self, matrix: np.ndarray, target: np.ndarray, alive: np.ndarray):
        """Factor the matrix on the units alive."""
        at = np.flatnonzero(alive)
        factor = np.linalg.inv(np.linalg.cholesky(matrix[np.ix_(at, at)]))
        self.inverse = np.zeros_like(matrix)
        self.inverse[np.ix_(at, at)] = factor.T @ factor
        self.values = self.inverse @ np.where(alive, target, 0)
        self.alive = alive.copy()

    def costs(self) -> np.ndarray:
        """Rise of the model when a unit alone goes and the others make up for it."""
        diagonal = np.diagonal(self.inverse)
        safe = np.where(self.alive, diagonal, 1)
        return np.where(self.alive, np.square(self.values) / (2 * safe), np.inf)

    def remove(self, unit: int) -> None:
        """Remove one unit and refit the others."""
        column = self.inverse[:, unit] / self.inverse[unit, unit]
        self.values = self.values - column * self.values[unit]
        self.inverse = self.inverse - np.outer(column, self.inverse[unit])
        self.inverse[unit] = self.inverse[:, unit] = 0
        self.values[unit] = 0
        self.alive[unit] = False


def eliminate(
    groups: Groups,
    terms: tuple[Term, ...],
    allowed: Mapping[str, np.ndarray],
    matrix: np.ndarray,
    gradient: np.ndarray,
    center: np.ndarray,
    budget: float,
) -> Elimination:
    r"""Remove units until the cost fits, always those of least rise per saving.

    The rise of unit u is $m_u^2 / (2 [H^{-1}]_{uu})$ at the refitted gates m, and its
    saving what it costs at the present choice, so that prices follow the widths of the
    neighbors. A group goes down to its next allowed count at once.

    Args:
      groups: result of `groups`.
      terms: the cost as a polynomial.
      allowed: group name -> numbers of units it may keep, increasing.
      matrix: H, positive definite, float64, shape `(U, U)`.
      gradient: slope at the center, shape `(U,)`.
      center: the gates, zero where a unit is gone already, shape `(U,)`.
      budget: largest allowed cost; the smallest counts must fit it.

    Returns:
      The units left and their gates.
    """
    units = units_of(groups)
    alive = center != 0
    target = matrix @ center - gradient
    front = _Front(matrix, target, alive)
    keep = units.split(front.alive)  # views: they follow the removals

    def price() -> float:
        return evaluate(terms, keep)

    while price() > budget:
        costs = units.split(front.costs())
        savings = marginal(terms, groups.sizes, keep)
        best, chosen = np.inf, None
        for name, span in zip(units.names, units.spans, strict=True):
            present = int(keep[name].sum())
            lower = allowed[name][allowed[name] < present]
            if not lower.size:
                continue
            going = np.argsort(costs[name], kind="stable")[: present - int(lower[-1])]
            saved = float(savings[name][going].sum())
            rate = float(costs[name][going].sum()) / max(saved, 1e-300)
            if rate < best:
                best, chosen = rate, going + span.start
        if chosen is None:
            break
        for unit in chosen:
            front.remove(int(unit))
    step = front.values - center
    change = float(gradient @ step + step @ matrix @ step / 2)
    return Elimination({n: k.copy() for n, k in keep.items()}, front.values, change)
