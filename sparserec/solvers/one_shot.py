"""The classics in one step: Optimal Brain Damage and Optimal Brain Surgeon."""

from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Int

from sparserec import _linsolve, _tree, select
from sparserec._run import Solver, State
from sparserec._solution import Solution
from sparserec._types import (
    LossFn,
    Mask,
    Params,
    Prunable,
    Scalar,
    Status,
    first_status,
)
from sparserec.budget import Budget, matrices
from sparserec.quadratic import CurvatureFn, Objective, QuadraticModel, hessian
from sparserec.quadratic._model import MatrixCurvature
from sparserec.solvers import _front, _states
from sparserec.solvers._supports import eliminate


def _done(
    state: State, params: Params, mask: Mask, value: Scalar, failure: Int[Array, ""]
) -> State:
    """The state after the only step; the change is zero, as there is no other."""
    return state._replace(
        params=params,
        mask=mask,
        objective=value,
        change=jnp.zeros_like(state.change),
        settled=jnp.bool_(True),
        failure=failure,
    )


def _damage(
    objective: Objective,
    state: State,
    budget: Budget,
    args: tuple,
    index: Int[Array, ""],
) -> State:
    del index
    diagonal = objective.model(state.params, args).curvature.diagonal()
    saliency = jax.tree.map(
        lambda h, w: jnp.maximum(h, 0).astype(w.dtype) * jnp.square(w),
        diagonal,
        state.params,
    )
    mask = select.support(saliency, budget.counts, budget.groups)
    params = _tree.keep(mask, state.params)
    value = objective.value(params, args)
    return _done(state, params, mask, value, jnp.int32(Status.RUNNING))


def _surgery(
    objective: Objective,
    damping: Scalar,
    state: State,
    budget: Budget,
    args: tuple,
    index: Int[Array, ""],
) -> State:
    del index
    model = objective.model(state.params, args)
    layout = _tree.layout(state.params)
    matrix = cast(MatrixCurvature, model.curvature).to_matrix()
    everything = jnp.ones(matrix.shape[0], bool)
    scale = jnp.mean(jnp.abs(jnp.diagonal(matrix)))
    inverse, succeeded = _linsolve.inverse_positive(
        _linsolve.restrict(matrix, everything, damping * scale)
    )
    end = eliminate(_tree.flatten(state.params), inverse, budget, layout)
    mask = layout.split(end.alive)
    params = _tree.cast_like(layout.split(end.values), state.params)
    # Where there is no inverse there is no surgery, only magnitudes.
    largest = select.support(state.params, budget.counts, budget.groups)
    mask = _tree.where(succeeded, mask, largest)
    params = _tree.keep(mask, _tree.where(succeeded, params, state.params))
    failure = first_status((~succeeded, Status.NOT_POSITIVE_DEFINITE))
    return _done(state, params, mask, objective.value(params, args), failure)


def obd(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: int | Array | Mapping[str, int | Array],
    *,
    args: tuple = (),
    curvature: CurvatureFn = hessian,
    prunable: Prunable = matrices,
) -> Solution:
    r"""Prunes once by Optimal Brain Damage: keeps the largest $H_{ii} w_i^2 / 2$.

    The gradient is taken to be zero and the weights kept do not change. This is one
    step of `iobs` with a diagonal curvature, without the refit.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, or a `QuadraticModel`; static.
      params: trained weights, any pytree of floating arrays.
      k: prunable weights to keep in all, an integer, or a mapping from leaf path to
        count; traced.
      args: data handed to the loss; traced.
      curvature: builds the local model whose diagonal is used. Beyond the dense
        limit of the Hessian the diagonal takes one product for every weight.
      prunable: which leaves may be pruned; see `sparserec.matrices`.

    Returns:
      A `Solution` after one iteration, status `CONVERGED`. Negative diagonal entries
      count as zero; ties go to the lowest index; with `k=0` nothing prunable stays.

    Raises:
      TypeError: `k` or `params` of the wrong type.
      ValueError: `k` out of range, unknown paths, a loss that is no scalar or not
        finite.

    Source: LeCun, Denker & Solla (1990).
    """
    return _front.solve(
        lambda objective, _: Solver(
            Partial(_states.dense_start, objective), Partial(_damage, objective)
        ),
        loss_fn,
        params,
        k,
        args=args,
        curvature=curvature,
        prunable=prunable,
        tol=0.0,
        max_steps=1,
    )


def obs(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: int | Array | Mapping[str, int | Array],
    *,
    args: tuple = (),
    curvature: CurvatureFn = hessian,
    damping: Scalar | float = 0.0,
    prunable: Prunable = matrices,
) -> Solution:
    r"""Prunes once by Optimal Brain Surgeon: remove the cheapest, refit, repeat.

    Every removal takes $p = \arg\min w_i^2 / (2[H^{-1}]_{ii})$ and moves the others by
    $-w_p H^{-1}e_p / [H^{-1}]_{pp}$; the gradient is taken to be zero. The Hessian is
    not updated in between: see `iobs` for that.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, or a `QuadraticModel`; static.
      params: trained weights, any pytree of floating arrays.
      k: prunable weights to keep in all, an integer, or a mapping from leaf path to
        count; traced.
      args: data handed to the loss; traced.
      curvature: builds the local model; it must be stored as a matrix (by default up
        to 512 weights). The cost is cubic in the number of weights.
      damping: added to the diagonal, relative to its mean; traced.
      prunable: which leaves may be pruned; see `sparserec.matrices`.

    Returns:
      A `Solution` after one iteration, status `CONVERGED`, or
      `NOT_POSITIVE_DEFINITE` where the damped curvature has no inverse; the params
      are then those of magnitude pruning. Ties leave the lowest index.

    Raises:
      TypeError: `k` or `params` of the wrong type.
      ValueError: `k` out of range, unknown paths, a curvature that is not stored, a
        loss that is no scalar or not finite.

    Source: Hassibi & Stork (1993).
    """
    strength = jnp.asarray(damping)
    return _front.solve(
        lambda objective, _: Solver(
            Partial(_states.dense_start, objective),
            Partial(_surgery, objective, strength),
        ),
        loss_fn,
        params,
        k,
        args=args,
        curvature=curvature,
        needs=("to_matrix",),
        prunable=prunable,
        tol=0.0,
        max_steps=1,
    )
