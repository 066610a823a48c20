r"""Rows of gradients: computed in chunks by one compiled step, memory bounded.

A *unit* is what gives rows at one go: a mini-batch of examples, whose averaged
gradient is one row, or one example, whose exact Gauss-Newton factor is several.

Legend: m examples, u units of b examples each, o outputs of an example, n weights.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparserec import _linsolve, _tree
from sparserec._linsolve import matmul
from sparserec._types import LossFn, Params, Scalar
from sparserec.quadratic._block_rows import BlockLayout
from sparserec.quadratic._layer_rows import Leaf
from sparserec.quadratic._matrix_free import (
    _ROOTS,
    softmax_cross_entropy,
    squared_error,
)
from sparserec.quadratic._unit_factors import unit_factors

Kind = Literal["empirical", "sampled", "gauss_newton"]

_ENTRIES = 1 << 21  # of a chunk of rows: 8 MB in float32 stay near the cache
_EXAMPLES = 4096  # of a chunk: bounds the activations


class RowSpec(NamedTuple):
    """What rows are wanted and how they are stored; hashable, static.

    Attributes:
      kind: whose gradients, see `fisher`.
      units: number of units.
      batch_size: examples in a unit.
      per_unit: rows that a unit gives.
      predict_fn: outputs of the network, or `None`.
      output_loss_fn: loss of the outputs, or `None`.
      sample_fn: draws targets from outputs, or `None`.
      dtype: name of the dtype of stored rows, or `None` for that of the params.
      implicit: store activations and deltas of dense layers instead of rows.
      blocks: how stored rows are cut, or `None`.
      chunk: units in one compiled step.
    """

    kind: Kind
    units: int
    batch_size: int
    per_unit: int
    predict_fn: Callable | None
    output_loss_fn: Callable | None
    sample_fn: Callable | None
    dtype: str | None
    implicit: bool
    blocks: BlockLayout | None
    chunk: int

    @property
    def rows(self) -> int:
        """Number of rows in all."""
        return self.units * self.per_unit

    @property
    def scale(self) -> float:
        """Factor of a row that makes the sum of squares the mean curvature."""
        return math.sqrt(self.batch_size / self.units)


class Collected(NamedTuple):
    """Rows with what was seen on the way.

    Attributes:
      value: mean loss over the examples of the rows, shape `()`.
      slope: mean gradient over them, shaped like the params; `None` where rows are
        not gradients of the loss.
      rows: what the layout asks for: an array `(rows, n)`, one array for each batch
        of blocks, or one entry for each leaf.
    """

    value: Scalar
    slope: Params | None
    rows: Any


def chunk_of(units: int, batch_size: int, per_unit: int, width: int) -> int:
    """Units in one step such that neither rows nor activations grow large."""
    bound = min(_ENTRIES // (width * per_unit), _EXAMPLES // batch_size)
    steps = math.ceil(units / max(1, bound))
    return math.ceil(units / steps)


def unit_index(total: int, units: int, batch_size: int) -> np.ndarray:
    """Examples of every unit, int32, shape `(units, batch_size)`.

    Evenly spaced over the data, and interleaved: data sorted by class give every
    unit examples of all classes.
    """
    used = units * batch_size
    chosen = np.arange(used, dtype=np.int64) * total // used
    return chosen.reshape(batch_size, units).T.astype(np.int32)


# --- what one unit gives ------------------------------------------------------------


def _categorical(key: Array, logits: Array) -> Array:
    return jax.random.categorical(key, logits, axis=-1)


def _normal(key: Array, outputs: Array) -> Array:
    return outputs + jax.random.normal(key, outputs.shape, outputs.dtype)


SAMPLERS: dict[Callable, Callable] = {
    softmax_cross_entropy: _categorical,
    squared_error: _normal,
}
"""How targets are drawn under the likelihood that belongs to a loss."""


def sampled_loss(
    spec: RowSpec, key: Array | None, params: Params, *args: Any
) -> Float[Array, ""]:
    """Loss on targets drawn from the predictions; its gradients are scores."""
    *inputs, targets = args
    assert spec.predict_fn is not None
    assert spec.output_loss_fn is not None
    assert spec.sample_fn is not None
    outputs = spec.predict_fn(params, *inputs)
    drawn = spec.sample_fn(key, jax.lax.stop_gradient(outputs))
    return spec.output_loss_fn(outputs, drawn.astype(targets.dtype))


def output_root(
    output_loss_fn: Callable, outputs: Array, targets: Array
) -> Float[Array, "o *outputs"]:
    r"""Columns $c_j$ with $\sum_j c_j c_j^\top$ the curvature of one example's loss."""
    size = outputs.size
    units = jnp.eye(size, dtype=outputs.dtype).reshape(size, *outputs.shape)
    root = _ROOTS.get(output_loss_fn)
    if root is not None:
        return jax.vmap(lambda unit: root(outputs, unit))(units)
    slope = jax.grad(lambda o: output_loss_fn(o, targets))
    bend = jax.vmap(lambda unit: jax.jvp(slope, (outputs,), (unit,))[1])(units)
    values, vectors = _linsolve.eigh(bend.reshape(size, size))
    # A loss that is not convex in the outputs has no root: the Gauss-Newton matrix
    # of its convex part is the closest one.
    columns = jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T
    return columns.reshape(units.shape)


