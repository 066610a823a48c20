"""Quadratic models from arrays: least squares, and one builder per curvature.

Half precision is raised to float32: there is no factorisation of it, and its range
is too small for squares.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparserec import _tree
from sparserec._linsolve import matmul
from sparserec._types import Params, Scalar
from sparserec.quadratic._explicit import (
    GRAM_LIMIT,
    BlockDiagonal,
    Dense,
    Diagonal,
    LowRank,
)
from sparserec.quadratic._model import Curvature, QuadraticModel


def _model(
    curvature: Curvature, center: Params, gradient: Params | None, value: Scalar | float
) -> QuadraticModel:
    """A model around `center`; a missing gradient is zero."""
    center, gradient = _tree.to_working_precision((center, gradient))
    slope = _tree.zeros_like(center) if gradient is None else gradient
    return QuadraticModel(
        center, jnp.asarray(value, _tree.dtype(center)), slope, curvature
    )


def _check_width(width: int, center: Params, name: str) -> None:
    size = _tree.size(center)
    if width != size:
        raise ValueError(
            f"`{name}` must have one column for each of the {size} entries of "
            f"`center`, got {width}."
        )


def dense(
    matrix: Float[Array, "n n"],
    center: Params,
    gradient: Params | None = None,
    value: Scalar | float = 0.0,
) -> QuadraticModel:
    r"""$v + \langle g, w-c\rangle + \frac12 (w-c)^\top H (w-c)$ with a stored $H$.

    Args:
      matrix: symmetric $H$, shape `(n, n)`, over the entries of `center` in tree
        order.
      center: $c$, any pytree of floating arrays with n entries.
      gradient: $g$, shaped like `center`; zero if `None`.
      value: $v$, a scalar.

    Returns:
      The model.

    Raises:
      ValueError: `matrix` is not square or its width is not n.
    """
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"`matrix` must be square, got shape {matrix.shape}.")
    _check_width(matrix.shape[1], center, "matrix")
    matrix = _tree.to_working_precision(matrix)
    return _model(Dense(matrix, _tree.layout(center)), center, gradient, value)


def diagonal(
    entries: Params,
    center: Params,
    gradient: Params | None = None,
    value: Scalar | float = 0.0,
) -> QuadraticModel:
    """A model with a diagonal curvature.

    Args:
      entries: diagonal of $H$, shaped like `center`.
      center: the point around which the model is expanded.
      gradient: shaped like `center`; zero if `None`.
      value: loss at the center, a scalar.

    Returns:
      The model.

    Raises:
      ValueError: `entries` and `center` have different layouts.
    """
    if _tree.layout(entries) != _tree.layout(center):
        raise ValueError(
            "`entries` must have the structure and shapes of `center`; got "
            f"{_tree.layout(entries)} and {_tree.layout(center)}."
        )
    entries = _tree.to_working_precision(entries)
    return _model(Diagonal(entries), center, gradient, value)


def block_diagonal(
    blocks: Float[Array, "b w w"],
    center: Params,
    gradient: Params | None = None,
    value: Scalar | float = 0.0,
) -> QuadraticModel:
    """A model with square blocks of equal width along the diagonal.

    Args:
      blocks: shape `(b, w, w)`, each symmetric; block i governs entries
        `i * w` to `(i + 1) * w - 1` in tree order; the last one may reach beyond
        the n entries and is zero there.
      center: the point around which the model is expanded, n entries.
      gradient: shaped like `center`; zero if `None`.
      value: loss at the center, a scalar.

    Returns:
      The model.

    Raises:
      ValueError: the blocks are not square or do not just cover the n entries.
    """
    size = _tree.size(center)
    if blocks.ndim != 3 or blocks.shape[1] != blocks.shape[2]:
        raise ValueError(f"`blocks` must have shape (b, w, w), got {blocks.shape}.")
    if not 0 <= blocks.shape[0] * blocks.shape[1] - size < blocks.shape[1]:
        raise ValueError(
            f"`blocks` of shape {blocks.shape} do not just cover the {size} entries "
            f"of `center`: use ceil({size} / {blocks.shape[1]}) blocks."
        )
    curvature = BlockDiagonal(_tree.to_working_precision(blocks), _tree.layout(center))
    return _model(curvature, center, gradient, value)


def low_rank(
    rows: Float[Array, "m n"],
    center: Params,
    gradient: Params | None = None,
    value: Scalar | float = 0.0,
    *,
    ridge: Scalar | float = 0.0,
) -> QuadraticModel:
    r"""A model with $H = X^\top X + \rho I$ from m rows.

    Args:
      rows: $X$, shape `(m, n)`, columns in the tree order of `center`. Scale them
        (for example by $1/\sqrt m$) if a mean is meant.
      center: the point around which the model is expanded, n entries.
      gradient: shaped like `center`; zero if `None`.
      value: loss at the center, a scalar.
      ridge: $\rho \ge 0$, in units of curvature.

    Returns:
      The model. Up to 2,048 columns its Gram matrix is computed once, here.

    Raises:
      ValueError: `rows` is no matrix or its width is not n.
    """
    if rows.ndim != 2:
        raise ValueError(f"`rows` must be a matrix (m, n), got shape {rows.shape}.")
    _check_width(rows.shape[1], center, "rows")
    rows = _tree.to_working_precision(rows)
    # A Gram matrix pays as soon as it is not wider than the rows are many, and is
    # what makes supports wider than the rows exact.
    gram = matmul(rows.T, rows) if rows.shape[1] <= GRAM_LIMIT else None
    curvature = LowRank(
        rows, jnp.asarray(ridge, rows.dtype), gram, _tree.layout(center)
    )
    return _model(curvature, center, gradient, value)


def least_squares(
    design: Float[Array, "m n"],
    response: Float[Array, "m"],
    ridge: Scalar | float = 0.0,
) -> QuadraticModel:
    r"""The loss $\frac12\|y - Xw\|^2 + \frac\rho2\|w\|^2$ as a model around zero.

    Args:
      design: $X$, shape `(m, n)`, floating.
      response: $y$, shape `(m,)`, floating.
      ridge: $\rho \ge 0$, in units of curvature.

    Returns:
      A model that can be given to every solver in place of a loss, with params of
      shape `(n,)`.

    Raises:
      ValueError: shapes do not match.
      TypeError: integer or sparse input (says what to write).
    """
    if not isinstance(design, jax.Array | np.ndarray):
        raise TypeError(
            f"`design` must be a dense array, got {type(design).__name__}; for sparse "
            "ones write `sparserec.recovery.regression(X, y).model`."
        )
    if design.ndim != 2 or response.shape != design.shape[:1]:
        raise ValueError(
            "`design` must have shape (m, n) and `response` shape (m,); got "
            f"{design.shape} and {response.shape}."
        )
    for name, x in (("design", design), ("response", response)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"`{name}` has dtype {x.dtype}; convert it to float.")
    wide = _tree.dtype(_tree.to_working_precision((design, response)))
    design, response = design.astype(wide), response.astype(wide)
    half = jnp.asarray(0.5, wide)
    model = low_rank(
        design,
        jnp.zeros(design.shape[1], wide),
        -matmul(response, design),
        half * jnp.vdot(response, response),
        ridge=ridge,
    )
    return dataclasses.replace(model, least=jnp.zeros((), wide))
