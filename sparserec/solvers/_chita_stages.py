"""CHITA as a step of the one loop: a model, a budget, a variant, a judge."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparserec import _linsolve, _tree, select
from sparserec._run import Incumbent, State
from sparserec._types import Params, Scalar, first_status
from sparserec.budget import Budget
from sparserec.quadratic import Objective, QuadraticModel
from sparserec.solvers import _descent, _states
from sparserec.solvers._chita_refine import refine
from sparserec.solvers._chita_types import Found, Limits
from sparserec.solvers._chita_unseen import without_unseen
from sparserec.solvers._chita_variants import BASELINES, VARIANTS
from sparserec.solvers._descent import Descent
from sparserec.solvers._examples import Examples, divide
from sparserec.solvers._schedule import budget_at

StageSchedule = (
    Literal["exp", "poly", "linear", "const", "mfac", "geometric"]
    | Callable[[Int[Array, ""]], Array]
)
SCHEDULES = ("exp", "poly", "linear", "const", "mfac", "geometric")

_FALL = 2 / 3
"""Share of the stages in which `"geometric"` falls; the others refine at the end."""

_AVERAGED = 1 / 3
"""Share of the stages, the last ones, whose average competes with the last iterate."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Options:
    """The static choices of a stage; see `chita`."""

    variant: str = "best"
    stages: int = 1
    schedule: StageSchedule = "exp"
    start_density: float = 0.9
    held_out: float = 0.0
    refinements: int = 0
    descent: Descent | None = None


class Memory(NamedTuple):
    """What the stages carry along.

    Attributes:
      total: sum of the params of the last stages; empty where none are averaged.
      descent: state of the optimizer between the stages.
    """

    total: Params
    descent: _descent.DescentState


def stage_budget(options: Options, budget: Budget, index: Int[Array, ""]) -> Budget:
    r"""How many weights a stage keeps.

    With $s = 1 - k/n$ the share pruned in the end, $b$ that of the first stage,
    f stages and $t = 0, \dots, f - 1$, the share pruned after stage t is

    - exp: $b + (s-b)\,(1-2^{-t})/(1-2^{-(f-1)})$, halving what is left to prune;
    - poly: $s + (b-s)\,(1-t/(f-1))^3$;
    - linear: $b + (s-b)\,t/(f-1)$;
    - const: $s$;
    - mfac: $1 - (1-b)\,q^{t+1}$ with $q^f = (1-s)/(1-b)$;
    - geometric: $1 - (1-s)^{\min(1, 3(t+1)/2f)}$: a constant fraction goes at every
      stage, and the last third refines at the final budget.

    Args:
      options: schedule, number of stages, density after the first one.
      budget: the final budget, which the last stage has exactly.
      index: number of the stage, from zero, traced.

    Returns:
      A budget between the final one and all weights.
    """
    if callable(options.schedule):
        return budget_at(options.schedule, budget, index, options.stages)
    last = options.stages - 1
    if last == 0 or options.schedule == "const":
        return budget
    sizes = jnp.maximum(jnp.asarray(budget.sizes, jnp.float32), 1)
    target = budget.counts.astype(jnp.float32) / sizes
    first = jnp.maximum(jnp.asarray(options.start_density, jnp.float32), target)
    time = index.astype(jnp.float32)
    share = time / last
    if options.schedule == "exp":
        density = first + (target - first) * (1 - 2.0**-time) / (1 - 2.0**-last)
    elif options.schedule == "poly":
        density = target + (first - target) * (1 - share) ** 3
    elif options.schedule == "linear":
        density = first + (target - first) * share
    elif options.schedule == "geometric":
        fallen = jnp.minimum((time + 1) / max(round(_FALL * options.stages), 1), 1)
        density = jnp.maximum(target, 1 / sizes) ** fallen
    else:
        ratio = jnp.maximum(target, 1 / sizes) / jnp.maximum(first, 1 / sizes)
        density = first * ratio ** ((time + 1) / options.stages)
    counts = jnp.round(density * sizes).astype(jnp.int32)
    counts = jnp.clip(counts, budget.counts, jnp.asarray(budget.sizes, jnp.int32))
    # The end is exact whatever float32 makes of it.
    counts = jnp.where((index >= last) | (density <= target), budget.counts, counts)
    return dataclasses.replace(budget, counts=counts)


def _local_model(objective: Objective, params: Params, args: tuple) -> QuadraticModel:
    """The model to prune: a given one as it is, with its own center."""
    if isinstance(objective.loss_fn, QuadraticModel):
        return objective.loss_fn
    if objective.on_host:
        # The builder bounds its own memory; products over chunks are no rows.
        return objective.curvature(objective.loss_fn, params, args)
    return objective.model(params, args)


@functools.partial(jax.jit, static_argnames=("variant", "given"))
def _candidates(
    variant: str,
    model: QuadraticModel,
    params: Params,
    budget: Budget,
    limits: Limits,
    *,
    given: bool,
) -> Found:
    # A model that somebody gave is minimised as it is, baselines stay as published.
    if not given and variant not in BASELINES:
        model, params = without_unseen(model, params, budget)
    return VARIANTS[variant](model, params, budget, limits)


