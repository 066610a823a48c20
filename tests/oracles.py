"""Slow NumPy answers that the fast code is compared with.

Everything here is written from the definitions, for vectors and dense matrices:
exhaustive searches, explicit inverses, one removal after another. Masks are boolean
vectors, True where an entry is kept.
"""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Mask = NDArray[np.bool_]


class Sparse(NamedTuple):
    """A k-sparse answer.

    Attributes:
      mask: True where an entry is kept.
      params: the values, zero off the mask.
      value: the objective at `params`.
    """

    mask: Mask
    params: Vector
    value: float


# --- instances -----------------------------------------------------------------------


def random_positive(
    rng: np.random.Generator, dim: int, condition: float, *, skewed: bool = False
) -> Matrix:
    """A random rotation of the geometric spectrum 1 .. condition.

    A skewed one has most eigenvalues near the ends, as Hessians of networks have.
    """
    basis, _ = np.linalg.qr(rng.normal(size=(dim, dim)))
    places = np.linspace(0.0, 1.0, dim)
    if skewed:
        places = places**3
    matrix = (basis * condition**places) @ basis.T
    return (matrix + matrix.T) / 2


def random_mask(rng: np.random.Generator, dim: int, k: int) -> Mask:
    """k of dim places, uniformly."""
    return rng.permutation(dim) < k


# --- selection -----------------------------------------------------------------------


def top_k_mask(scores: Vector, k: int) -> Mask:
    """The k largest magnitudes; ties go to the lowest index."""
    order = np.argsort(-np.abs(scores), kind="stable")
    mask = np.zeros(scores.size, bool)
    mask[order[:k]] = True
    return mask


def hard_threshold(vector: Vector, k: int) -> Vector:
    """The vector with all but its k largest magnitudes set to zero."""
    return np.where(top_k_mask(vector, k), vector, 0.0)


def all_masks(dim: int, k: int) -> Iterator[Mask]:
    """Every way to keep k of dim entries."""
    for kept in itertools.combinations(range(dim), k):
        mask = np.zeros(dim, bool)
        mask[list(kept)] = True
        yield mask


# --- sparse quadratics ---------------------------------------------------------------


def quadratic_value(hessian: Matrix, linear: Vector, params: Vector) -> float:
    """x'Hx/2 - b'x."""
    return float(params @ hessian @ params / 2 - linear @ params)


def minimize_on(hessian: Matrix, linear: Vector, mask: Mask) -> Vector:
    """Minimizer of x'Hx/2 - b'x over vectors that are zero off the mask."""
    params = np.zeros(linear.size)
    params[mask] = np.linalg.solve(hessian[np.ix_(mask, mask)], linear[mask])
    return params


def best_support(hessian: Matrix, linear: Vector, k: int) -> Sparse:
    """Minimizer of x'Hx/2 - b'x over all k-sparse vectors, by trying every mask."""
    candidates = []
    for mask in all_masks(linear.size, k):
        params = minimize_on(hessian, linear, mask)
        value = quadratic_value(hessian, linear, params)
        candidates.append(Sparse(mask, params, value))
    return min(candidates, key=lambda candidate: candidate.value)


def projection_value(hessian: Matrix, point: Vector, mask: Mask) -> float:
    """Least of (x-u)'H(x-u)/2 over x on the mask, as u_S'([H^-1]_SS)^-1 u_S / 2."""
    removed = ~mask
    block = np.linalg.inv(hessian)[np.ix_(removed, removed)]
    return float(point[removed] @ np.linalg.solve(block, point[removed]) / 2)


def ideal_projection(hessian: Matrix, point: Vector, k: int) -> Sparse:
    """Closest k-sparse vector to a point in the norm of H, by trying every mask."""
    masks = list(all_masks(point.size, k))
    values = [projection_value(hessian, point, mask) for mask in masks]
    best = int(np.argmin(values))
    params = obs_constraint_form(hessian, point, masks[best])
    return Sparse(masks[best], params, values[best])


def cost_of_refit_without(hessian: Matrix, point: Vector, index: int) -> float:
    """Least of (x-u)'H(x-u)/2 over x whose entry `index` is zero."""
    mask = np.ones(point.size, bool)
    mask[index] = False
    step = minimize_on(hessian, hessian @ point, mask) - point
    return float(step @ hessian @ step / 2)


# --- the OBS update, five times ------------------------------------------------------
# All return the minimizer of (x-u)'H(x-u)/2 over x that is zero off the mask, where u
# is the Newton point u = theta - H^-1 g.


def newton_point(hessian: Matrix, params: Vector, gradient: Vector) -> Vector:
    """theta - H^-1 g."""
    return params - np.linalg.solve(hessian, gradient)


def obs_constraint_form(hessian: Matrix, point: Vector, mask: Mask) -> Vector:
    """(a) u - H^-1[:, S] ([H^-1]_SS)^-1 u_S, S the removed set."""
    removed = ~mask
    inverse = np.linalg.inv(hessian)
    block = inverse[np.ix_(removed, removed)]
    return point - inverse[:, removed] @ np.linalg.solve(block, point[removed])


def obs_support_form(hessian: Matrix, point: Vector, mask: Mask) -> Vector:
    """(b) u_Q + H_QQ^-1 H_QS u_S on the kept set Q."""
    removed = ~mask
    pull = hessian[np.ix_(mask, removed)] @ point[removed]
    params = np.zeros(point.size)
    params[mask] = point[mask] + np.linalg.solve(hessian[np.ix_(mask, mask)], pull)
    return params


def obs_gradient_form(
    hessian: Matrix, params: Vector, gradient: Vector, mask: Mask
) -> Vector:
    """(c) H_QQ^-1 (H theta - g)_Q, which needs no inverse of H."""
    return minimize_on(hessian, hessian @ params - gradient, mask)


def obs_restricted_newton(
    hessian: Matrix, params: Vector, gradient: Vector, mask: Mask
) -> Vector:
    """(d) theta_Q - H_QQ^-1 g_Q; right only if theta is zero off the mask."""
    return params - minimize_on(hessian, gradient, mask)


def obs_sequential(hessian: Matrix, point: Vector, order: list[int]) -> Vector:
    """(e) one removal after another, with the inverse updated after each."""
    inverse = np.linalg.inv(hessian)
    params = point.copy()
    for index in order:
        column = inverse[:, index] / inverse[index, index]
        params = params - column * params[index]
        inverse = inverse - np.outer(column, inverse[index, :])
        # Exact in theory; rounding left here would be divided by pivots later.
        params[index] = 0.0
        inverse[index, :] = 0.0
        inverse[:, index] = 0.0
    return params


def backward_elimination(hessian: Matrix, point: Vector, k: int) -> Sparse:
    """Removes the entry whose loss hurts least after a full refit, until k are left."""
    mask = np.ones(point.size, bool)
    for _ in range(point.size - k):
        costs = np.full(point.size, np.inf)
        for index in np.flatnonzero(mask):
            without = mask.copy()
            without[index] = False
            costs[index] = projection_value(hessian, point, without)
        mask[np.argmin(costs)] = False
    params = minimize_on(hessian, hessian @ point, mask)
    step = params - point
    return Sparse(mask, params, float(step @ hessian @ step / 2))
