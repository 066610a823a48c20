"""Loss and curvature of more data than fits at once: sums over chunks, on the host.

Every chunk goes through one compiled step; the sums run in Python. That bounds the
memory by that of one chunk, and keeps convolutions out of compiled loops, where
they run tens of times slower on CPU.
"""

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from sparserec import _tree
from sparserec._types import LossFn, Params, Scalar
from sparserec.quadratic._matrix_free import CurvatureFn, Hessian, MatrixFree, hessian
from sparserec.quadratic._model import QuadraticModel


def leading_size(args: tuple) -> int:
    """Number of examples: the common leading size of all arrays in `args`.

    Raises:
      ValueError: there is none, or the sizes differ; lists the shapes.
    """
    shapes = [jnp.shape(x) for x in jax.tree.leaves(args)]
    sizes = {shape[0] for shape in shapes if shape}
    if len(sizes) != 1 or () in shapes:
        raise ValueError(
            "the arrays in `args` must share their leading axis, the examples; got "
            f"shapes {shapes}. Close over what is not data, e.g. with "
            "`jax.tree_util.Partial(loss_fn, ...)`."
        )
    return sizes.pop()


def chunks(args: tuple, batch_size: int) -> Iterator[tuple[tuple, float]]:
    """Consecutive slices of the data, each with its share of the examples."""
    total = leading_size(args)
    for start in range(0, total, batch_size):
        stop = min(start + batch_size, total)
        piece = jax.tree.map(lambda x: x[start:stop], args)  # noqa: B023
        yield piece, (stop - start) / total


@jax.jit
def _value(loss_fn: LossFn, params: Params, args: tuple) -> Scalar:
    return loss_fn(params, *args)


@jax.jit
def _value_and_gradient(loss_fn: LossFn, params: Params, args: tuple):
    return jax.value_and_grad(loss_fn)(params, *args)


@functools.partial(jax.jit, static_argnames="curvature")
def _product(curvature, loss_fn, params, args, v):
    return curvature(loss_fn, params, args).curvature.matvec(v)


@functools.partial(jax.jit, static_argnames="curvature")
def _probe(curvature, loss_fn, params, args, number):
    return curvature(loss_fn, params, args).curvature.estimate_diagonal(number)


def _weighted_sum(terms: Iterator[tuple[Params, float]]) -> Params:
    total = None
    for term, weight in terms:
        scaled = term if weight == 1 else _tree.scale(weight, term)
        total = scaled if total is None else _tree.add(total, scaled)
    return total


def value(loss_fn: LossFn, params: Params, args: tuple, batch_size: int) -> Scalar:
    """Mean loss over all chunks."""
    return _weighted_sum(
        (_value(loss_fn, params, piece), weight)
        for piece, weight in chunks(args, batch_size)
    )


def value_and_gradient(
    loss_fn: LossFn, params: Params, args: tuple, batch_size: int
) -> tuple[Scalar, Params]:
    """Mean loss over all chunks, and its gradient."""
    return _weighted_sum(
        (_value_and_gradient(loss_fn, params, piece), weight)
        for piece, weight in chunks(args, batch_size)
    )


def _chunked_product(curvature, loss_fn, params, args, batch_size):
    def product(v: Params) -> Params:
        return _weighted_sum(
            (_product(curvature, loss_fn, params, piece, v), weight)
            for piece, weight in chunks(args, batch_size)
        )

    return product


def _chunked_probe(curvature, loss_fn, params, args, batch_size, number):
    return _weighted_sum(
        (_probe(curvature, loss_fn, params, piece, number), weight)
        for piece, weight in chunks(args, batch_size)
    )


def local_model(
    curvature: CurvatureFn,
    loss_fn: LossFn,
    params: Params,
    args: tuple,
    batch_size: int,
) -> QuadraticModel:
    """The model that `curvature` builds, summed over chunks of the data."""
    if curvature is hessian:
        curvature = Hessian()
    if isinstance(curvature, Hessian):
        # A stored matrix would be rebuilt for every product of every chunk.
        curvature = dataclasses.replace(curvature, dense_limit=0)
    value, gradient = value_and_gradient(loss_fn, params, args, batch_size)
    data = (loss_fn, params, args, batch_size)
    summed = MatrixFree(
        prepare=Partial(functools.partial(_chunked_product, curvature), *data),
        center=params,
        probe=Partial(functools.partial(_chunked_probe, curvature), *data),
        cg_steps=getattr(curvature, "cg_steps", 20),
        cg_tol=getattr(curvature, "cg_tol", 1e-4),
        on_host=True,
    )
    return QuadraticModel(params, value, gradient, summed)
