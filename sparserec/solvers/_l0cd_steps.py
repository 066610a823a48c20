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
from sparserec._types import Mask, Params, Scalar, Status
from sparserec.budget import Budget
from sparserec.quadratic import Objective, QuadraticModel
from sparserec.solvers import _search, _starts, _states
from sparserec.solvers._columns import Problem, make_problem
from sparserec.solvers._coordinate import coordinate_descent
from sparserec.solvers._search import SearchOptions
from sparserec.solvers._starts import slots_of
from sparserec.solvers._swaps import (
    Members,
    Move,
    Slots,
    best_move,
    exchange_for,
    exchange_gains,
    factorise,
    slack_of,
)
from sparserec.solvers._swaps import objective as refitted_value
from sparserec.solvers._walk import walk

_REFITS = 4  # models on one support before its loss is compared
_HALVINGS = 10  # of a step of a refit
_TRIED = 8  # neighbors refitted where the model sees no way down


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Options:
    """The static choices; see `sparserec.l0cd`.

    Attributes:
      begin: what is known of the first params: `"zeros"`, `"sparse"` (a support
        within the budget, to begin with), or `"unknown"`.
      whole: whether to go on beyond the first local optimum of a model; otherwise
        one step ends with `MAX_STEPS` where going on may help.
    """

    slots: int
    swaps: bool = True
    lasso: bool = False
    penalised: bool = False
    order: str = "cyclic"
    starts: tuple[str, ...] | None = None
    effort: float = 1.0
    begin: str = "unknown"
    whole: bool = True

    @property
    def search(self) -> SearchOptions:
        """The choices of the search alone."""
        return SearchOptions(self.slots, self.starts, self.effort, self.whole)


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
    options: Options,
    weights: Weights,
    params: Params,
    budget: Budget,
    args: tuple,
) -> tuple[State, Incumbent]:
    own = _tree.flatten(params) != 0
    if options.begin == "unknown":
        mask = select.support(params, budget.counts, budget.groups)
        # A zero that is kept would have to be paid for.
        priced = (weights.penalty > 0) | (weights.l1 > 0)
        own = _tree.flatten(mask) & (own | ~priced)
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
    failure = state.failure
    if options.lasso:
        flat, done = coordinate_descent(
            problem, flat, weights.l1, order=options.order, slots=options.slots
        )
        mask = mask_of(flat != 0, state.params, budget)
        value = None
    else:
        found, done, ended = _best_support(problem, options, weights, flat, budget)
        if not options.whole:
            failure = jnp.where(ended, failure, jnp.int32(Status.MAX_STEPS))
        mask = mask_of(found.inside, state.params, budget)
        values = jnp.where(found.filled, found.values, 0)
        flat = jnp.zeros_like(flat).at[found.index].add(values)
        value = model.sound(refitted_value(problem, found))
    params = _tree.cast_like(_tree.layout(state.params).split(flat), state.params)
    if value is None:
        value = model(params) + penalties(params, budget, weights)
    zero = jnp.zeros_like(state.change)
    return state._replace(
        params=params,
        mask=mask,
        objective=value.astype(state.objective.dtype),
        # A second step would find the same: the search has ended by itself.
        change=jnp.where(done, zero, zero + 1),
        stationarity=zero,
        failure=failure,
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
) -> tuple[Members, Bool[Array, ""], Bool[Array, ""]]:
    """Members of the support found, whether no exchange helps, and no search either."""
    if options.penalised or not options.swaps:
        flat, settled = coordinate_descent(
            problem, flat, weights.l1, order=options.order, slots=options.slots
        )
    own = slots_of((flat != 0) | (problem.group < 0), options.slots)
    if not options.swaps:
        return factorise(problem, *own), settled, settled

    def warm(pursue: Callable[[], Slots]) -> Slots:
        # All members of a penalised answer are worth their price: no other start.
        if options.penalised or options.begin == "sparse":
            return own
        if options.begin == "zeros":
            return pursue()
        started = jnp.any((flat != 0) & (problem.group >= 0))
        return jax.lax.cond(started, lambda: own, pursue)

    found = _search.search(problem, budget, options.search, weights.key, warm)
    done = found.gain <= slack_of(problem, found.members)
    return found.members, done, done & ~found.unsure


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
        if options.penalised:
            return _starts.empty(problem, options.slots)
        return _starts.thresholding_pursuit(problem, budget, options.slots)

    begin = jax.lax.cond(first, pursue, lambda: own)
    members = factorise(problem, *begin)
    far = walk(problem, members, patience=0, max_moves=20 * options.slots)
    chosen = _first_better(
        refitted_on, present, far.best, _neighbors(problem, members)
    )
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
    """A few Newton steps on a support, each halved until the loss falls.

    Where the curvature can be restricted, no step sees the rest of the data.
    """
    restrict = getattr(objective.curvature, "restrict", None)
    if restrict is None:
        return _newton_steps(objective, weights, budget, args, params, slots)
    part = jnp.where(slots.filled, params[slots.index], 0)
    places = Slots(jnp.arange(part.size, dtype=jnp.int32), slots.filled)
    data = restrict(args, slots.index)
    found = _newton_steps(objective, weights, budget, data, part, places)
    whole = jnp.zeros_like(params).at[slots.index].add(found.params)
    return Candidate(whole, slots, found.objective)


def _newton_steps(
    objective: Objective,
    weights: Weights,
    budget: Budget,
    args: tuple,
    params: Params,
    slots: Slots,
) -> Candidate:
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


