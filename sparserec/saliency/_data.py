"""What the scores share: data visited in pieces, curvatures by name, examples."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer

from sparserec import _tree
from sparserec._types import LossFn, Params
from sparserec.quadratic import (
    CurvatureFn,
    GaussNewton,
    Hessian,
    QuadraticModel,
    hessian,
)
from sparserec.quadratic._chunked import leading_size
from sparserec.quadratic._matrix_free import as_pytree

Batches: TypeAlias = Iterable[tuple] | None
"""Tuples of arguments for the loss, visited once, one after another."""

CurvatureChoice: TypeAlias = Literal["hessian", "gauss_newton"] | CurvatureFn


def _pieces(args: tuple, batches: Batches, batch_size: int | None) -> Iterator[tuple]:
    for each in (args,) if batches is None else batches:
        if not isinstance(each, tuple):
            raise TypeError(
                "every entry of `batches` must be a tuple of arguments for the loss, "
                f"such as `(x, y)`; got {type(each).__name__}."
            )
        total = leading_size(each)
        size = total if batch_size is None else batch_size
        for start in range(0, total, size):
            yield jax.tree.map(lambda x: x[start : start + size], each)  # noqa: B023


def check_data(args: tuple, batches: Batches, batch_size: int | None) -> None:
    """Explains data of the wrong form."""
    if not isinstance(args, tuple):
        raise TypeError(
            f"`args` must be a tuple, got {type(args).__name__}; write `args=(x, y)`."
        )
    if batches is not None and args:
        raise ValueError("give either `args` or `batches`, not both.")
    valid = isinstance(batch_size, int) and not isinstance(batch_size, bool)
    if batch_size is not None and not (valid and batch_size >= 1):
        raise ValueError(
            f"`batch_size` must be an integer of at least 1, got {batch_size!r}."
        )


def mean_over(
    step: Callable[[tuple], Params],
    args: tuple,
    batches: Batches,
    batch_size: int | None,
) -> Params:
    """Mean of `step(piece)` over all examples; one piece in memory at a time.

    The pieces are visited on the host: that bounds the memory, and keeps convolutions
    out of compiled loops, where they are tens of times slower on CPU.
    """
    check_data(args, batches, batch_size)
    if batches is None and batch_size is None:
        return step(args)
    total, count = None, 0
    for piece in _pieces(args, batches, batch_size):
        size = leading_size(piece)
        term = _tree.scale(size, step(piece))
        total = term if total is None else _tree.add(total, term)
        count += size
        if not isinstance(jax.tree.leaves(total)[0], Tracer):
            # Else the host runs ahead, and the queue holds many pieces.
            jax.block_until_ready(total)
    if count == 0:
        raise ValueError("`batches` is empty: there is nothing to average over.")
    return _tree.scale(1 / count, total)


def resolve(curvature: Any, loss_fn: Any) -> CurvatureFn:
    """The builder that a name stands for; builders pass through.

    Raises:
      ValueError: an unknown name, or a Gauss-Newton curvature of a loss whose
        outputs are not known.
    """
    if curvature == "gauss_newton":
        owner = getattr(loss_fn, "__self__", None)
        if not isinstance(owner, GaussNewton):
            raise ValueError(
                "`curvature='gauss_newton'` must know where the outputs are: give "
                "the loss as `sparserec.quadratic.gauss_newton(predict_fn, "
                "output_loss_fn).loss`, or that builder itself as `curvature`."
            )
        return owner
    if isinstance(curvature, str) and curvature != "hessian":
        raise ValueError(
            "`curvature` must be 'hessian', 'gauss_newton' or a builder from "
            f"`sparserec.quadratic`, got {curvature!r}."
        )
    if isinstance(curvature, Hessian):
        return dataclasses.replace(curvature, dense_limit=0)
    if curvature == "hessian" or curvature is hessian:
        # One product is wanted: storing a matrix would take one for every weight.
        return Hessian(dense_limit=0)
    return curvature


def prepared(loss_fn: LossFn | QuadraticModel, params: Params) -> tuple[Any, Params]:
    """The loss as an argument of compiled functions, and params in working precision.

    Raises:
      ValueError: a quadratic model of other params.
    """
    working = _tree.to_working_precision(params)
    if not isinstance(loss_fn, QuadraticModel):
        return as_pytree(loss_fn), working
    center = loss_fn.center
    if _tree.layout(center) != _tree.layout(working):
        raise ValueError(
            "`params` must have the structure and shapes of the model's center, "
            f"{_tree.layout(center)}; got {_tree.layout(working)}."
        )
    return loss_fn, _tree.cast_like(working, center)


def of_one_example(loss_fn: LossFn, params: Params, *example: Any) -> jax.Array:
    """The loss of a single example: a mean over a leading axis of length one."""
    return loss_fn(params, *jax.tree.map(lambda x: jnp.asarray(x)[None], example))
