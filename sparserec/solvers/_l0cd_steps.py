"""The steps of L0 coordinate descent: all at once on a model, by models on a loss."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sparserec import _tree, select
from sparserec._run import Incumbent, State
from sparserec._types import Mask, Params, Scalar
from sparserec.budget import Budget
from sparserec.quadratic import Objective, QuadraticModel
from sparserec.solvers import _search, _starts, _states
from sparserec.solvers._columns import Problem, make_problem
from sparserec.solvers._coordinate import coordinate_descent
from sparserec.solvers._search import SearchOptions
from sparserec.solvers._starts import slots_of, support_of
from sparserec.solvers._swaps import (
    Members,
    Slots,
    apply_move,
    best_move,
    factorise,
    slack_of,
)
from sparserec.solvers._swaps import objective as refitted_value
from sparserec.solvers._walk import walk

_REFITS = 4  # models on one support before its loss is compared
_HALVINGS = 10  # of a step of a refit


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Options:
    """The static choices; see `sparserec.l0cd`."""

    slots: int
    swaps: bool = True
    lasso: bool = False
    penalised: bool = False
    order: str = "cyclic"
    starts: tuple[str, ...] | None = None
    effort: float = 1.0


class Weights(NamedTuple):
    """Weights of the penalties, each of shape `()`, and a key for random starts."""

    penalty: Scalar
    l2: Scalar
    l1: Scalar
    key: Key[Array, ""] | None


def _prunable(params: Params, budget: Budget) -> list[Array]:
    leaves = jax.tree.leaves(params)
    return [x for x, g in zip(leaves, budget.groups, strict=True) if g >= 0]


def penalties(params: Params, budget: Budget, weights: Weights) -> Scalar:
    """The three penalties at `params`, shape `()`."""
    wide = _tree.dtype(params)
    chosen = _prunable(params, budget)
    count = _tree.count([x != 0 for x in chosen]).astype(wide)
    length = functools.reduce(
        jnp.add, [jnp.sum(jnp.abs(x)).astype(wide) for x in chosen]
    )
    energy = _tree.dot(params, params)
    return weights.penalty * count + weights.l1 * length + weights.l2 * energy


def problem_value(problem: Problem, model: QuadraticModel, params: Params) -> Scalar:
    """Value of the problem at the center of its model, shape `()`."""
    flat = _tree.flatten(params)
    half = jnp.asarray(0.5, flat.dtype)
    count = jnp.sum((flat != 0) & (problem.group >= 0), dtype=jnp.int32)
    ridge = half * problem.ridge * jnp.vdot(flat, flat)
    return model.value + ridge + problem.penalty * count.astype(flat.dtype)


def init(
    objective: Objective,
    weights: Weights,
    params: Params,
    budget: Budget,
    args: tuple,
) -> tuple[State, Incumbent]:
    mask = select.support(params, budget.counts, budget.groups)
    # A zero that is kept would have to be paid for.
    priced = (weights.penalty > 0) | (weights.l1 > 0)
    own = _tree.flatten(mask) & ((_tree.flatten(params) != 0) | ~priced)
    mask = mask_of(own, params, budget)
    projection = _tree.keep(mask, params)
    loss = _value(objective, projection, args)
    value = loss + penalties(projection, budget, weights)
    # The memory is the largest gradient so far: the scale of stationarity.
    state = _states.begin(
        projection, mask, value, -jnp.ones((), value.dtype), settled=True
    )
    return state, Incumbent(projection, mask, value)


def _value(objective: Objective, params: Params, args: tuple) -> Scalar:
    """The loss; a model around zero is not asked for its product at zero."""
    if not isinstance(objective.loss_fn, QuadraticModel):
        return objective.value(params, args)
    model = objective.loss_fn
    flat, center = _tree.flatten(params), _tree.flatten(model.center)
    return jax.lax.cond(
        jnp.any(flat != center),
        lambda: objective.value(params, args),
        lambda: model.value.astype(flat.dtype),
    )


def step(
    objective: Objective,
    options: Options,
    weights: Weights,
    state: State,
    budget: Budget,
    args: tuple,
    index: Int[Array, ""],
) -> State:
    if isinstance(objective.loss_fn, QuadraticModel):
        return _solve_model(objective.loss_fn, options, weights, state, budget)
    return _improve_loss(objective, options, weights, state, budget, args, index)


# --- a quadratic model: everything in one step ---------------------------------------


def _solve_model(
    model: QuadraticModel,
    options: Options,
    weights: Weights,
    state: State,
    budget: Budget,
) -> State:
    problem = make_problem(model, budget, penalty=weights.penalty, l2=weights.l2)
    flat = _tree.flatten(state.params).astype(problem.linear.dtype)
    if options.lasso:
        flat, done = coordinate_descent(
            problem, flat, weights.l1, order=options.order, slots=options.slots
        )
        mask = mask_of(flat != 0, state.params, budget)
        value = None
    else:
        found, done = _best_support(problem, options, weights, flat, budget)
        mask = mask_of(found.inside, state.params, budget)
        values = jnp.where(found.filled, found.values, 0)
        flat = jnp.zeros_like(flat).at[found.index].add(values)
        value = model.sound(refitted_value(problem, found))
    shaped = _tree.layout(state.params).split(flat)
    params = _tree.cast_like(shaped, state.params)
    if value is None:
        value = model(params) + penalties(params, budget, weights)
    zero = jnp.zeros_like(state.change)
    change = _tree.norm(_tree.sub(params, state.params)) / jnp.maximum(
        _tree.norm(params), jnp.finfo(zero.dtype).tiny
    )
    return state._replace(
        params=params,
        mask=mask,
        objective=value.astype(state.objective.dtype),
        # A second step would find the same: the search has ended by itself.
        change=jnp.where(done, zero, change),
        stationarity=zero,
    )


def mask_of(inside: Bool[Array, "n"], like: Params, budget: Budget) -> Mask:
    """A flat support as a mask; leaves that are never pruned are all `True`."""
    leaves, structure = jax.tree.flatten(_tree.layout(like).split(inside))
    whole = [
        x if g >= 0 else jnp.ones(x.shape, bool)
        for x, g in zip(leaves, budget.groups, strict=True)
    ]
    return jax.tree.unflatten(structure, whole)


def _best_support(
    problem: Problem,
    options: Options,
    weights: Weights,
    flat: Float[Array, "n"],
    budget: Budget,
) -> tuple[Members, Bool[Array, ""]]:
    """Members of the support found, and whether the search ended by itself."""
    started = jnp.any((flat != 0) & (problem.group >= 0))
    if options.penalised or not options.swaps:
        values, settled = coordinate_descent(
            problem, flat, weights.l1, order=options.order, slots=options.slots
        )
        own = slots_of((values != 0) | (problem.group < 0), options.slots)
        if not options.swaps:
            return factorise(problem, *own), settled
        # All members of a penalised answer are worth their price: no other start.
        found = _search.search(
            problem, budget, _search_options(options), weights.key, lambda _: own
        )
    else:

        def warm(pursue: Callable[[], Slots]) -> Slots:
            scores = jnp.square(flat) * problem.diagonal
            mask = support_of(problem, scores, budget)
            live = (mask & (flat != 0)) | (problem.group < 0)
            return jax.lax.cond(started, lambda: slots_of(live, options.slots), pursue)

        found = _search.search(
            problem, budget, _search_options(options), weights.key, warm
        )
    return found.members, found.gain <= slack_of(problem, found.members)


def _search_options(options: Options) -> SearchOptions:
    return SearchOptions(options.slots, options.starts, options.effort)


# --- any loss: one model after another ------------------------------------------------


class Candidate(NamedTuple):
    """A support with its values and the objective there."""

    params: Params
    slots: Slots
    objective: Scalar


def _improve_loss(
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
        none = _starts.empty(problem, options.slots)
        if options.penalised:
            return none
        return _starts.thresholding_pursuit(problem, budget, none)

    begin = jax.lax.cond(first, pursue, lambda: own)
    members = factorise(problem, *begin)
    move = best_move(problem, members)
    once = apply_move(problem, members, move)
    possible = move.gain > 0
    near = Slots(
        jnp.where(possible, once.index, members.index),
        jnp.where(possible, once.filled, members.filled),
    )
    far = walk(problem, members, patience=0, max_moves=20 * options.slots)
    candidates = [
        refitted_on(present.params, far.best),
        refitted_on(present.params, near),
    ]
    best = functools.reduce(_better, candidates)
    eps = jnp.finfo(present.objective.dtype).eps
    slack = 64 * eps * jnp.abs(present.objective)
    improved = best.objective < present.objective - slack
    chosen = _select(improved, best, present)
    return _next_state(state, chosen, model, budget, fixed)


def fixed_entries(mask: Mask, budget: Budget) -> Bool[Array, "n"]:
    """The entries that are never pruned, as a flat mask."""
    leaves, structure = jax.tree.flatten(mask)
    flags = [
        jnp.full(x.shape, g < 0) for x, g in zip(leaves, budget.groups, strict=True)
    ]
    return _tree.flatten(jax.tree.unflatten(structure, flags))


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
    """A few Newton steps on a support, each halved until the loss falls."""
    inside = jnp.zeros(_tree.size(params), bool).at[slots.index].max(slots.filled)
    layout = _tree.layout(params)
    start = _tree.keep(layout.split(inside), params)

    def value(params: Params) -> Scalar:
        total = objective.value(params, args) + penalties(params, budget, weights)
        return jnp.where(jnp.isfinite(total), total, jnp.inf)

    def newton(_: Array, state: tuple[Params, Scalar]) -> tuple[Params, Scalar]:
        params, best = state
        model = objective.model(params, args)
        problem = make_problem(model, budget, l2=weights.l2)
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
    return Candidate(params, slots, best.astype(_tree.dtype(params)))


def _select(condition: Bool[Array, ""], a: Candidate, b: Candidate) -> Candidate:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)


def _better(a: Candidate, b: Candidate) -> Candidate:
    return _select(a.objective <= b.objective, a, b)
