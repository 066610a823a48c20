r"""Active-set IHT on a row problem.

While the support stays, $F$ along the path $T_k(\beta - \tau D)$ is one quadratic,
whose minimiser is exact; where that minimiser lies beyond the first change of the
support, several lengths beyond it are tried in one pass over the rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparserec import _linsolve
from sparserec._linsolve import matmul
from sparserec._types import Scalar
from sparserec.budget import Budget
from sparserec.solvers._chita_rows import (
    AllColumns,
    Columns,
    Point,
    RowProblem,
    better,
    group_of_entries,
    largest,
    point_at,
    sparse_product,
    with_columns,
)

_TRIALS = 5  # lengths beyond the first change of the support, tried at once
_REACH = 64.0  # the shortest of them is at least the exact length over this
_FIRST_LENGTHS = (0.0, 0.5, 1.0, 2.0)  # of the thresholded step, over the exact one
_FLOOR = 1e-4  # of a diagonal that is taken to a negative power, over its mean
_ROOM = 1.5  # size of the active set relative to the support
_ROUNDS = 3  # active sets, at most


class _State(NamedTuple):
    point: Point
    slope: Array  # gradient on the active set, zero elsewhere
    direction: Array  # zero off the support
    norm: Scalar  # squared norm of the gradient on the support, when last used
    stable: Bool[Array, ""]  # whether the last step left the support as it was
    steps: Int[Array, ""]
    gained: Scalar  # by all steps so far, the scale of the tolerance
    done: Bool[Array, ""]


def first_change(
    point: Point,
    slope: Float[Array, "n"],
    direction: Float[Array, "n"],
    active: Bool[Array, "n"],
    group: np.ndarray,
    groups: int,
) -> Scalar:
    r"""The length at which the support of $T_k(\beta - \tau D)$ first changes.

    A kept entry falls to $|\beta_i| - s_i \tau |D_i|$ with
    $s_i = \mathrm{sign}(\beta_i D_i)$ while the largest entry left out rises to
    $\tau m$; they meet at $|\beta_i| / (m + s_i |D_i|)$.
    """
    outside = active & ~point.mask
    rising = jnp.where(outside, jnp.abs(slope), -jnp.inf)
    # One more segment for entries that are never pruned.
    segment = jnp.asarray(np.where(group < 0, groups, group))
    highest = jax.ops.segment_max(rising, segment, groups + 1)[segment]
    magnitude = jnp.abs(point.params)
    closing = highest + jnp.sign(point.params) * direction
    meets = point.mask & jnp.asarray(group >= 0) & (closing > 0)
    lengths = jnp.where(meets, magnitude / jnp.where(meets, closing, 1), jnp.inf)
    return jnp.min(lengths)


def _step(
    problem: RowProblem,
    budget: Budget,
    columns: Columns | AllColumns,
    active: Bool[Array, "n"],
    origin: Float[Array, "m"],
    tol: Scalar,
    state: _State,
) -> _State:
    group = group_of_entries(budget, problem.layout)
    point = state.point
    inside = jnp.where(point.mask, state.slope, 0)
    norm = jnp.vdot(inside, inside)
    # Conjugate directions while the support stays; they start over when it changes.
    memory = jnp.where(state.stable & (state.norm > 0), norm / state.norm, 0)
    direction = inside + memory * jnp.where(point.mask, state.direction, 0)
    descent = jnp.vdot(inside, direction)
    downhill = descent > 0
    direction = jnp.where(downhill, direction, inside)
    descent = jnp.where(downhill, descent, norm)
    product = columns.times(direction)
    bend = jnp.vdot(product, product) + problem.ridge * jnp.vdot(direction, direction)
    exact = descent / jnp.where(bend > 0, bend, 1)
    change = first_change(
        point, state.slope, direction, active, group, len(budget.sizes)
    )

    def stay() -> tuple[Point, Bool[Array, ""]]:
        params = point.params - exact * direction
        after = point.product - exact * product
        value = problem.at(params - problem.center, after)
        return Point(params, point.mask, after, value), jnp.bool_(True)

    def go_beyond() -> tuple[Point, Bool[Array, ""]]:
        longer = jnp.where(point.mask, direction, state.slope)
        return _best_beyond(
            problem, budget, columns, active, origin, point, longer, exact, change
        )

    moved, stable = jax.lax.cond((exact < change) & (bend > 0), stay, go_beyond)
    lower = moved.value < point.value
    gain = jnp.where(lower, point.value - moved.value, 0)
    gained = state.gained + gain
    after = jax.tree.map(lambda x, y: jnp.where(lower, x, y), moved, point)
    ridge_term = problem.ridge * (after.params - problem.center)
    slope = (
        problem.gradient
        + ridge_term
        + columns.transposed_times(after.product, problem.gradient)
    )
    return _State(
        point=after,
        slope=jnp.where(active, slope, 0),
        direction=direction,
        norm=norm,
        stable=stable & lower,
        steps=state.steps + 1,
        # A conjugate direction that fails is followed by the gradient itself.
        gained=gained,
        done=(gain <= tol * gained) & ((memory == 0) | lower),
    )


def _best_beyond(
    problem: RowProblem,
    budget: Budget,
    columns: Columns | AllColumns,
    active: Bool[Array, "n"],
    origin: Float[Array, "m"],
    point: Point,
    direction: Float[Array, "n"],
    exact: Scalar,
    change: Scalar,
) -> tuple[Point, Bool[Array, ""]]:
    """The best of several lengths beyond the first change of the support."""
    last = jnp.where(exact > 0, 2 * exact, jnp.where(jnp.isfinite(change), change, 1))
    first = jnp.clip(change, last / (2 * _REACH), last)
    share = jnp.linspace(0, 1, _TRIALS, dtype=first.dtype)
    lengths = first * (last / first) ** share

    def cut(length: Scalar) -> tuple[Array, Array]:
        moved = jnp.where(active, point.params - length * direction, 0)
        mask = largest(moved, budget, problem.layout)
        return jnp.where(mask, moved, 0), mask

    trials, masks = jax.vmap(cut)(lengths)
    products = columns.times(trials.T) - origin[:, None]
    values = jax.vmap(problem.at, in_axes=(0, 1))(
        trials - problem.center[None, :], products
    )
    best = jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))
    found = Point(trials[best], masks[best], products[:, best], values[best])
    return found, jnp.all(found.mask == point.mask)


class Search(NamedTuple):
    """What an IHT run ends with.

    Attributes:
      point: the best point.
      steps: steps taken in all, shape `()`.
      converged: whether the last step gained less than the tolerance, shape `()`.
    """

    point: Point
    steps: Int[Array, ""]
    converged: Bool[Array, ""]


def first_point(problem: RowProblem, budget: Budget, start: Array) -> Point:
    """The projection of a start onto the budget."""
    mask = largest(start, budget, problem.layout)
    return point_at(problem, jnp.where(mask, start, 0), mask)


def metric(diagonal: Float[Array, "n"], power: Scalar) -> Float[Array, "n"]:
    """A power of a diagonal in units of its mean; ones where it is not positive."""
    mean = jnp.mean(diagonal)
    share = jnp.where(mean > 0, diagonal / jnp.where(mean > 0, mean, 1), 1)
    # Columns of zeros would be infinitely important for negative powers.
    floor = jnp.where(power < 0, jnp.asarray(_FLOOR, share.dtype), 0)
    return jnp.where(power == 0, 1, jnp.maximum(share, floor) ** power)


def thresholded_step(
    problem: RowProblem, budget: Budget, start: Array, power: Scalar | float = 1.0
) -> Point:
    r"""The best of several lengths of a scaled gradient step, thresholded.

    With $D$ the diagonal of the curvature to some power, entries $v$ of a step along
    $(D + \bar D)^{-1} g$ compete by $\sqrt{D}\,|v|$: for the diagonal itself by what
    their loss costs, to second order and apart from all others. Three passes over the
    rows, two where `power` is zero, and one where there is no gradient.
    """
    step = start - problem.center
    # Trained weights are mostly the center itself, where the gradient is known.
    slope = jax.lax.cond(
        jnp.any(step != 0),
        lambda: problem.slope(step, matmul(problem.rows, step)),
        lambda: problem.gradient,
    )
    weights = jax.lax.cond(
        jnp.asarray(power) == 0,
        lambda: jnp.ones_like(slope),
        lambda: metric(
            _linsolve.column_dots(problem.rows, problem.rows) + problem.ridge,
            jnp.asarray(power, slope.dtype),
        ),
    )
    direction = slope / (weights + jnp.mean(weights))
    scale = jnp.sqrt(weights)

    def chosen(params: Array) -> Array:
        return largest(scale * params, budget, problem.layout)

    first = chosen(start)
    return jax.lax.cond(
        jnp.any(slope != 0),
        lambda: _best_length(problem, chosen, start, slope, direction, first),
        lambda: point_at(problem, jnp.where(first, start, 0), first),
    )


def _best_length(
    problem: RowProblem,
    chosen: Callable[[Array], Array],
    start: Float[Array, "n"],
    slope: Float[Array, "n"],
    direction: Float[Array, "n"],
    first: Bool[Array, "n"],
) -> Point:
    """The lowest of the points at several lengths of a step, each cut to a support."""
    inside = jnp.where(first, direction, 0)
    begin = jnp.where(first, start, 0) - problem.center
    # Any other order of the axes is two to four times slower on CPU.
    both = matmul(problem.rows, jnp.stack([inside, begin]).T)
    bend, product = both[:, 0], both[:, 1]
    stiffness = jnp.vdot(bend, bend) + problem.ridge * jnp.vdot(inside, inside)
    descent = jnp.vdot(inside, slope)
    exact = descent / jnp.where(stiffness > 0, stiffness, 1)
    lengths = exact * jnp.asarray(_FIRST_LENGTHS, exact.dtype)

    def cut(length: Scalar) -> tuple[Array, Array, Array]:
        moved = start - length * direction
        mask = chosen(moved)
        trial = jnp.where(mask, moved, 0)
        return trial, mask, trial - jnp.where(first, moved, 0)

    trials, masks, changes = jax.vmap(cut)(lengths)
    steps = trials - problem.center[None, :]
    # On the first support all trials lie on one line; few entries leave or join it.
    exchanged = sparse_product(problem.rows, changes.T)
    products = product[:, None] - bend[:, None] * lengths[None, :] + exchanged
    values = jax.vmap(problem.at, in_axes=(0, 1))(steps, products)
    best = jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))
    return Point(trials[best], masks[best], products[:, best], values[best])


class _Round(NamedTuple):
    point: Point
    steps: Int[Array, ""]
    rounds: Int[Array, ""]
    gained: Scalar
    converged: Bool[Array, ""]
    done: Bool[Array, ""]


def _active_set(
    problem: RowProblem, budget: Budget, point: Point, slope: Float[Array, "n"]
) -> Bool[Array, "n"]:
    """The support, and the entries that a gradient step brings close to it."""
    inside = jnp.where(point.mask, slope, 0)
    bend = matmul(problem.rows, inside)
    norm = jnp.vdot(inside, inside)
    stiffness = jnp.vdot(bend, bend) + problem.ridge * norm
    length = norm / jnp.where(stiffness > 0, stiffness, 1)
    moved = jnp.abs(point.params - length * slope)
    # The support first: nothing may compete with it for a place.
    top = jnp.max(jnp.where(jnp.isfinite(moved), moved, 0)) + 1
    scores = jnp.where(point.mask, top, moved)
    sizes = jnp.asarray(budget.sizes, jnp.int32)
    # In this order no count overflows: an int32 would, from 1.4e9 weights on.
    room = jnp.ceil(budget.counts.astype(jnp.float32) * (_ROOM - 1)).astype(jnp.int32)
    wider = Budget(
        budget.counts + jnp.minimum(room, sizes - budget.counts),
        budget.groups,
        budget.sizes,
    )
    return largest(scores, wider, problem.layout)


def search(
    problem: RowProblem,
    budget: Budget,
    point: Point,
    *,
    tol: Scalar,
    max_steps: Int[Array, ""] | int,
) -> Search:
    """IHT from a sparse point until a step gains less than `tol`, relative.

    Every round gathers the columns of an active set, steps there, and then looks
    whether a gradient step on all columns would bring in others.
    """
    # What the entries outside an active set, all zero, contribute.
    origin = matmul(problem.rows, problem.center)

    def one_round(before: _Round) -> _Round:
        slope = problem.slope(
            before.point.params - problem.center, before.point.product
        )
        active = _active_set(problem, budget, before.point, slope)

        def run(columns: Columns | AllColumns) -> _State:
            zero = jnp.zeros_like(slope)
            start = _State(
                point=before.point,
                slope=jnp.where(active, slope, 0),
                direction=zero,
                norm=jnp.zeros((), slope.dtype),
                stable=jnp.bool_(False),
                steps=before.steps,
                gained=before.gained,
                done=jnp.bool_(False),
            )
            return jax.lax.while_loop(
                lambda state: ~state.done & (state.steps < max_steps),
                lambda state: _step(
                    problem, budget, columns, active, origin, tol, state
                ),
                start,
            )

        end = with_columns(problem.rows, active, run)
        little = end.gained - before.gained <= tol * end.gained
        rounds = before.rounds + 1
        over = (end.steps >= max_steps) | (rounds >= _ROUNDS) | little
        return _Round(end.point, end.steps, rounds, end.gained, end.done, over)

    start = _Round(
        point=point,
        steps=jnp.int32(0),
        rounds=jnp.int32(0),
        gained=jnp.zeros_like(point.value),
        converged=jnp.bool_(False),
        done=jnp.asarray(max_steps) < 1,
    )
    end = jax.lax.while_loop(lambda state: ~state.done, one_round, start)
    return Search(end.point, end.steps, end.converged)


class _Attempt(NamedTuple):
    point: Point
    number: Int[Array, ""]
    converged: Bool[Array, ""]


def search_from_both(
    problem: RowProblem,
    budget: Budget,
    start: Float[Array, "n"],
    *,
    tol: Scalar,
    max_steps: Int[Array, ""] | int,
    power: Scalar | float = 1.0,
) -> tuple[Point, Bool[Array, ""]]:
    """IHT from the projection of a start and, where it converged, from another point.

    The other point is the thresholded step, whose support is another one: where a
    large ridge stops IHT soon, the two often end in different minima.

    Returns:
      The better end, and whether the last search converged.
    """

    def attempt(before: _Attempt) -> _Attempt:
        begin = jax.lax.cond(
            before.number == 0,
            lambda: before.point,
            lambda: thresholded_step(problem, budget, start, power),
        )
        end = search(problem, budget, begin, tol=tol, max_steps=max_steps)
        point = better(before.point, end.point)
        return _Attempt(point, before.number + 1, end.converged)

    first = first_point(problem, budget, start)
    last = jax.lax.while_loop(
        lambda now: (now.number == 0) | ((now.number == 1) & now.converged),
        attempt,
        _Attempt(first, jnp.int32(0), jnp.bool_(False)),
    )
    return last.point, last.converged
