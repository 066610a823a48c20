"""The I-OBS step for stored curvatures: supports compete, each refitted exactly."""

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sparserec import _linsolve, _tree, select
from sparserec._run import Incumbent, State
from sparserec._types import Mask, Params, Scalar, Status, first_status
from sparserec.budget import Budget
from sparserec.quadratic import (
    MatrixFree,
    Objective,
    QuadraticModel,
    mean_curvature,
)
from sparserec.quadratic._model import StoredCurvature
from sparserec.solvers import _states
from sparserec.solvers._schedule import Schedule, budget_at
from sparserec.solvers._supports import MASK_RULES, best_exchange

FIRST_DAMPING = 0.01
"""Relative damping at which the adaptive rule starts."""

_GROWTHS, _GROWTH_RATIO = 8, 10.0**0.5  # growths of schedule "up", and their dampings
_GROWTH, _DECAY = 4.0, 0.5  # of adaptive damping, after a rejection / an acceptance
_RANGE = 1e-8, 1e8  # of adaptive damping, relative
_EXCHANGE_LIMIT = 2048  # weights up to which exchanges compete: they write H out


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class StoredOptions:
    """The static choices of the step; see `iobs`."""

    mask_rule: str = "top_k"
    values: str = "obs"
    adaptive: bool = True
    schedule: Schedule = None
    stages: int = 16
    safeguard: bool = True


class _Memory(NamedTuple):
    damping: Scalar  # absolute, for the next step
    scale: Scalar  # mean curvature at the start
    gradient_norm: Scalar  # largest so far: the scale of stationarity
    start: Params  # where another growth begins
    origin: Int[Array, ""]  # step at which the running growth began
    growths: Int[Array, ""]  # begun so far


class _Candidate(NamedTuple):
    """A refitted support; the objective is infinite where the refit failed."""

    params: Params
    mask: Mask
    objective: Scalar


def init(
    objective: Objective,
    damping: Scalar,
    params: Params,
    budget: Budget,
    args: tuple,
) -> tuple[State, Incumbent]:
    model = objective.model(params, args)
    scale = mean_curvature(model.curvature)
    scale = jnp.where(jnp.isfinite(scale) & (scale > 0), scale, 1)
    mask = select.support(params, budget.counts, budget.groups)
    projection = _tree.keep(mask, params)
    one = jnp.ones((), model.value.dtype)
    memory = _Memory(
        damping=damping.astype(one.dtype) * scale,
        scale=scale,
        gradient_norm=-one,
        start=params,
        origin=jnp.int32(0),
        growths=jnp.int32(1),
    )
    state = _states.begin(params, _tree.ones_mask(params), model.value, memory)
    return state, Incumbent(projection, mask, objective.value(projection, args))


def step(
    objective: Objective,
    options: StoredOptions,
    step_size: Scalar | None,
    state: State,
    budget: Budget,
    args: tuple,
    index: Int[Array, ""],
) -> State:
    model = objective.model(state.params, args)
    stage = index - state.memory.origin
    now = budget_at(options.schedule, budget, stage, options.stages)
    damping = state.memory.damping
    if options.values == "top_k":
        chosen, solved = _bare(model, options, damping, step_size, now)
        chosen = chosen._replace(objective=objective.value(chosen.params, args))
        accepted = jnp.bool_(True)
    else:
        supports, solved = _supports(model, options, damping, step_size, now)
        ridges = _refit_dampings(model, damping)
        candidates = [
            _refit(objective, model, support, ridge, args)
            for support in supports
            for ridge in ridges
        ]
        chosen = functools.reduce(_better, candidates)
        accepted = jnp.isfinite(chosen.objective)
        if options.safeguard:
            # Among equally good supports the present one stays; rounding would let
            # them take turns for ever.
            place = len(supports) - 1 - hasattr(model.curvature, "to_matrix")
            present = functools.reduce(
                _better, candidates[place * len(ridges) : (place + 1) * len(ridges)]
            )
            slack = 8 * jnp.finfo(damping.dtype).eps * jnp.abs(present.objective)
            even = present.objective <= chosen.objective + slack
            chosen = _select(even, present, chosen)
            plain = _masked(objective, state.params, now, args)
            accepted = chosen.objective <= plain.objective
            chosen = _select(accepted, chosen, plain)
            if options.schedule == "up":
                # While the budget grows, the support of the Newton point is right
                # more often than the one with the lowest loss so far.
                own = functools.reduce(_better, candidates[: len(ridges)])
                growing = jnp.any(now.counts < budget.counts) & jnp.isfinite(
                    own.objective
                )
                chosen, accepted = _select(growing, own, chosen), accepted | growing
    after = _next_state(options, state, model, budget, now, chosen, accepted, solved)
    if options.schedule == "up" and options.adaptive and options.safeguard:
        return _grow_again(state, after, model, index)
    return after


