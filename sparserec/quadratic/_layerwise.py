"""Models of what pruning does to the outputs of every layer, from inputs alone."""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparserec import _tree
from sparserec._linsolve import matmul
from sparserec._types import LossFn, Params, Prunable, Scalar
from sparserec.quadratic import _chunked
from sparserec.quadratic import _fisher_input as _input
from sparserec.quadratic._input_grams import InputGrams, Order
from sparserec.quadratic._matrix_free import as_pytree
from sparserec.quadratic._model import QuadraticModel
from sparserec.quadratic._unit_factors import Notes, Use, noted_value


@dataclasses.dataclass(frozen=True)
class Layerwise:
    """Builds models from the inputs of layers. Make one with `layerwise(...)`.

    Attributes:
      batch_size: examples in one evaluation of the loss.
      centered: whose inputs lose their mean over a batch.
      normalize: whether every layer has a mean curvature of one.
      ridge: pull towards the center, in units of curvature.
    """

    batch_size: int = 64
    centered: bool | Prunable = False
    normalize: bool = True
    ridge: float = 0.0

    @property
    def on_host(self) -> bool:
        """The loop over mini-batches runs in Python: convolutions need it on CPU."""
        return True

    def __call__(self, loss_fn: LossFn, params: Params, args: tuple) -> QuadraticModel:
        """Local model at `params`; its gradient is zero and its value the loss."""
        params = _tree.to_working_precision(params)
        loss_fn = as_pytree(loss_fn)
        size = min(self.batch_size, _chunked.leading_size(args))
        piece, _ = next(_chunked.chunks(args, size))
        orders = _orders(loss_fn, params, piece)
        total = None
        for piece, weight in _chunked.chunks(args, size):
            part = _tree.scale(weight, _batch(self, loss_fn, params, piece))
            total = part if total is None else _tree.add(total, part)
        assert total is not None
        value, grams = total
        if self.normalize:
            grams = _normalized(grams)
        if not _input.is_traced(grams):
            _check_finite(grams, params)
        dtype = _tree.dtype(params)
        curvature = InputGrams(
            grams, jnp.asarray(self.ridge, dtype), orders, _tree.layout(params)
        )
        return QuadraticModel(
            params, value.astype(dtype), _tree.zeros_like(params), curvature
        )


def layerwise(
    *,
    batch_size: int = 64,
    centered: bool | Prunable = False,
    normalize: bool = True,
    ridge: float = 0.0,
) -> Layerwise:
    r"""Curvature of the squared errors at the outputs of every layer.

    With $W_l$ the weights of layer l, one row for every output, and $a$ its inputs
    (for a convolution the patch under its kernel), at all examples and positions,

    $$q(W) = f(c) + \tfrac12 \sum_l \frac{1}{s_l}
      \operatorname{mean}_a \|(W_l - C_l)\,a\|^2 + \tfrac\rho2 \|W-C\|^2.$$

    No gradient is needed. The curvature of a loss at trained weights tells little
    about weights that move far: where it is confident its gradients are small, and
    whole layers look as if they did not matter. This one asks every layer to go on
    doing what it did. Layers are found by reading the loss, in whatever library it is
    written: a leaf counts where it is the matrix of a product or the kernel of a
    convolution without groups.

    Args:
      batch_size: examples in one evaluation of the loss: a batch with statistics of
        its own where the loss normalises by batches, as in training mode.
      centered: subtract the mean of every input over the batch (and its positions):
        for layers whose mean output does not matter, such as those before a batch
        normalisation whose statistics are estimated again. A bool for all layers or a
        predicate `(path, leaf) -> bool`.
      normalize: $s_l$ is the mean of $a_i^2$ over the inputs of the layer, so that
        all layers have a mean curvature of one, and one ridge serves all of them;
        else $s_l = 1$. Layers whose inputs are all zero keep $s_l = 1$.
      ridge: $\rho \ge 0$ towards the params the model is built at, in units of
        curvature.

    Returns:
      A curvature builder: `builder(loss_fn, params, args)` is a model with an
      `InputGrams` curvature and a zero gradient. Leaves with less than two axes have
      curvature $\rho$ alone. The loop over batches runs in Python.

    Raises:
      ValueError: `ridge` is negative, or `batch_size` below one, or below two where
        inputs are centered. The builder raises one for leaves with two axes or more
        that are in no layer, and names them.

    Source: Dong, Chen & Pan (2017), layer-wise OBS; Frantar & Alistarh (2022), OBC.
    """
    _input.check_count("batch_size", batch_size)
    if centered is not False and batch_size < 2:
        raise ValueError(
            "`centered` subtracts means over a batch: `batch_size` must be at least 2."
        )
    if not ridge >= 0:
        raise ValueError(f"`ridge` must be a number of at least 0, got {ridge!r}.")
    return Layerwise(batch_size, centered, normalize, float(ridge))


def _check_finite(grams: list[Array | None], params: Params) -> None:
    names = [
        name
        for name, gram in zip(_tree.paths(params), grams, strict=True)
        if gram is not None and not bool(jnp.all(jnp.isfinite(gram)))
    ]
    if names:
        raise ValueError(
            f"the inputs of {names} hold NaN or infinity, or their squares overflow. "
            "Look for NaN in `params` and `args`."
        )


