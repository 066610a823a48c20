"""Scores of single weights: magnitude, first order, diagonal, inverse diagonal."""

import functools
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

from sparserec import _tree
from sparserec._types import LossFn, Params, Scalar
from sparserec.quadratic import CurvatureFn, QuadraticModel, hessian, mean_curvature
from sparserec.quadratic._matrix_free import _signs
from sparserec.quadratic._model import StoredCurvature
from sparserec.saliency._data import (
    Batches,
    CurvatureChoice,
    mean_over,
    of_one_example,
    prepared,
    resolve,
)

_WIDTH = 16  # products with unit vectors taken side by side


def magnitude(params: Params) -> Params:
    r"""Half the square of every weight, $\theta_i^2 / 2$.

    The order is that of $|\theta_i|$; the square is what adds up over a unit, and
    what `obd` gives for a curvature of one everywhere.

    Args:
      params: $\theta$, any pytree of floating arrays.

    Returns:
      Scores shaped like `params`, in units of squared weight, at least float32.
    """
    working = _tree.to_working_precision(params)
    return jax.tree.map(lambda w: jnp.asarray(0.5, w.dtype) * jnp.square(w), working)


@jax.jit
def _gradient(loss_fn: Any, params: Params, args: tuple) -> Params:
    if isinstance(loss_fn, QuadraticModel):
        return loss_fn.at(params).gradient
    return jax.grad(loss_fn)(params, *args)


def taylor(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    *,
    args: tuple = (),
    batches: Batches = None,
    batch_size: int | None = None,
) -> Params:
    r"""First-order change of the loss on removal of a weight, $-\theta_i g_i$.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, a mean over examples where the data
        is visited in pieces; or a `QuadraticModel`.
      params: $\theta$, any pytree of floating arrays.
      args: data handed to the loss.
      batches: tuples like `args`, instead of them, visited once; of any sizes.
      batch_size: visit the examples in pieces of this many, on the host.

    Returns:
      Signed scores shaped like `params`, in units of loss, at least float32: negative
      where the removal is predicted to lower the loss.

    Raises:
      ValueError: both `args` and `batches`, or empty batches.
      TypeError: data that are no tuples.

    Source: Molchanov et al. (2017); Mozer & Smolensky (1989).
    """
    loss, theta = prepared(loss_fn, params)
    gradient = mean_over(
        lambda piece: _gradient(loss, theta, piece), args, batches, batch_size
    )
    return jax.tree.map(lambda w, g: -w.astype(g.dtype) * g, theta, gradient)


# --- Optimal Brain Damage ------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="curvature")
def _entries(
    curvature: CurvatureFn, loss_fn: Any, params: Params, args: tuple, indices: Array
) -> Array:
    """Diagonal entries of the curvature, one product with a unit vector each."""
    layout = _tree.layout(params)
    product = curvature(loss_fn, params, args).curvature.matvec

    def entry(index: Array) -> Array:
        unit = jnp.zeros(layout.size, _tree.dtype(params))
        unit = unit.at[index].set(1, mode="drop")
        column = product(_tree.cast_like(layout.split(unit), params))
        return _tree.flatten(column).at[index].get(mode="fill", fill_value=0)

    return jax.vmap(entry)(indices)


@functools.partial(jax.jit, static_argnames="curvature")
def _estimate(
    curvature: CurvatureFn, loss_fn: Any, params: Params, args: tuple, number: Array
) -> Params:
    """Signs times the product with them: unbiased for the diagonal."""
    model = curvature(loss_fn, params, args).curvature
    probe = getattr(model, "probe", None)
    if probe is not None:
        return probe(number)
    signs = _signs(params, number)
    return jax.tree.map(jnp.multiply, signs, model.matvec(signs))


@jax.jit
def _squares(loss_fn: Any, params: Params, args: tuple) -> Params:
    """Mean over the examples of the squared gradient of one example."""

    def gradient(*example: Any) -> Params:
        return jax.grad(functools.partial(of_one_example, loss_fn))(params, *example)

    rows = jax.vmap(gradient)(*args)
    return jax.tree.map(lambda row: jnp.mean(jnp.square(row), axis=0), rows)


def diagonal(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    *,
    args: tuple = (),
    curvature: CurvatureChoice | Literal["fisher"] = "hessian",
    probes: int | None = None,
    batches: Batches = None,
    batch_size: int | None = None,
) -> Params:
    r"""Diagonal of the curvature of a loss.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, a mean over the examples; or a
        `QuadraticModel`.
      params: any pytree of floating arrays.
      args: data handed to the loss.
      curvature: `"hessian"`; `"gauss_newton"`, for a loss that is the `loss` of
        `sparserec.quadratic.gauss_newton(...)`; `"fisher"`, the mean over the examples
        of the squared gradient of one; or any builder of local models.
      probes: products with vectors of random signs whose mean estimates the diagonal;
        `None` takes one product for every weight, which is exact. Not for `"fisher"`,
        which is exact with one gradient of every example.
      batches: tuples like `args`, instead of them; a list where `probes` is `None`,
        because it is visited again and again.
      batch_size: visit the examples in pieces of this many, on the host.

    Returns:
      The diagonal, shaped like `params`, in units of curvature, at least float32.
      Estimates have no bias; those of the Hessian may be negative.

    Raises:
      ValueError: an unknown curvature, `probes` that fits neither the curvature nor
        the numbers from one, both `args` and `batches`, or empty batches.
      TypeError: data that are no tuples.

    Source: Hutchinson (1990), Bekas et al. (2007) for the estimates.
    """
    if probes is not None and (
        not isinstance(probes, int) or probes < 1 or curvature == "fisher"
    ):
        raise ValueError(
            "`probes` must be an integer of at least 1, or None for the exact "
            f"diagonal (always with curvature='fisher'); got {probes!r}."
        )
    loss, theta = prepared(loss_fn, params)
    if isinstance(loss, QuadraticModel):
        return loss.curvature.diagonal()
    data = (args, batches, batch_size)
    if curvature == "fisher":
        return mean_over(lambda piece: _squares(loss, theta, piece), *data)
    builder = resolve(curvature, loss_fn)
    if batches is not None:
        data = (args, list(batches), batch_size)
    if probes is not None:
        total = _tree.zeros_like(theta)
        for number in range(probes):
            index = jnp.int32(number)
            total = _tree.add(
                total,
                mean_over(
                    lambda piece: _estimate(builder, loss, theta, piece, index),  # noqa: B023
                    *data,
                ),
            )
        return _tree.scale(1 / probes, total)
    layout = _tree.layout(theta)
    parts = []
    for start in range(0, layout.size, _WIDTH):
        indices = jnp.arange(start, start + _WIDTH, dtype=jnp.int32)
        parts.append(
            mean_over(
                lambda piece: _entries(builder, loss, theta, piece, indices),  # noqa: B023
                *data,
            )
        )
    flat = jnp.concatenate(parts)[: layout.size]
    return _tree.cast_like(layout.split(flat), theta)


