r"""Local search over supports of a quadratic problem within bounds.

Let F be the members strictly within their bounds and B those at one. With the values
of B left where they are, the free members are a problem without bounds, and exchanges
of one member are scored in closed form: for i in F as in `_swaps.py`, for i in B with

$$r_j + S_{ij} w_i, \quad d_j, \quad \text{at the cost}\quad
  r_i w_i + \tfrac12 d_i w_i^2, \qquad S = H - H_{\cdot F} H_{FF}^{-1} H_{F\cdot},$$

the newcomer moved into its bounds. Scores leave out what the refit does to the other
bounds, so the best few are refitted within them, and the best of those is taken if the
objective falls.

Legend: n weights, s slots (places for members of a support), g groups of a budget.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec._linsolve import matmul
from sparserec._types import Scalar
from sparserec.quadratic import Dense, QuadraticModel, make_objective
from sparserec.solvers._box import Box
from sparserec.solvers._columns import Problem, block, columns, product_on
from sparserec.solvers._members import Members, Slots, factorise, floor_of
from sparserec.solvers._refit import Scales
from sparserec.solvers._refit_within import refit_within

_TRIED = 8  # exchanges refitted at every step


class Placed(NamedTuple):
    """A support with its values within the bounds.

    Attributes:
      index: entry in each slot, int32, shape `(s,)`.
      filled: which slots are in use, shape `(s,)`.
      values: zeros in empty slots, shape `(s,)`.
      value: objective there, shape `()`.
    """

    index: Int[Array, "s"]
    filled: Bool[Array, "s"]
    values: Float[Array, "s"]
    value: Scalar


class _Scores(NamedTuple):
    """For every entry, its best way in: the gain, and the slot of who leaves."""

    gain: Float[Array, "n"]
    slot: Int[Array, "n"]  # -1 for an addition


class _Removals(NamedTuple):
    """What taking out the member of each slot does."""

    shift: Float[Array, "s n"]  # added to the slope of all entries
    bend: Float[Array, "s n"]  # added to what is left of their curvature
    cost: Float[Array, "s"]  # infinite where nobody may leave


class _Descent(NamedTuple):
    placed: Placed
    moves: Int[Array, ""]
    settled: Bool[Array, ""]


def descend(
    problem: Problem, start: Placed, *, max_moves: int
) -> tuple[Placed, Bool[Array, ""]]:
    """Takes exchanges, additions and removals until none of the best ones helps.

    Args:
      problem: what is minimised, with bounds.
      start: within budget and bounds; its values are where the first refit starts.
      max_moves: largest number of moves; static.

    Returns:
      Where it ended, without members whose value is zero, and whether it ended by
      itself.
    """

    def body(state: _Descent) -> _Descent:
        placed = state.placed
        found = _best_of(problem, placed, _candidates(problem, placed))
        slack = 64 * jnp.finfo(found.value.dtype).eps * jnp.abs(placed.value)
        better = found.value < placed.value - slack
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), found, placed)
        return _Descent(best, state.moves + 1, ~better)

    end = jax.lax.while_loop(
        lambda state: ~state.settled & (state.moves < max_moves),
        body,
        _Descent(refitted(problem, start), jnp.int32(0), jnp.bool_(False)),
    )
    return end.placed, end.settled


def place(problem: Problem, slots: Slots, flat: Float[Array, "n"]) -> Placed:
    """Entries of a vector in their slots, not yet refitted."""
    values = jnp.where(slots.filled, flat[slots.index], 0)
    return Placed(slots.index, slots.filled, values, problem.constant)


def refitted(problem: Problem, placed: Placed) -> Placed:
    """The best values on a support within the bounds; those that are zero leave it."""
    lower, upper = _bounds(problem)
    index, wide = placed.index, problem.linear.dtype
    matrix = block(problem, index)
    zero = jnp.zeros((), wide)
    target = jnp.where(placed.filled, problem.linear[index], 0)
    model = QuadraticModel(jnp.zeros_like(target), zero, -target, Dense(matrix))
    box = Box(lower[index], upper[index])
    present = jnp.where(placed.filled, jnp.diagonal(matrix), 0)
    count = jnp.maximum(jnp.sum(placed.filled, dtype=jnp.int32), 1)
    scales = Scales(
        damping=zero,
        curvature=jnp.maximum(jnp.sum(present) / count.astype(wide), _tiny(wide)),
        gradient=jnp.maximum(jnp.linalg.norm(target), _tiny(wide)),
        loss=8 * jnp.finfo(wide).eps * jnp.abs(problem.constant),
    )
    fit = refit_within(
        make_objective(model),
        placed.filled,
        placed.values,
        (),
        scales,
        index.shape[0],
        box,
    )
    fixed = problem.group[index] < 0
    filled = placed.filled & (fixed | (fit.params != 0))
    paid = jnp.sum(filled & ~fixed, dtype=jnp.int32).astype(wide)
    value = problem.constant + fit.value + problem.penalty * paid
    return Placed(index, filled, jnp.where(filled, fit.params, 0), value)


def _bounds(problem: Problem) -> tuple[Float[Array, "n"], Float[Array, "n"]]:
    assert problem.lower is not None
    assert problem.upper is not None
    return problem.lower, problem.upper


def _tiny(wide: jnp.dtype) -> float:
    return float(jnp.finfo(wide).tiny)


def _best_of(problem: Problem, placed: Placed, candidates: Placed) -> Placed:
    """The candidate of lowest objective, all refitted."""
    found = jax.lax.map(lambda one: refitted(problem, one), candidates)
    value = jnp.where(jnp.isfinite(found.value), found.value, jnp.inf)
    best = jnp.argmin(value)
    one = jax.tree.map(lambda x: x[best], found)
    return one._replace(value=value[best].astype(placed.value.dtype))


def _candidates(problem: Problem, placed: Placed) -> Placed:
    """The supports of best score, and the one without its cheapest member."""
    members, bound = _free_members(problem, placed)
    removals = _removals(problem, members, placed, bound)
    scores = _scores(problem, members, placed, removals)
    costs = removals.cost
    number = min(_TRIED, scores.gain.shape[0])
    gains, entries = jax.lax.top_k(scores.gain, number)
    empty = jnp.argmin(placed.filled).astype(jnp.int32)

    def exchanged(gain: Scalar, entry: Int[Array, ""]) -> Placed:
        leaving = scores.slot[entry]
        slot = jnp.where(leaving < 0, empty, leaving)
        possible = gain > -jnp.inf
        index = placed.index.at[slot].set(entry.astype(jnp.int32))
        # A refit finds the value; the others are a good start.
        moved = Placed(
            index,
            placed.filled.at[slot].set(True),
            placed.values.at[slot].set(0),
            placed.value,
        )
        return jax.tree.map(lambda a, b: jnp.where(possible, a, b), moved, placed)

    several = jax.vmap(exchanged)(gains, entries)
    cheapest = jnp.argmin(costs)
    gone = (jnp.arange(costs.shape[0]) == cheapest) & jnp.isfinite(costs)
    fewer = placed._replace(
        filled=placed.filled & ~gone, values=jnp.where(gone, 0, placed.values)
    )
    return jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), several, fewer)


def _free_members(problem: Problem, placed: Placed) -> tuple[Members, Bool[Array, "s"]]:
    """The members within their bounds, given the others, and who the others are."""
    lower, upper = _bounds(problem)
    low, high = lower[placed.index], upper[placed.index]
    bound = placed.filled & ((placed.values <= low) | (placed.values >= high))
    pinned = jnp.where(bound, placed.values, 0)
    linear = problem.linear - product_on(problem, placed.index, pinned)
    given = problem._replace(linear=linear)
    return factorise(given, placed.index, placed.filled & ~bound), bound


def _removals(
    problem: Problem, members: Members, placed: Placed, bound: Bool[Array, "s"]
) -> _Removals:
    diagonal = jnp.diagonal(members.inverse)
    pivot = 1 / jnp.where(members.filled & (diagonal > 0), diagonal, 1)
    free_cost = jnp.square(members.values) * pivot / 2
    free_shift = members.coupling * (members.values * pivot)[:, None]
    # What the free members leave of the columns of those at a bound.
    gram = columns(problem, placed.index)
    left = gram - matmul(gram[:, placed.index], members.coupling)
    held = jnp.where(bound, placed.values, 0)
    slope, bend = members.slope[placed.index], members.bend[placed.index]
    bound_cost = slope * held + bend * jnp.square(held) / 2
    may_go = placed.filled & (problem.group[placed.index] >= 0)
    cost = jnp.where(bound, bound_cost, free_cost)
    return _Removals(
        shift=jnp.where(bound[:, None], left * held[:, None], free_shift),
        bend=jnp.square(members.coupling) * pivot[:, None],
        cost=jnp.where(may_go, cost, jnp.inf),
    )


def _scores(
    problem: Problem, members: Members, placed: Placed, removals: _Removals
) -> _Scores:
    """Every entry alone, or in the place of the member that makes most of it."""
    least = floor_of(problem.diagonal)
    lower, upper = _bounds(problem)

    def entering(slope: Float[Array, "n"], bend: Float[Array, "n"]) -> Array:
        best = slope / bend
        value = jnp.clip(best, lower, upper)
        # A column that the members span brings nothing but rounding.
        return jnp.where(bend > least, bend * value * (best - value / 2), -jnp.inf)

    def with_slot(state: _Scores, row) -> tuple[_Scores, None]:
        shift, bend, cost, owner, slot = row
        gain = entering(members.slope + shift, members.bend + bend) - cost
        gain = jnp.where(problem.group == owner, gain, -jnp.inf)
        better = gain > state.gain
        return _Scores(
            jnp.where(better, gain, state.gain), jnp.where(better, slot, state.slot)
        ), None

    groups = jnp.arange(problem.capacity.shape[0], dtype=jnp.int32)
    owner = problem.group[placed.index]
    held = (owner[:, None] == groups[None, :]) & placed.filled[:, None]
    room = problem.capacity - jnp.sum(held, axis=0, dtype=jnp.int32)
    open_ = (room > 0)[jnp.maximum(problem.group, 0)] & ~jnp.all(placed.filled)
    alone = entering(members.slope, members.bend) - problem.penalty
    slots = jnp.arange(owner.shape[0], dtype=jnp.int32)
    best, _ = jax.lax.scan(
        with_slot,
        _Scores(
            jnp.where(open_, alone, -jnp.inf),
            jnp.full(problem.group.shape, -1, jnp.int32),
        ),
        (removals.shift, removals.bend, removals.cost, owner, slots),
    )
    inside = jnp.zeros(problem.group.shape, bool).at[placed.index].max(placed.filled)
    closed = inside | (problem.group < 0)
    return _Scores(jnp.where(closed, -jnp.inf, best.gain), best.slot)
