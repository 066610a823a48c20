"""Least squares with an intercept, weights and columns of any unit.

Legend: m examples, n columns, t responses.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental.sparse import BCOO
from jaxtyping import Array, Float

from sparserec import _tree
from sparserec.quadratic import LowRank, QuadraticModel
from sparserec.recovery._joint import JointRows
from sparserec.recovery._rows import Design, WeightedRows


class Regression(NamedTuple):
    """A least-squares problem in standard form, and the way back.

    Attributes:
      model: for every solver and for `path`, over weights of shape `(n,)`; for
        several responses `(n, t)`, whose rows are the features.
      mean: of the columns, zeros without an intercept, shape `(n,)`.
      scale: by which centered columns were divided, ones without standardization,
        shape `(n,)`.
      offset: mean of the response, zero without an intercept, shape `()` or `(t,)`.
    """

    model: QuadraticModel
    mean: Float[Array, "n"]
    scale: Float[Array, "n"]
    offset: Float[Array, "..."]

    def undo(self, params: Float[Array, "*K n"]) -> tuple[Array, Array]:
        """Coefficients and intercept in the units of the data.

        Args:
          params: weights of the model, shape `(n,)` or `(K, n)`; for several responses
            `(n, t)` or `(K, n, t)`.

        Returns:
          Coefficients of the same shape, and intercepts of shape `()` or `(K,)`; for
          several responses `(t,)` or `(K, t)`.
        """
        outputs = self.offset.ndim
        before = (1,) * (params.ndim - 1 - outputs)
        coefficients = params / self.scale.reshape(*before, -1, *(1,) * outputs)
        if outputs:
            shift = jnp.einsum("n,...nt->...t", self.mean, coefficients)
            return coefficients, self.offset.reshape(*before, -1) - shift
        return coefficients, self.offset - coefficients @ self.mean

    def groups(self) -> np.ndarray:
        """Labels under which a feature is in for all responses or for none.

        Returns:
          Integers shaped like the weights, for `path` and the pursuit family.
        """
        shape = self.model.center.shape
        features = np.arange(shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
        return np.broadcast_to(features, shape)


def regression(
    design: Float[Array, "m n"] | BCOO,
    response: Float[Array, "m *t"],
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
        `jax.experimental.sparse.BCOO` with two sparse axes; a sparse matrix of SciPy is
        converted to one.
      response: $y$, shape `(m,)`, floating; or several, shape `(m, t)`, whose squares
        are added up. Give `path` the `groups()` of the answer, and k counts features.
      weights: $\omega \ge 0$, shape `(m,)`; ones if `None`.
      intercept: whether there is a $\beta_0$; static.
      standardize: whether columns are divided by their standard deviation (their root
        mean square without an intercept); static. Constant columns are left alone.

    Returns:
      A `Regression`; its `undo` turns weights into coefficients and intercept.

    Raises:
      ValueError: shapes do not match; NaN or infinities (says in which columns).
      TypeError: integer input; convert it first.
    """
    if not isinstance(design, BCOO) and hasattr(design, "tocoo"):
        design = BCOO.from_scipy_sparse(design)
    _check(design, response, weights)
    wide = _tree.dtype(_tree.to_working_precision((_values(design), response)))
    response = response.astype(wide)
    share = jnp.ones(response.shape[:1], wide)
    if weights is not None:
        share = weights.astype(wide)
    total = jnp.sum(share)
    size = design.shape[1]
    matrix = _as_type(design, wide)
    plain = Design(matrix, jnp.zeros(size, wide), jnp.ones(size, wide))
    mean, offset = plain.mean, jnp.zeros(response.shape[1:], wide)
    if intercept:
        mean = plain.transposed_times(share) / total
        offset = jnp.tensordot(share, response, 1) / total
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
    rest = response - (offset[None, :] if offset.ndim else offset)
    bent = share.reshape(-1, *(1,) * (response.ndim - 1)) * rest
    center = jnp.zeros((size, *response.shape[1:]), wide)
    slope = standard.transposed_times(bent.T)
    model = QuadraticModel(
        center,
        jnp.vdot(bent, rest) / 2,
        -slope.T,
        _curvature(standard, share, center),
        least=jnp.zeros((), wide),
    )
    return Regression(model, mean, scale, offset)


def _curvature(
    design: Design, share: Float[Array, "m"], center: Float[Array, "n *t"]
) -> LowRank | WeightedRows | JointRows:
    layout = _tree.layout(center)
    if center.ndim > 1:
        return JointRows(design, share, None, jnp.zeros_like(center), layout)
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
    if (
        design.ndim != 2
        or response.ndim not in (1, 2)
        or response.shape[:1] != design.shape[:1]
    ):
        raise ValueError(
            "`design` must have shape (m, n) and `response` shape (m,), or (m, t) for "
            f"several; got {design.shape} and {response.shape}."
        )
    if weights is not None and weights.shape != response.shape[:1]:
        raise ValueError(
            f"`weights` must have shape {response.shape[:1]}, one for every example; "
            f"got {weights.shape}."
        )
    for name, x in (("design", design), ("response", response), ("weights", weights)):
        if x is not None and not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"`{name}` has dtype {x.dtype}; convert it to float.")
    _check_finite(design, response, weights)
    if isinstance(design, BCOO) and design.n_sparse != 2:
        raise ValueError(
            "a BCOO `design` must have two sparse axes, got "
            f"`n_sparse={design.n_sparse}`; build it with `BCOO.fromdense(x)`."
        )


def _check_finite(design, response, weights) -> None:
    """Refuses NaN and infinities, and says where they are; traced data pass."""
    if isinstance(_values(design), Tracer) or isinstance(response, Tracer):
        return
    bad = ~np.isfinite(np.asarray(_values(design)))
    if bad.any():
        if isinstance(design, BCOO):
            columns = np.unique(np.asarray(design.indices)[bad, 1])
        else:
            columns = np.flatnonzero(bad.any(axis=0))
        raise ValueError(
            f"`design` holds {int(bad.sum())} NaN or infinities, in {columns.size} of "
            f"{design.shape[1]} columns, the first of them {columns[:10].tolist()}. "
            "Drop or impute what is missing."
        )
    for name, x in (("response", response), ("weights", weights)):
        if x is None or isinstance(x, Tracer):
            continue
        rows = np.flatnonzero(
            ~np.isfinite(np.asarray(x)).reshape(x.shape[0], -1).all(1)
        )
        if rows.size:
            raise ValueError(
                f"`{name}` is NaN or infinite for {rows.size} of {x.shape[0]} "
                f"examples, the first of them {rows[:10].tolist()}. Drop them."
            )
