r"""Exchanges of two: pairs of entries that are worth nothing alone.

Two correlated columns with opposite signs nearly cancel: either alone explains
little, both together much, and no sequence of improving exchanges finds them. With
$D = H - H_{\cdot Q} K H_{Q\cdot}$ and $r$ as in `_swaps.py`, adding a and b gains

$$\tfrac12 \frac{r_a^2 D_{bb} - 2 r_a r_b D_{ab} + r_b^2 D_{aa}}
  {D_{aa} D_{bb} - D_{ab}^2}.$$

All pairs of a block are scored so; the best ones are put in, and the members that
cost least go out, one after the other.

Legend: n entries of a block, s slots.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec._linsolve import matmul
from sparserec._types import Scalar
from sparserec.quadratic import Dense
from sparserec.solvers._columns import Problem, over_rows
from sparserec.solvers._members import (
    Members,
    Slots,
    floor_of,
    objective,
    room,
    slack_of,
)
from sparserec.solvers._swaps import Move, apply_move, removal_terms

_TRIES = 16
"""Pairs that are tried, at most; each appears twice among the best."""


def exchange_pairs(problem: Problem, members: Members) -> tuple[Slots, Scalar]:
    """The best support after two entries come in and as many as must go out.

    Args:
      problem: over a block, with a stored matrix.
      members: a support with two empty slots, or all entries inside.

    Returns:
      The support and its value; the support of the members if no pair lowers it.
    """
    best, partner = _best_pairs(problem, members)

    def attempt(place: Array, state: tuple[Slots, Scalar]) -> tuple[Slots, Scalar]:
        def change(part: Array, changed: Members) -> Members:
            entry = jnp.where(part == 0, best[place], partner[place])
            move = jax.tree.map(
                lambda x, y: jnp.where(part < 2, x, y),
                _addition(changed, entry),
                _forced_removal(problem, changed),
            )
            return apply_move(problem, changed, move)

        changed = jax.lax.fori_loop(0, 4, change, members)
        value = objective(problem, changed)
        slots, least = state
        # Rounding, or a pair that was taken out again.
        better = value < least - slack_of(problem, changed)
        better &= jnp.all(room(problem, changed) >= 0)
        found = Slots(
            jnp.where(better, changed.index, slots.index),
            jnp.where(better, changed.filled, slots.filled),
        )
        return found, jnp.where(better, value, least)

    start = Slots(members.index, members.filled), objective(problem, members)
    possible = jnp.sum(~members.filled, dtype=jnp.int32) >= 2
    tries = jnp.where(possible, best.shape[0], 0)
    return jax.lax.fori_loop(0, tries, attempt, start)


def _best_pairs(
    problem: Problem, members: Members
) -> tuple[Int[Array, "t"], Int[Array, "t"]]:
    """Entries with the best partner, and that partner."""
    matrix = problem.curvature
    assert isinstance(matrix, Dense)
    left = matrix.matrix - matmul(members.gram.T, members.coupling)
    size = problem.linear.shape[0]
    closed = members.inside | (problem.group < 0)
    closed |= members.bend <= floor_of(problem.diagonal)
    share = jnp.finfo(left.dtype).eps ** 0.5

    def gains(
        shared: Float[Array, "n"], slope: Scalar, bend: Scalar, shut: Bool[Array, ""]
    ) -> Float[Array, "n"]:
        both = bend * members.bend
        apart = both - jnp.square(shared)
        top = jnp.square(slope) * members.bend + jnp.square(members.slope) * bend
        top -= 2 * slope * members.slope * shared
        # Parallel columns, the entry itself among them, are no pair.
        ok = (apart > share * both) & ~closed & ~shut
        return jnp.where(ok, top / jnp.where(ok, apart, 1), -jnp.inf)

    nothing = jnp.full(size, -jnp.inf, left.dtype)
    scores = over_rows(
        jnp.maximum, gains, nothing, left, members.slope, members.bend, closed
    )
    best = jax.lax.top_k(scores, min(_TRIES, size))[1].astype(jnp.int32)

    def partner(entry: Array) -> Array:
        found = gains(
            left[entry], members.slope[entry], members.bend[entry], closed[entry]
        )
        return jnp.argmax(found).astype(jnp.int32)

    return best, jax.vmap(partner)(best)


def _addition(members: Members, entry: Array) -> Move:
    slot = jnp.argmin(members.filled).astype(jnp.int32)
    gain = jnp.zeros((), members.values.dtype)
    return Move(gain, entry, slot, ~members.inside[entry], jnp.bool_(False))


def _forced_removal(problem: Problem, members: Members) -> Move:
    """The cheapest removal from a group that is over its budget, or none at all."""
    over = room(problem, members) < 0
    cost, _, _ = removal_terms(problem, members, None)
    crowded = over[jnp.maximum(problem.group[members.index], 0)]
    cost = jnp.where(crowded, cost, jnp.inf)
    slot = jnp.argmin(cost).astype(jnp.int32)
    leaves = jnp.isfinite(cost[slot])
    # Without a removal the slot must be an empty one, which stays so.
    empty = jnp.argmin(members.filled).astype(jnp.int32)
    slot = jnp.where(leaves, slot, empty)
    gain = -cost[slot] / 2
    return Move(gain, members.index[slot], slot, jnp.bool_(False), leaves)
