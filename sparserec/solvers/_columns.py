r"""The problem that searches over supports solve, and its columns.

$$\min_w \tfrac12 w^\top H w - b^\top w + \lambda_0 \|w\|_0$$

over vectors with budgets on the number of nonzero entries. Everything a search needs
from a curvature is a few columns of $H$, its diagonal, and one product a refit.

Legend: n weights, s slots (places for members of a support), g groups of a budget.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparserec import _tree
from sparserec._linsolve import matmul
from sparserec._types import Scalar
from sparserec.budget import Budget
from sparserec.quadratic import Curvature, Dense, LowRank, QuadraticModel

_SIZES = (16, 24, 32, 48, 64, 96, 128)


class Problem(NamedTuple):
    r"""A sparse quadratic problem over one flat vector.

    Attributes:
      curvature: $H$ without the ridge.
      template: a pytree with the structure, shapes and dtypes of the params.
      linear: $b$, shape `(n,)`, in units of loss per unit of weight.
      diagonal: diagonal of $H$ with the ridge, shape `(n,)`.
      ridge: added to the diagonal of $H$, shape `()`.
      penalty: $\lambda_0$, in units of loss, shape `()`.
      group: which budget governs an entry, int32, shape `(n,)`; -1 where it is
        never pruned.
      capacity: weights that each group may keep, int32, shape `(g,)`.
      constant: value at zero, shape `()`.
      lower: least values, shape `(n,)`; `None` for no bounds.
      upper: largest values, shape `(n,)`; `None` for no bounds.
    """

    curvature: Curvature
    template: object
    linear: Float[Array, "n"]
    diagonal: Float[Array, "n"]
    ridge: Scalar
    penalty: Scalar
    group: Int[Array, "n"]
    capacity: Int[Array, "g"]
    constant: Scalar
    lower: Float[Array, "n"] | None = None
    upper: Float[Array, "n"] | None = None


def make_problem(
    model: QuadraticModel,
    budget: Budget,
    *,
    penalty: Scalar | float = 0.0,
    l2: Scalar | float = 0.0,
    around_zero: bool = False,
) -> Problem:
    r"""The problem $q(w) + \lambda_0\|w\|_0 + \lambda_2\|w\|^2$ of a model $q$.

    Args:
      model: local model with a curvature; its center is any point.
      budget: weights to keep.
      penalty: $\lambda_0 \ge 0$, in units of loss, shape `()`.
      l2: $\lambda_2 \ge 0$, in units of curvature, shape `()`.
      around_zero: whether the center is known to be zero: there is less to compile.

    Returns:
      The problem, in the widest dtype of the center.
    """
    wide = _tree.dtype(model.center)
    gradient = _tree.flatten(model.gradient).astype(wide)
    ridge = 2 * jnp.asarray(l2, wide)
    diagonal = flat_diagonal(model.curvature).astype(wide)
    linear, constant = -gradient, model.value.astype(wide)
    if not around_zero:
        center = _tree.flatten(model.center)
        # A model around zero, such as a regression, needs no pass over the data here.
        product = jax.lax.cond(
            jnp.any(center != 0),
            lambda: _tree.flatten(model.curvature.matvec(model.center)).astype(wide),
            lambda: jnp.zeros_like(center),
        )
        linear += product
        half = jnp.asarray(0.5, wide)
        constant -= jnp.vdot(gradient, center) - half * jnp.vdot(center, product)
    return Problem(
        curvature=model.curvature,
        template=model.center,
        linear=linear,
        diagonal=diagonal + ridge,
        ridge=ridge,
        penalty=jnp.asarray(penalty, wide),
        group=group_of_entries(budget, _tree.layout(model.center)),
        capacity=budget.counts,
        constant=constant,
    )


def flat_diagonal(curvature: Curvature) -> Float[Array, "n"]:
    """Diagonal of $H$ in tree order, shape `(n,)`."""
    if isinstance(curvature, LowRank):
        rows = curvature.rows
        start = jnp.full(rows.shape[1], curvature.ridge, rows.dtype)
        return over_rows(jnp.add, jnp.square, start, rows)
    return _tree.flatten(curvature.diagonal())


def rounded(count: int, limit: int) -> int:
    """The next of a few sizes, so that neighboring counts share a compilation."""
    for size in _SIZES:
        if size >= count:
            return min(size, limit)
    step = 64
    return min(-(-count // step) * step, limit)


def group_of_entries(budget: Budget, layout: _tree.Layout) -> Int[Array, "n"]:
    """Index of the budget group of every entry; -1 where it is never pruned."""
    sizes = [math.prod(shape) for shape in layout.shapes]
    return jnp.asarray(np.repeat(budget.groups, sizes), jnp.int32)


def over_rows(
    combine: Callable[[Array, Array], Array],
    term: Callable[..., Array],
    start: Float[Array, "n"],
    *rows: Array,
) -> Float[Array, "n"]:
    """Reduces `term(row of each)` over the first axis into one vector.

    XLA's own reduction along the leading axis of wide arrays is up to 30 times slower
    on CPU than one row after another; elsewhere it is the fast one.

    Args:
      combine: `jnp.add` or `jnp.maximum`.
      term: from one row of every operand (a vector, or a scalar for operands of one
        axis) to a vector of length n.
      start: neutral element, shape `(n,)`.
      *rows: operands with the same leading axis.

    Returns:
      The reduction, shape `(n,)`.
    """

    def one_by_one(*rows: Array) -> Array:
        def body(i: Array, total: Array) -> Array:
            return combine(total, term(*(x[i] for x in rows)))

        return jax.lax.fori_loop(0, rows[0].shape[0], body, start)

    def at_once(*rows: Array) -> Array:
        reduce = jnp.sum if combine is jnp.add else jnp.max
        return combine(start, reduce(jax.vmap(term)(*rows), axis=0))

    return jax.lax.platform_dependent(*rows, cpu=one_by_one, default=at_once)


def columns(problem: Problem, index: Int[Array, "s"]) -> Float[Array, "s n"]:
    """Columns of $H$ (ridge included), one in each row: one pass over the data.

    Curvatures without `columns` (those known by products) give them by one batch of
    products with unit vectors.
    """
    size, wide = problem.linear.shape[0], problem.linear.dtype
    curvature = problem.curvature
    stored = getattr(curvature, "columns", None)
    if stored is not None:
        found = stored(index).T.astype(wide)
    else:
        units = jnp.zeros((index.shape[0], size), wide)
        units = units.at[jnp.arange(index.shape[0]), index].set(1)

        def product(unit: Float[Array, "n"]) -> Float[Array, "n"]:
            shaped = _tree.layout(problem.template).split(unit)
            shaped = _tree.cast_like(shaped, problem.template)
            return _tree.flatten(curvature.matvec(shaped)).astype(wide)

        found = jax.vmap(product)(units)
    places = jnp.arange(size, dtype=index.dtype)
    return found + jnp.where(places[None, :] == index[:, None], problem.ridge, 0)


def block(problem: Problem, index: Int[Array, "s"]) -> Float[Array, "s s"]:
    """$H$ between the entries of `index`, without the rest of their columns."""
    if not hasattr(problem.curvature, "columns"):
        return columns(problem, index)[:, index]
    inner = stored_block(problem.curvature, index).astype(problem.linear.dtype)
    same = index[:, None] == index[None, :]
    return inner + problem.ridge * same.astype(inner.dtype)


def stored_block(curvature: Any, index: Int[Array, "s"]) -> Float[Array, "s s"]:
    """$H$ between the entries of `index`, of a curvature with `columns` or `block`."""
    if hasattr(curvature, "block"):
        return curvature.block(index)
    if isinstance(curvature, LowRank) and curvature.gram is None:
        rows = curvature.rows[:, index]
        # Off the diagonal only where an index appears twice.
        same = index[:, None] == index[None, :]
        return matmul(rows.T, rows) + curvature.ridge * same.astype(rows.dtype)
    return curvature.columns(index)[index]


def product_on(
    problem: Problem, index: Int[Array, "s"], values: Float[Array, "s"]
) -> Float[Array, "n"]:
    """$Hw$ for the vector with `values` at `index`: one pass over the data."""
    curvature = problem.curvature
    vector = jnp.zeros_like(problem.linear).at[index].add(values)
    if isinstance(curvature, LowRank):
        fitted = matmul(curvature.rows[:, index], values.astype(curvature.rows.dtype))
        product = matmul(fitted, curvature.rows)
        return product + (curvature.ridge + problem.ridge) * vector
    shaped = _tree.layout(problem.template).split(vector)
    shaped = _tree.cast_like(shaped, problem.template)
    return _tree.flatten(curvature.matvec(shaped)) + problem.ridge * vector


def restricted(problem: Problem, index: Int[Array, "a"]) -> Problem:
    """The same problem over the entries of `index` alone, with a stored matrix."""
    matrix = block(problem, index)
    linear = problem.linear[index]
    return problem._replace(
        curvature=Dense(matrix),
        template=linear,
        linear=linear,
        diagonal=jnp.diagonal(matrix),
        ridge=jnp.zeros_like(problem.ridge),
        group=problem.group[index],
        lower=None if problem.lower is None else problem.lower[index],
        upper=None if problem.upper is None else problem.upper[index],
    )