def step(
    objective: Objective,
    options: Options,
    limits: Limits,
    state: State,
    budget: Budget,
    args: tuple,
    index: Int[Array, ""],
) -> State:
    examples = divide(args, options.held_out)
    model = _local_model(objective, state.params, examples.build)
    now = stage_budget(options, budget, index)
    dtype = _tree.dtype(state.params)
    ridges = limits.ridges.astype(dtype)
    refined = options.refinements > 0 and not objective.is_quadratic
    limits = dataclasses.replace(
        limits,
        ridges=ridges,
        tol=limits.tol.astype(dtype),
        metric=limits.metric.astype(dtype),
        keep_kernel=refined,
    )
    found = _candidates(
        options.variant, model, state.params, now, limits, given=objective.is_quadratic
    )
    value, best = _judged(objective, model, found, ridges, examples)
    chosen = jax.tree.map(lambda x: x[best], found._replace(kernel=None))
    params, tuned = _descent.descend(
        options.descent,
        objective,
        examples,
        chosen.params,
        chosen.mask,
        state.memory.descent,
    )
    chosen = chosen._replace(params=params)
    if refined:
        params = refine(
            objective,
            model,
            chosen.params,
            chosen.mask,
            ridges[best],
            found.kernel,
            examples,
            options.refinements,
        )
        chosen = chosen._replace(params=params)
    total, averaged = state.memory.total, averages(objective, options)
    if averaged:
        chosen, total = _averaged(
            objective, options, chosen, total, examples, budget, index
        )
    if refined or averaged or options.descent is not None:
        value = objective.value(chosen.params, examples.judge)
    after = _next_state(options, state, chosen, value, ridges[best], now, budget)
    return after._replace(memory=Memory(total, tuned))


def _judged(
    objective: Objective,
    model: QuadraticModel,
    found: Found,
    ridges: Float[Array, "l"],
    examples: Examples,
) -> tuple[Scalar, Int[Array, ""]]:
    """The lowest value among the answers, one for every ridge, and whose it is."""

    def judge(i: int) -> Scalar:
        if objective.is_quadratic and found.value is not None:
            return found.value[i].astype(ridges.dtype)
        params = jax.tree.map(lambda x: x[i], found.params)
        if objective.is_quadratic:
            return _with_ridge(model, params, ridges[i])
        return objective.value(params, examples.judge)

    values = jnp.stack([judge(i) for i in range(ridges.size)])
    best = jnp.argmin(jnp.where(jnp.isnan(values), jnp.inf, values))
    return values[best], best


def _averaged_stages(options: Options) -> int:
    """How many of the last stages are averaged."""
    return max(1, round(_AVERAGED * options.stages))


def averages(objective: Objective, options: Options) -> bool:
    """Whether there are stages to average: the mean of one is that one."""
    return _averaged_stages(options) > 1 and not objective.is_quadratic


def start(
    objective: Objective, options: Options, params: Params, budget: Budget, args: tuple
) -> tuple[State, Incumbent]:
    """The dense params, an empty sum of those of the last stages, a fresh optimizer."""
    judge = divide(args, options.held_out).judge
    state, incumbent = _states.dense_start(objective, params, budget, judge)
    total = _tree.zeros_like(params) if averages(objective, options) else ()
    memory = Memory(total, _descent.init(options.descent, params))
    return state._replace(memory=memory), incumbent


def _averaged(
    objective: Objective,
    options: Options,
    chosen: Found,
    total: Params,
    examples: Examples,
    budget: Budget,
    index: Int[Array, ""],
) -> tuple[Found, Params]:
    """At the last stage the average of the last ones, where its loss is lower.

    Every stage follows its own examples; their average follows all of them.
    """
    count = _averaged_stages(options)
    counts = index >= options.stages - count
    total = _tree.where(counts, _tree.add(total, chosen.params), total)

    def body(now: tuple[Found, Array]) -> tuple[Found, Array]:
        found, left = now
        mean = _tree.scale(1 / count, total)
        mask = select.support(mean, budget.counts, budget.groups)
        mean = _tree.keep(mask, mean)
        lower = objective.value(mean, examples.judge) < objective.value(
            found.params, examples.judge
        )
        better = found._replace(
            params=_tree.where(lower, mean, found.params),
            mask=_tree.where(lower, mask, found.mask),
        )
        return better, left - 1

    times = (index == options.stages - 1).astype(jnp.int32)
    chosen, _ = _linsolve.while_loop(
        lambda now: now[1] > 0, body, (chosen, times), on_host=objective.on_host
    )
    return chosen, total


def _with_ridge(model: QuadraticModel, params: Params, ridge: Scalar) -> Scalar:
    distance = _tree.sub(params, model.center)
    half = jnp.asarray(0.5, ridge.dtype)
    return model(params) + half * ridge * _tree.dot(distance, distance).astype(
        ridge.dtype
    )


def _next_state(
    options: Options,
    state: State,
    found: Found,
    value: Scalar,
    ridge: Scalar,
    now: Budget,
    budget: Budget,
) -> State:
    change = _states.relative_change(found.params, state.params)
    if options.stages == 1:
        # The only step: it has converged where what it did inside has.
        change = jnp.where(found.converged, 0, 1).astype(change.dtype)
    failed = ~_linsolve.usable(found.status)
    return State(
        params=_tree.cast_like(found.params, state.params),
        mask=found.mask,
        objective=value,
        change=change,
        stationarity=state.stationarity,
        damping=ridge.astype(state.damping.dtype),
        settled=jnp.all(now.counts == budget.counts),
        failure=first_status((failed, found.status)),
    )
