"""The steps of L0 coordinate descent: all at once on a model, by models on a loss."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec import _tree, select
from sparserec._run import Incumbent, State
from sparserec._types import Params, Status
from sparserec.budget import Budget
from sparserec.quadratic import Objective, QuadraticModel
from sparserec.solvers import _search, _states
from sparserec.solvers._columns import Problem, make_problem
from sparserec.solvers._coordinate import coordinate_descent
from sparserec.solvers._l0cd_loss import improve_loss
from sparserec.solvers._l0cd_types import Options, Weights, mask_of, penalties
from sparserec.solvers._l1_search import l1_search
from sparserec.solvers._members import Members, Slots, factorise, slack_of
from sparserec.solvers._members import objective as refitted_value
from sparserec.solvers._starts import slots_of


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
    loss = _states.first_value(objective, projection, args)
    value = loss + penalties(projection, budget, weights)
    # The memory is the largest gradient so far: the scale of stationarity.
    state = _states.begin(
        projection, mask, value, -jnp.ones((), value.dtype), settled=True
    )
    return state, Incumbent(projection, mask, value)


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
    return improve_loss(objective, options, weights, state, budget, args, index)


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
        flat, done = l1_search(
            problem,
            flat,
            weights.l1,
            order=options.order,
            slots=options.slots,
            swaps=options.swaps,
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
