"""Other ways to prune over the same rows: magnitude, independent OBS, and CBS."""

import jax
import jax.numpy as jnp

from sparserec import _linsolve, _tree, select
from sparserec._types import Mask, Params, Scalar, Status
from sparserec.budget import Budget
from sparserec.quadratic import QuadraticModel
from sparserec.solvers._chita_types import Found, Limits, for_each


def _repeat(params: Params, mask: Mask, number: int) -> Found:
    def spread(tree: Params) -> Params:
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (number, *x.shape)), tree)

    status = jnp.full(number, int(Status.CONVERGED), jnp.int32)
    return Found(spread(params), spread(mask), jnp.ones(number, bool), status)


def magnitude(
    model: QuadraticModel, params: Params, budget: Budget, limits: Limits
) -> Found:
    """The largest weights, values untouched."""
    del model
    mask = select.support(params, budget.counts, budget.groups)
    return _repeat(_tree.keep(mask, params), mask, limits.ridges.shape[0])


def saliency_support(
    model: QuadraticModel, params: Params, budget: Budget, ridge: Scalar
) -> tuple[Mask, Params]:
    r"""The k largest $w_i^2 / [(H+\lambda I)^{-1}]_{ii}$, and that diagonal."""
    inverse = model.curvature.inverse_diagonal(ridge)  # type: ignore[attr-defined]
    scores = jax.tree.map(
        lambda w, v: jnp.square(w) / jnp.where(v > 0, v, jnp.inf).astype(w.dtype),
        params,
        inverse,
    )
    return select.support(scores, budget.counts, budget.groups), inverse


def independent_obs(
    model: QuadraticModel, params: Params, budget: Budget, limits: Limits
) -> Found:
    r"""Removes all weights of low OBS saliency at once, each as if it were alone.

    $w \leftarrow w - H^{-1} v$ with $v_i = w_i / [H^{-1}]_{ii}$ on the weights removed.
    The gradient is taken to be zero.

    Source: Singh & Alistarh (2020), WoodFisher, for block-diagonal curvatures; Frantar
    et al. (2021), M-FAC, for the whole matrix.
    """

    def solve(ridge: Scalar) -> Found:
        mask, inverse = saliency_support(model, params, budget, ridge)
        push = jax.tree.map(
            lambda m, w, v: jnp.where(m, 0, w / jnp.where(v > 0, v, 1).astype(w.dtype)),
            mask,
            params,
            inverse,
        )
        everything = _tree.ones_mask(params)
        solved = model.curvature.solve_on(everything, push, ridge)
        usable = _linsolve.usable(solved.status)
        moved = _tree.where(usable, _tree.sub(params, solved.value), params)
        return Found(_tree.keep(mask, moved), mask, jnp.bool_(True), solved.status)

    return for_each(solve, limits.ridges)