def _grow_again(
    before: State, after: State, model: QuadraticModel, index: Int[Array, ""]
) -> State:
    """Starts over with more damping where growth has ended in a dead end.

    Growth under another damping ends in another support, about as good; the best of
    several is right far more often than any one. There is nothing to gain where the
    whole gradient vanishes.
    """
    memory = before.memory
    same = jnp.all(_tree.flatten(before.mask) == _tree.flatten(after.mask))
    # A second refit on the same support gains a little by rounding alone.
    slack = jnp.finfo(memory.scale.dtype).eps ** 0.5 * jnp.abs(before.objective)
    stalled = before.settled & same & (after.objective >= before.objective - slack)
    steep = _tree.norm(model.gradient) > 1e-6 * memory.gradient_norm
    again = stalled & steep & (memory.growths < _GROWTHS)
    strength = _GROWTH_RATIO ** memory.growths.astype(memory.scale.dtype)
    fresh = _Memory(
        damping=FIRST_DAMPING * strength * memory.scale,
        scale=memory.scale,
        gradient_norm=after.memory.gradient_norm,
        start=memory.start,
        origin=index + 1,
        growths=memory.growths + 1,
    )
    return State(
        params=_tree.where(again, memory.start, after.params),
        mask=after.mask,
        objective=after.objective,
        change=after.change,
        stationarity=after.stationarity,
        damping=after.damping,
        settled=after.settled & ~again,
        failure=after.failure,
        memory=jax.tree.map(lambda x, y: jnp.where(again, x, y), fresh, after.memory),
        attempt=memory.growths,
    )


def _next_state(
    options: StoredOptions,
    state: State,
    model: QuadraticModel,
    budget: Budget,
    now: Budget,
    chosen: _Candidate,
    accepted: Bool[Array, ""],
    solved: Bool[Array, ""],
) -> State:
    memory = state.memory
    damping = memory.damping
    if options.adaptive:
        factor = jnp.where(accepted & solved, _DECAY, _GROWTH).astype(damping.dtype)
        low, high = (jnp.asarray(bound, damping.dtype) for bound in _RANGE)
        damping = jnp.clip(damping * factor, low * memory.scale, high * memory.scale)
        if options.schedule == "up":
            damping = jnp.where(
                jnp.any(now.counts < budget.counts), memory.damping, damping
            )
        failed = jnp.bool_(False)
    else:
        failed = ~solved & jnp.isfinite(model.value)
    gradient_norm = _states.gradient_scale(
        memory.gradient_norm, model.gradient, memory.scale * _tree.norm(model.center)
    )
    live_gradient = _tree.norm(_tree.keep(chosen.mask, model.gradient))
    # The bare thresholding of a Newton point has fixed points that are not
    # stationary on their support, so only the change can tell that it has ended.
    measured = options.values == "obs"
    stationarity = live_gradient / gradient_norm
    return State(
        params=chosen.params,
        mask=chosen.mask,
        objective=chosen.objective,
        change=_states.relative_change(chosen.params, state.params),
        stationarity=stationarity if measured else jnp.zeros_like(stationarity),
        damping=memory.damping,
        settled=jnp.all(now.counts == budget.counts),
        failure=first_status((failed, Status.NOT_POSITIVE_DEFINITE)),
        memory=_Memory(
            damping=damping,
            scale=memory.scale,
            gradient_norm=gradient_norm,
            start=memory.start,
            origin=memory.origin,
            growths=memory.growths,
        ),
    )


def _newton_point(
    model: QuadraticModel, damping: Scalar, step_size: Scalar | None
) -> tuple[Params, Bool[Array, ""]]:
    r"""$u = w - \eta (H + \lambda I)^{-1} g$, and whether the solve succeeded.

    The automatic step is $n / \mathrm{tr}\,(H+\lambda I)^{-1}H$: one for a
    curvature of full rank, and about n over the rank where there are fewer rows
    than weights, where the Newton point moves short by that factor.
    """
    everything = _tree.ones_mask(model.center)
    solved = model.curvature.solve_on(everything, model.gradient, damping)
    if step_size is not None:
        length = step_size.astype(damping.dtype)
    elif hasattr(model.curvature, "effective_dimension"):
        rank = cast(StoredCurvature, model.curvature).effective_dimension(damping)
        size = _tree.size(model.center)
        # Twice around n is rounding; NaN says that the factorisation failed.
        length = jnp.where(rank >= 1, size / jnp.maximum(rank, 1), 1)
    else:
        length = jnp.ones((), damping.dtype)
    point = _tree.add_scaled(model.center, -length, solved.value)
    return point, _linsolve.usable(solved.status)


