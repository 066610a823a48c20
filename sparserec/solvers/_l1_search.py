r"""Exchanges under an l1 penalty, orthant by orthant.

Within one orthant, with signs s, the penalty is linear:

$$\lambda_1\|w\|_1 = \lambda_1 s^\top w \quad\text{where}\quad s_j w_j \ge 0,$$

so the problem is one with bounds, whose best exchanges are scored and refitted as in
`_box_search.py`. Coordinate descent on the whole problem leaves an orthant where that
pays. The signs are those of the members, and outside those of the negative gradient.

Legend: n weights.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec._types import Scalar
from sparserec.solvers import _box_search
from sparserec.solvers._columns import Problem, product_on
from sparserec.solvers._coordinate import coordinate_descent
from sparserec.solvers._starts import slots_of

_ROUNDS = 20
_MOVES = 20  # most moves within one orthant for every slot


class _Round(NamedTuple):
    values: Float[Array, "n"]
    objective: Scalar
    done: Bool[Array, ""]  # coordinate descent has ended by itself
    rounds: Int[Array, ""]
    going: Bool[Array, ""]


def l1_search(
    problem: Problem,
    values: Float[Array, "n"],
    l1: Scalar,
    *,
    order: str,
    slots: int,
    swaps: bool,
) -> tuple[Float[Array, "n"], Bool[Array, ""]]:
    """Coordinate descent and exchanges until neither lowers the objective.

    Args:
      problem: what is minimised, with or without bounds.
      values: where to start, within the budget, shape `(n,)`.
      l1: weight of the l1 norm on prunable entries, shape `()`.
      order: of coordinate descent; static.
      slots: places for members; static.
      swaps: whether there are exchanges, or coordinate descent alone; static.

    Returns:
      The values, and whether nothing was left to do.
    """
    price = jnp.where(problem.group < 0, 0, l1)

    def descended(values: Array) -> tuple[Array, Array]:
        return coordinate_descent(problem, values, l1, order=order, slots=slots)

    def bent(values: Array) -> Array:
        index, filled = slots_of(values != 0, slots)
        return product_on(problem, index, jnp.where(filled, values[index], 0))

    def objective(values: Array) -> Scalar:
        paid = (values != 0) & (problem.group >= 0)
        count = jnp.sum(paid, dtype=jnp.int32).astype(values.dtype)
        smooth = jnp.vdot(values, bent(values) / 2 - problem.linear)
        return smooth + jnp.vdot(price, jnp.abs(values)) + problem.penalty * count

    def body(state: _Round) -> _Round:
        orthant = _orthant(problem, state.values, bent(state.values), price)
        own = slots_of((state.values != 0) | (problem.group < 0), slots)
        start = _box_search.place(orthant, own, state.values)
        placed, _ = _box_search.descend(orthant, start, max_moves=_MOVES * slots)
        found = jnp.zeros_like(state.values)
        found = found.at[placed.index].add(jnp.where(placed.filled, placed.values, 0))
        found, done = descended(found)
        value = objective(found)
        slack = 64 * jnp.finfo(value.dtype).eps * jnp.abs(state.objective)
        better = value < state.objective - slack
        return _Round(
            values=jnp.where(better, found, state.values),
            objective=jnp.where(better, value, state.objective),
            done=jnp.where(better, done, state.done),
            rounds=state.rounds + 1,
            going=better,
        )

    first, done = descended(values)
    if not swaps:
        return first, done
    end = jax.lax.while_loop(
        lambda state: state.going & (state.rounds < _ROUNDS),
        body,
        _Round(first, objective(first), done, jnp.int32(0), jnp.bool_(True)),
    )
    return end.values, end.done & ~end.going


def _orthant(
    problem: Problem,
    values: Float[Array, "n"],
    bent: Float[Array, "n"],
    price: Float[Array, "n"],
) -> Problem:
    """The problem within the orthant of the members and of what may come in."""
    sign = jnp.sign(jnp.where(values != 0, values, problem.linear - bent))
    free, infinite = problem.group < 0, jnp.asarray(jnp.inf, values.dtype)
    low = jnp.where(free | (sign < 0), -infinite, 0)
    high = jnp.where(free | (sign > 0), infinite, 0)
    if problem.lower is not None:
        low = jnp.maximum(low, problem.lower)
    if problem.upper is not None:
        high = jnp.minimum(high, problem.upper)
    return problem._replace(linear=problem.linear - price * sign, lower=low, upper=high)
