r"""Coordinate descent on a block of a sparse quadratic problem.

$$F(w) = \tfrac12 w^\top H w - b^\top w + \lambda_0\|w\|_0 + \lambda_1\|w\|_1$$

Within bounds, where there are any. Every visit sets one entry to its exact minimiser,
moved into its bounds: with $u = b_j - \sum_{i\ne j}
H_{ji} w_i$ that is $\operatorname{soft}(u, \lambda_1)/H_{jj}$ where the gain
$(|u| - \lambda_1)_+^2 / (2 H_{jj})$ exceeds $\lambda_0$, and zero elsewhere. Where the
budget is used up, an entry may only take the place of the member whose loss it makes
good best. The columns of the block are stored, so a visit touches no data.

Legend: n weights, a entries of the block, g groups of a budget.

Source: Hazimeh & Mazumder (2020), L0Learn: objectives, thresholds and active sets.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec._types import Scalar
from sparserec.quadratic import Dense
from sparserec.solvers._columns import Problem, product_on, restricted

ORDERS = ("cyclic", "greedy")

_ROUNDS = 20  # blocks that are chosen afresh, at most
_NARROWEST, _WIDTH = 256, 8  # entries of a block: at least, and for every weight kept


class Coordinates(NamedTuple):
    """A point and its negative gradient, without the penalties.

    Attributes:
      values: $w$, shape `(a,)`.
      slope: $b - Hw$, shape `(a,)`.
    """

    values: Float[Array, "a"]
    slope: Float[Array, "a"]


class _Visit(NamedTuple):
    """What a visit would change: entry j to `new`, and entry i to zero."""

    entry: Int[Array, ""]
    new: Scalar
    leaving: Int[Array, ""]
    exchanges: Bool[Array, ""]
    drop: Scalar  # of the objective


def soft(u: Array, threshold: Array | Scalar) -> Array:
    """Shrinks towards zero by the threshold."""
    return jnp.sign(u) * jnp.maximum(jnp.abs(u) - threshold, 0)


def _best_value(
    problem: Problem, pull: Array, bend: Array, weight: Array | Scalar
) -> tuple[Array, Array]:
    """The best value of every entry alone within its bounds, and its gain over zero."""
    best = soft(pull, weight) / bend
    if problem.lower is None:
        return best, jnp.square(best) * bend / 2
    value = jnp.clip(best, problem.lower, problem.upper)
    return value, bend * value * (best - value / 2)


def _targets(problem: Problem, point: Coordinates, l1: Scalar) -> tuple[Array, Array]:
    """The minimiser of every entry on its own, and its gain over zero."""
    bend = jnp.where(problem.diagonal > 0, problem.diagonal, 1)
    pull = point.slope + problem.diagonal * point.values
    weight = jnp.where(problem.group < 0, 0, l1)
    pull = jnp.where(problem.diagonal > 0, pull, 0)
    return _best_value(problem, pull, bend, weight)


def _room(problem: Problem, values: Float[Array, "a"]) -> Int[Array, "g"]:
    groups = jnp.arange(problem.capacity.shape[0], dtype=jnp.int32)
    held = (problem.group[:, None] == groups[None, :]) & (values != 0)[:, None]
    return problem.capacity - jnp.sum(held, axis=0, dtype=jnp.int32)


def _drops(problem: Problem, point: Coordinates, l1: Scalar) -> tuple[Array, Array]:
    """New value of every entry where there is room, and by how much F falls."""
    target, gain = _targets(problem, point, l1)
    fixed = problem.group < 0
    price = jnp.where(fixed, 0, problem.penalty)
    alive = point.values != 0
    left = _room(problem, point.values)[jnp.maximum(problem.group, 0)] > 0
    new = jnp.where(fixed | ((gain > price) & (alive | left)), target, 0)
    pull = point.slope + problem.diagonal * point.values
    weight = jnp.where(fixed, 0, l1)

    def cost(w: Array) -> Array:
        smooth = problem.diagonal * jnp.square(w) / 2 - pull * w
        return smooth + weight * jnp.abs(w) + jnp.where(w != 0, price, 0)

    return new, cost(point.values) - cost(new)


def _exchange(
    problem: Problem, point: Coordinates, l1: Scalar, entry: Int[Array, ""]
) -> _Visit:
    """The best member to give its place to an entry, the others as they are."""
    matrix = _matrix(problem)
    bend = jnp.where(problem.diagonal[entry] > 0, problem.diagonal[entry], 1)
    pull = point.slope[entry] + matrix[entry] * point.values
    bounds = problem
    if problem.lower is not None and problem.upper is not None:
        bounds = problem._replace(
            lower=problem.lower[entry], upper=problem.upper[entry]
        )
    target, gain = _best_value(bounds, pull, bend, l1)
    w = point.values
    cost = point.slope * w + problem.diagonal * jnp.square(w) / 2 - l1 * jnp.abs(w)
    allowed = (w != 0) & (problem.group == problem.group[entry])
    allowed &= (problem.group >= 0) & (problem.diagonal[entry] > 0) & (w[entry] == 0)
    drop = jnp.where(allowed, gain - cost, -jnp.inf)
    leaving = jnp.argmax(drop).astype(jnp.int32)
    return _Visit(entry, target[leaving], leaving, jnp.bool_(True), drop[leaving])


def _matrix(problem: Problem) -> Float[Array, "a a"]:
    assert isinstance(problem.curvature, Dense)
    return problem.curvature.matrix


def _apply(problem: Problem, point: Coordinates, visit: _Visit) -> Coordinates:
    matrix = _matrix(problem)
    values, slope = point
    out = jnp.where(visit.exchanges, values[visit.leaving], 0)
    values = values.at[visit.leaving].add(-out)
    change = visit.new - values[visit.entry]
    values = values.at[visit.entry].set(visit.new)
    slope = slope - matrix[visit.entry] * change + matrix[visit.leaving] * out
    return Coordinates(values, slope)


def _better_visit(
    problem: Problem, point: Coordinates, l1: Scalar, entry: Array, new: Array, drop
) -> _Visit:
    """The entry on its own or in exchange; a visit that changes nothing if neither."""
    alone = _Visit(entry, new[entry], entry, jnp.bool_(False), drop[entry])
    swap = _exchange(problem, point, l1, entry)
    use_swap = swap.drop > jnp.maximum(alone.drop, _rounding(problem))
    return jax.tree.map(lambda a, b: jnp.where(use_swap, a, b), swap, alone)


def _rounding(problem: Problem) -> Scalar:
    eps = jnp.finfo(problem.linear.dtype).eps
    return (
        64
        * eps
        * jnp.max(
            jnp.square(problem.linear)
            / jnp.where(problem.diagonal > 0, problem.diagonal, 1),
            initial=0,
        )
    )


def cyclic_sweep(
    problem: Problem, point: Coordinates, l1: Scalar
) -> tuple[Coordinates, Scalar]:
    """Visits every entry once, in order; the point after it and the fall of F."""

    def visit(entry: Array, state: tuple[Coordinates, Scalar]):
        point, total = state
        new, drop = _drops(problem, point, l1)
        chosen = _better_visit(problem, point, l1, entry, new, drop)
        return _apply(problem, point, chosen), total + jnp.maximum(chosen.drop, 0)

    zero = jnp.zeros((), problem.linear.dtype)
    return jax.lax.fori_loop(0, problem.linear.shape[0], visit, (point, zero))


def greedy_sweep(
    problem: Problem, point: Coordinates, l1: Scalar
) -> tuple[Coordinates, Scalar]:
    """As many visits as there are weights to keep, each where F falls most."""

    def visit(_: Array, state: tuple[Coordinates, Scalar]):
        point, total = state
        new, drop = _drops(problem, point, l1)
        _, gain = _targets(problem, point, l1)
        full = _room(problem, point.values)[jnp.maximum(problem.group, 0)] <= 0
        waiting = jnp.where(full & (point.values == 0), gain, -jnp.inf)
        best, next_in = jnp.argmax(drop), jnp.argmax(waiting)
        alone = drop[best] > _rounding(problem)
        entry = jnp.where(alone, best, next_in).astype(jnp.int32)
        chosen = _better_visit(problem, point, l1, entry, new, drop)
        return _apply(problem, point, chosen), total + jnp.maximum(chosen.drop, 0)

    zero = jnp.zeros((), problem.linear.dtype)
    visits = jnp.clip(jnp.sum(problem.capacity), 1, problem.linear.shape[0])
    return jax.lax.fori_loop(0, visits, visit, (point, zero))


class _Sweeping(NamedTuple):
    point: Coordinates
    drop: Scalar
    sweeps: Int[Array, ""]


def descend_on_block(
    problem: Problem,
    values: Float[Array, "a"],
    l1: Scalar,
    *,
    order: str,
    max_sweeps: int,
) -> tuple[Float[Array, "a"], Bool[Array, ""]]:
    """Sweeps over a stored block until F no longer falls.

    Args:
      problem: over the block, with a stored matrix.
      values: where to start, within the budget.
      l1: weight of the l1 norm, shape `()`.
      order: `"cyclic"` or `"greedy"`; static.
      max_sweeps: largest number of sweeps; static.

    Returns:
      The values, and whether F stopped falling before the sweeps were used up.
    """
    sweep = cyclic_sweep if order == "cyclic" else greedy_sweep
    rounding = _rounding(problem)

    def body(state: _Sweeping) -> _Sweeping:
        point, drop = sweep(problem, state.point, l1)
        return _Sweeping(point, drop, state.sweeps + 1)

    slope = problem.linear - jnp.matmul(
        values, _matrix(problem), precision=jax.lax.Precision.HIGHEST
    )
    start = _Sweeping(
        Coordinates(values, slope),
        jnp.full((), jnp.inf, values.dtype),
        jnp.int32(0),
    )
    end = jax.lax.while_loop(
        lambda s: (s.drop > rounding) & (s.sweeps < max_sweeps), body, start
    )
    return end.point.values, end.drop <= rounding


class _Active(NamedTuple):
    values: Float[Array, "n"]
    slope: Float[Array, "n"]
    rounds: Int[Array, ""]
    settled: Bool[Array, ""]
    converged: Bool[Array, ""]


def coordinate_descent(
    problem: Problem,
    values: Float[Array, "n"],
    l1: Scalar,
    *,
    order: str = "cyclic",
    slots: int,
    max_sweeps: int = 200,
) -> tuple[Float[Array, "n"], Bool[Array, ""]]:
    """Coordinate descent over active sets.

    A block of the members and the entries with the largest gradients is stored and
    solved; one pass over the data then looks for entries outside that would lower the
    objective, until there is none.

    Args:
      problem: what is minimised, any curvature with columns.
      values: where to start, within the budget, shape `(n,)`.
      l1: weight of the l1 norm on prunable entries, shape `()`.
      order: `"cyclic"` (by decreasing gradient) or `"greedy"`; static.
      slots: largest number of members, which sets the width of the block; static.
      max_sweeps: largest number of sweeps over a block; static.

    Returns:
      The values, and whether nothing was left to do.
    """
    size = problem.linear.shape[0]
    width = min(size, max(_NARROWEST, _WIDTH * slots))
    scale = jnp.where(problem.diagonal > 0, problem.diagonal, 1)

    def waiting(values: Array, slope: Array) -> Array:
        _, gain = _best_value(problem, slope, scale, l1)
        return jnp.where((values != 0) | (problem.diagonal <= 0), 0, gain)

    def body(state: _Active) -> _Active:
        gain = waiting(state.values, state.slope)
        inside = (state.values != 0) | (problem.group < 0)
        scores = jnp.where(inside, jnp.inf, gain)
        entries = jax.lax.top_k(scores, width)[1].astype(jnp.int32)
        block = restricted(problem, entries)
        found, converged = descend_on_block(
            block, state.values[entries], l1, order=order, max_sweeps=max_sweeps
        )
        values = jnp.zeros_like(state.values).at[entries].set(found)
        slope = problem.linear - product_on(problem, entries, found)
        # Outside the block: what would come in alone, or outweigh a member.
        gain = waiting(values, slope).at[entries].set(0)
        least = jnp.square(found) * block.diagonal / 2
        least = jnp.min(jnp.where((found != 0) & (block.group >= 0), least, jnp.inf))
        left = _room(block, found)[jnp.maximum(problem.group, 0)] > 0
        price = jnp.where(left, problem.penalty, jnp.maximum(problem.penalty, least))
        again = jnp.any(gain > price + _rounding(problem)) & (width < size)
        return _Active(values, slope, state.rounds + 1, ~again, converged)

    def slope_at(values: Array) -> Array:
        everything = jnp.nonzero(values, size=slots, fill_value=0)[0]
        count = jnp.sum(values != 0, dtype=jnp.int32)
        live = jnp.arange(slots, dtype=jnp.int32) < count
        return problem.linear - product_on(
            problem, everything, jnp.where(live, values[everything], 0)
        )

    slope = jax.lax.cond(
        jnp.any(values != 0), slope_at, lambda _: problem.linear, values
    )
    start = _Active(values, slope, jnp.int32(0), jnp.bool_(False), jnp.bool_(False))
    end = jax.lax.while_loop(lambda s: ~s.settled & (s.rounds < _ROUNDS), body, start)
    return end.values, end.settled & end.converged
