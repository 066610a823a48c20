"""A step of L0 coordinate descent on any loss: one model after another."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sparserec import _tree
from sparserec._run import State
from sparserec._types import Params, Scalar
from sparserec.budget import Budget
from sparserec.quadratic import Objective, QuadraticModel
from sparserec.solvers import _starts
from sparserec.solvers._columns import Problem, group_of_entries, make_problem
from sparserec.solvers._l0cd_types import (
    Options,
    Weights,
    fixed_entries,
    mask_of,
    penalties,
)
from sparserec.solvers._starts import slots_of
from sparserec.solvers._swaps import (
    Members,
    Move,
    Slots,
    best_move,
    exchange_for,
    exchange_gains,
    factorise,
)
from sparserec.solvers._walk import walk

_REFITS = 4  # models on one support before its loss is compared
_HALVINGS = 10  # of a step of a refit
_TRIED = 8  # neighbors refitted where the model sees no way down


class Candidate(NamedTuple):
    """A support with its values and the objective there."""

    params: Params
    slots: Slots
    objective: Scalar


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
    present = refitted_on(state.params, own)
    model = objective.model(present.params, args)
    problem = make_problem(model, budget, penalty=weights.penalty, l2=weights.l2)
    first = (index == 0) & ~jnp.any(mask & ~fixed)

    def pursue() -> Slots:
        if options.penalised:
            return _starts.empty(problem, options.slots)
        return _starts.thresholding_pursuit(problem, budget, options.slots)

    begin = jax.lax.cond(first, pursue, lambda: own)
    members = factorise(problem, *begin)
    far = walk(problem, members, patience=0, max_moves=20 * options.slots)
    chosen = _first_better(refitted_on, present, far.best, _neighbors(problem, members))
    return _next_state(state, chosen, model, budget, fixed)


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
) -> Candidate:
    """The better of two refitted supports or, where neither helps, the next that does.

    A model says little about supports whose values lie far away; their refits do.
    """
    supports = jax.tree.map(lambda x, y: jnp.concatenate([x[None], y]), far, near)
    eps = jnp.finfo(present.objective.dtype).eps
    enough = present.objective - 64 * eps * jnp.abs(present.objective)

    def body(state: tuple[Candidate, Int[Array, ""]]):
        best, number = state
        slots = jax.tree.map(lambda x: x[number], supports)
        found = refitted_on(present.params, slots)
        better = found.objective < jnp.minimum(best.objective, enough)
        return _select(better, found, best), number + 1

    def going(state: tuple[Candidate, Int[Array, ""]]) -> Bool[Array, ""]:
        best, number = state
        unhelped = best.objective >= enough
        return (number < 2) | (unhelped & (number < supports.filled.shape[0]))

    return jax.lax.while_loop(going, body, (present, jnp.int32(0)))[0]


def _next_state(
    state: State,
    chosen: Candidate,
    model: QuadraticModel,
    budget: Budget,
    fixed: Bool[Array, "n"],
) -> State:
    inside = jnp.zeros(fixed.shape, bool)
    inside = inside.at[chosen.slots.index].max(chosen.slots.filled) | fixed
    mask = mask_of(inside, state.params, budget)
    change = _tree.norm(_tree.sub(chosen.params, state.params))
    gradient_norm = jnp.maximum(state.memory, _tree.norm(model.gradient))
    live = _tree.norm(_tree.keep(mask, model.gradient))
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


def refit(
    objective: Objective,
    weights: Weights,
    budget: Budget,
    args: tuple,
    params: Params,
    slots: Slots,
) -> Candidate:
    """A few Newton steps on a support, each halved until the loss falls.

    Where the loss can be restricted to it, no step sees the rest of the weights.
    """
    own = objective.on_support(params, args, slots.index)
    if own is None:
        inside = jnp.zeros(_tree.size(params), bool).at[slots.index].max(slots.filled)
        start = _tree.keep(_tree.layout(params).split(inside), params)

        def price(params: Params) -> Scalar:
            return penalties(params, budget, weights)

        found, best = _newton_steps(
            (objective, args), weights, budget, price, start, slots
        )
        return Candidate(found, slots, best)
    owner = group_of_entries(budget, _tree.layout(params))[slots.index]

    def price_of_part(part: Array) -> Scalar:
        count = jnp.sum((part != 0) & (owner >= 0), dtype=jnp.int32)
        ridge = weights.l2 * jnp.vdot(part, part)
        return weights.penalty * count.astype(part.dtype) + ridge

    part = jnp.where(slots.filled, _tree.flatten(params)[slots.index], 0)
    places = Slots(jnp.arange(part.size, dtype=jnp.int32), slots.filled)
    part, best = _newton_steps(own, weights, budget, price_of_part, part, places)
    whole = _tree.with_entries(_tree.zeros_like(params), slots.index, part)
    return Candidate(whole, slots, best)


def _newton_steps(
    objective: tuple[Objective, tuple],
    weights: Weights,
    budget: Budget,
    price: Callable[[Params], Scalar],
    start: Params,
    slots: Slots,
) -> tuple[Params, Scalar]:
    loss, args = objective
    layout = _tree.layout(start)
    # Solves look at the members alone: which budget they belong to says nothing.
    together = dataclasses.replace(
        budget, groups=(0,) * len(layout.shapes), sizes=(layout.size,)
    )

    def value(params: Params) -> Scalar:
        total = loss.value(params, args) + price(params)
        return jnp.where(jnp.isfinite(total), total, jnp.inf)

    def newton(_: Array, state: tuple[Params, Scalar]) -> tuple[Params, Scalar]:
        params, best = state
        model = loss.model(params, args)
        problem = make_problem(model, together, l2=weights.l2)
        target = _starts.refitted(problem, slots)
        usable = slots.filled & jnp.isfinite(target)
        flat = jnp.zeros_like(problem.linear)
        flat = flat.at[slots.index].add(jnp.where(usable, target, 0))
        goal = _tree.cast_like(layout.split(flat), params)
        step = _tree.sub(goal, params)

        def trial(length: Scalar) -> tuple[Params, Scalar, Scalar]:
            point = _tree.add_scaled(params, length, step)
            return point, value(point), length

        def halve(state: tuple[Params, Scalar, Scalar]):
            return trial(state[2] / 2)

        point, there, _ = jax.lax.while_loop(
            lambda s: (s[1] > best) & (s[2] > 2.0**-_HALVINGS),
            halve,
            trial(jnp.ones((), best.dtype)),
        )
        better = there <= best
        return _tree.where(better, point, params), jnp.where(better, there, best)

    params, best = jax.lax.fori_loop(0, _REFITS, newton, (start, value(start)))
    return params, best.astype(_tree.dtype(params))


def _select(condition: Bool[Array, ""], a: Candidate, b: Candidate) -> Candidate:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
