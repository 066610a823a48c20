r"""Out of local optima: descents and tabu search on a block of promising entries.

A support that no exchange improves is often still several percent above the best one
where columns are correlated. From there the search takes the least bad exchange, bars
the way back for a while, and goes on. It runs on a stored block of $H$ between the
members and the entries closest to coming in, so that a step touches no data.

Legend: n weights, s slots, a entries of the block, t descents.

Source: Glover (1989) for tabu search; exact scores as in `_swaps.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sparserec._types import Scalar
from sparserec.solvers._columns import Problem, restricted
from sparserec.solvers._members import Members, Slots, gather, objective
from sparserec.solvers._pairs import exchange_pairs
from sparserec.solvers._swaps import exchange_gains
from sparserec.solvers._walk import walk

_NARROWEST, _WIDTH = 256, 8  # entries of a block: at least, and for every slot


class Block(NamedTuple):
    """A problem over a few entries, and where they come from.

    Attributes:
      problem: with a stored matrix over the entries of the block.
      entries: which they are in the whole problem, int32, shape `(a,)`.
      members: the support, in places of the block.
    """

    problem: Problem
    entries: Int[Array, "a"]
    members: Slots


def block_size(size: int, slots: int) -> int:
    """Entries of a block: eight for every slot, at least 256, at most all."""
    return min(size, max(_NARROWEST, _WIDTH * slots))


def block_around(problem: Problem, members: Members, size: int) -> Block:
    """The members and the entries whose best exchange loses least."""
    gains = exchange_gains(problem, members)
    scores = jnp.where(members.inside, jnp.inf, gains)
    entries = jax.lax.top_k(scores, size)[1].astype(jnp.int32)
    places = jnp.zeros(scores.shape, jnp.int32)
    places = places.at[entries].set(jnp.arange(size, dtype=jnp.int32))
    return Block(
        problem=restricted(problem, entries),
        entries=entries,
        members=Slots(places[members.index], members.filled),
    )


class _Runs(NamedTuple):
    best: Slots
    value: Scalar
    moves: Int[Array, ""]


def escape(
    problem: Problem,
    members: Members,
    *,
    kept: Bool[Array, "t s"],
    hard: Bool[Array, ""],
    patience: Int[Array, ""],
    max_moves: Int[Array, ""],
    max_descent: int,
) -> tuple[Slots, Int[Array, ""]]:
    """Looks for a better support on a block around the members.

    Args:
      problem: what is minimised.
      members: a support that no exchange improves.
      kept: members that each of t descents begins with, shape `(t, s)`.
      hard: whether to make these descents, and exchanges of two, before the tabu
        search from the best support so far, shape `()`.
      patience: moves of the tabu search without a new best after which it ends.
      max_moves: largest number of its moves.
      max_descent: largest number of moves of a descent; static.

    Returns:
      The best support found, that of the members among them, and the number of moves
      of the tabu search.
    """
    size = block_size(problem.linear.shape[0], members.index.shape[0])
    block = block_around(problem, members, size)
    inner, last = block.problem, kept.shape[0]

    def run(turn: Array, state: _Runs) -> _Runs:
        descending = turn < last
        chosen = kept[jnp.minimum(turn, last - 1)]
        begin = Slots(
            jnp.where(descending, block.members.index, state.best.index),
            jnp.where(descending, block.members.filled & chosen, state.best.filled),
        )
        moving = jnp.where(descending, max_descent, max_moves)
        result = walk(
            inner,
            gather(inner, *begin),
            patience=jnp.where(descending, 0, patience),
            max_moves=jnp.where(turn == last, 0, moving),
        )
        best, value = jax.lax.cond(
            turn == last,
            lambda: exchange_pairs(inner, result.members),
            lambda: (result.best, result.value),
        )
        better = value < state.value
        return _Runs(
            best=jax.tree.map(lambda a, b: jnp.where(better, a, b), best, state.best),
            value=jnp.where(better, value, state.value),
            moves=jnp.where(descending, 0, result.moves),
        )

    value = objective(problem, members)
    start = _Runs(block.members, value, jnp.int32(0))
    # Descents, exchanges of two, and the tabu search; the last alone where unsure.
    end = jax.lax.fori_loop(jnp.where(hard, 0, last + 1), last + 2, run, start)
    return Slots(block.entries[end.best.index], end.best.filled), end.moves
