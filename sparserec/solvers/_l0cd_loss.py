"""A step of L0 coordinate descent on any loss: one model after another.

Where no support nearby is better, the search goes on from supports with a few more or
fewer members (strategic oscillation, Glover 1977): what comes in or goes out on the
way back to the budget often differs, and classes that are nearly separated have many
local optima that single exchanges do not leave.

Legend: n weights, s slots (places for members of a support), g groups of a budget.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sparserec import _tree
from sparserec._run import State
from sparserec._types import Count, Params, Scalar
from sparserec.budget import Budget
from sparserec.quadratic import Objective
from sparserec.solvers import _search, _starts
from sparserec.solvers._columns import Problem, make_problem
from sparserec.solvers._l0cd_refit import Candidate, refit, select
from sparserec.solvers._l0cd_types import (
    Options,
    Weights,
    fixed_entries,
    mask_of,
)
from sparserec.solvers._members import Members, Slots, factorise
from sparserec.solvers._starts import slots_of
from sparserec.solvers._swaps import Move, best_move, exchange_for, exchange_gains
from sparserec.solvers._walk import walk

_TRIED = 8  # neighbors refitted where the model sees no way down
_SWINGS = 4  # 1 more, 1 fewer, 2 more, 2 fewer, for an effort of 1
_DESCENT = 8  # most models on the way down from one of them


class _Search(NamedTuple):
    here: Candidate  # may have more or fewer members than the budget
    swing: Count  # the one under way; 0 before the first
    away: Bool[Array, ""]  # the next support leaves the budget
    steps: Count  # models since then
    unsure: Bool[Array, ""]  # whether to look beyond the first local optimum
    slope: Params  # gradient at the first model
    going: Bool[Array, ""]


def improve_loss(
    objective: Objective,
    options: Options,
    weights: Weights,
    state: State,
    budget: Budget,
    args: tuple,
    index: Int[Array, ""],
) -> State:
    """Refits the support, and takes a new one if it is better after its refit."""
    fixed = fixed_entries(state.mask, budget)
    mask = _tree.flatten(state.mask) & (_tree.flatten(state.params) != 0)
    own = slots_of(mask | fixed, options.slots)
    refitted_on = functools.partial(refit, objective, weights, budget, args)
    home = refitted_on(state.params, own)
    unknown = (index == 0) & ~jnp.any(mask & ~fixed)
    swings = 0 if options.penalised else math.ceil(_SWINGS * options.effort)

    def body(search: _Search) -> _Search:
        here = search.here
        model = objective.model(here.params, args)
        problem = make_problem(model, budget, penalty=weights.penalty, l2=weights.l2)
        problem = problem._replace(capacity=_capacity(search, budget))

        def pursue() -> Slots:
            if options.penalised:
                return _starts.empty(problem, options.slots)
            return _starts.thresholding_pursuit(problem, budget, options.slots)

        first = search.swing == 0
        begin = jax.lax.cond(first & unknown, pursue, lambda: here.slots)
        members = factorise(problem, *begin)
        within = _within_capacity(problem, members)
        unlike = search.away | jnp.any(within != members.filled)
        far = walk(
            problem,
            members._replace(filled=within),
            patience=0,
            max_moves=20 * options.slots,
        )
        found = _first_better(
            refitted_on,
            here._replace(objective=jnp.where(unlike, jnp.inf, here.objective)),
            far.best,
            _neighbors(problem, members),
            most=jnp.where(unlike, 1, jnp.where(first, 2 + _TRIED, 2)),
        )
        unsure = jnp.where(
            first, ~_search.is_safe(far.members, far.gain), search.unsure
        )
        slope = jax.tree.map(
            lambda a, b: jnp.where(first, a, b), model.gradient, search.slope
        )
        search = search._replace(unsure=unsure, slope=slope)
        return _onward(search, home, found, unlike, swings)

    start = _Search(
        here=home,
        swing=jnp.int32(0),
        away=jnp.bool_(False),
        steps=jnp.int32(0),
        unsure=jnp.bool_(True),
        slope=_tree.zeros_like(home.params),
        going=jnp.bool_(True),
    )
    end = jax.lax.while_loop(lambda search: search.going, body, start)
    return _next_state(state, end.here, end.slope, budget, fixed)


def _capacity(search: _Search, budget: Budget) -> Int[Array, "g"]:
    """The budget, or one, two, ... more and fewer in turn on the way out."""
    more = search.swing % 2 == 1
    size = (search.swing + 1) // 2
    shift = jnp.where(search.away, jnp.where(more, size, -size), 0)
    return jnp.maximum(budget.counts + shift, 0)


def _within_capacity(problem: Problem, members: Members) -> Bool[Array, "s"]:
    """The members without those that cost least, one by one, until there is room."""
    group = problem.group[members.index]
    groups = jnp.arange(problem.capacity.shape[0], dtype=jnp.int32)

    def candidates(filled: Array) -> Array:
        held = jnp.sum(
            (group[:, None] == groups[None, :]) & filled[:, None], 0, jnp.int32
        )
        return filled & (group >= 0) & (held > problem.capacity)[group]

    def remove(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        filled, inverse, values = state
        diagonal = jnp.diagonal(inverse)
        pivot = jnp.where(diagonal > 0, diagonal, 1)
        cost = jnp.square(values) / pivot
        # What is not finite goes last, but before those that stay.
        largest = jnp.finfo(cost.dtype).max
        cost = jnp.where(cost < largest, cost, largest)
        cost = jnp.where(candidates(filled), cost, jnp.inf)
        gone = jnp.argmin(cost)
        column = inverse[gone] / pivot[gone]
        return (
            filled.at[gone].set(False),
            inverse - column[:, None] * inverse[gone][None, :],
            values - column * values[gone],
        )

    return jax.lax.while_loop(
        lambda state: jnp.any(candidates(state[0])),
        remove,
        (members.filled, members.inverse, members.values),
    )[0]


def _onward(
    search: _Search,
    home: Candidate,
    found: Candidate,
    unlike: Bool[Array, ""],
    swings: int,
) -> _Search:
    """Follows what was found down to a local optimum, then swings to the other side.

    A better support than the one at home ends the step: the next one begins there.
    """
    better = found.objective < _enough(home)
    lower = unlike | (found.objective < search.here.objective)
    descending = (search.swing > 0) & lower & (search.steps < _DESCENT)
    settled = ~search.away & ~descending
    again = settled & ~better
    more = search.unsure & (search.swing < swings)
    return _Search(
        here=select(again, home, found),
        swing=search.swing + again.astype(jnp.int32),
        away=again,
        steps=jnp.where(again, 0, search.steps + 1),
        unsure=search.unsure,
        slope=search.slope,
        going=~settled | (again & more),
    )


def _enough(home: Candidate) -> Scalar:
    """The objective below which a support is better, not only rounded otherwise."""
    eps = jnp.finfo(home.objective.dtype).eps
    return home.objective - 64 * eps * jnp.abs(home.objective)


def _neighbors(problem: Problem, members: Members) -> Slots:
    """The supports one move away that the model likes best, stacked, the best first.

    The first is that of the best move of all; the others exchange one member each.
    """
    gains, columns = jax.lax.top_k(
        exchange_gains(problem, members), min(_TRIED, members.slope.size)
    )
    exchanges = jax.vmap(lambda column: exchange_for(problem, members, column))(
        columns.astype(jnp.int32)
    )
    best = best_move(problem, members)
    moves = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), best, exchanges)
    possible = jnp.concatenate([best.gain[None] > 0, jnp.isfinite(gains)])

    def moved(move: Move, possible: Bool[Array, ""]) -> Slots:
        here = jnp.arange(members.index.size, dtype=jnp.int32) == move.slot
        here &= possible
        column = jnp.where(move.enters, move.column, 0)
        return Slots(
            jnp.where(here, column, members.index),
            jnp.where(here, move.enters, members.filled),
        )

    return jax.vmap(moved)(moves, possible)


def _first_better(
    refitted_on: Callable[[Params, Slots], Candidate],
    present: Candidate,
    far: Slots,
    near: Slots,
    *,
    most: Count,
) -> Candidate:
    """The better of two refitted supports or, where neither helps, the next that does.

    A model says little about supports whose values lie far away; their refits do.
    At most so many are refitted; a single one is taken as it is.
    """
    supports = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), far, near)
    enough = _enough(present)
    alone = most == 1

    def body(state: tuple[Candidate, Int[Array, ""]]):
        best, number = state
        slots = jax.tree.map(lambda x: x[number], supports)
        found = refitted_on(present.params, slots)
        better = alone | (found.objective < jnp.minimum(best.objective, enough))
        return select(better, found, best), number + 1

    def going(state: tuple[Candidate, Int[Array, ""]]) -> Bool[Array, ""]:
        best, number = state
        wanted = (number < 2) | (best.objective >= enough)
        return wanted & (number < jnp.minimum(most, supports.filled.shape[0]))

    return jax.lax.while_loop(going, body, (present, jnp.int32(0)))[0]


def _next_state(
    state: State,
    chosen: Candidate,
    slope: Params,
    budget: Budget,
    fixed: Bool[Array, "n"],
) -> State:
    inside = jnp.zeros(fixed.shape, bool)
    inside = inside.at[chosen.slots.index].max(chosen.slots.filled) | fixed
    mask = mask_of(inside, state.params, budget)
    change = _tree.norm(_tree.sub(chosen.params, state.params))
    gradient_norm = jnp.maximum(state.memory, _tree.norm(slope))
    live = _tree.norm(_tree.keep(mask, slope))
    same = jnp.all(_tree.flatten(mask) == _tree.flatten(state.mask))
    tiny = jnp.finfo(change.dtype).tiny
    return state._replace(
        params=chosen.params,
        mask=mask,
        objective=chosen.objective,
        change=change / jnp.maximum(_tree.norm(chosen.params), tiny),
        # The gradient is that of the refitted point before the exchange.
        stationarity=jnp.where(
            same, live / jnp.where(gradient_norm > 0, gradient_norm, 1), 1
        ).astype(change.dtype),
        memory=gradient_norm,
    )
