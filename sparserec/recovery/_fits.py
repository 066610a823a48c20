"""The fits behind the estimators: from NumPy data to paths.

The search runs in JAX's default precision, the refit on the support that is chosen
in double precision with NumPy (`_refits.py`).

Legend: m examples, n columns, t outputs, f folds, K budgets.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.sparse import BCOO
from jaxtyping import Array, Float

from sparserec._types import Scalar
from sparserec.recovery._joint import JointCurvature, JointLikelihood
from sparserec.recovery._likelihoods import Family, Likelihood, LikelihoodCurvature
from sparserec.recovery._path import path
from sparserec.recovery._record import Path
from sparserec.recovery._regression import Regression, regression
from sparserec.recovery._resample import over_fits
from sparserec.recovery._rows import Design


class Choices(NamedTuple):
    """What a fit depends on besides the data; static but for `l2`."""

    family: Family | None  # None for least squares
    k_max: int
    outputs: int  # responses or classes that share features; 0 for a plain vector
    intercept: bool
    standardize: bool


class Bounds(NamedTuple):
    """Of the coefficients, in the units of the columns given, shape `(n,)`."""

    lower: Float[Array, "n"]
    upper: Float[Array, "n"]


class Weights(NamedTuple):
    """Coefficients along a path, in the units of the data."""

    coefficients: Float[Array, "K n *t"]
    intercept: Float[Array, "K *t"]


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
    response: Float[Array, "m *t"],
    weights: Float[Array, "m"],
    l2: Scalar,
    bounds: Bounds | None,
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
    params = {"coefficients": standard.model.center}
    limits: dict[str, Any] = {}
    if bounds is not None:
        wide = jax.tree.map(lambda b: _over_outputs(b * standard.scale, params), bounds)
        limits = dict(wide._asdict())
    if choices.family is None:
        return _least_squares(standard, l2, limits, choices)
    groups = {"coefficients": standard.groups()}
    if choices.intercept:
        params["intercept"] = jnp.zeros_like(standard.offset)
        groups["intercept"] = np.zeros(standard.offset.shape, int)
        nothing = jnp.full_like(standard.offset, jnp.inf)
        signs = {"lower": -nothing, "upper": nothing}
        limits = {
            name: {"coefficients": limits[name], "intercept": signs[name]}
            for name in limits
        }
    else:
        limits = {name: {"coefficients": x} for name, x in limits.items()}
    design = Design(matrix, standard.mean, 1 / standard.scale, choices.intercept)
    joint = choices.outputs > 0
    found = path(
        JointLikelihood() if joint else Likelihood(choices.family),
        params,
        choices.k_max,
        args=(design, response, weights, l2),
        curvature=JointCurvature() if joint else LikelihoodCurvature(choices.family),
        groups=groups if joint else None,
        prunable={name: name == "coefficients" for name in params},
        **limits,
    )
    centered = standard._replace(offset=jnp.zeros_like(standard.offset))
    coefficients, shift = centered.undo(found.params["coefficients"])
    if not choices.intercept:
        return found, Weights(coefficients, jnp.zeros_like(shift))
    return found, Weights(coefficients, found.params["intercept"] + shift)


def _over_outputs(bound: Float[Array, "n"], params: dict) -> Float[Array, "n *t"]:
    shape = params["coefficients"].shape
    return jnp.broadcast_to(bound.reshape(-1, *(1,) * (len(shape) - 1)), shape)


def _least_squares(
    standard: Regression, l2: Scalar, limits: dict[str, Any], choices: Choices
) -> tuple[Path, Weights]:
    model, options = standard.model, dict(limits)
    if choices.outputs:
        rows: Any = model.curvature
        ridge = jnp.full_like(rows.ridge, 2) * l2
        curvature = dataclasses.replace(rows, ridge=ridge)
        model = dataclasses.replace(model, curvature=curvature)
        options["groups"] = standard.groups()
    else:
        options["l2"] = l2
    found = path(model, model.center, choices.k_max, **options)
    return found, Weights(*standard.undo(found.params))


@functools.partial(jax.jit, static_argnames="choices")
def held_out(
    matrix: Array | BCOO,
    response: Float[Array, "m *t"],
    weights: Float[Array, "m"],
    left_out: Float[Array, "f m"],
    l2: Scalar,
    bounds: Bounds | None,
    choices: Choices,
) -> Float[Array, "f K"]:
    """Mean loss on each fold, given as ones, of the path that is fitted without it."""

    def one(fold: Float[Array, "m"]) -> Float[Array, "K"]:
        _, found = fit_path(matrix, response, weights * (1 - fold), l2, bounds, choices)
        share = weights * fold

        def loss(weights: Weights) -> Scalar:
            eta = matrix @ weights.coefficients
            if choices.outputs:
                eta = eta + weights.intercept[None, :]
            else:
                eta = eta + weights.intercept
            return jnp.vdot(share, _losses(choices, eta, response)) / jnp.sum(share)

        return jax.lax.map(loss, found)

    return over_fits(one, left_out)


def _losses(
    choices: Choices, eta: Float[Array, "m *t"], response: Float[Array, "m *t"]
) -> Float[Array, "m"]:
    """Loss of every example; the same as the paths minimise."""
    if choices.family is None:
        squares = jnp.square(eta - response) / 2
        return jnp.sum(squares, axis=1) if choices.outputs else squares
    if choices.outputs:
        return jax.nn.logsumexp(eta, axis=1) - jnp.sum(response * eta, axis=1)
    return choices.family.cumulant(eta) - response * eta
