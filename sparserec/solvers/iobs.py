"""I-OBS: iterative Optimal Brain Surgeon, curvature-preconditioned thresholding.

Every step models the loss by a quadratic, takes the damped Newton point, lets
several supports compete, refits the weights on each (the OBS update), and keeps the
best only if it beats plain masking.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Int

from sparserec import _linsolve, _tree, select
from sparserec._run import Incumbent, Solver, State
from sparserec._solution import Solution
from sparserec._types import LossFn, Mask, Params, Prunable, Scalar, Status
from sparserec.budget import Budget, matrices
from sparserec.quadratic import (
    CurvatureFn,
    MatrixFree,
    Objective,
    QuadraticModel,
    hessian,
    mean_curvature,
)
from sparserec.solvers import _front, _iobs_products
from sparserec.solvers._descent import Descent
from sparserec.solvers._iobs_products import ProductOptions
from sparserec.solvers._schedule import Schedule, budget_at, check_schedule
from sparserec.solvers._supports import (
    EXACT_LIMIT,
    MASK_RULES,
    NEEDS,
    best_exchange,
)

FIRST_DAMPING = 0.01
"""Relative damping at which the adaptive rule starts."""

_GROWTHS, _GROWTH_RATIO = 5, 10.0**0.5  # growths of schedule "up", and their dampings
_GROWTH, _DECAY = 4.0, 0.5  # of adaptive damping, after a rejection / an acceptance
_RANGE = 1e-8, 1e8  # of adaptive damping, relative


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Options:
    """The static choices of I-OBS; see `iobs`."""

    mask_rule: str = "top_k"
    values: str = "obs"
    adaptive: bool = True
    schedule: Schedule = None
    stages: int = 16
    safeguard: bool = True


class _Memory(NamedTuple):
    damping: Scalar  # absolute, for the next step
    scale: Scalar  # mean curvature at the start
    gradient_norm: Scalar  # at the start; negative before the first step
    start: Params  # where another growth begins
    origin: Int[Array, ""]  # step at which the running growth began
    growths: Int[Array, ""]  # begun so far


class _Candidate(NamedTuple):
    """A refitted support; the objective is infinite where the refit failed."""

    params: Params
    mask: Mask
    objective: Scalar


def _init(
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
    state = State(
        params=params,
        mask=_tree.ones_mask(params),
        objective=model.value,
        change=one,
        stationarity=one,
        damping=one * jnp.nan,
        settled=jnp.bool_(False),
        failure=jnp.int32(Status.RUNNING),
        memory=_Memory(
            damping=damping.astype(one.dtype) * scale,
            scale=scale,
            gradient_norm=-one,
            start=params,
            origin=jnp.int32(0),
            growths=jnp.int32(1),
        ),
    )
    return state, Incumbent(projection, mask, objective.value(projection, args))


def _step(
    objective: Objective,
    options: Options,
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
    five is right far more often than any one. There is nothing to gain where the
    whole gradient vanishes.
    """
    memory = before.memory
    same = jnp.all(_tree.flatten(before.mask) == _tree.flatten(after.mask))
    stalled = before.settled & same & (after.objective >= before.objective)
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
        memory=jax.tree.map(
            lambda x, y: jnp.where(again, x, y), fresh, after.memory
        ),
    )


