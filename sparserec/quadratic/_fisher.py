"""Models from the gradients of single examples or mini-batches: the Fisher matrix."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from sparserec import _tree
from sparserec._types import LossFn, Params, Scalar
from sparserec.quadratic import _chunked
from sparserec.quadratic import _fisher_input as _input
from sparserec.quadratic._block_rows import BlockLowRank, block_layout
from sparserec.quadratic._builders import low_rank
from sparserec.quadratic._gradient_curvature import GradientRows
from sparserec.quadratic._gradient_rows import (
    SAMPLERS,
    Collected,
    Kind,
    RowSpec,
    chunk_of,
    collect,
    unit_index,
)
from sparserec.quadratic._layer_rows import Leaf, StoredLeaf
from sparserec.quadratic._matrix_free import as_pytree
from sparserec.quadratic._model import Curvature, QuadraticModel


@dataclasses.dataclass(frozen=True)
class Fisher:
    r"""Builds low-rank models from gradient rows. Make one with `fisher(...)`.

    Attributes:
      rows: number of rows, or `None` for as many as the data give.
      batch_size: examples averaged in a row.
      kind: `"empirical"`, `"sampled"` or `"gauss_newton"`.
      predict_fn: outputs of the network, or `None`.
      output_loss_fn: loss of the outputs, or `None`.
      sample_fn: draws targets from outputs, or `None`.
      key: implementation and words of the PRNG key, or `None`; hashable.
      first_order: whether the model has the gradient of the loss.
      ridge: pull towards the center, in units of curvature.
      dtype: name of the dtype of stored rows, or `None` for that of the params.
      implicit: whether rows of dense layers stay products of inputs and slopes.
      blocks: `None`, `"leaf"`, or the largest width of a block.
      chunk_size: rows' units computed at a time, or `None` for a size that bounds
        the memory.
      on_host: whether the loop over chunks runs in Python.
      coupled: whether the examples of a row act on each other.
    """

    rows: int | None = None
    batch_size: int = 1
    kind: Kind = "empirical"
    predict_fn: Callable | None = None
    output_loss_fn: Callable | None = None
    sample_fn: Callable | None = None
    key: tuple[str, tuple] | None = None
    first_order: bool = True
    ridge: float = 0.0
    dtype: str | None = None
    implicit: bool = False
    blocks: int | Literal["leaf"] | None = None
    chunk_size: int | None = None
    on_host: bool = False
    coupled: bool = False

    def loss(self, params: Params, *args: Any) -> Scalar:
        """The loss of the outputs: `loss(params, *inputs, targets)`."""
        if self.predict_fn is None or self.output_loss_fn is None:
            raise ValueError(
                "this curvature was made without `predict_fn` and `output_loss_fn`, "
                "so it knows no loss; pass your own `loss_fn`."
            )
        *inputs, targets = args
        return self.output_loss_fn(self.predict_fn(params, *inputs), targets)

    def with_key(self, key: Array) -> "Fisher":
        """The same builder with another PRNG key, for fresh samples."""
        return dataclasses.replace(self, key=_input.hashable_key(key))

    def check(self, loss_fn: LossFn, params: Params, args: tuple) -> None:
        """Raises a `ValueError` unless the loss is a mean over single examples.

        Does nothing where the params or the data are traced: there are no values; nor
        where examples are coupled: no loss of a single one exists.
        """
        if self.coupled or _input.is_traced((loss_fn, params, args)):
            return
        _input.check_mean(loss_fn, params, args)
        if self.kind != "empirical":
            _input.check_mean(self.loss, params, args)

    def __call__(self, loss_fn: LossFn, params: Params, args: tuple) -> QuadraticModel:
        """Local model of `loss_fn(params, *args)` at `params`.

        Outside compiled code the form of the loss and the rows are checked; a
        `ValueError` says what is wrong with them.
        """
        params = _tree.to_working_precision(params)
        total = _chunked.leading_size(args)
        spec = self._spec(params, args, total)
        loss_fn = as_pytree(loss_fn)
        self.check(loss_fn, params, args)
        collected = collect(
            spec,
            loss_fn,
            params,
            args,
            _input.restored_key(self.key),
            on_host=self.on_host,
        )
        if not _input.is_traced(collected.rows):
            _input.check_finite(collected.rows, spec.rows)
        curvature = self._curvature(spec, params, collected)
        complete = spec.units * spec.batch_size == total
        if collected.slope is not None and (complete or not self.first_order):
            value, gradient = collected.value, collected.slope
        else:
            if not self.first_order:
                chosen = unit_index(total, spec.units, spec.batch_size).reshape(-1)
                args = jax.tree.map(lambda x: jnp.asarray(x)[chosen], args)
            value, gradient = self._loss_and_gradient(spec, loss_fn, params, args)
        if not self.first_order:
            gradient = _tree.zeros_like(params)
        return QuadraticModel(
            params, value.astype(_tree.dtype(params)), gradient, curvature
        )

    def _loss_and_gradient(
        self, spec: RowSpec, loss_fn: LossFn, params: Params, args: tuple
    ) -> tuple[Scalar, Params | None]:
        """Over these examples; no gradient where the model has none."""
        size = max(spec.chunk * spec.batch_size, 32)
        if not self.first_order:
            size = size if self.on_host else _chunked.leading_size(args)
            return _chunked.value(loss_fn, params, args, size), None
        if not self.on_host:
            return _value_and_gradient(loss_fn, params, args)
        return _chunked.value_and_gradient(loss_fn, params, args, size)

    def _curvature(
        self, spec: RowSpec, params: Params, collected: Collected
    ) -> Curvature:
        layout, rows = _tree.layout(params), collected.rows
        ridge = jnp.asarray(self.ridge, _tree.dtype(params))
        if spec.implicit:
            return GradientRows(rows, ridge, layout)
        if spec.blocks is not None:
            return BlockLowRank(rows, ridge, spec.blocks, layout)
        if rows.dtype.itemsize < 4:
            parts = np.cumsum([math.prod(shape) for shape in layout.shapes])[:-1]
            leaves: list[Leaf] = [StoredLeaf(x) for x in jnp.split(rows, parts, axis=1)]
            return GradientRows(leaves, ridge, layout)
        return low_rank(rows, params, ridge=self.ridge).curvature

    def _spec(self, params: Params, args: tuple, total: int) -> RowSpec:
        per_unit = 1
        if self.kind == "gauss_newton":
            per_unit = _input.outputs_per_example(self.predict_fn, params, args)
        units = _input.number_of_units(self.rows, self.batch_size, per_unit, total)
        blocks = None
        if self.blocks is not None:
            width = None if self.blocks == "leaf" else self.blocks
            blocks = block_layout(_tree.layout(params).shapes, width)
        chunk = self.chunk_size
        if chunk is None and self.on_host and self.batch_size > 1:
            chunk = 1
        elif chunk is None:
            chunk = chunk_of(units, self.batch_size, per_unit, _tree.size(params))
        return RowSpec(
            kind=self.kind,
            units=units,
            batch_size=self.batch_size,
            per_unit=per_unit,
            predict_fn=self.predict_fn,
            output_loss_fn=self.output_loss_fn,
            sample_fn=self.sample_fn,
            dtype=self.dtype,
            implicit=self.implicit,
            blocks=blocks,
            chunk=min(chunk, units),
        )


def fisher(
    *,
    rows: int | None = None,
    batch_size: int = 1,
    kind: Kind = "empirical",
    predict_fn: Callable | None = None,
    output_loss_fn: Callable | None = None,
    sample_fn: Callable | None = None,
    key: Array | None = None,
    first_order: bool = True,
    ridge: float = 0.0,
    dtype: Any = None,
    implicit: bool = False,
    blocks: int | Literal["leaf"] | None = None,
    chunk_size: int | None = None,
    on_host: bool = False,
    coupled: bool = False,
) -> Fisher:
    r"""Curvature from gradient rows, for the `curvature=` of any solver.

    With $x_i$ the gradient of the mean loss over the $B$ examples of row i, the
    model of a loss $f$ with m rows is

    $$q(w) = f(c) + \langle\nabla f(c), w-c\rangle
      + \tfrac12 (w-c)^\top\Bigl(\tfrac Bm X^\top X + \rho I\Bigr)(w-c).$$

    `loss_fn(params, *args)` must be a mean over the leading axis of `args`: an
    example is a slice of length one. Only `coupled` rows take other losses.

    Args:
      rows: m; by default as many as the data give. `args` must hold at least m
        times `batch_size` examples; of more, evenly spaced ones are used for rows,
        and all of them for the value and the gradient.
      batch_size: B, examples averaged in one row. The factor B above makes the
        curvature of independent gradients the same for every B. Codes that leave it
        out have a ridge B times weaker than this one: multiply theirs by B.
      kind: whose gradients. `"empirical"`: of the loss on the true targets.
        `"sampled"`: on targets drawn from the predictions (Monte-Carlo Fisher), in
        expectation the Gauss-Newton matrix of a likelihood. `"gauss_newton"`: the
        exact matrix over `rows / outputs` examples, a row for every output of an
        example; `batch_size` must be 1.
      predict_fn: `predict_fn(params, *inputs) -> outputs`, an array; needed by
        the last two kinds, with `args=(*inputs, targets)`.
      output_loss_fn: `output_loss_fn(outputs, targets) -> scalar`, a mean over the
        leading axis; needed by the last two kinds.
      sample_fn: `sample_fn(key, outputs) -> targets`; known for
        `sparserec.quadratic.softmax_cross_entropy` and `.squared_error`.
      key: PRNG key of the samples, from `jax.random.key`; no default.
      first_order: `False` leaves the gradient out of the model, as if the params
        were a minimum; the value is then that over the examples of the rows, and no
        others are visited.
      ridge: $\rho \ge 0$ towards the params the model is built at, in units of
        curvature.
      dtype: of the stored rows: `None` for that of the params, or
        `jax.numpy.bfloat16` for half the memory.
      implicit: store inputs and slopes of dense layers in place of their rows,
        which are found by reading the loss; for layers of any size, few examples a
        row.
      blocks: block-diagonal curvature: `"leaf"`, or the largest width of blocks. A
        block holds the weights of as many outputs (the last axis of a leaf) as fit,
        or an even part of those of one output: weights that read different inputs
        of one output can make up for each other, those of different outputs cannot.
      chunk_size: rows (for `"gauss_newton"`: examples) computed at a time; by
        default so many that a chunk stays below about 8 MB.
      on_host: loop over the chunks in Python, around one compiled step: for
        convolutions on CPU, which are slow inside compiled loops. Not for use in
        compiled code. Rows of mini-batches then come one at a time by default.
      coupled: the examples of a row act on each other, as in batch normalisation in
        training mode: a row is the gradient of the loss of its own mini-batch, and
        the model is one of the mean loss over mini-batches. For networks whose batch
        statistics are estimated again after pruning, see
        `sparserec.training.recalibrate`: rows with fixed statistics charge for
        changes that the new statistics undo. The form of the loss is not checked.

    Returns:
      A curvature builder. Its models have a `LowRank` curvature; with `blocks` a
      `BlockLowRank`, and with `implicit` or rows in half precision a
      `GradientRows`.

    Raises:
      ValueError: options that do not fit together. The builder itself raises one
        where there are fewer examples than rows need, where arrays in `args` do not
        share their leading axis, where rows hold NaN, and where the mean of
        single-example losses is not the loss.
      TypeError: `key` is not a PRNG key.

    Source: Amari (1998), Martens (2020) on the kinds of Fisher matrices; Benbaki et
    al. (2023) on rows of mini-batches.
    """
    _input.check_options(kind, batch_size, predict_fn, output_loss_fn, implicit, blocks)
    _input.check_coupled(coupled, batch_size, implicit)
    for name, value in (("rows", rows), ("batch_size", batch_size)):
        _input.check_count(name, value)
    _input.check_count("chunk_size", chunk_size)
    if blocks != "leaf":
        _input.check_count("blocks", blocks)
    if isinstance(ridge, Tracer) or not ridge >= 0:
        raise ValueError(f"`ridge` must be a number of at least 0, got {ridge!r}.")
    if kind == "sampled":
        if key is None:
            raise ValueError(
                "`kind='sampled'` draws targets: pass `key=jax.random.key(seed)`."
            )
        sample_fn = sample_fn or SAMPLERS.get(output_loss_fn)  # type: ignore[arg-type]
        if sample_fn is None:
            raise ValueError(
                "how targets are drawn is known for `softmax_cross_entropy` and "
                "`squared_error` only; pass `sample_fn(key, outputs) -> targets`."
            )
    elif key is not None:
        raise ValueError(f"`kind={kind!r}` draws nothing: leave `key` out.")
    return Fisher(
        rows=rows,
        batch_size=batch_size,
        kind=kind,
        predict_fn=predict_fn,
        output_loss_fn=output_loss_fn,
        sample_fn=sample_fn,
        key=None if key is None else _input.hashable_key(key),
        first_order=first_order,
        ridge=float(ridge),
        dtype=None if dtype is None else jnp.dtype(dtype).name,
        implicit=implicit,
        blocks=blocks,
        chunk_size=chunk_size,
        on_host=on_host,
        coupled=coupled,
    )


@jax.jit
def _value_and_gradient(loss_fn, params, args):
    return jax.value_and_grad(loss_fn)(params, *args)