def _unit_rows(
    spec: RowSpec, loss_fn: LossFn, params: Params, key: Array | None, args: tuple
) -> tuple[Scalar, Float[Array, "o n"]]:
    """Loss of one unit and its rows, flat and not scaled."""
    if spec.kind == "gauss_newton":
        assert spec.predict_fn is not None
        assert spec.output_loss_fn is not None
        *inputs, targets = args
        predict_fn = spec.predict_fn
        outputs, pull = jax.vjp(lambda p: predict_fn(p, *inputs), params)
        columns = output_root(spec.output_loss_fn, outputs, targets)
        rows = jax.vmap(lambda column: _tree.flatten(pull(column)[0]))(columns)
        return jnp.zeros((), rows.dtype), rows
    if spec.kind == "sampled":
        loss_fn = functools.partial(sampled_loss, spec, key)
    value, slope = jax.value_and_grad(loss_fn)(params, *args)
    return value, _tree.flatten(slope)[None]


def _unit_leaves(
    spec: RowSpec, loss_fn: LossFn, params: Params, key: Array | None, args: tuple
) -> tuple[Scalar, list[Leaf]]:
    """Loss of one unit and its row leaf by leaf, not scaled."""
    if spec.kind == "sampled":
        loss_fn = functools.partial(sampled_loss, spec, key)
    return unit_factors(loss_fn, params, args)


# --- chunks -------------------------------------------------------------------------


class _Chunk(NamedTuple):
    value: Scalar  # sum over the units that are new in this chunk
    slope: Any  # the same for gradients
    rows: Any


def _each_unit(count: int, keys: Any, data: tuple, function: Callable) -> Any:
    """What a function of a key and the data of a unit gives for every unit."""
    if count > 1:
        return jax.vmap(function)(keys, data)
    # Gradients of a mini-batch through convolutions are far slower under vmap.
    found = function(*jax.tree.map(lambda x: x[0], (keys, data)))
    return jax.tree.map(lambda x: x[None], found)


def _row_axis(spec: RowSpec) -> int:
    return 0 if spec.blocks is None else 1


def _chunk(
    spec: RowSpec,
    loss_fn: LossFn,
    params: Params,
    args: tuple,
    key: Array | None,
    number: Int[Array, ""],
) -> _Chunk:
    """The rows of one chunk; the last one steps back to be as long as the others."""
    total = jnp.shape(jax.tree.leaves(args)[0])[0]
    index = jnp.asarray(unit_index(total, spec.units, spec.batch_size))
    begin = number * spec.chunk
    start = jnp.minimum(begin, spec.units - spec.chunk)
    places = start + jnp.arange(spec.chunk, dtype=jnp.int32)
    chosen = jax.lax.dynamic_slice_in_dim(index, start, spec.chunk)
    data = jax.tree.map(lambda x: jnp.asarray(x)[chosen], args)
    # A key for every unit, so that results do not depend on the chunks.
    keys = (
        None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(places)
    )
    each = functools.partial(_each_unit, spec.chunk, keys, data)
    if spec.implicit:
        values, factors = each(
            lambda unit_key, unit: _unit_leaves(spec, loss_fn, params, unit_key, unit)
        )
        new = (places >= begin).astype(values.dtype)
        slope = jnp.concatenate(
            [leaf.transposed_times(new.astype(leaf.dtype)) for leaf in factors]
        )
        stored = [leaf.scaled(spec.scale, spec.dtype) for leaf in factors]
        return _Chunk(jnp.vdot(new, values), slope, stored)
    values, rows = each(
        lambda unit_key, unit: _unit_rows(spec, loss_fn, params, unit_key, unit)
    )
    rows = rows.reshape(-1, rows.shape[-1])
    new = (places >= begin).astype(values.dtype)
    weights = jnp.repeat(new, spec.per_unit).astype(rows.dtype)
    slope = matmul(weights, rows)
    rows = jnp.asarray(spec.scale, rows.dtype) * rows
    if spec.dtype is not None:
        rows = rows.astype(spec.dtype)
    stored = rows if spec.blocks is None else spec.blocks.cut(rows)
    return _Chunk(jnp.vdot(new, values), slope, stored)