def _next_state(
    options: Options,
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
    gradient_norm = jnp.where(
        memory.gradient_norm < 0, _tree.norm(model.gradient), memory.gradient_norm
    )
    live_gradient = _tree.norm(_tree.keep(chosen.mask, model.gradient))
    # The bare thresholding of a Newton point has fixed points that are not
    # stationary on their support, so only the change can tell that it has ended.
    measured = options.values == "obs"
    change = _tree.norm(_tree.sub(chosen.params, state.params))
    tiny = jnp.finfo(change.dtype).tiny
    return State(
        params=chosen.params,
        mask=chosen.mask,
        objective=chosen.objective,
        change=change / jnp.maximum(_tree.norm(chosen.params), tiny),
        stationarity=live_gradient / jnp.where(gradient_norm > 0, gradient_norm, 1)
        if measured
        else jnp.zeros_like(change),
        damping=memory.damping,
        settled=jnp.all(now.counts == budget.counts),
        failure=jnp.where(
            failed, int(Status.NOT_POSITIVE_DEFINITE), int(Status.RUNNING)
        ).astype(jnp.int32),
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
        rank = model.curvature.effective_dimension(damping)
        size = _tree.size(model.center)
        # Twice around n is rounding; NaN says that the factorisation failed.
        length = jnp.where(rank >= 1, size / jnp.maximum(rank, 1), 1)
    else:
        length = jnp.ones((), damping.dtype)
    point = _tree.add_scaled(model.center, -length, solved.value)
    return point, _linsolve.usable(solved.status)


def _bare(
    model: QuadraticModel,
    options: Options,
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
    options: Options,
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
        if hasattr(model.curvature, "to_matrix"):
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


def iobs_solver(
    objective: Objective,
    *,
    options: Options,
    damping: Scalar | float,
    step_size: Scalar | float | None,
) -> Solver:
    """I-OBS on stored curvatures as a `Solver`, for use with `run`.

    Args:
      objective: what to minimise, from `sparserec.quadratic.make_objective`.
      options: static choices.
      damping: relative damping; the first one where it is adaptive.
      step_size: of the Newton point; `None` for the automatic one.

    Returns:
      The pair of init and step.
    """
    fixed = None if step_size is None else jnp.asarray(step_size)
    return Solver(
        init=Partial(_init, objective, jnp.asarray(damping)),
        step=Partial(_step, objective, options, fixed),
    )


def iobs_product_solver(objective: Objective, *, options: ProductOptions) -> Solver:
    """I-OBS on curvatures known by products as a `Solver`, for use with `run`.

    Args:
      objective: what to minimise, from `sparserec.quadratic.make_objective`; its
        models must have a `sparserec.quadratic.MatrixFree` curvature.
      options: static choices.

    Returns:
      The pair of init and step.
    """
    return Solver(
        init=Partial(_iobs_products.init, objective, options),
        step=Partial(_iobs_products.step, objective, options),
    )


def iobs(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: int | Array | Mapping[str, int | Array],
    *,
    args: tuple = (),
    curvature: CurvatureFn = hessian,
    mask_rule: Literal["top_k", "saliency", "backward", "exact"] = "top_k",
    values: Literal["obs", "top_k"] = "obs",
    damping: Scalar | float | Literal["auto"] = "auto",
    step_size: Scalar | float | Literal["auto"] = "auto",
    schedule: Schedule = None,
    stages: int = 16,
    batches: Callable[[int], tuple] | tuple | None = None,
    safeguard: bool = True,
    held_out: float | None = None,
    refinements: int = 6,
    descent: Descent | None = None,
    prunable: Prunable = matrices,
    batch_size: int | None = None,
    tol: Scalar | float = 1e-6,
    max_steps: int = 50,
) -> Solution:
    r"""Minimises a loss over k-sparse params by iterative Optimal Brain Surgeon.

    Every step models the loss at $w$ by $g$ and $H$ and computes

    $$u = w - \eta (H + \lambda I)^{-1} g, \qquad
      Q = \text{rule}_k(u), \qquad
      w^+_Q = H_{QQ}^{-1} (H w - g)_Q, \quad w^+_{\bar Q} = 0.$$

    The support of the Newton point competes with that of the largest weights; each
    is refitted, and the best is taken only if its loss is not above that of plain
    masking. Otherwise plain masking is taken, and adaptive damping grows.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, or a `QuadraticModel`; static
        (pass the same function object again and nothing recompiles).
      params: where to start, any pytree of floating arrays: trained weights for
        pruning, zeros for recovery.
      k: prunable weights to keep in all, an integer, or a mapping from leaf path to
        count; traced.
      args: data handed to the loss; traced.
      curvature: builds the local model: `sparserec.quadratic.hessian` (exact; a
        stored matrix up to 512 weights), or
        `sparserec.quadratic.gauss_newton(...)` for networks; static. Ignored where
        `loss_fn` is a model.
      mask_rule: how a Newton point becomes a support; static. `"top_k"`: largest
        magnitudes; `"saliency"`: largest $u_i^2/[(H+\lambda I)^{-1}]_{ii}$;
        `"backward"`: backward elimination (OBC), $O(n^3)$, stored curvatures;
        `"exact"`: all supports, at most 16 weights.
      values: `"obs"` refits on the support; `"top_k"` takes the Newton point as it
        is, without safeguard: the practical variant of the paper. Static.
      damping: `"auto"` adapts it; a number $\ge 0$ is fixed. Relative to the mean
        curvature at the start, no unit; traced.
      step_size: $\eta$. `"auto"` is one for a curvature of full rank and about n
        over the rank otherwise; traced.
      schedule: `None`; `"down"` lowers the budget from all weights to k (pruning);
        `"up"` raises it from few weights to k (recovery); or a function from the
        step's index to a count. Static.
      stages: steps that the built-in schedules take; static.
      batches: fresh data for every step instead of `args`: a tuple of arrays with
        one more leading axis over steps, or a callable from the step's index to
        such a tuple, called on the host.
      safeguard: competing supports and acceptance by loss. `False` gives the bare
        iteration that the theorems speak of. Static.
      held_out: share of the examples that judge candidates and build nothing, for
        curvatures known by products; by default 0.1 with `batches`, and none with
        `args`, so that the loss of all of them is minimised. Static.
      refinements: re-linearised refits on the support at every step, for curvatures
        known by products; static.
      descent: `sparserec.Descent(optimizer)` tunes the kept weights by mini-batches
        between the choice of the support and the refinements; static.
      prunable: which leaves may be pruned; see `sparserec.matrices`. Other leaves
        are refitted along with the support.
      batch_size: visit the data in chunks of this many examples, with loops on the
        host; for data or convolutions that one program cannot hold. Static.
      tol: relative change at which to stop; the relative gradient on the support
        must be below its square root too. Traced.
      max_steps: largest number of steps, schedule included; static.

    Returns:
      A `Solution` with at most k prunable weights. With `k=0` they are all zero;
      ties go to the lowest index. If a NaN appears on the way, the best finite
      iterate with status `NONFINITE`; where a fixed damping leaves the curvature
      indefinite, the best iterate with status `NOT_POSITIVE_DEFINITE`.

    Raises:
      TypeError: `k` or `params` of the wrong type.
      ValueError: `k` out of range, unknown paths or options, a rule that the
        curvature cannot serve, a loss that is not a scalar or not finite at the
        start, data of the wrong form.

    Source: Wu et al. (2024), I-OBS: Options 1 and 2; the OBS update in its support
    form. Competing supports, safeguard, damping and schedules are additions.
    """
    _check_choices(params, mask_rule, values, damping, step_size)
    check_schedule(schedule)
    _front.check_positive_int("stages", stages)
    if held_out is None:
        held_out = 0.0 if batches is None else 0.1
    if not 0 <= held_out < 1:
        raise ValueError(f"`held_out` must lie in [0, 1), got {held_out!r}.")
    adaptive = isinstance(damping, str)
    bare = not (adaptive and safeguard and values == "obs" and mask_rule == "top_k")

    def make_solver(objective: Objective, known_by_products: bool) -> Solver:
        if known_by_products and not bare:
            return iobs_product_solver(
                objective,
                options=ProductOptions(
                    schedule, stages, held_out, refinements, descent
                ),
            )
        return iobs_solver(
            objective,
            options=Options(mask_rule, values, adaptive, schedule, stages, safeguard),
            damping=FIRST_DAMPING if adaptive else damping,
            step_size=None if isinstance(step_size, str) else step_size,
        )

    return _front.solve(
        make_solver,
        loss_fn,
        params,
        k,
        args=args,
        batches=batches,
        curvature=curvature,
        needs=NEEDS[mask_rule],
        prunable=prunable,
        batch_size=batch_size,
        tol=tol,
        max_steps=max_steps,
    )


def _check_choices(
    params: Params, mask_rule: str, values: str, damping: object, step_size: object
) -> None:
    if mask_rule not in MASK_RULES:
        raise ValueError(
            f"`mask_rule` must be one of {sorted(MASK_RULES)}, got {mask_rule!r}."
        )
    if values not in ("obs", "top_k"):
        raise ValueError(f"`values` must be 'obs' or 'top_k', got {values!r}.")
    for name, value in (("damping", damping), ("step_size", step_size)):
        if isinstance(value, str) and value != "auto":
            raise ValueError(f"`{name}` must be 'auto' or a number, got {value!r}.")
    if isinstance(damping, int | float) and not damping >= 0:
        raise ValueError(f"`damping` must be at least 0, got {damping!r}.")
    if mask_rule == "exact" and _tree.size(params) > EXACT_LIMIT:
        raise ValueError(
            f"`mask_rule='exact'` enumerates all supports of at most {EXACT_LIMIT} "
            f"weights; these params have {_tree.size(params)}. Use 'backward'."
        )
