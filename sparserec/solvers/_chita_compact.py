r"""Backsolve on the columns of a support alone, copied together.

With $d = \beta - c$ fixed off the support $Q$, the model is one of $\beta_Q$ with the
rows $X_Q$ and an offset $u_0 = X_{Q^c} d_{Q^c}$ in every product. Shapes are static and
the support is not: a few sizes are compiled, and the smallest that fits is used.

Legend: m rows, n weights, c columns copied.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec._linsolve import matmul
from sparserec._types import Scalar
from sparserec.solvers._chita_backsolve import (
    Split,
    backsolve,
    solve_normal,
    split_gradient,
)
from sparserec.solvers._chita_rows import (
    Point,
    RowProblem,
    gather_block,
    indices,
    kernel,
)

_LEAST = 1 << 20  # entries of the rows: a pass over fewer is no work worth a program
_STEPS = 4  # sizes up to the number of rows, each two thirds of the next
_SHARES = 8, 4  # of all columns, one over these, are the sizes above


def sizes(m: int, n: int) -> list[int]:
    """Numbers of columns for which a program is compiled, ascending; static.

    Up to the number of rows they lie close together, for there the work is cubic in
    them. None for small problems, and none of more than half the columns.
    """
    if m * n < _LEAST:
        return []
    few = [round(m * (2 / 3) ** i) for i in range(_STEPS)]
    more = [n // share for share in _SHARES if n // share > m]
    return sorted({size for size in (*few, *more) if 0 < size <= n // 2})


class Held(NamedTuple):
    r"""A problem on some of its columns.

    Attributes:
      problem: the rows there; zeros pad them.
      index: which columns, ascending; padded with n.
      lost: half the squared distance from the center to the support, shape `()`.
      gram: $X_Q^\top X_Q$ where there are no more columns than rows, else the kernel
        $X_Q X_Q^\top$.
      split: the gradient on the support by rows; `None` for the first of these.
    """

    problem: RowProblem
    index: Int[Array, "c"]
    lost: Scalar
    gram: Float[Array, "s s"]
    split: Split | None


def hold(problem: RowProblem, point: Point, size: int, ridge: Scalar) -> Held:
    """Copies the columns of a support, of at most `size` entries, together.

    Args:
      problem: the model.
      point: a point on the support.
      size: columns there is room for; static.
      ridge: the least that will be added to the problem's.

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
    if size <= problem.rows.shape[0]:
        return Held(small, index, lost, _gram(columns), None)
    gram = kernel(problem.rows, point.mask)
    return Held(small, index, lost, gram, split_gradient(small, ridge))


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
    if held.split is None:
        point, status = solve_normal(problem, held.gram)
    else:
        inside = held.index < mask.shape[0]
        point, status = backsolve(problem, inside, held.split, held.gram)
    params = jnp.zeros(mask.shape, point.params.dtype)
    params = params.at[held.index].set(point.params, mode="drop")
    return point._replace(params=params, mask=mask), status
