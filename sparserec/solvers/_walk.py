"""Walks over supports: descents, and tabu searches out of local optima.

Legend: n weights, s slots (places for members of a support).

Source: Glover (1989) for tabu search; exact scores as in `_swaps.py`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sparserec._types import Scalar
from sparserec.solvers._columns import Problem
from sparserec.solvers._members import Members, Slots, objective, refresh, slack_of
from sparserec.solvers._swaps import Barred, Move, apply_move, best_move, entry_at

REFRESH = 32
"""Moves between two fresh factorisations: updates lose about a digit in that many."""

BARRED_FROM_ENTERING, BARRED_FROM_LEAVING = 15, 5
"""Moves for which one may not be undone; measured on correlated designs."""


class Walk(NamedTuple):
    """Where a walk over supports has come to.

    Attributes:
      members: the support it ended at.
      best: the best support met.
      value: objective at the best.
      gain: of the best move from the members, shape `()`.
      moves: number of moves, int32, shape `()`.
    """

    members: Members
    best: Slots
    value: Scalar
    gain: Scalar
    moves: Int[Array, ""]


class _Walking(NamedTuple):
    members: Members
    move: Move  # the best one from the members
    slack: Scalar  # gain below which a move is rounding
    enter_from: Int[Array, "n"]  # move from which an entry may come in again
    leave_from: Int[Array, "n"]  # move from which it may go out again
    best: Slots
    best_value: Scalar
    moves: Int[Array, ""]
    since: Int[Array, ""]  # moves since the best was found
    stale: Int[Array, ""]  # moves since the last factorisation
    ended: Bool[Array, ""]


def walk(
    problem: Problem,
    members: Members,
    *,
    patience: Int[Array, ""] | int,
    max_moves: Int[Array, ""] | int,
) -> Walk:
    """Takes the best move again and again: a descent, or a tabu search.

    With no patience it ends where no move lowers the objective, judged on a fresh
    factorisation. With patience it then takes the least bad move, bars the way back
    for a while, and ends after that many moves without a new best.

    Args:
      problem: what is minimised.
      members: where to start; `gather` is enough.
      patience: int32, shape `()`; 0 for a descent.
      max_moves: largest number of moves, int32, shape `()`.

    Returns:
      Where it ended, and the best support on the way.
    """
    patience = jnp.asarray(patience, jnp.int32)
    entries = jnp.arange(problem.linear.shape[0], dtype=jnp.int32)
    roaming = patience > 0

    def advance(state: _Walking) -> Members:
        return apply_move(problem, state.members, state.move)

    def renew(state: _Walking) -> Members:
        return refresh(problem, state.members)

    def body(state: _Walking) -> _Walking:
        worth = state.move.gain > state.slack
        due = (state.stale >= REFRESH) | (~roaming & ~worth & (state.stale > 0))
        goes = ~due
        one = goes.astype(jnp.int32)
        members = jax.lax.cond(due, renew, advance, state)
        moves = state.moves + one
        gone = entries == entry_at(state.members.index, state.move.slot)
        come = entries == state.move.column
        enter_from = jnp.where(
            gone & goes & state.move.leaves,
            moves + BARRED_FROM_ENTERING,
            state.enter_from,
        )
        leave_from = jnp.where(
            come & goes & state.move.enters,
            moves + BARRED_FROM_LEAVING,
            state.leave_from,
        )
        barred = Barred(roaming & (enter_from > moves), roaming & (leave_from > moves))
        value = objective(problem, members)
        slack = slack_of(problem, members)
        better = value < state.best_value - jnp.where(roaming, slack, 0)
        since = jnp.where(better, 0, state.since + one)
        move = best_move(problem, members, barred)
        stale = jnp.where(goes, state.stale + 1, 0)
        arrived = ~roaming & (move.gain <= slack) & (stale == 0)
        return _Walking(
            members=members,
            move=move,
            slack=slack,
            enter_from=enter_from,
            leave_from=leave_from,
            best=Slots(
                jnp.where(better, members.index, state.best.index),
                jnp.where(better, members.filled, state.best.filled),
            ),
            best_value=jnp.where(better, value, state.best_value),
            moves=moves,
            since=since,
            stale=stale,
            ended=arrived
            | (moves >= max_moves)
            | (roaming & (since >= patience))
            | ~jnp.isfinite(move.gain),
        )

    unknown = jnp.full((), jnp.inf, problem.linear.dtype)
    never = jnp.zeros(problem.linear.shape, jnp.int32)
    zero, no = jnp.int32(0), jnp.bool_(False)
    start = _Walking(
        members=members,
        move=Move(-unknown, zero, zero, no, no),
        slack=unknown,
        enter_from=never,
        leave_from=never,
        best=Slots(members.index, members.filled),
        best_value=unknown,
        moves=zero,
        since=zero,
        stale=jnp.int32(REFRESH),
        ended=no,
    )
    end = jax.lax.while_loop(lambda s: ~s.ended, body, start)
    return Walk(end.members, end.best, end.best_value, end.move.gain, end.moves)
