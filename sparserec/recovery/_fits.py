"""The fits behind the estimators: from NumPy data to paths, and exact refits.

The search runs in JAX's default precision, the refit on the support that is chosen
in double precision with NumPy.

Legend: m examples, n columns, f folds, K budgets, s columns of a support.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO
from jaxtyping import Array, Float

from sparserec._types import Scalar
from sparserec.recovery._likelihoods import (
    LOGISTIC,
    POISSON,
    Family,
    Likelihood,
    LikelihoodCurvature,
)
from sparserec.recovery._path import path
from sparserec.recovery._record import Path
from sparserec.recovery._regression import regression
from sparserec.recovery._resample import over_fits
from sparserec.recovery._rows import Design

_NEWTON_STEPS = 100
_NEWTON_TOL = 1e-14  # relative decrease


def _sigmoid(eta: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -eta))


# NumPy's own functions: JAX may be in single precision.
_EXACT = {
    LOGISTIC: Family(
        lambda eta: np.logaddexp(0, eta),
        _sigmoid,
        lambda eta: _sigmoid(eta) * _sigmoid(-eta),
    ),
    POISSON: Family(np.exp, np.exp, np.exp),
}


class Choices(NamedTuple):
    """What a fit depends on besides the data; static but for `l2`."""

    family: Family | None  # None for least squares
    k_max: int
    intercept: bool
    standardize: bool


class Weights(NamedTuple):
    """Coefficients along a path, in the units of the data."""

    coefficients: Float[Array, "K n"]
    intercept: Float[Array, "K"]


def as_matrix(x: Any) -> Array | BCOO:
    """A NumPy array or a scipy.sparse matrix as JAX takes it."""
    if isinstance(x, np.ndarray):
        return jnp.asarray(x)
    found = x.tocoo()
    indices = np.stack([found.row, found.col], axis=1)
    return BCOO((jnp.asarray(found.data), jnp.asarray(indices)), shape=x.shape)


def units(
    x: Any, weights: np.ndarray, intercept: bool, standardize: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Means and scales of dense columns, in double precision; zeros and ones if sparse.

    The search would lose the digits of columns far from zero.
    """
    mean, scale = np.zeros(x.shape[1]), np.ones(x.shape[1])
    if isinstance(x, np.ndarray):
        if intercept:
            mean = np.average(x, axis=0, weights=weights)
        if standardize:
            scale = spread_of(x, mean, weights)
    return mean, scale


def spread_of(x: np.ndarray, mean: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Weighted standard deviations; ones where a column is constant."""
    spread = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
    level = np.sqrt(np.finfo(x.dtype).eps) * np.abs(mean)
    return np.where(spread > level, spread, 1)


@functools.partial(jax.jit, static_argnames="choices")
def fit_path(
    matrix: Array | BCOO,
    response: Float[Array, "m"],
    weights: Float[Array, "m"],
    l2: Scalar,
    choices: Choices,
) -> tuple[Path, Weights]:
    """The path of one data set, and its coefficients."""
    standard = regression(
        matrix,
        response,
        weights=weights,
        intercept=choices.intercept,
        standardize=choices.standardize,
    )
    if choices.family is None:
        found = path(standard.model, standard.model.center, choices.k_max, l2=l2)
        return found, Weights(*standard.undo(found.params))
    params = {"coefficients": jnp.zeros_like(standard.scale)}
    if choices.intercept:
        params["intercept"] = jnp.zeros_like(standard.offset)
    design = Design(matrix, standard.mean, 1 / standard.scale, choices.intercept)
    found = path(
        Likelihood(choices.family),
        params,
        choices.k_max,
        args=(design, response, weights, l2),
        curvature=LikelihoodCurvature(choices.family),
        prunable={name: name == "coefficients" for name in params},
    )
    coefficients = found.params["coefficients"] / standard.scale[None, :]
    shift = coefficients @ standard.mean
    intercept = found.params.get("intercept", jnp.zeros_like(shift)) - shift
    return found, Weights(
        coefficients, intercept if choices.intercept else jnp.zeros_like(shift)
    )


@functools.partial(jax.jit, static_argnames="choices")
def held_out(
    matrix: Array | BCOO,
    response: Float[Array, "m"],
    weights: Float[Array, "m"],
    left_out: Float[Array, "f m"],
    l2: Scalar,
    choices: Choices,
) -> Float[Array, "f K"]:
    """Mean loss on each fold, given as ones, of the path that is fitted without it."""

    def one(fold: Float[Array, "m"]) -> Float[Array, "K"]:
        _, found = fit_path(matrix, response, weights * (1 - fold), l2, choices)
        predictor = (matrix @ found.coefficients.T).T + found.intercept[:, None]
        if choices.family is None:
            losses = jnp.square(predictor - response[None, :]) / 2
        else:
            losses = choices.family.cumulant(predictor) - response[None, :] * predictor
        share = weights * fold
        return losses @ share / jnp.sum(share)

    return over_fits(one, left_out)


def refit_least_squares(
    part: np.ndarray,
    response: np.ndarray,
    weights: np.ndarray,
    scale: np.ndarray,
    l2: float,
    intercept: bool,
) -> tuple[np.ndarray, float]:
    """Coefficients and intercept on the columns of a support, in double precision."""
    total = weights.sum()
    mean = weights @ part / total if intercept else np.zeros(part.shape[1])
    offset = float(weights @ response / total) if intercept else 0.0
    root = np.sqrt(weights)
    rows = root[:, None] * (part - mean)
    target = root * (response - offset)
    if l2:
        rows = np.vstack([rows, np.diag(np.sqrt(2 * l2) * scale)])
        target = np.concatenate([target, np.zeros(part.shape[1])])
    coefficients = np.linalg.lstsq(rows, target, rcond=None)[0]
    return coefficients, offset - float(coefficients @ mean)


def refit_likelihood(
    part: np.ndarray,
    response: np.ndarray,
    weights: np.ndarray,
    start: tuple[np.ndarray, float],
    ridge: np.ndarray,
    family: Family,
    intercept: bool,
) -> tuple[np.ndarray, float]:
    """The same for a likelihood: Newton steps, each halved until the loss falls."""
    exact: Any = _EXACT[family]
    ones = np.ones((part.shape[0], 1 if intercept else 0))
    rows = np.hstack([part, ones])
    ridge = np.concatenate([ridge, np.zeros(ones.shape[1])])
    point = np.concatenate([start[0], np.full(ones.shape[1], start[1])])

    def value(point: np.ndarray) -> float:
        eta = rows @ point
        terms = exact.cumulant(eta) - response * eta
        return float(weights @ terms + ridge @ point**2 / 2)

    best = value(point)
    for _ in range(_NEWTON_STEPS):
        eta = rows @ point
        residual = weights * (exact.mean(eta) - response)
        gradient = residual @ rows + ridge * point
        bend = weights * exact.variance(eta)
        matrix = (rows * bend[:, None]).T @ rows + np.diag(ridge)
        step = np.linalg.lstsq(matrix, gradient, rcond=None)[0]
        length = 1.0
        while value(point - length * step) > best and length > 1e-8:
            length /= 2
        point = point - length * step
        before, best = best, min(best, value(point))
        if before - best <= _NEWTON_TOL * max(abs(before), 1e-300):
            break
    return point[: part.shape[1]], float(point[-1]) if intercept else 0.0