def _orders(loss_fn: LossFn, params: Params, piece: tuple) -> tuple[Order, ...]:
    """The axes of every leaf, outputs first; raises for matrices in no layer."""
    leaves, names = jax.tree.leaves(params), _tree.paths(params)
    orders: list[Order] = [None] * len(leaves)
    uses: list[Use] = []

    def look(params: Params, piece: tuple) -> Scalar:
        value, notes = _read(loss_fn, params, piece)
        uses.extend(notes.uses)
        return value

    jax.eval_shape(look, params, piece)
    for use in uses:
        order = _order(use)
        if orders[use.leaf] not in (None, order):
            raise ValueError(
                f"the leaf {names[use.leaf]!r} is the matrix of two layers in two "
                "ways: untie its layers, or take `sparserec.quadratic.fisher`."
            )
        orders[use.leaf] = order
    lost = [
        name
        for name, leaf, order in zip(names, leaves, orders, strict=True)
        if order is None and leaf.ndim >= 2
    ]
    if lost:
        raise ValueError(
            f"no product or convolution (without groups) has {lost} as its matrix: "
            "close over these leaves, e.g. with `jax.tree_util.Partial`, or take "
            "`sparserec.quadratic.fisher`."
        )
    return tuple(orders)


def _order(use: Use) -> tuple[int, ...]:
    if use.convolution:
        out, features, *space = use.given["dimension_numbers"].rhs_spec
        return (out, *space, features)
    return (1, 0) if use.inputs_first else (0, 1)


def _read(loss_fn: LossFn, params: Params, piece: tuple) -> tuple[Scalar, Notes]:
    notes = Notes(convolutions=True)
    return noted_value(notes, loss_fn, params, piece), notes


@functools.partial(jax.jit, static_argnames="builder")
def _batch(builder: Layerwise, loss_fn: LossFn, params: Params, piece: tuple):
    """The loss of a batch and the Gram matrix of every leaf, or `None`."""
    value, notes = _read(loss_fn, params, piece)
    leaves, names = jax.tree.leaves(params), _tree.paths(params)
    grams: list[Array | None] = [None] * len(leaves)
    for use, inputs in zip(notes.uses, notes.inputs, strict=True):
        leaf, centered = leaves[use.leaf], builder.centered
        if callable(centered):
            centered = centered(names[use.leaf], leaf)
        rows = _inputs(use, inputs, leaf.shape).astype(leaf.dtype)
        if centered:
            rows = rows - jnp.mean(rows, axis=0, keepdims=True)
        gram = matmul(rows.T, rows) / jnp.asarray(len(rows), rows.dtype)
        seen = grams[use.leaf]
        grams[use.leaf] = gram if seen is None else seen + gram
    return value, grams


def _inputs(
    use: Use, inputs: Array, shape: tuple[int, ...]
) -> Float[Array, "positions w"]:
    """What a layer multiplies with its weights, one row for every product."""
    if use.convolution:
        return patches(inputs, shape, use.given)
    contracted = use.given["dimension_numbers"][0][1 if use.weight_first else 0][0]
    inputs = jnp.moveaxis(inputs, contracted, -1)
    return inputs.reshape(-1, inputs.shape[-1])


def patches(
    inputs: Array, kernel: tuple[int, ...], given: dict[str, Any]
) -> Float[Array, "positions w"]:
    """Inputs of a convolution under its kernel at every position.

    Args:
      inputs: its left operand.
      kernel: shape of its right operand.
      given: parameters of `jax.lax.conv_general_dilated`.

    Returns:
      One row for every example and position; entries by place in the kernel, in
      row-major order, and by channel within.
    """
    numbers = given["dimension_numbers"]
    batch, channel, *space = numbers.lhs_spec
    x = jnp.transpose(inputs, (batch, *space, channel))
    sides = [kernel[axis] for axis in numbers.rhs_spec[2:]]
    border = [(0, 0, 0), *((low, high, 0) for low, high in given["padding"]), (0, 0, 0)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), border)
    strides, dilation = given["window_strides"], given["rhs_dilation"]
    spans = [(side - 1) * step + 1 for side, step in zip(sides, dilation, strict=True)]
    counts = [
        max(0, (size - span) // stride + 1)
        for size, span, stride in zip(x.shape[1:-1], spans, strides, strict=True)
    ]
    pieces = []
    for place in itertools.product(*(range(side) for side in sides)):
        starts = [at * step for at, step in zip(place, dilation, strict=True)]
        piece = tuple(
            slice(start, start + (count - 1) * stride + 1, stride)
            for start, count, stride in zip(starts, counts, strides, strict=True)
        )
        pieces.append(x[(slice(None), *piece)])
    return jnp.concatenate(pieces, axis=-1).reshape(-1, math.prod(sides) * x.shape[-1])


@jax.jit
def _normalized(grams: list[Array | None]) -> list[Array | None]:
    def divided(gram: Array) -> Array:
        mean = jnp.mean(jnp.diagonal(gram))
        return gram / jnp.where(mean > 0, mean, 1)

    return [None if gram is None else divided(gram) for gram in grams]
