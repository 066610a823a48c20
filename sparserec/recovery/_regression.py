"""Least squares with an intercept, weights and columns of any unit.

Legend: m examples, n columns.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.sparse import BCOO
from jaxtyping import Array, Float

from sparserec import _tree
from sparserec._types import Scalar
from sparserec.quadratic import LowRank, QuadraticModel
from sparserec.recovery._rows import Design, WeightedRows


class Regression(NamedTuple):
    """A least-squares problem in standard form, and the way back.

    Attributes:
      model: for every solver and for `path`, over weights of shape `(n,)`.
      mean: of the columns, zeros without an intercept, shape `(n,)`.
      scale: by which centered columns were divided, ones without standardization,
        shape `(n,)`.
      offset: mean of the response, zero without an intercept, shape `()`.
    """

    model: QuadraticModel
    mean: Float[Array, "n"]
    scale: Float[Array, "n"]
    offset: Scalar

    def undo(self, params: Float[Array, "*K n"]) -> tuple[Array, Array]:
        """Coefficients and intercept in the units of the data.

        Args:
          params: weights of the model, shape `(n,)` or `(K, n)`.

        Returns:
          Coefficients of the same shape, and intercepts of shape `()` or `(K,)`.
        """
        coefficients = params / self.scale.reshape((1,) * (params.ndim - 1) + (-1,))
        return coefficients, self.offset - coefficients @ self.mean


def regression(
    design: Float[Array, "m n"] | BCOO,
    response: Float[Array, "m"],
    *,
    weights: Float[Array, "m"] | None = None,
    intercept: bool = True,
    standardize: bool = True,
) -> Regression:
    r"""Weighted least squares with an intercept, as a model over the other weights.

    $$\tfrac12 \sum_i \omega_i (y_i - \beta_0 - x_i^\top \beta)^2$$

    The intercept is eliminated (columns and response are centered) and columns are
    divided by their weighted standard deviation, so that none is preferred for its
    unit. A sparse design is not centered in memory; a correction of rank one does it.

    Args:
      design: $X$, shape `(m, n)`, floating, an array or a
        `jax.experimental.sparse.BCOO` with two sparse axes.
      response: $y$, shape `(m,)`, floating.
      weights: $\omega \ge 0$, shape `(m,)`; ones if `None`.
      intercept: whether there is a $\beta_0$; static.
      standardize: whether columns are divided by their standard deviation (their root
        mean square without an intercept); static. Constant columns are left alone.

    Returns:
      A `Regression`; its `undo` turns weights into coefficients and intercept.

    Raises:
      ValueError: shapes do not match.
      TypeError: integer input; convert it first.
    """
    _check(design, response, weights)
    wide = _tree.dtype(_tree.to_working_precision((_values(design), response)))
    response = response.astype(wide)
    share = jnp.ones_like(response) if weights is None else weights.astype(wide)
    total = jnp.sum(share)
    size = design.shape[1]
    matrix = _as_type(design, wide)
    plain = Design(matrix, jnp.zeros(size, wide), jnp.ones(size, wide))
    mean, offset = plain.mean, jnp.zeros((), wide)
    if intercept:
        mean = plain.transposed_times(share) / total
        offset = jnp.vdot(share, response) / total
    if not isinstance(matrix, BCOO):
        matrix = matrix - mean[None, :]
    shift = mean if isinstance(matrix, BCOO) else jnp.zeros_like(mean)
    centered = Design(matrix, shift, plain.scale)
    scale = plain.scale
    if standardize:
        spread = jnp.sqrt(centered.energy(share) / total)
        # What is left of a constant column is rounding.
        level = jnp.sqrt(jnp.finfo(wide).eps) * jnp.abs(mean)
        scale = jnp.where(spread > level, spread, 1)
    standard = Design(matrix, shift, 1 / scale)
    rest = response - offset
    model = QuadraticModel(
        jnp.zeros(size, wide),
        jnp.vdot(share * rest, rest) / 2,
        -standard.transposed_times(share * rest),
        _curvature(standard, share),
    )
    return Regression(model, mean, scale, offset)


def _curvature(design: Design, share: Float[Array, "m"]) -> LowRank | WeightedRows:
    center = jnp.zeros_like(design.scale)
    layout = _tree.layout(center)
    if isinstance(design.matrix, BCOO):
        return WeightedRows(design, share, center, layout)
    rows = design.matrix * design.scale[None, :] * jnp.sqrt(share)[:, None]
    return LowRank(rows, jnp.zeros((), rows.dtype), None, layout)


def _values(design: Array | BCOO) -> Array:
    return design.data if isinstance(design, BCOO) else design


def _as_type(design: Array | BCOO, wide) -> Array | BCOO:
    if isinstance(design, BCOO):
        data = design.data.astype(wide)
        return BCOO((data, design.indices), shape=design.shape)
    return design.astype(wide)


def _check(design, response, weights) -> None:
    if design.ndim != 2 or response.shape != design.shape[:1]:
        raise ValueError(
            "`design` must have shape (m, n) and `response` shape (m,); got "
            f"{design.shape} and {response.shape}."
        )
    if weights is not None and weights.shape != response.shape:
        raise ValueError(
            f"`weights` must have shape {response.shape}, one for every example; got "
            f"{weights.shape}."
        )
    for name, x in (("design", design), ("response", response), ("weights", weights)):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"`{name}` has dtype {x.dtype}; convert it to float.")
    if isinstance(design, BCOO) and design.n_sparse != 2:
        raise ValueError(
            "a BCOO `design` must have two sparse axes, got "
            f"`n_sparse={design.n_sparse}`; build it with `BCOO.fromdense(x)`."
        )
