r"""Backsolve on the columns of a small support alone, copied together.

With $d = \beta - c$ fixed off the support $Q$, the model is one of $\beta_Q$ with the
rows $X_Q$ and an offset $u_0 = X_{Q^c} d_{Q^c}$ in every product. Shapes are static and
the support is not: one size is compiled, for supports smaller than the rows are many.

Legend: m rows, n weights, c columns copied.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec._linsolve import matmul
from sparserec._types import Scalar
from sparserec.solvers._chita_backsolve import solve_normal
from sparserec.solvers._chita_rows import Point, RowProblem, gather_block, indices

_LEAST = 1 << 20  # entries of the rows: a pass over fewer is no work worth a program


def capacity(m: int, n: int) -> int:
    """Columns for which there is room; zero where a problem is small; static.

    Two thirds of the rows: beyond, the matrix over the rows is as cheap. A second,
    smaller size would save a few milliseconds and take a second to compile.
    """
    size = 2 * m // 3
    return size if m * n >= _LEAST and size <= n // 2 else 0


class Held(NamedTuple):
    r"""A problem on some of its columns.

    Attributes:
      problem: the rows there; zeros pad them.
      index: which columns, ascending; padded with n.
      lost: half the squared distance from the center to the support, shape `()`.
      gram: $X_Q^\top X_Q$, shape `(c, c)`.
    """

    problem: RowProblem
    index: Int[Array, "c"]
    lost: Scalar
    gram: Float[Array, "c c"]


def hold(problem: RowProblem, point: Point, size: int) -> Held:
    """Copies the columns of a support, of at most `size` entries, together.

    Args:
      problem: the model.
      point: a point on the support.
      size: columns there is room for; static.

    Returns:
      The problem on the support.
    """
    index, _ = indices(point.mask, size)
    # Without the barrier every use would gather them again.
    columns = jax.lax.optimization_barrier(gather_block(problem.rows, index))

    def take(vector: Array) -> Array:
        return vector.at[index].get(mode="fill", fill_value=0)

    center = take(problem.center)
    away = jnp.where(point.mask, 0, -problem.center)
    # The point's product is known: what its columns on the support add is taken away.
    inside = matmul(columns, take(point.params) - center)
    small = RowProblem(
        rows=columns,
        ridge=problem.ridge,
        center=center,
        gradient=take(problem.gradient),
        value=problem.value + jnp.vdot(problem.gradient, away),
        layout=problem.layout,
        offset=point.product - inside,
    )
    lost = jnp.asarray(0.5, center.dtype) * jnp.vdot(away, away)
    return Held(small, index, lost, _gram(columns))


def _gram(columns: Float[Array, "m c"]) -> Float[Array, "c c"]:
    """Three quarters of the products: one of two blocks off the diagonal is copied."""
    half = columns.shape[1] // 2
    left, right = columns[:, :half], columns[:, half:]
    side = matmul(right.T, left)
    top = jnp.concatenate([matmul(left.T, left), side.T], axis=1)
    return jnp.concatenate([top, jnp.concatenate([side, matmul(right.T, right)], 1)])


def solve(
    held: Held, mask: Bool[Array, "n"], ridge: Scalar
) -> tuple[Point, Int[Array, ""]]:
    """The minimiser of the model with a ridge on its support, as a flat point.

    Args:
      held: from `hold`.
      mask: the support.
      ridge: added to that of the problem.

    Returns:
      As for `backsolve`.
    """
    total = held.problem.ridge + ridge
    value = held.problem.value + total * held.lost
    problem = dataclasses.replace(held.problem, ridge=total, value=value)
    point, status = solve_normal(problem, held.gram)
    params = jnp.zeros(mask.shape, point.params.dtype)
    params = params.at[held.index].set(point.params, mode="drop")
    return point._replace(params=params, mask=mask), status
