r"""Coordinate descent on a support: cyclic, or exact in one block after another.

With $G$ the curvature within a block and $s$ the gradient there, a pass of cyclic
descent over the block is $-(\mathrm{tril}\,G)^{-1} s$, one triangular solve, and the
exact minimiser is $-G^{-1} s$. So no loop visits single coordinates.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jaxtyping import Array, Bool, Float, Int

from sparserec import _linsolve
from sparserec._linsolve import matmul
from sparserec._types import Scalar
from sparserec.solvers._chita_rows import Point, RowProblem, gather_block, indices

BLOCK = 128
"""Coordinates in a block: its curvature costs as much as 128 passes over it."""


class _State(NamedTuple):
    step: Float[Array, "bw"]  # from the center, at the columns
    product: Float[Array, "m"]
    value: Scalar
    gained: Scalar
    passes: Int[Array, ""]
    done: Bool[Array, ""]


class Descended(NamedTuple):
    """What coordinate descent ends with.

    Attributes:
      point: the point after the last pass.
      passes: passes over the support, shape `()`.
      converged: whether the last pass gained less than the tolerance, shape `()`.
    """

    point: Point
    passes: Int[Array, ""]
    converged: Bool[Array, ""]


def descend(
    problem: RowProblem,
    point: Point,
    *,
    cyclic: bool,
    tol: Scalar,
    max_passes: Int[Array, ""] | int,
) -> Descended:
    """Coordinate descent from a point until a pass gains less than `tol`, relative.

    Args:
      problem: the model.
      point: where to start; its support stays.
      cyclic: one coordinate after another in ascending order; else every block of
        128 is minimised exactly.
      tol: gain of a pass, relative to all gains so far, at which to stop.
      max_passes: largest number of passes.

    Returns:
      A point that is nowhere above the one given.
    """
    rows = problem.rows
    width = min(BLOCK, rows.shape[1])
    every = -(-rows.shape[1] // width)
    few = max(1, every // 8)

    def run(blocks: int) -> Descended:
        return _run(
            problem, point, blocks, width, cyclic=cyclic, tol=tol, limit=max_passes
        )

    if few == every:
        return run(every)
    # Clearing a buffer as large as the rows would cost more than a sparse descent.
    fits = jnp.sum(point.mask, dtype=jnp.int32) <= few * width
    return jax.lax.cond(fits, lambda: run(few), lambda: run(every))


def _prepare(
    problem: RowProblem, index: Array, count: Array, blocks: int, width: int, cyclic
) -> tuple[Array, Array]:
    """The columns of every block, and a factor of the curvature within it."""
    rows = problem.rows
    eye = jnp.eye(width, dtype=rows.dtype)

    def put(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        columns, factors = carry
        at = jax.lax.dynamic_slice_in_dim(index, i * width, width)
        block = gather_block(rows, at)
        gram = matmul(block.T, block)
        # Dead columns, and those that only pad, must not break the factorisation.
        noise = 4 * jnp.finfo(rows.dtype).eps * jnp.trace(gram) / width
        shift = jnp.maximum(problem.ridge, noise)
        gram = gram + jnp.where(shift > 0, shift, 1) * eye
        factor = jnp.tril(gram) if cyclic else _linsolve.cholesky(gram)
        return columns.at[i].set(block), factors.at[i].set(factor)

    empty = (
        jnp.zeros((blocks, rows.shape[0], width), rows.dtype),
        jnp.zeros((blocks, width, width), rows.dtype),
    )
    return jax.lax.fori_loop(0, count, put, empty)


def _run(
    problem: RowProblem,
    point: Point,
    blocks: int,
    width: int,
    *,
    cyclic: bool,
    tol: Scalar,
    limit: Int[Array, ""] | int,
) -> Descended:
    index, number = indices(point.mask, blocks * width)
    count = -(-number // width)
    columns, factors = _prepare(problem, index, count, blocks, width, cyclic)
    here = problem.center.at[index].get(mode="fill", fill_value=0)
    slopes = problem.gradient.at[index].get(mode="fill", fill_value=0)
    start = point.params.at[index].get(mode="fill", fill_value=0) - here
    outside = jnp.where(point.mask, 0, -problem.center)
    constant = problem.value + jnp.vdot(problem.gradient, outside)
    half = jnp.asarray(0.5, start.dtype)
    fixed = constant + half * problem.ridge * jnp.vdot(outside, outside)

    def visit(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        step, product = carry
        block, factor = columns[i], factors[i]
        at = i * width
        part = jax.lax.dynamic_slice_in_dim(step, at, width)
        slope = jax.lax.dynamic_slice_in_dim(slopes, at, width)
        slope = slope + matmul(product, block) + problem.ridge * part
        if cyclic:
            move = jax.scipy.linalg.solve_triangular(factor, slope, lower=True)
        else:
            move = _linsolve.cholesky_solve(factor, slope)
        step = jax.lax.dynamic_update_slice_in_dim(step, part - move, at, 0)
        return step, product - matmul(block, move)

    def one_pass(state: _State) -> _State:
        step, product = jax.lax.fori_loop(0, count, visit, (state.step, state.product))
        bend = jnp.vdot(product, product) + problem.ridge * jnp.vdot(step, step)
        value = fixed + jnp.vdot(slopes, step) + half * bend
        gain = jnp.where(value < state.value, state.value - value, 0)
        down = value < state.value
        return _State(
            step=jnp.where(down, step, state.step),
            product=jnp.where(down, product, state.product),
            value=jnp.where(down, value, state.value),
            gained=state.gained + gain,
            passes=state.passes + 1,
            done=gain <= tol * (state.gained + gain),
        )

    end = jax.lax.while_loop(
        lambda state: ~state.done & (state.passes < limit),
        one_pass,
        _State(
            start,
            point.product,
            point.value,
            jnp.zeros_like(point.value),
            jnp.int32(0),
            jnp.bool_(False),
        ),
    )
    entries = here + end.step
    params = jnp.zeros_like(problem.center).at[index].set(entries, mode="drop")
    found = Point(params, point.mask, end.product, end.value)
    return Descended(found, end.passes, end.done)
