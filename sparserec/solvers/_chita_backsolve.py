r"""Backsolve: the exact minimiser on a support by the push-through form.

With $b_Q = g_Q + X_Q^\top u_0$ the gradient at the masked center, the step on the
support is

$$\delta_Q = -(X_Q^\top X_Q + \rho I)^{-1} b_Q
           = -X_Q^\top (X_Q X_Q^\top + \rho I)^{-1} (h + u_0)
  \quad\text{for}\quad g = X^\top h,$$

one m by m factorisation whatever the size of the support, and nothing that cancels as
$\rho$ falls. The part of $g$ that no $h$ gives is added by Woodbury's formula. Where
there are more rows than weights on the support, the first form is the cheaper one.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec import _linsolve
from sparserec._linsolve import matmul
from sparserec._types import Scalar
from sparserec.solvers._chita_rows import Point, RowProblem, kernel, point_at

_ALIGNED = 1e-3
"""Relative rest of the gradient below which the mean row is taken to explain it."""

_REFINEMENTS = 2  # of a delicate solve: each costs four passes over the rows
_DELICATE = 1e-2  # ridge relative to the mean of the kernel, below which it is one


class Split(NamedTuple):
    r"""The gradient as $X^\top h$ and a rest.

    Attributes:
      dual: $h$, shape `(m,)`.
      rest: $g - X^\top h$, shape `(n,)`.
    """

    dual: Float[Array, "m"]
    rest: Float[Array, "n"]


def split_gradient(problem: RowProblem, ridge: Scalar | float = 0.0) -> Split:
    r"""Writes the gradient as a combination of rows, as far as it is one.

    Rows that are gradients of examples have it as their mean. Other rows (least
    squares, sampled labels) take a few conjugate gradients on $XX^\top h = Xg$, unless
    the problem's ridge and `ridge` are so large that Woodbury's formula loses nothing.
    """
    rows, gradient = problem.rows, problem.gradient
    mean = matmul(jnp.ones(rows.shape[0], rows.dtype), rows)
    norm = jnp.vdot(mean, mean)
    share = jnp.vdot(mean, gradient) / jnp.where(norm > 0, norm, 1)
    rest = gradient - share * mean
    aligned = jnp.linalg.norm(rest) <= _ALIGNED * jnp.linalg.norm(gradient)

    def search() -> Split:
        solved = _linsolve.conjugate_gradients(
            lambda v: matmul(rows, matmul(v, rows)),
            matmul(rows, gradient),
            jnp.ones(rows.shape[0], bool),
            damping=jnp.zeros((), rows.dtype),
            tol=float(jnp.finfo(rows.dtype).eps) ** 0.75,
            max_steps=30,
        )
        return Split(solved.value, gradient - matmul(solved.value, rows))

    def otherwise() -> Split:
        squares = jnp.sum(jnp.sum(jnp.square(rows), axis=1))
        safe = problem.ridge + ridge >= _DELICATE * squares / rows.shape[0]
        none = jnp.zeros(rows.shape[0], rows.dtype)
        return jax.lax.cond(safe, lambda: Split(none, gradient), search)

    flat = jnp.full(rows.shape[0], share, rows.dtype)
    return jax.lax.cond(aligned, lambda: Split(flat, rest), otherwise)


def positive_ridge(ridge: Scalar, gram: Float[Array, "m m"]) -> Scalar:
    """The ridge, raised to what keeps the factorisation of a kernel from breaking."""
    m = gram.shape[0]
    noise = 4 * jnp.finfo(gram.dtype).eps * jnp.trace(gram) / m
    floor = jnp.maximum(ridge, noise)
    return jnp.where(floor > 0, floor, 1)


class Solved(NamedTuple):
    """A step on a support.

    Attributes:
      step: zero off the support, shape `(n,)`.
      product: rows times the step to the masked center and this one, shape `(m,)`.
    """

    step: Float[Array, "n"]
    product: Float[Array, "m"]


def solve_with(
    problem: RowProblem,
    mask: Bool[Array, "n"],
    gram: Float[Array, "m m"],
    factor: Float[Array, "m m"],
    shift: Scalar,
    split: Split,
    start: Float[Array, "n"],
) -> Solved:
    """The step on a support in two passes, given its kernel and a Cholesky factor.

    `start` is the step to the masked center, or zero.
    """
    rest = jnp.where(mask, split.rest, 0) / shift
    begun = problem.product(start - rest)
    inner = _linsolve.cholesky_solve(factor, split.dual + begun)
    step = jnp.where(mask, -matmul(inner, problem.rows), 0) - rest
    # Rows times rows on the support are the kernel: no third pass.
    return Solved(step, begun - matmul(gram, inner))


def _refine(
    problem: RowProblem, newton: Callable[[Array], Array], point: Point
) -> Point:
    """One step of iterative refinement, taken where it lowers the value.

    `newton` gives the step for a slope by the factorisation at hand.
    """
    step = point.params - problem.center
    slope = jnp.where(point.mask, problem.slope(step, point.product), 0)
    move = jnp.where(point.mask, newton(slope), 0)
    product = matmul(problem.rows, move)
    # The length that is exact along this direction: rounding in the direction then
    # costs nothing.
    bend = jnp.vdot(product, product) + problem.ridge * jnp.vdot(move, move)
    length = -jnp.vdot(slope, move) / jnp.where(bend > 0, bend, 1)
    length = jnp.where(bend > 0, length, 0)
    return _moved(problem, point, length * move, length * product)


def _moved(
    problem: RowProblem, point: Point, move: Float[Array, "n"], product: Array
) -> Point:
    after = point.product + product
    params = point.params + move
    value = problem.at(params - problem.center, after)
    moved = Point(params, point.mask, after, value)
    down = value <= point.value
    return jax.tree.map(lambda x, y: jnp.where(down, x, y), moved, point)


def _refined(
    problem: RowProblem,
    newton: Callable[[Array], Array],
    point: Point,
    delicate: Bool[Array, ""],
) -> Point:
    return jax.lax.fori_loop(
        0,
        jnp.where(delicate, _REFINEMENTS, 0),
        lambda _, at: _refine(problem, newton, at),
        point,
    )


def backsolve(
    problem: RowProblem,
    mask: Bool[Array, "n"],
    split: Split,
    gram: Float[Array, "m m"] | None = None,
) -> tuple[Point, Int[Array, ""]]:
    r"""The minimiser of the model on a support.

    Args:
      problem: the model.
      mask: its support $Q$.
      split: from `split_gradient`.
      gram: $X_Q X_Q^\top$ where it is known.

    Returns:
      The point, and the status of the solve; where the factorisation failed the
      point is the masked center.
    """
    gram = kernel(problem.rows, mask) if gram is None else gram
    shift = positive_ridge(problem.ridge, gram)
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    factor = _linsolve.cholesky(gram + shift * identity)
    masked = jnp.where(mask, problem.center, 0)
    start = masked - problem.center
    solved = solve_with(problem, mask, gram, factor, shift, split, start)
    succeeded = jnp.all(jnp.isfinite(factor))
    status = _linsolve.direct_status(succeeded, solved.step)
    usable = _linsolve.usable(status)

    def stepped() -> Point:
        value = problem.at(start + solved.step, solved.product)
        return Point(masked + solved.step, mask, solved.product, value)

    point = jax.lax.cond(usable, stepped, lambda: point_at(problem, masked, mask))
    mean = jnp.trace(gram) / gram.shape[0]
    delicate = usable & (problem.ridge < _DELICATE * mean)
    # The product by way of the kernel has lost digits there.
    point = jax.lax.cond(
        delicate, lambda: point_at(problem, point.params, mask), lambda: point
    )

    def newton(slope: Array) -> Array:
        inner = _linsolve.cholesky_solve(factor, matmul(problem.rows, slope))
        return (matmul(inner, problem.rows) - slope) / shift

    return _refined(problem, newton, point, delicate), status


def solve_normal(
    problem: RowProblem, gram: Float[Array, "n n"]
) -> tuple[Point, Int[Array, ""]]:
    r"""The minimiser over all columns of a problem that has fewer than it has rows.

    $$\delta = -(X^\top X + \rho I)^{-1} (g + X^\top u_0)$$

    with $u_0$ the problem's offset. Needs no $h$ with $g = X^\top h$.

    Args:
      problem: the model; columns of zeros, with zeros in the gradient and the center,
        may pad it.
      gram: $X^\top X$.

    Returns:
      The point, and the status of the solve; where the factorisation failed the
      point is the center.
    """
    shift = positive_ridge(problem.ridge, gram)
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    factor = _linsolve.cholesky(gram + shift * identity)

    def newton(slope: Array) -> Array:
        return -_linsolve.cholesky_solve(factor, slope)

    everything = jnp.ones(problem.center.shape, bool)
    still = point_at(problem, problem.center, everything)
    step = newton(problem.slope(jnp.zeros_like(problem.center), still.product))
    status = _linsolve.direct_status(jnp.all(jnp.isfinite(factor)), step)
    usable = _linsolve.usable(status)
    point = jax.lax.cond(
        usable,
        lambda: point_at(problem, problem.center + step, everything),
        lambda: still,
    )
    mean = jnp.trace(gram) / problem.rows.shape[0]
    delicate = usable & (problem.ridge < _DELICATE * mean)
    return _refined(problem, newton, point, delicate), status
