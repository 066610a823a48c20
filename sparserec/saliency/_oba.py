"""Optimal Brain Apoptosis: every weight times the curvature times all weights."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from sparserec import _tree
from sparserec._types import LossFn, Params
from sparserec.quadratic import CurvatureFn, Hessian, QuadraticModel
from sparserec.saliency._data import (
    Batches,
    CurvatureChoice,
    mean_over,
    prepared,
    resolve,
)


@functools.partial(jax.jit, static_argnames="curvature")
def gradient_and_product(
    curvature: CurvatureFn, loss_fn: Any, params: Params, args: tuple
) -> tuple[Params, Params]:
    r"""$(g, H\theta)$ on one piece of the data, at the cost of one product."""
    if isinstance(loss_fn, QuadraticModel):
        model = loss_fn.at(params)
        return model.gradient, model.curvature.matvec(params)
    if isinstance(curvature, Hessian):
        slope = jax.grad(loss_fn)
        return jax.jvp(lambda p: slope(p, *args), (params,), (params,))
    model = curvature(loss_fn, params, args)
    return model.gradient, model.curvature.matvec(params)


def shares(
    params: Params, gradient: Params, product: Params, *, first_order: bool
) -> Params:
    r"""$\theta\odot H\theta$, or $-\theta\odot g + \frac12\theta\odot H\theta$."""
    if not first_order:
        return jax.tree.map(jnp.multiply, params, product)
    return jax.tree.map(
        lambda w, g, h: w * (jnp.asarray(0.5, w.dtype) * h - g),
        params,
        gradient,
        product,
    )


def oba(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    *,
    args: tuple = (),
    curvature: CurvatureChoice = "hessian",
    first_order: bool = False,
    batches: Batches = None,
    batch_size: int | None = None,
) -> Params:
    r"""Second-order score of every weight, with all others perturbed as well.

    $$s_i = \theta_i (H\theta)_i = \sum_j \theta_i H_{ij} \theta_j$$

    by one forward derivative of the gradient, exactly: with the curvature of the
    loss, all blocks inside and between layers, and the second derivatives of every
    activation and normalization. With `first_order`,

    $$s_i = -\theta_i g_i + \tfrac12 \theta_i (H\theta)_i,$$

    the share of the weight in the change that the local model predicts when all
    weights are removed; the shares add up to that change.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, a mean over examples where the data
        is visited in pieces; or a `QuadraticModel`.
      params: $\theta$, any pytree of floating arrays.
      args: data handed to the loss.
      curvature: `"hessian"`; `"gauss_newton"`, for a loss that is the `loss` of
        `sparserec.quadratic.gauss_newton(...)`; or any builder of local models.
      first_order: whether to add the first-order term, and halve the second.
      batches: tuples like `args`, instead of them, visited once; of any sizes.
      batch_size: visit the examples in pieces of this many, on the host, so that the
        memory is that of one piece.

    Returns:
      Signed scores shaped like `params`, in units of loss, at least float32. They are
      averaged over all examples before any magnitude is taken; `sparserec.oba` and
      `sparserec.select` look at magnitudes. A NaN in the data makes them NaN.

    Raises:
      ValueError: an unknown curvature, both `args` and `batches`, or empty batches.
      TypeError: data that are no tuples.

    Source: Sun et al. (2025), Optimal Brain Apoptosis; the product by Pearlmutter
    (1994).
    """
    builder = resolve(curvature, loss_fn)
    loss, theta = prepared(loss_fn, params)
    gradient, product = mean_over(
        lambda piece: gradient_and_product(builder, loss, theta, piece),
        args,
        batches,
        batch_size,
    )
    theta = _tree.cast_like(theta, product)
    return shares(theta, gradient, product, first_order=first_order)