def obd(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    *,
    args: tuple = (),
    curvature: CurvatureChoice | Literal["fisher"] = "hessian",
    first_order: bool = False,
    probes: int | None = None,
    batches: Batches = None,
    batch_size: int | None = None,
) -> Params:
    r"""Score of Optimal Brain Damage, $\frac12 H_{ii}\theta_i^2$.

    With `first_order`, $-\theta_i g_i + \frac12 H_{ii}\theta_i^2$: the change of the
    loss that the local model predicts when only this weight is removed.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, a mean over the examples; or a
        `QuadraticModel`.
      params: $\theta$, any pytree of floating arrays.
      args: data handed to the loss.
      curvature: `"hessian"`, `"gauss_newton"`, `"fisher"` or a builder; see
        `diagonal`.
      first_order: whether to add the first-order term.
      probes: products with vectors of random signs that estimate the diagonal; `None`
        takes one product for every weight, which is exact.
      batches: tuples like `args`, instead of them; of any sizes.
      batch_size: visit the examples in pieces of this many, on the host.

    Returns:
      Signed scores shaped like `params`, in units of loss, at least float32.

    Raises:
      ValueError: an unknown curvature, wrong `probes`, both `args` and `batches`, or
        empty batches.
      TypeError: data that are no tuples.

    Source: LeCun, Denker & Solla (1990).
    """
    if batches is not None:
        batches = list(batches)
    entries = diagonal(
        loss_fn,
        params,
        args=args,
        curvature=curvature,
        probes=probes,
        batches=batches,
        batch_size=batch_size,
    )
    _, theta = prepared(loss_fn, params)
    scores = jax.tree.map(
        lambda h, w: jnp.asarray(0.5, h.dtype) * h * jnp.square(w.astype(h.dtype)),
        entries,
        theta,
    )
    if not first_order:
        return scores
    first = taylor(loss_fn, params, args=args, batches=batches, batch_size=batch_size)
    return _tree.add(scores, _tree.cast_like(first, scores))


# --- Optimal Brain Surgeon -----------------------------------------------------------


def obs(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    *,
    args: tuple = (),
    curvature: CurvatureFn = hessian,
    damping: Scalar | float = 0.0,
) -> Params:
    r"""Score of Optimal Brain Surgeon, $\theta_i^2 / (2[(H+\lambda I)^{-1}]_{ii})$.

    The change of the local model, its gradient taken to be zero, when a weight is
    removed and all others are moved to make up for it.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, or a `QuadraticModel`.
      params: $\theta$, any pytree of floating arrays.
      args: data handed to the loss.
      curvature: builds the local model. Its curvature must be stored: a matrix (the
        Hessian of up to 512 weights), blocks, a diagonal, or rows.
      damping: $\lambda$ relative to the mean curvature, no unit; traced.

    Returns:
      Non-negative scores shaped like `params`, in units of loss, at least float32.

    Raises:
      ValueError: a curvature that is known only by products, or one whose inverse
        does not exist at this damping (outside compiled code; inside, the scores are
        NaN or infinite there).

    Source: Hassibi & Stork (1993).
    """
    loss, theta = prepared(loss_fn, params)
    model = (
        loss.at(theta)
        if isinstance(loss, QuadraticModel)
        else curvature(loss, theta, args)
    )
    if not hasattr(model.curvature, "inverse_diagonal"):
        raise ValueError(
            f"`obs` needs a stored curvature; {type(model.curvature).__name__} is "
            "known by products only. Use `quadratic.Hessian(dense_limit=...)`, or give "
            "a model from `quadratic.dense`, `.block_diagonal` or `.low_rank`; or use "
            "the scores `obd` or `oba`."
        )
    stored = cast(StoredCurvature, model.curvature)
    shift = jnp.asarray(damping, _tree.dtype(theta)) * mean_curvature(stored)
    inverse = stored.inverse_diagonal(shift)
    valid = jax.tree.map(lambda h: jnp.all((h > 0) & jnp.isfinite(h)), inverse)
    flags = jax.tree.leaves(valid)
    if not any(isinstance(flag, Tracer) for flag in flags) and not all(flags):
        raise ValueError(
            f"the curvature has no positive definite inverse at `damping={damping!r}`. "
            "Give a larger one, or a curvature that cannot be indefinite."
        )
    return jax.tree.map(
        lambda w, h: jnp.square(w.astype(h.dtype)) / (2 * h), theta, inverse
    )