def _empty(spec: RowSpec, shapes: _Chunk) -> _Chunk:
    axis = _row_axis(spec)

    def lengthened(x: Any) -> Array:
        shape = list(x.shape)
        shape[axis] = spec.rows
        return jnp.zeros(shape, x.dtype)

    zeros = functools.partial(jax.tree.map, lambda x: jnp.zeros(x.shape, x.dtype))
    return _Chunk(
        zeros(shapes.value), zeros(shapes.slope), jax.tree.map(lengthened, shapes.rows)
    )


def _add(spec: RowSpec, total: _Chunk, part: _Chunk, number: Int[Array, ""]) -> _Chunk:
    start = jnp.minimum(number * spec.chunk, spec.units - spec.chunk) * spec.per_unit
    return _Chunk(
        value=total.value + part.value,
        slope=_tree.add(total.slope, part.slope),
        rows=jax.tree.map(
            lambda all_rows, new: jax.lax.dynamic_update_slice_in_dim(
                all_rows, new, start, _row_axis(spec)
            ),
            total.rows,
            part.rows,
        ),
    )


@functools.partial(jax.jit, static_argnames="spec")
def _all_chunks(spec, loss_fn, params, args, key) -> _Chunk:
    if spec.chunk == spec.units:
        # No loop around it: convolutions in one are slow on CPU.
        return _chunk(spec, loss_fn, params, args, key, jnp.int32(0))
    part = functools.partial(_chunk, spec, loss_fn, params, args, key)
    empty = _empty(spec, jax.eval_shape(part, jnp.int32(0)))
    return jax.lax.fori_loop(
        0,
        math.ceil(spec.units / spec.chunk),
        lambda number, total: _add(spec, total, part(number), number),
        empty,
    )


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="total")
def _next_chunk(spec, loss_fn, params, args, key, total, number) -> _Chunk:
    part = _chunk(spec, loss_fn, params, args, key, number)
    return _add(spec, total, part, number)


def collect(
    spec: RowSpec,
    loss_fn: LossFn,
    params: Params,
    args: tuple,
    key: Array | None,
    *,
    on_host: bool,
) -> Collected:
    """All rows, in one compiled program or by a loop over one compiled step.

    Args:
      spec: what is wanted; static.
      loss_fn: a pytree callable, the mean over the leading axis of its data.
      params: where gradients are taken.
      args: data; every array has m examples along its leading axis.
      key: for sampled targets, else `None`.
      on_host: run the loop over chunks in Python.

    Returns:
      The rows, scaled so that the sum of their squares is a mean over examples.
    """
    if on_host:
        shapes = jax.eval_shape(
            functools.partial(_chunk, spec), loss_fn, params, args, key, jnp.int32(0)
        )
        total = _empty(spec, shapes)
        for number in range(math.ceil(spec.units / spec.chunk)):
            total = _next_chunk(
                spec, loss_fn, params, args, key, total, jnp.int32(number)
            )
    else:
        total = _all_chunks(spec, loss_fn, params, args, key)
    if spec.kind != "empirical":
        return Collected(total.value, None, total.rows)
    slope = total.slope
    share = jnp.asarray(1 / spec.units, slope.dtype)
    shaped = _tree.cast_like(_tree.layout(params).split(share * slope), params)
    value = total.value * jnp.asarray(1 / spec.units, total.value.dtype)
    return Collected(value, shaped, total.rows)
