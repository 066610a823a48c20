"""The steps of L0 coordinate descent within bounds."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec import _tree
from sparserec._run import Incumbent, State
from sparserec._types import Params, Scalar
from sparserec.budget import Budget
from sparserec.quadratic import Objective, QuadraticModel, mean_curvature
from sparserec.solvers import _box, _box_search, _l0cd_steps, _states
from sparserec.solvers._box import Box
from sparserec.solvers._box_search import Placed
from sparserec.solvers._columns import Problem, make_problem
from sparserec.solvers._l0cd_types import (
    Options,
    Weights,
    fixed_entries,
    mask_of,
    penalties,
)
from sparserec.solvers._l1_search import l1_search
from sparserec.solvers._refit import Fit, Scales
from sparserec.solvers._refit_within import refit_within
from sparserec.solvers._starts import empty, slots_of

_MOVES = 20  # most moves of a descent for every slot


def init(
    objective: Objective,
    options: Options,
    weights: Weights,
    box: Box,
    params: Params,
    budget: Budget,
    args: tuple,
) -> tuple[State, Incumbent]:
    clipped = _box.clip(box, params)
    return _l0cd_steps.init(objective, options, weights, clipped, budget, args)


def step(
    objective: Objective,
    options: Options,
    weights: Weights,
    box: Box,
    state: State,
    budget: Budget,
    args: tuple,
    index: Int[Array, ""],
) -> State:
    del index
    if isinstance(objective.loss_fn, QuadraticModel):
        return _solve_model(objective.loss_fn, options, weights, box, state, budget)
    return _improve_loss(objective, options, box, state, budget, args)


def _bounded(problem: Problem, box: Box) -> Problem:
    wide = problem.linear.dtype
    lower, upper = (_tree.flatten(x).astype(wide) for x in box)
    return problem._replace(lower=lower, upper=upper)


def _solve_model(
    model: QuadraticModel,
    options: Options,
    weights: Weights,
    box: Box,
    state: State,
    budget: Budget,
) -> State:
    """Coordinate descent, and from its support and from nothing a local search."""
    problem = make_problem(model, budget, penalty=weights.penalty, l2=weights.l2)
    problem = _bounded(problem, box)
    flat = _tree.flatten(state.params).astype(problem.linear.dtype)
    flat, done = l1_search(
        problem,
        flat,
        weights.l1,
        order=options.order,
        slots=options.slots,
        swaps=options.lasso and options.swaps,
    )
    if options.lasso:
        inside = flat != 0
    else:
        found, done = _best_support(problem, options, flat, done)
        flat, inside = _spread(problem, found)
    shaped = _tree.layout(state.params).split(flat)
    params = _tree.cast_like(shaped, state.params)
    value = model(params) + penalties(params, budget, weights)
    change = _states.relative_change(params, state.params)
    return state._replace(
        params=params,
        mask=mask_of(inside, state.params, budget),
        objective=value.astype(state.objective.dtype),
        # A second step would find the same: the search has ended by itself.
        change=jnp.where(done, jnp.zeros_like(change), change),
        stationarity=jnp.zeros_like(state.stationarity),
    )


def _best_support(
    problem: Problem,
    options: Options,
    flat: Float[Array, "n"],
    settled: Bool[Array, ""],
) -> tuple[Placed, Bool[Array, ""]]:
    own = slots_of((flat != 0) | (problem.group < 0), options.slots)
    near = _box_search.place(problem, own, flat)
    if not options.swaps:
        return _box_search.refitted(problem, near), settled
    none = empty(problem, options.slots)
    far = _box_search.place(problem, none, jnp.where(problem.group < 0, flat, 0))
    starts = jax.tree.map(lambda *xs: jnp.stack(xs), near, far)
    descend = functools.partial(
        _box_search.descend, problem, max_moves=_MOVES * options.slots
    )
    found, ended = jax.lax.map(descend, starts)
    best = jnp.argmin(found.value)
    return jax.tree.map(lambda x: x[best], (found, ended))


def _spread(problem: Problem, placed: Placed) -> tuple[Array, Bool[Array, "n"]]:
    """Members as a vector and a mask."""
    values = jnp.where(placed.filled, placed.values, 0)
    flat = jnp.zeros_like(problem.linear).at[placed.index].add(values)
    inside = jnp.zeros(flat.shape, bool).at[placed.index].max(placed.filled)
    return flat, inside


def _improve_loss(
    objective: Objective,
    options: Options,
    box: Box,
    state: State,
    budget: Budget,
    args: tuple,
) -> State:
    """Refits the support, and takes that of the local model if the loss falls."""
    fixed = fixed_entries(state.mask, budget)
    own = (_tree.flatten(state.mask) & (_tree.flatten(state.params) != 0)) | fixed
    present, memory = _refit(objective, options, box, state, own, args)
    model = objective.model(present.params, args)
    problem = _bounded(make_problem(model, budget), box)
    start = _box_search.place(
        problem, slots_of(own, options.slots), _tree.flatten(present.params)
    )
    found, _ = _box_search.descend(problem, start, max_moves=_MOVES * options.slots)
    _, inside = _spread(problem, found)
    refitted = state._replace(params=present.params, memory=memory)
    best, memory = _refit(objective, options, box, refitted, inside, args)
    slack = 64 * jnp.finfo(best.value.dtype).eps * jnp.abs(present.value)
    better = best.value < present.value - slack
    fit = jax.tree.map(lambda a, b: jnp.where(better, a, b), best, present)
    change = _states.relative_change(fit.params, state.params)
    return state._replace(
        params=fit.params,
        mask=mask_of(jnp.where(better, inside, own), state.params, budget),
        objective=fit.value,
        change=jnp.where(better, jnp.maximum(change, 1), change),
        stationarity=fit.slope,
        memory=memory,
    )


def _refit(
    objective: Objective,
    options: Options,
    box: Box,
    state: State,
    inside: Bool[Array, "n"],
    args: tuple,
) -> tuple[Fit, Scalar]:
    model = objective.model(state.params, args)
    wide = state.objective.dtype
    curvature = mean_curvature(model.curvature).astype(wide)
    curvature = jnp.maximum(curvature, jnp.finfo(wide).tiny)
    bend = curvature * _tree.norm(state.params)
    scales = Scales(
        damping=jnp.zeros((), wide),
        curvature=curvature,
        gradient=_states.gradient_scale(state.memory, model.gradient, bend),
        loss=8 * jnp.finfo(wide).eps * jnp.abs(model.value),
    )
    mask = _tree.layout(state.params).split(inside)
    fit = refit_within(objective, mask, state.params, args, scales, options.slots, box)
    return fit, fit.gradient
