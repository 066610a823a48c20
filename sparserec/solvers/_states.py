"""What the states of all solvers have in common: how they begin, how they measure."""

from typing import Any

import jax
import jax.numpy as jnp

from sparserec import _tree, select
from sparserec._run import Incumbent, State
from sparserec._types import Mask, Params, Scalar, Status
from sparserec.budget import Budget
from sparserec.quadratic import Objective, QuadraticModel


def begin(
    params: Params,
    mask: Mask,
    objective: Scalar,
    memory: Any = (),
    *,
    settled: bool = False,
    measured: bool = True,
) -> State:
    """The state before the first step: no change and no damping measured yet.

    Args:
      params: where the iteration starts.
      mask: its support.
      objective: loss there, shape `()`.
      memory: what the solver carries along.
      settled: whether the start obeys the budget.
      measured: whether the solver measures stationarity; else it is zero for good.

    Returns:
      A running state.
    """
    one = jnp.ones((), objective.dtype)
    return State(
        params=params,
        mask=mask,
        objective=objective,
        change=one,
        stationarity=one if measured else jnp.zeros_like(one),
        damping=one * jnp.nan,
        settled=jnp.bool_(settled),
        failure=jnp.int32(Status.RUNNING),
        memory=memory,
    )


def first_value(objective: Objective, params: Params, args: tuple) -> Scalar:
    """The loss at the start; a model around it is not asked for a product."""
    model = objective.loss_fn
    if not isinstance(model, QuadraticModel):
        return objective.value(params, args)
    away = _tree.flatten(params) != _tree.flatten(model.center)
    return jax.lax.cond(
        jnp.any(away),
        lambda: objective.value(params, args),
        lambda: model.value.astype(_tree.dtype(params)),
    )


def dense_start(
    objective: Objective, params: Params, budget: Budget, args: tuple
) -> tuple[State, Incumbent]:
    """The dense params, for solvers whose last step always finds something better.

    Args:
      objective: what is minimised.
      params: where to start.
      budget: the final budget.
      args: data of the loss.

    Returns:
      The state, and plain masking with an infinite loss as the point to fall back to.
    """
    mask = select.support(params, budget.counts, budget.groups)
    value = first_value(objective, params, args)
    state = begin(params, _tree.ones_mask(params), value, measured=False)
    projection = _tree.keep(mask, params)
    return state, Incumbent(projection, mask, jnp.full_like(value, jnp.inf))


def relative_change(params: Params, before: Params) -> Scalar:
    """Norm of the change, relative to that of the new params."""
    change = _tree.norm(_tree.sub(params, before))
    tiny = jnp.finfo(change.dtype).tiny
    return change / jnp.maximum(_tree.norm(params), tiny)


def gradient_scale(largest: Scalar, gradient: Params, bend: Scalar) -> Scalar:
    """The norm to which gradients on the support are compared.

    The largest full gradient so far, not the first one: training ends where the
    gradient vanishes, and only on leaving that point does it show its scale. Below
    the floor it is rounding (all weights may stay).

    Args:
      largest: the scale so far; negative before the first step.
      gradient: of the loss at the iterate.
      bend: a curvature times the norm of the params, in units of gradient.

    Returns:
      A positive scalar.
    """
    info = jnp.finfo(largest.dtype)
    floor = jnp.maximum(jnp.sqrt(info.eps) * bend, info.tiny)
    now = jnp.maximum(_tree.norm(gradient), floor.astype(largest.dtype))
    return jnp.maximum(largest, now.astype(largest.dtype))
