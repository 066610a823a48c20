r"""The problem that CHITA solves, and passes over its rows.

$$F(\beta) = v + \langle g, d\rangle + \tfrac12 \|Xd\|^2 + \tfrac\rho2 \|d\|^2,
  \qquad d = \beta - c,$$

over vectors with at most k nonzero prunable entries. All vectors are flat.

Legend: m rows, n weights, g groups of a budget, b blocks of w gathered columns.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparserec import _tree, select
from sparserec._linsolve import matmul
from sparserec._types import Scalar
from sparserec.budget import Budget
from sparserec.quadratic import LowRank, QuadraticModel

WIDTH = 256
"""Columns gathered at a time: one block of 1,000 rows fits the second-level cache."""

_PANELS = 4  # of a symmetric product: 10 of its 16 blocks are computed
_ENTRIES = 1 << 18  # of a block of columns in such a product: a megabyte in float32
_FEW = 8  # columns below n over this are cheaper copied for one product than in place
_SHARE = 4  # columns are copied together where they are fewer than n over this

_T = TypeVar("_T")


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "ridge", "center", "gradient", "value", "offset"],
    meta_fields=["layout"],
)
@dataclasses.dataclass(frozen=True)
class RowProblem:
    r"""A quadratic model with $H = X^\top X + \rho I$, flattened.

    Attributes:
      rows: $X$, shape `(m, n)`.
      ridge: $\rho$, shape `()`.
      center: $c$, shape `(n,)`.
      gradient: $g$ at the center, shape `(n,)`.
      value: $v$, shape `()`.
      layout: static layout of the params.
      offset: part of every product with the rows that no step here changes, shape
        `(m,)`; `None` where there is none.
    """

    rows: Float[Array, "m n"]
    ridge: Scalar
    center: Float[Array, "n"]
    gradient: Float[Array, "n"]
    value: Scalar
    layout: _tree.Layout
    offset: Float[Array, "m"] | None = None

    def product(self, step: Float[Array, "n"]) -> Float[Array, "m"]:
        """Rows times a step from the center: one pass over the rows."""
        found = matmul(self.rows, step)
        return found if self.offset is None else self.offset + found

    def at(self, step: Float[Array, "n"], product: Float[Array, "m"]) -> Scalar:
        """Value at a step from the center whose product with the rows is known."""
        half = jnp.asarray(0.5, step.dtype)
        bend = jnp.vdot(product, product) + self.ridge * jnp.vdot(step, step)
        return self.value + jnp.vdot(self.gradient, step) + half * bend

    def slope(
        self, step: Float[Array, "n"], product: Float[Array, "m"]
    ) -> Float[Array, "n"]:
        """Gradient at a step from the center: one pass over the rows."""
        # A row vector times the matrix is the fast order for XLA on CPU.
        return self.gradient + matmul(product, self.rows) + self.ridge * step


class Point(NamedTuple):
    """A sparse point with what is known about it.

    Attributes:
      params: flat, zero off the mask, shape `(n,)`.
      mask: its support, shape `(n,)`.
      product: rows times its step from the center, shape `(m,)`.
      value: the objective there, shape `()`.
    """

    params: Float[Array, "n"]
    mask: Bool[Array, "n"]
    product: Float[Array, "m"]
    value: Scalar


def row_problem(model: QuadraticModel) -> RowProblem:
    """The flat problem of a model with a `LowRank` curvature."""
    curvature = model.curvature
    assert isinstance(curvature, LowRank)
    dtype = curvature.rows.dtype
    if dtype.itemsize < 4:
        dtype = jnp.dtype(jnp.float32)
    return RowProblem(
        rows=curvature.rows.astype(dtype),
        ridge=curvature.ridge.astype(dtype),
        center=_tree.flatten(model.center).astype(dtype),
        gradient=_tree.flatten(model.gradient).astype(dtype),
        value=model.value.astype(dtype),
        layout=_tree.layout(model.center),
    )


def point_at(
    problem: RowProblem, params: Float[Array, "n"], mask: Bool[Array, "n"]
) -> Point:
    """The point with these params, its value from one pass over the rows."""
    step = params - problem.center
    product = problem.product(step)
    return Point(params, mask, product, problem.at(step, product))


def better(a: Point, b: Point) -> Point:
    """The point with the lower value; the first where they are even or b is NaN."""
    return jax.tree.map(lambda x, y: jnp.where(b.value < a.value, y, x), a, b)


def largest(
    scores: Float[Array, "n"], budget: Budget, layout: _tree.Layout
) -> Bool[Array, "n"]:
    """Flat mask of the largest magnitudes that the budget allows."""
    shaped = layout.split(scores)
    return _tree.flatten(select.support(shaped, budget.counts, budget.groups))


def group_of_entries(budget: Budget, layout: _tree.Layout) -> np.ndarray:
    """Budget group of every entry, -1 where it is never pruned; static."""
    sizes = [math.prod(shape) for shape in layout.shapes]
    return np.repeat(np.asarray(budget.groups, np.int32), sizes)


# --- gathered columns ----------------------------------------------------------------


class Columns(NamedTuple):
    """Some columns of the rows, copied together block by block.

    Attributes:
      index: which columns, ascending; padded with n, shape `(b * w,)`.
      blocks: shape `(b, m, w)`; zeros where padded.
      count: number of blocks in use, shape `()`.
    """

    index: Int[Array, "bw"]
    blocks: Float[Array, "b m w"]
    count: Int[Array, ""]

    def spread(self, entries: Float[Array, "bw"], like: Array) -> Float[Array, "n"]:
        """A flat vector with these entries at the columns and zeros elsewhere."""
        return jnp.zeros_like(like).at[self.index].set(entries, mode="drop")

    def take(self, vector: Float[Array, "n"]) -> Float[Array, "bw"]:
        """The entries of a flat vector at the columns."""
        return vector.at[self.index].get(mode="fill", fill_value=0)

    def times(self, vectors: Float[Array, "n *t"]) -> Float[Array, "m *t"]:
        """The columns times the entries of one or several vectors there."""
        width = self.blocks.shape[2]
        taken = self.take(vectors)

        def add(i: Array, total: Array) -> Array:
            part = jax.lax.dynamic_slice_in_dim(taken, i * width, width)
            return total + matmul(self.blocks[i], part)

        start = jnp.zeros((self.blocks.shape[1], *vectors.shape[1:]), taken.dtype)
        return jax.lax.fori_loop(0, self.count, add, start)

    def transposed_times(self, u: Float[Array, "m"], like: Array) -> Float[Array, "n"]:
        """A vector over the rows times the columns, zeros elsewhere."""
        width = self.blocks.shape[2]

        def put(i: Array, total: Array) -> Array:
            part = matmul(u, self.blocks[i])
            return jax.lax.dynamic_update_slice_in_dim(total, part, i * width, 0)

        entries = jax.lax.fori_loop(
            0, self.count, put, jnp.zeros(self.index.shape, u.dtype)
        )
        return self.spread(entries, like)


def indices(mask: Bool[Array, "n"], size: int) -> tuple[Array, Array]:
    """Where a mask is true, padded with n to a static size; and how often."""
    found = jnp.nonzero(mask, size=size, fill_value=mask.shape[0])[0]
    return found.astype(jnp.int32), jnp.sum(mask, dtype=jnp.int32)


def gather_block(rows: Float[Array, "m n"], index: Int[Array, "w"]) -> Array:
    """Columns at an index, zeros where it is n."""
    return jnp.take(rows, index, axis=1, mode="fill", fill_value=0)


def gather(rows: Float[Array, "m n"], mask: Bool[Array, "n"], blocks: int) -> Columns:
    """Copies the columns on a mask; the work grows with their number."""
    width = min(WIDTH, rows.shape[1])
    index, number = indices(mask, blocks * width)
    count = -(-number // width)

    def put(i: Array, buffer: Array) -> Array:
        at = jax.lax.dynamic_slice_in_dim(index, i * width, width)
        return buffer.at[i].set(gather_block(rows, at))

    empty = jnp.zeros((blocks, rows.shape[0], width), rows.dtype)
    return Columns(index, jax.lax.fori_loop(0, count, put, empty), count)


def sparse_product(
    rows: Float[Array, "m n"], vectors: Float[Array, "n t"]
) -> Float[Array, "m t"]:
    """Rows times vectors, by the columns where one is not zero if these are few."""
    m, n = rows.shape
    width = min(WIDTH, n)
    blocks = n // (_FEW * width)
    if blocks == 0:
        return matmul(rows, vectors)
    index, number = indices(jnp.any(vectors != 0, axis=1), blocks * width)

    def add(i: Array, total: Array) -> Array:
        at = jax.lax.dynamic_slice_in_dim(index, i * width, width)
        part = vectors.at[at].get(mode="fill", fill_value=0)
        return total + matmul(gather_block(rows, at), part)

    return jax.lax.cond(
        number <= blocks * width,
        lambda: jax.lax.fori_loop(
            0,
            -(-number // width),
            add,
            jnp.zeros((m, vectors.shape[1]), vectors.dtype),
        ),
        lambda: matmul(rows, vectors),
    )


class AllColumns(NamedTuple):
    """All columns, in place; with the methods of `Columns`."""

    rows: Float[Array, "m n"]

    def times(self, vectors: Float[Array, "n *t"]) -> Float[Array, "m *t"]:
        """The rows times one or several vectors."""
        return matmul(self.rows, vectors)

    def transposed_times(self, u: Float[Array, "m"], like: Array) -> Float[Array, "n"]:
        """A vector over the rows times all columns."""
        del like
        return matmul(u, self.rows)


def with_columns(
    rows: Float[Array, "m n"],
    mask: Bool[Array, "n"],
    function: Callable[[Columns | AllColumns], _T],
) -> _T:
    """Calls a function with the columns on a mask, or with all of them.

    Shapes are static and the mask is not: a quarter of the columns fits a buffer, and
    beyond that a pass over all rows in place is as fast as one over copied blocks.
    """
    width = min(WIDTH, rows.shape[1])
    few = rows.shape[1] // (_SHARE * width)
    if few == 0:
        return function(AllColumns(rows))
    return jax.lax.cond(
        jnp.sum(mask, dtype=jnp.int32) <= few * width,
        lambda: function(gather(rows, mask, few)),
        lambda: function(AllColumns(rows)),
    )


def kernel(
    rows: Float[Array, "m n"],
    mask: Bool[Array, "n"],
    start: Float[Array, "m m"] | None = None,
) -> Float[Array, "m m"]:
    r"""$X_S X_S^\top$, added to `start`.

    On CPU the work grows with the size of the support; elsewhere one product of masked
    rows takes less than the launches of a loop.
    """
    total = jax.lax.platform_dependent(
        rows, mask, cpu=_kernel_by_blocks, default=_kernel_at_once
    )
    return total if start is None else start + total


def _kernel_at_once(rows: Float[Array, "m n"], mask: Bool[Array, "n"]) -> Array:
    live = jnp.where(mask[None, :], rows, 0)
    return matmul(live, live.T)


def _kernel_by_blocks(rows: Float[Array, "m n"], mask: Bool[Array, "n"]) -> Array:
    """Only panels below the diagonal are multiplied: five eighths of the products."""
    m, n = rows.shape
    width = min(max(_ENTRIES // m, 64), n)
    index, number = indices(mask, -(-n // width) * width)
    tall = -(-m // _PANELS)
    spans = [(i, min(i + tall, m)) for i in range(0, m, tall)]

    def add(i: Array, panels: list[Array]) -> list[Array]:
        at = jax.lax.dynamic_slice_in_dim(index, i * width, width)
        block = gather_block(rows, at)
        return [
            panel + matmul(block[begin:end], block[:end].T)
            for panel, (begin, end) in zip(panels, spans, strict=True)
        ]

    empty = [jnp.zeros((end - begin, end), rows.dtype) for begin, end in spans]
    panels = jax.lax.fori_loop(0, -(-number // width), add, empty)
    lower = jnp.concatenate([jnp.pad(x, ((0, 0), (0, m - x.shape[1]))) for x in panels])
    return jnp.tril(lower) + jnp.tril(lower, -1).T
