"""Iterative hard thresholding, with a step that fits any scaling of the problem."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Int

from sparserec import _tree, select
from sparserec._linsolve import while_loop
from sparserec._run import Incumbent, Solver, State
from sparserec._solution import Solution
from sparserec._types import LossFn, Mask, Params, Prunable, Scalar
from sparserec.budget import Budget, matrices
from sparserec.quadratic import Objective, QuadraticModel
from sparserec.solvers import _box, _front, _states
from sparserec.solvers._box import Box

_LARGEST_SHRINKAGE = 60
"""Halvings of one step before it is given up: 2^-60 is beyond float64 rounding."""


class _Memory(NamedTuple):
    step_size: Scalar
    gradient_norm: Scalar  # largest so far: the scale of stationarity


class _Trial(NamedTuple):
    params: Params
    mask: Params
    objective: Scalar
    step_size: Scalar
    accepted: Array
    shrinkages: Int[Array, ""]


def _norm_squared(a: Params) -> Scalar:
    return _tree.dot(a, a)


def _project(box: Box | None, point: Params, budget: Budget) -> tuple[Params, Mask]:
    """The nearest point within budget and bounds, and its support."""
    sizes = _box.magnitudes(box, point)
    mask = select.support(sizes, budget.counts, budget.groups)
    return _tree.keep(mask, _box.clip(box, point)), mask


def _init(
    objective: Objective,
    box: Box | None,
    params: Params,
    budget: Budget,
    args: tuple,
) -> tuple[State, Incumbent]:
    projection, mask = _project(box, params, budget)
    value = objective.value(projection, args)
    minus = -jnp.ones((), value.dtype)
    memory = _Memory(step_size=minus, gradient_norm=minus)
    state = _states.begin(projection, mask, value, memory, settled=True)
    return state, Incumbent(projection, mask, value)


def _step(
    objective: Objective,
    step_size: Scalar | None,
    box: Box | None,
    state: State,
    budget: Budget,
    args: tuple,
    index: Int[Array, ""],
) -> State:
    del index
    model = objective.model(state.params, args)
    gradient = model.gradient

    def project(length: Scalar) -> tuple[Params, Mask]:
        point = _tree.add_scaled(state.params, -length, gradient)
        return _project(box, point, budget)

    if step_size is None:
        length = _exact_step(model, state, budget, box)
        trial = _shrink_until_majorised(objective, model, args, project, length)
        params, mask, value, length = trial[:4]
    else:
        length = step_size.astype(state.objective.dtype)
        params, mask = project(length)
        value = objective.value(params, args)
    live = _box.movable(box, mask, params, gradient)
    live_gradient = _tree.norm(_tree.keep(live, gradient))
    gradient_norm = _states.gradient_scale(
        state.memory.gradient_norm, gradient, _tree.norm(params) / length
    )
    return State(
        params=params,
        mask=mask,
        objective=value,
        change=_states.relative_change(params, state.params),
        stationarity=live_gradient / gradient_norm,
        damping=state.damping,
        settled=state.settled,
        failure=state.failure,
        memory=_Memory(step_size=length, gradient_norm=gradient_norm),
    )


def _exact_step(
    model: QuadraticModel, state: State, budget: Budget, box: Box | None
) -> Scalar:
    """Exact line search on the support: |g_Q|^2 / g_Q' H g_Q.

    From an empty support the one of the largest gradients is used; weights that the
    step would press against their bounds are left out. Where the
    curvature along the gradient is not positive the last step is doubled.
    """
    by_gradient = select.support(model.gradient, budget.counts, budget.groups)
    empty = _norm_squared(_tree.keep(state.mask, state.params)) == 0
    support = _tree.where(empty, by_gradient, state.mask)
    support = _box.movable(box, support, state.params, model.gradient)
    direction = _tree.keep(support, model.gradient)
    curvature = _tree.dot(direction, model.curvature.matvec(direction))
    ratio = _norm_squared(direction) / jnp.where(curvature > 0, curvature, 1)
    last = state.memory.step_size
    fallback = jnp.where(last > 0, 2 * last, 1)
    return jnp.where((curvature > 0) & (ratio > 0), ratio, fallback)


def _shrink_until_majorised(
    objective: Objective, model: QuadraticModel, args: tuple, project, length: Scalar
) -> _Trial:
    r"""Halves the step $\eta$ until $f(x^+) \le f(x) + g^\top d + \|d\|^2/(2\eta)$.

    On a quadratic this is $\eta \le \|d\|^2 / d^\top H d$, the condition of
    normalised IHT; on any loss it makes the objective decrease.
    """

    def attempt(length: Scalar, shrinkages: Int[Array, ""]) -> _Trial:
        params, mask = project(length)
        value = objective.value(params, args)
        step = _tree.sub(params, model.center)
        bound = (
            model.value
            + _tree.dot(model.gradient, step)
            + _norm_squared(step) / (2 * length)
        )
        slack = 8 * jnp.finfo(value.dtype).eps * jnp.abs(model.value)
        return _Trial(
            params=params,
            mask=mask,
            objective=value,
            step_size=length,
            accepted=value <= bound + slack,
            shrinkages=shrinkages,
        )

    return while_loop(
        lambda trial: ~trial.accepted & (trial.shrinkages < _LARGEST_SHRINKAGE),
        lambda trial: attempt(trial.step_size / 2, trial.shrinkages + 1),
        attempt(length, jnp.int32(0)),
        on_host=objective.on_host,
    )


def iht_solver(
    objective: Objective,
    *,
    step_size: Scalar | float | None = None,
    box: Box | None = None,
) -> Solver:
    """Iterative hard thresholding as a `Solver`, for use with `run`.

    Args:
      objective: what to minimise, from `sparserec.quadratic.make_objective`.
      step_size: fixed step; `None` for the automatic one.
      box: bounds of the weights; `None` for none.

    Returns:
      The pair of init and step.
    """
    fixed = None if step_size is None else jnp.asarray(step_size)
    return Solver(
        init=Partial(_init, objective, box), step=Partial(_step, objective, fixed, box)
    )


def iht(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: int | Array | Mapping[str, int | Array],
    *,
    args: tuple = (),
    step_size: Scalar | float | Literal["auto"] = "auto",
    curvature=None,
    lower: Params | float | None = None,
    upper: Params | float | None = None,
    prunable: Prunable = matrices,
    batch_size: int | None = None,
    tol: Scalar | float = 1e-6,
    max_steps: int = 500,
) -> Solution:
    r"""Minimises a loss over k-sparse params by iterative hard thresholding.

    $$w^{t+1} = T_k\bigl(w^t - \eta_t \nabla f(w^t)\bigr)$$

    where $T_k$ keeps the k largest magnitudes. The automatic step is the exact line
    search on the current support, halved until the step is majorised, so that the
    objective decreases whatever the scaling of the problem.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, or a `QuadraticModel`; static
        (pass the same function object again and nothing recompiles).
      params: starting point, any pytree of floating arrays; its projection onto
        the k largest magnitudes is the first iterate.
      k: prunable weights to keep in all, an integer, or a mapping from leaf path to
        count; traced.
      args: data handed to the loss; traced.
      step_size: `"auto"`, or a fixed step in units of squared weight per loss.
      curvature: builds the local model whose product sets the automatic step; the
        exact Hessian by default. See `sparserec.quadratic`.
      lower: least values of the weights, a number, or numbers shaped like `params`;
        `None` for none. At most zero for prunable weights: a weight that is not kept
        is zero. $T_k$ then keeps what brings the point nearest. Traced.
      upper: largest values, at least zero for prunable weights; as `lower`.
      prunable: which leaves may be pruned; see `sparserec.matrices`. Other leaves
        are optimised along.
      batch_size: visit the data in chunks of this many examples, with loops on the
        host; for data or convolutions that one program cannot hold. Static.
      tol: relative change at which to stop; the relative gradient on the support
        must be below its square root too. Traced.
      max_steps: largest number of steps; static.

    Returns:
      A `Solution` with at most k prunable weights; with `k=0` they are all zero.
      Ties go to the lowest index. If a NaN appears on the way, the best finite
      iterate with status `NONFINITE`.

    Raises:
      TypeError: `k` or `params` of the wrong type.
      ValueError: `k` out of range, unknown paths, a loss that is not a scalar or
        not finite at the start, data of the wrong form, bounds that contradict each
        other.

    Source: Blumensath & Davies (2009, 2010: normalised step).
    """
    automatic = isinstance(step_size, str)
    if automatic and step_size != "auto":
        raise ValueError(f"`step_size` must be 'auto' or a number, got {step_size!r}.")
    fixed = None if automatic else step_size
    box = _box.make_box(lower, upper, params, prunable)
    return _front.solve(
        lambda objective, _: iht_solver(objective, step_size=fixed, box=box),
        loss_fn,
        params,
        k,
        args=args,
        curvature=curvature,
        prunable=prunable,
        batch_size=batch_size,
        tol=tol,
        max_steps=max_steps,
    )
