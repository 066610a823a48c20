"""Supports by ADMM on a quadratic model, under a budget that falls step by step."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparserec import _tree, select
from sparserec._types import Mask, Params, Scalar
from sparserec.budget import Budget
from sparserec.quadratic import QuadraticModel, mean_curvature
from sparserec.solvers import _chita_iht

_FIRST = 0.6  # density of the first steps
_FALL = 0.75  # share of the steps in which the budget falls


class _State(NamedTuple):
    kept: Params  # z
    dual: Params  # u
    mask: Mask  # where z may be other than zero


def support(
    model: QuadraticModel,
    params: Params,
    budget: Budget,
    *,
    ridge: Scalar,
    power: Scalar,
    steps: Scalar,
) -> Mask:
    r"""Which weights to keep, by the alternating direction method of multipliers.

    For the model $q$ with the ridge, $\rho$ its mean curvature and $T$ the projection
    on the budget of the step, from $z = w$, $u = 0$,

    $$x \leftarrow \arg\min_x q(x) + \tfrac\rho2\|x - z + u\|^2, \quad
      z \leftarrow T(x + u), \quad u \leftarrow u + x - z.$$

    One factorisation serves all steps where the curvature has a `resolvent`.

    Args:
      model: what is minimised.
      params: where to start.
      budget: the final budget; that of step t of s is
        $k + (k_0 - k)\,(1 - t/(0.75 s))_+^3$ with $k_0$ 60 % of the weights.
      ridge: added to the curvature, shape `()`.
      power: of the diagonal $D$ of the curvature in the projection, by
        $D_i^{p/2} |v_i|$, shape `()`.
      steps: number of steps, at least one; traced.

    Returns:
      A mask at the final budget. Where the model has no minimum or holds NaN it is
      the support of the last finite point.

    Source: Boyd et al. (2011), section 9.1, on nonconvex constraints; Boza (2024) and
    Meng et al. (2024), ALPS, on the layers of networks.
    """
    dtype = _tree.dtype(params)
    penalty = (jnp.asarray(mean_curvature(model.curvature), dtype) + ridge).astype(
        dtype
    )
    solve = resolvent(model, ridge + penalty)
    scale = _scale(model, ridge, power, params)

    # Once in the program: compiling a selection takes a second.
    def chosen(point: Params, budget: Budget) -> Mask:
        scores = jax.tree.map(jnp.multiply, scale, point)
        return select.support(scores, budget.counts, budget.groups)

    def body(step: jax.Array, now: _State) -> _State:
        pull = _tree.sub(_tree.sub(now.kept, now.dual), model.center)
        target = _tree.sub(_tree.scale(penalty, pull), model.gradient)
        moved = _tree.add(_tree.add(model.center, solve(target)), now.dual)
        moved = _tree.where(_tree.all_finite(moved), moved, now.kept)
        mask = chosen(moved, _budget_at(budget, step + 1, steps))
        kept = _tree.keep(mask, moved)
        return _State(kept, _tree.sub(moved, kept), mask)

    start = _State(params, _tree.zeros_like(params), _tree.ones_mask(params))
    return jax.lax.fori_loop(0, jnp.maximum(steps, 1), body, start).mask


def resolvent(model: QuadraticModel, damping: Scalar) -> Callable[[Params], Params]:
    r"""Products with $(H+\lambda I)^{-1}$, by one factorisation where possible."""
    ready = getattr(model.curvature, "resolvent", None)
    if ready is not None:
        return ready(damping)
    everything = _tree.ones_mask(model.center)
    return lambda v: model.curvature.solve_on(everything, v, damping).value


def _scale(
    model: QuadraticModel, ridge: Scalar, power: Scalar, params: Params
) -> Params:
    ones = jax.tree.map(jnp.ones_like, params)
    if not hasattr(model.curvature, "diagonal"):
        return ones

    def weighed() -> Params:
        diagonal = _tree.flatten(model.curvature.diagonal()) + ridge
        weights = jnp.sqrt(_chita_iht.metric(diagonal, power))
        return _tree.cast_like(_tree.layout(params).split(weights), params)

    return jax.lax.cond(power != 0, weighed, lambda: ones)


def _budget_at(budget: Budget, step: jax.Array, steps: Scalar) -> Budget:
    sizes = jnp.asarray(budget.sizes, jnp.float32)
    falling = _FALL * jnp.maximum(steps, 1).astype(jnp.float32)
    left = jnp.maximum(1 - step.astype(jnp.float32) / falling, 0) ** 3
    final = budget.counts.astype(jnp.float32)
    excess = jnp.maximum(_FIRST * sizes - final, 0) * left
    counts = budget.counts + excess.astype(jnp.int32)
    return dataclasses.replace(budget, counts=counts)
