"""All budgets of a smooth loss, by quadratic models of it.

At every k the local model proposes a support, and the loss itself decides after a
refit; where a whole descent on the model does not help, its first move is tried. Up
one weight after another, and down again.

Legend: n weights, s slots (places for members of a support), K budgets from 1 to K.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from sparserec import _tree
from sparserec._types import Count, Params, Scalar, Status, first_status
from sparserec.budget import Budget
from sparserec.quadratic import Objective
from sparserec.recovery._record import Path, Records, as_path, improve
from sparserec.solvers._columns import group_of_entries, make_problem
from sparserec.solvers._l0cd_refit import Candidate, refit
from sparserec.solvers._l0cd_types import Weights
from sparserec.solvers._members import Slots, factorise
from sparserec.solvers._starts import slots_of
from sparserec.solvers._swaps import best_removal
from sparserec.solvers._walk import walk

_MODELS = 10  # most models at one k
_DESCENT = 4  # most moves on one model for every slot


class _Sweep(NamedTuple):
    present: Candidate
    k: Count
    rising: Bool[Array, ""]
    arrived: Bool[Array, ""]  # at this k just now
    single: Bool[Array, ""]  # only one move on the next model
    here: Count  # models at this k
    moves: Count
    gain: Scalar  # of the best move on the last model
    records: Records
    going: Bool[Array, ""]


@functools.partial(jax.jit, static_argnames=("slots", "k_max"))
def loss_path(
    objective: Objective,
    params: Params,
    budget: Budget,
    args: tuple,
    l2: Scalar,
    *,
    slots: int,
    k_max: int,
) -> Path:
    """Supports, values and objectives for every k from 1 to `k_max`.

    Args:
      objective: what is minimised.
      params: where the weights that are never pruned start.
      budget: says which weights may be pruned; its count is not used.
      args: data of the loss.
      l2: weight of the squared norm.
      slots: places for members: `k_max`, and the weights that are never pruned.
      k_max: largest budget.

    Returns:
      The path, with objectives that do not rise in k.
    """
    wide = _tree.dtype(params)
    nothing = jnp.zeros((), wide)
    weights = Weights(nothing, l2, nothing, None)
    fixed = group_of_entries(budget, _tree.layout(params)) < 0
    refitted_on = functools.partial(refit, objective, weights, budget, args)

    def propose(state: _Sweep) -> tuple[Slots, Scalar, Count]:
        """What the model at the present params makes of their support."""
        model = objective.model(state.present.params, args)
        problem = make_problem(model, budget, l2=l2)
        problem = problem._replace(capacity=state.k[None])
        members = factorise(problem, *state.present.slots)
        # The way down begins with the removal that costs least.
        inside = members.filled & (problem.group[members.index] >= 0)
        held = jnp.sum(inside, dtype=jnp.int32)
        gone = jnp.arange(slots, dtype=jnp.int32) == best_removal(problem, members).slot
        filled = members.filled & ~(gone & (held > state.k))
        limit = jnp.where(state.single, 1, _DESCENT * slots)
        start = members._replace(filled=filled)
        end = walk(problem, start, patience=0, max_moves=limit)
        return end.best, end.gain, end.moves

    def body(state: _Sweep) -> _Sweep:
        # Before the first move there is nothing but the weights never pruned.
        first = state.k == 0
        support, gain, moves = propose(state)
        present = state.present
        new = refitted_on(present.params, support)
        eps = jnp.finfo(wide).eps
        slack = 64 * eps * jnp.abs(new.objective)
        over = ~state.rising & state.arrived
        better = (new.objective < present.objective - slack) | over
        improved = better & (state.here < _MODELS)
        best = jax.tree.map(lambda a, b: jnp.where(better, a, b), new, present)
        settled = ~improved & (state.single | first | (moves <= 1))
        again = ~improved & ~settled
        found = _record(best, gain, state.here < _MODELS)
        row = jnp.maximum(state.k - 1, 0)
        records, worse = jax.lax.cond(
            settled,
            lambda: improve(state.records, row, found, slack),
            lambda: (state.records, jnp.bool_(False)),
        )
        # What was found on the way up is the better place to go on from.
        going_on = jax.lax.cond(
            worse, lambda: _recorded(records, row, best), lambda: best
        )
        rising = state.rising & ~(settled & (state.k == k_max))
        k = jnp.where(settled, state.k + jnp.where(rising, 1, -1), state.k)
        return _Sweep(
            present=going_on,
            k=k,
            rising=rising,
            arrived=settled,
            single=again,
            here=jnp.where(settled, 0, state.here + 1),
            moves=state.moves + moves,
            gain=gain,
            records=records,
            going=(k > 0) | rising,
        )

    start = _start(params, fixed, slots, k_max)
    end = jax.lax.while_loop(lambda state: state.going, body, start)
    return as_path(end.records, end.moves, params, budget)


def _start(params: Params, fixed: Bool[Array, "n"], slots: int, k_max: int) -> _Sweep:
    """Nothing but the weights that are never pruned, and no record yet."""
    wide = _tree.dtype(params)
    own = slots_of(fixed, slots)
    kept = _tree.keep(_tree.layout(params).split(fixed), params)
    zero, no = jnp.int32(0), jnp.bool_(False)
    return _Sweep(
        present=Candidate(kept, own, jnp.full((), jnp.inf, wide)),
        k=zero,
        rising=~no,
        arrived=no,
        single=no,
        here=zero,
        moves=zero,
        gain=jnp.zeros((), wide),
        records=Records.empty(k_max, own, wide),
        going=~no,
    )


def _record(best: Candidate, gain: Scalar, in_time: Bool[Array, ""]) -> Records:
    """A candidate as the entry for its k."""
    flat = _tree.flatten(best.params)[best.slots.index].astype(gain.dtype)
    return Records.of(
        best.slots,
        jnp.where(best.slots.filled, flat, 0),
        best.objective,
        gain,
        first_status(
            (~jnp.isfinite(best.objective), Status.NONFINITE),
            (in_time, Status.CONVERGED),
            (~in_time, Status.MAX_STEPS),
        ),
    )


def _recorded(records: Records, row: Count, like: Candidate) -> Candidate:
    """The entry for one k as a candidate."""
    slots = records.slots(row)
    flat = jnp.zeros_like(_tree.flatten(like.params))
    flat = flat.at[slots.index].add(jnp.where(slots.filled, records.values[row], 0))
    params = _tree.cast_like(_tree.layout(like.params).split(flat), like.params)
    return Candidate(params, slots, records.value[row])
