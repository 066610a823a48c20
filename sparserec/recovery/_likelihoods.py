"""Negative log-likelihoods of generalized linear models, with their curvature.

Legend: m examples, n columns.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparserec import _tree
from sparserec._types import LossFn, Params, Scalar
from sparserec.quadratic import QuadraticModel
from sparserec.recovery._rows import Design, WeightedRows

# A linear predictor beyond this is a mean that no data have, and overflows.
_STEEPEST = 30.0


@dataclasses.dataclass(frozen=True)
class Family:
    """A one-parameter exponential family with its canonical link; static.

    Attributes:
      cumulant: elementwise; its derivative is the mean.
      mean: of the response, from the linear predictor.
      variance: of the response, from the linear predictor.
    """

    cumulant: Callable[[Any], Any]
    mean: Callable[[Any], Any]
    variance: Callable[[Any], Any]


def _logistic_variance(eta: Array) -> Array:
    return jax.nn.sigmoid(eta) * jax.nn.sigmoid(-eta)


def _bounded_exp(eta: Array) -> Array:
    return jnp.exp(jnp.minimum(eta, _STEEPEST))


LOGISTIC = Family(jax.nn.softplus, jax.nn.sigmoid, _logistic_variance)
POISSON = Family(_bounded_exp, _bounded_exp, _bounded_exp)


@dataclasses.dataclass(frozen=True)
class Likelihood:
    r"""$\sum_i \omega_i (b(\eta_i) - y_i \eta_i) + \lambda\|\beta\|^2$; static.

    Args of the loss: the design A, the response, the weights and $\lambda$. Params are
    `{"coefficients": (n,)}`, and `"intercept"` where the design has one.
    """

    family: Family

    def __call__(
        self,
        params: Params,
        design: Design,
        response: Float[Array, "m"],
        weights: Float[Array, "m"],
        l2: Scalar,
    ) -> Scalar:
        """The penalised negative log-likelihood, up to a constant of the data."""
        eta = design.times(_tree.flatten(params))
        terms = self.family.cumulant(eta) - response * eta
        penalty = l2 * jnp.vdot(params["coefficients"], params["coefficients"])
        return jnp.vdot(weights, terms) + penalty


@dataclasses.dataclass(frozen=True)
class LikelihoodCurvature:
    """The exact local model of a `Likelihood`, over its rows; static."""

    family: Family

    def __call__(self, loss_fn: LossFn, params: Params, args: tuple) -> QuadraticModel:
        """The local quadratic model at `params`."""
        design, response, weights, l2 = args
        flat = _tree.flatten(params)
        eta = design.times(flat)
        ridge = 2 * l2 * jnp.ones_like(flat)
        if design.intercept:
            ridge = ridge.at[-1].set(0)
        slope = design.transposed_times(weights * (self.family.mean(eta) - response))
        layout = _tree.layout(params)
        return QuadraticModel(
            params,
            loss_fn(params, *args),
            layout.split(slope + ridge * flat),
            WeightedRows(design, weights * self.family.variance(eta), ridge, layout),
        )
