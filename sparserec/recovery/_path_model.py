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
from jaxtyping import Array, Bool, Float

from sparserec._linsolve import matmul
from sparserec._types import Count, Scalar, Status
from sparserec.budget import Budget
from sparserec.quadratic import QuadraticModel
from sparserec.recovery._record import Path, Records, as_path, improve
from sparserec.solvers._columns import Problem, columns, make_problem
from sparserec.solvers._members import Members, Slots, refresh, slack_at
from sparserec.solvers._starts import empty
from sparserec.solvers._swaps import (
    apply_move,
    best_addition,
    best_exchange,
    best_removal,
)
from sparserec.solvers._walk import REFRESH

_LIMIT = 4  # most exchanges at one k for every weight kept


class _Sweep(NamedTuple):
    members: Members
    k: Count
    rising: Bool[Array, ""]
    load: Bool[Array, ""]  # go on from the record at k
    loaded: Bool[Array, ""]  # that was done at this k
    stale: Count  # moves since the last factorisation
    here: Count  # moves at this k
    moves: Count
    records: Records
    going: Bool[Array, ""]


@functools.partial(jax.jit, static_argnames=("slots", "k_max", "around_zero"))
def model_path(
    model: QuadraticModel,
    budget: Budget,
    l2: Scalar,
    *,
    slots: int,
    k_max: int,
    around_zero: bool,
) -> Path:
    """Supports, values and objectives for every k from 1 to `k_max`.

    Args:
      model: what is minimised.
      budget: says which weights may be pruned; its count is not used.
      l2: weight of the squared norm.
      slots: places for members: `k_max`, and the weights that are never pruned.
      k_max: largest budget.
      around_zero: whether the center of the model is known to be zero; static.

    Returns:
      The path, with objectives that do not rise in k.
    """
    problem = make_problem(model, budget, l2=l2, around_zero=around_zero)

    def stretch(state: _Sweep) -> _Sweep:
        """A fresh factorisation, and moves until the next one is due."""
        return jax.lax.while_loop(
            lambda s: s.going & ~s.load & (s.stale < REFRESH),
            functools.partial(_iterate, problem, k_max),
            _renew(problem, state),
        )

    start = _start(problem, slots, k_max)
    end = jax.lax.while_loop(lambda state: state.going, stretch, start)
    return as_path(end.records, end.moves, model.center, budget, model.sound)


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
        k=zero,
        rising=~no,
        load=~no,
        loaded=no,
        stale=zero,
        here=zero,
        moves=zero,
        records=Records.empty(k_max, own, wide),
        going=~no,
    )


def _renew(problem: Problem, state: _Sweep) -> _Sweep:
    """The members from scratch: those there are, or those of the record at k."""
    old, found = state.members, state.records.slots(jnp.maximum(state.k - 1, 0))
    index = jnp.where(state.load, found.index, old.index)
    filled = jnp.where(state.load, found.filled, old.filled)
    gram = jax.lax.cond(
        state.load & jnp.any(filled),
        lambda: jnp.where(filled[:, None], columns(problem, index), 0),
        lambda: old.gram,
    )
    members = refresh(problem, old._replace(index=index, filled=filled, gram=gram))
    return state._replace(
        members=members, load=jnp.zeros_like(state.load), stale=jnp.int32(0)
    )


def _iterate(problem: Problem, k_max: int, state: _Sweep) -> _Sweep:
    """Judges the members at their k, and takes the next move."""
    members = state.members
    values, value, slack = _polished(problem, members)
    exchange = best_exchange(problem, members)
    limited = state.here > _LIMIT * (state.k + 2)
    settled = (exchange.gain <= slack) | limited
    status = jnp.where(limited, int(Status.MAX_STEPS), int(Status.CONVERGED))
    status = jnp.where(jnp.isfinite(value), status, int(Status.NONFINITE))
    found = Records.of(
        Slots(members.index, members.filled),
        values,
        jnp.where(settled, value, jnp.inf),
        exchange.gain,
        status,
    )
    row = jnp.maximum(state.k - 1, 0)
    records, worse = improve(state.records, row, found, slack)
    # What was found at this k on the way up is the better place to go on from.
    load = settled & worse & ~state.loaded
    onward = settled & ~load
    above = best_addition(problem, members, full=state.k >= k_max)
    below = best_removal(problem, members)
    # Where nothing is left to explain the way back begins early.
    rising = state.rising & ~(onward & (state.k == k_max))
    rising &= ~onward | (above.gain > slack)
    leaving = jax.tree.map(lambda a, b: jnp.where(rising, a, b), above, below)
    move = jax.tree.map(lambda a, b: jnp.where(onward, a, b), leaving, exchange)
    k = jnp.where(onward, state.k + jnp.where(rising, 1, -1), state.k)
    return _Sweep(
        members=apply_move(problem, members, move),
        k=k,
        rising=rising,
        load=load,
        loaded=load | (state.loaded & ~onward),
        stale=state.stale + 1,
        here=jnp.where(onward, 0, state.here + 1),
        moves=state.moves + 1,
        records=records,
        going=k > 0,
    )


def _polished(
    problem: Problem, members: Members
) -> tuple[Float[Array, "s"], Scalar, Scalar]:
    """Values after a step of refinement, the objective there, and its rounding."""
    target = jnp.where(members.filled, problem.linear[members.index], 0)
    bent = matmul(members.values, members.gram)[members.index]
    residual = jnp.where(members.filled, target - bent, 0)
    values = members.values + matmul(members.inverse, residual)
    explained = jnp.sum(members.values * target + values * residual)
    value = problem.constant - explained / 2
    return values, value, slack_at(value, explained)