def _bare(
    model: QuadraticModel,
    options: StoredOptions,
    damping: Scalar,
    step_size: Scalar | None,
    budget: Budget,
) -> tuple[_Candidate, Bool[Array, ""]]:
    """The paper's practical variant: the thresholded Newton point, as it is."""
    one = jnp.ones((), damping.dtype)
    point, solved = _newton_point(
        model, damping, one if step_size is None else step_size
    )
    mask = MASK_RULES[options.mask_rule](point, model.curvature, damping, budget)
    return _Candidate(_tree.keep(mask, point), mask, one), solved


def _supports(
    model: QuadraticModel,
    options: StoredOptions,
    damping: Scalar,
    step_size: Scalar | None,
    budget: Budget,
) -> tuple[list[Mask], Bool[Array, ""]]:
    """Competing supports, the one of the damped Newton point first."""
    rule = MASK_RULES[options.mask_rule]
    dampings = [damping]
    direct = not isinstance(model.curvature, MatrixFree)
    if direct and options.safeguard and options.adaptive:
        dampings += [jnp.zeros_like(damping)]
    supports, solved = [], jnp.bool_(False)
    for strength in dampings:
        point, success = _newton_point(model, strength, step_size)
        supports.append(rule(point, model.curvature, strength, budget))
        solved |= success
    if options.safeguard:
        supports.append(_support_of_magnitudes(model, budget))
        few = _tree.size(model.center) <= _EXCHANGE_LIMIT
        if few and hasattr(model.curvature, "to_matrix"):
            supports.append(best_exchange(model, supports[-1], budget))
    return supports, solved


def _support_of_magnitudes(model: QuadraticModel, budget: Budget) -> Mask:
    """The k largest weights; among zeros the largest gradients come first."""
    gradient = _tree.norm(model.gradient)
    # Below any weight that a float can tell from zero beside the largest one.
    largest = jnp.max(jnp.abs(_tree.flatten(model.center)))
    floor = jnp.where(largest > 0, largest * 1e-30, 1)
    scores = jax.tree.map(
        lambda w, g: (
            jnp.abs(w)
            + (floor / jnp.where(gradient > 0, gradient, 1)).astype(g.dtype)
            * jnp.abs(g)
        ),
        model.center,
        model.gradient,
    )
    return select.support(scores, budget.counts, budget.groups)


def _refit_dampings(model: QuadraticModel, damping: Scalar) -> list[Scalar]:
    """Exact solves try no damping first: a damped refit biases the values."""
    if isinstance(model.curvature, MatrixFree):
        return [damping]
    return [jnp.zeros_like(damping), damping]


def _refit(
    objective: Objective,
    model: QuadraticModel,
    mask: Mask,
    damping: Scalar,
    args: tuple,
) -> _Candidate:
    r"""The OBS update: minimise the model over the weights on the support.

    $x_Q = w_Q - (H_{QQ} + \lambda I)^{-1} (g + H(w_Q - w))_Q$, which is
    $H_{QQ}^{-1}(Hw - g)_Q$ without damping.
    """
    masked = _tree.keep(mask, model.center)
    bend = model.curvature.matvec(_tree.sub(masked, model.center))
    slope = _tree.keep(mask, _tree.add(model.gradient, bend))
    solved = model.curvature.solve_on(mask, slope, damping)
    params = _tree.sub(masked, solved.value)
    value = objective.value(params, args)
    usable = _linsolve.usable(solved.status) & jnp.isfinite(value)
    return _Candidate(params, mask, jnp.where(usable, value, jnp.inf))


def _masked(
    objective: Objective, params: Params, budget: Budget, args: tuple
) -> _Candidate:
    """Plain masking: the largest weights, values untouched."""
    mask = select.support(params, budget.counts, budget.groups)
    masked = _tree.keep(mask, params)
    return _Candidate(masked, mask, objective.value(masked, args))


def _select(condition: Bool[Array, ""], a: _Candidate, b: _Candidate) -> _Candidate:
    return _Candidate(
        params=_tree.where(condition, a.params, b.params),
        mask=_tree.where(condition, a.mask, b.mask),
        objective=jnp.where(condition, a.objective, b.objective),
    )


def _better(a: _Candidate, b: _Candidate) -> _Candidate:
    return _select(a.objective <= b.objective, a, b)
