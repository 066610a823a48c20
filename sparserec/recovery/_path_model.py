r"""All budgets of a quadratic model in one walk over supports.

The walk goes up, one addition after another, and down again, one removal after
another; at every k it takes exchanges until none lowers the objective. On the way down
it compares what it holds with what it found at the same k on the way up, and goes on
from the better one.

Legend: n weights, s slots (places for members of a support), K budgets from 1 to K.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec import _tree
from sparserec._linsolve import matmul
from sparserec._types import Count, Scalar, Status
from sparserec.budget import Budget
from sparserec.quadratic import QuadraticModel
from sparserec.recovery._record import Records, improve, monotone
from sparserec.solvers._columns import Problem, columns, make_problem
from sparserec.solvers._starts import empty
from sparserec.solvers._swaps import (
    Members,
    Move,
    apply_move,
    best_addition,
    best_exchange,
    best_removal,
    refresh,
    slack_of,
)
from sparserec.solvers._walk import REFRESH

_LIMIT = 4  # most exchanges at one k for every weight kept


class _Sweep(NamedTuple):
    members: Members
    move: Move  # the next one
    k: Count
    rising: Bool[Array, ""]
    load: Bool[Array, ""]  # go on from the record at k
    stale: Count  # moves since the last factorisation
    here: Count  # moves at this k
    moves: Count
    records: Records
    going: Bool[Array, ""]


@functools.partial(jax.jit, static_argnames=("slots", "k_max"))
def model_path(
    model: QuadraticModel, budget: Budget, l2: Scalar, *, slots: int, k_max: int
) -> tuple[Records, Count]:
    """Supports, values and objectives for every k from 1 to `k_max`.

    Args:
      model: what is minimised.
      budget: says which weights may be pruned; its count is not used.
      l2: weight of the squared norm.
      slots: places for members: `k_max`, and the weights that are never pruned.
      k_max: largest budget.

    Returns:
      The records, with objectives that do not rise in k, and the moves made.
    """
    problem = make_problem(model, budget, l2=l2)
    move = functools.partial(_move, problem, k_max)

    def stretch(state: _Sweep) -> _Sweep:
        """A fresh factorisation, and moves until the next one is due."""
        return jax.lax.while_loop(
            lambda s: s.going & ~s.load & (s.stale < REFRESH),
            move,
            _renew(problem, state),
        )

    start = _start(problem, slots, k_max)
    end = jax.lax.while_loop(lambda state: state.going, stretch, start)
    return monotone(end.records), end.moves


def _start(problem: Problem, slots: int, k_max: int) -> _Sweep:
    """Nothing but the weights that are never pruned, in the record to be loaded."""
    wide, size = problem.linear.dtype, problem.linear.shape[0]
    own = empty(problem, slots)
    wall = jnp.zeros((slots, size), wide)
    flat = jnp.zeros(size, wide)
    zero, no = jnp.int32(0), jnp.bool_(False)
    members = Members(
        index=own.index,
        filled=own.filled,
        gram=wall,
        inverse=jnp.zeros((slots, slots), wide),
        values=jnp.zeros(slots, wide),
        coupling=wall,
        slope=flat,
        bend=flat,
        inside=flat > 0,
    )
    return _Sweep(
        members=members,
        move=Move(jnp.zeros((), wide), zero, zero, no, no),
        k=zero,
        rising=~no,
        load=~no,
        stale=zero,
        here=zero,
        moves=zero,
        records=Records.empty(k_max, own, wide),
        going=~no,
    )


def _renew(problem: Problem, state: _Sweep) -> _Sweep:
    """The members from scratch: those there are, or those of the record at k."""
    records, old = state.records, state.members
    row = jnp.maximum(state.k - 1, 0)
    index = jnp.where(state.load, records.index[row], old.index)
    filled = jnp.where(state.load, records.filled[row], old.filled)
    gram = jax.lax.cond(
        state.load & jnp.any(filled),
        lambda: jnp.where(filled[:, None], columns(problem, index), 0),
        lambda: old.gram,
    )
    members = refresh(problem, old._replace(index=index, filled=filled, gram=gram))
    # No exchange improves what was recorded: it is left at once.
    k = state.k + jnp.where(state.load, jnp.where(state.rising, 1, -1), 0)
    leaving, possible = _first_move(problem, members, k, state.rising)
    first = state.load & (state.k == 0)
    values, value = _polished(problem, members)
    own = Records(
        index, filled, values, value, jnp.full_like(value, jnp.nan), _status(value)
    )
    return state._replace(
        members=members,
        move=jax.tree.map(
            lambda a, b: jnp.where(state.load, a, b), leaving, state.move
        ),
        k=k,
        load=jnp.bool_(False),
        stale=jnp.int32(0),
        records=jax.tree.map(
            lambda a, b: jnp.where(first, a, b),
            improve(records, row, own, jnp.zeros_like(value))[0],
            records,
        ),
        going=(k > 0) & (possible | ~state.load),
    )


def _move(problem: Problem, k_max: int, state: _Sweep) -> _Sweep:
    """Takes the move decided on, and decides on the next one."""
    members = apply_move(problem, state.members, state.move)
    here = state.here + 1
    slack = slack_of(problem, members)
    exchange = best_exchange(problem, members)
    limited = here > _LIMIT * (state.k + 2)
    settled = (exchange.gain <= slack) | limited
    values, value = jax.lax.cond(
        settled,
        lambda: _polished(problem, members),
        lambda: (members.values, jnp.full((), jnp.inf, slack.dtype)),
    )
    status = jnp.where(limited, int(Status.MAX_STEPS), _status(value))
    found = Records(
        members.index, members.filled, values, value, exchange.gain, status
    )
    records, worse = improve(state.records, state.k - 1, found, slack)
    # What was found at this k on the way up is the better place to go on from.
    load = settled & worse
    onward = settled & ~load
    rising = state.rising & ~(onward & (state.k == k_max))
    following, possible = _first_move(
        problem, members, jnp.where(rising, state.k + 1, state.k - 1), rising
    )
    # Where nothing is left to explain the way back begins early.
    turn = onward & rising & ~possible
    removal = best_removal(problem, members)
    following = jax.tree.map(lambda a, b: jnp.where(turn, a, b), removal, following)
    rising &= ~turn
    k = jnp.where(onward, state.k + jnp.where(rising, 1, -1), state.k)
    return _Sweep(
        members=members,
        move=jax.tree.map(lambda a, b: jnp.where(onward, a, b), following, exchange),
        k=k,
        rising=rising,
        load=load,
        stale=state.stale + 1,
        here=jnp.where(onward, 0, here),
        moves=state.moves + 1,
        records=records,
        going=k > 0,
    )


def _status(value: Scalar) -> Count:
    good = jnp.isfinite(value)
    return jnp.where(good, int(Status.CONVERGED), int(Status.NONFINITE)).astype(
        jnp.int32
    )


def _first_move(
    problem: Problem, members: Members, k: Count, rising: Bool[Array, ""]
) -> tuple[Move, Bool[Array, ""]]:
    """The addition or removal that leads to another k, and whether there is one."""
    above = best_addition(problem._replace(capacity=k[None]), members)
    below = best_removal(problem, members)
    move = jax.tree.map(lambda a, b: jnp.where(rising, a, b), above, below)
    return move, ~rising | (above.gain > slack_of(problem, members))


def _polished(
    problem: Problem, members: Members
) -> tuple[Float[Array, "s"], Scalar]:
    """Values after a step of refinement, and the objective there."""
    target = problem.linear[members.index]

    def residual(values: Float[Array, "s"]) -> Float[Array, "s"]:
        bent = matmul(values, members.gram)[members.index]
        return jnp.where(members.filled, target - bent, 0)

    values = members.values + matmul(members.inverse, residual(members.values))
    values = jnp.where(members.filled, values, 0)
    explained = jnp.vdot(values, target + residual(values))
    return values, problem.constant - explained / 2


def scattered(
    records: Records, like: Float[Array, "n"], fixed: Int[Array, "n"]
) -> tuple[Float[Array, "K n"], Bool[Array, "K n"]]:
    """Values and masks of all records as vectors."""
    rows = jnp.arange(records.value.shape[0])[:, None]
    shape = (records.value.shape[0], like.shape[0])
    flat = jnp.zeros(shape, like.dtype).at[rows, records.index].add(records.values)
    inside = jnp.zeros(shape, bool).at[rows, records.index].max(records.filled)
    return flat, inside | (fixed < 0)[None, :]
