"""A block-diagonal curvature from rows: every block is a low-rank problem of its own.

Legend: m rows, b blocks of w columns, n weights.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparserec import _linsolve, _tree
from sparserec._linsolve import LinearSolve, matmul
from sparserec._types import Mask, Params, Scalar
from sparserec.quadratic._push_through import push_through

_SCRATCH = 1 << 24  # entries of the systems that are solved side by side
_FILLED = 3 / 4  # of a block's width is the least that a batch holds
_BUFFERS = (1 / 8, 1 / 4, 1 / 2, 1)  # shares of a block's width


class BlockLayout(NamedTuple):
    """Where blocks lie: runs of consecutive entries, by batches of similar width.

    Entries are ordered output by output within a leaf: its last axis goes first.

    Attributes:
      shapes: of the leaves, in tree order.
      batches: for every batch the `(start, length)` of its blocks; the width of a
        batch is the longest of them, shorter blocks are padded.
    """

    shapes: tuple[tuple[int, ...], ...]
    batches: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def size(self) -> int:
        """Number of entries in all."""
        return sum(math.prod(shape) for shape in self.shapes)

    def order(self) -> np.ndarray:
        """Flat indices of the entries, output by output, int32, shape `(n,)`."""
        places = np.arange(self.size, dtype=np.int32)
        edges = np.cumsum([math.prod(shape) for shape in self.shapes])[:-1]
        leaves = [
            np.moveaxis(part.reshape(shape), -1, 0).reshape(-1) if shape else part
            for part, shape in zip(np.split(places, edges), self.shapes, strict=True)
        ]
        return np.concatenate(leaves)

    def index(self) -> list[np.ndarray]:
        """Entries of every block, int32, shape `(b, w)` per batch; padded with n."""
        found, order = [], np.append(self.order(), np.int32(self.size))
        for batch in self.batches:
            width = max(length for _, length in batch)
            offsets = np.arange(width)[None]
            starts = np.array([start for start, _ in batch])[:, None]
            lengths = np.array([length for _, length in batch])[:, None]
            found.append(order[np.where(offsets < lengths, starts + offsets, -1)])
        return found

    def cut(self, flat: Float[Array, "*m n"]) -> list[Float[Array, "b *m w"]]:
        """The blocks of flat vectors, padded with zeros, blocks first."""
        taken = [
            jnp.take(flat, index, axis=-1, mode="fill", fill_value=0)
            for index in self.index()
        ]
        return [jnp.moveaxis(x, -2, 0) for x in taken]

    def join(self, parts: list[Float[Array, "b w"]]) -> Float[Array, "n"]:
        """The flat vector whose blocks these are."""
        index = np.concatenate([x.reshape(-1) for x in self.index()])
        places = np.zeros(self.size + 1, np.int32)
        places[index] = np.arange(index.size)
        return jnp.concatenate([part.reshape(-1) for part in parts])[places[:-1]]


def _edges(shape: tuple[int, ...], width: int) -> list[int]:
    """Ends of the blocks of one leaf: whole outputs, or even parts of each."""
    outputs = shape[-1] if len(shape) > 1 else 1
    inputs = math.prod(shape) // max(outputs, 1)
    if not inputs:
        return []
    if inputs > width:
        parts = math.ceil(inputs / width)
        ends = [inputs * (i + 1) // parts for i in range(parts)]
        return [inputs * output + end for output in range(outputs) for end in ends]
    count = math.ceil(outputs / (width // inputs))
    return [inputs * (outputs * (i + 1) // count) for i in range(count)]


def block_layout(shapes: Sequence[tuple[int, ...]], width: int | None) -> BlockLayout:
    """Blocks aligned with leaves and with outputs, the last axis of a matrix.

    Args:
      shapes: of the leaves.
      width: largest block: it holds all weights of as many outputs as fit, or an even
        part of those of one output; a leaf with one axis is one output. `None` for
        one block per leaf.

    Returns:
      The layout; blocks padded by less than a quarter share a batch.
    """
    blocks, start = [], 0
    for shape in shapes:
        size = math.prod(shape)
        ends = ([size] if size else []) if width is None else _edges(shape, width)
        for begin, end in itertools.pairwise([0, *ends]):
            blocks.append((start + begin, end - begin))
        start += size
    batches: list[list[tuple[int, int]]] = []
    for block in sorted(blocks, key=lambda block: (-block[1], block[0])):
        if not batches or block[1] < _FILLED * batches[-1][0][1]:
            batches.append([])
        batches[-1].append(block)
    return BlockLayout(tuple(map(tuple, shapes)), tuple(map(tuple, batches)))


class Minimum(NamedTuple):
    """The minimiser of a quadratic on a support.

    Attributes:
      step: from the center, shaped like the params.
      value: of the quadratic there, relative to the center, shape `()`.
      status: as in `LinearSolve`.
    """

    step: Params
    value: Scalar
    status: Int[Array, ""]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["rows", "ridge"],
    meta_fields=["blocks", "layout"],
)
@dataclasses.dataclass(frozen=True)
class BlockLowRank:
    r"""$H = \mathrm{diag}_b(X_b^\top X_b) + \rho I$ from m rows cut into blocks.

    A solve is one batched operation: the smaller of the Gram matrix $X_b^\top X_b$
    and, where a block is wider than the rows are many, of the push-through matrix
    $X_{b,Q} X_{b,Q}^\top$, block by block.

    Attributes:
      rows: one array for every batch of blocks, shape `(b, m, w)`; columns beyond
        the end of a block are zero.
      ridge: $\rho \ge 0$, in units of curvature, shape `()`.
      blocks: static; which entries a block holds, see `blocks.index()`.
      layout: static layout of the params.
    """

    rows: list[Float[Array, "b m w"]]
    ridge: Float[Array, ""]
    blocks: BlockLayout
    layout: _tree.Layout

    def _split(self, flat: Array) -> list[Array]:
        return self.blocks.cut(flat)

    def _joined(self, parts: list[Array], like: Params) -> Params:
        flat = self.blocks.join(parts)
        return _tree.cast_like(self.layout.split(flat), like)

    def _wide(self, x: Array) -> Array:
        return x.astype(self.ridge.dtype)

    def matvec(self, v: Params) -> Params:
        """Product $Hv$, shaped like `v`."""

        def product(rows: Array, part: Array) -> Array:
            rows = self._wide(rows)
            return matmul(matmul(rows, part), rows) + self.ridge * part

        def all_blocks(flat: Array) -> Array:
            parts = [
                jax.lax.map(lambda pair: product(*pair), (rows, part))
                for rows, part in zip(self.rows, self._split(flat), strict=True)
            ]
            return self.blocks.join(parts)

        # Solvers begin at the center of their model: that step takes no pass.
        flat = self._wide(_tree.flatten(v))
        found = jax.lax.cond(jnp.any(flat != 0), all_blocks, jnp.zeros_like, flat)
        return _tree.cast_like(self.layout.split(found), v)

    def quadratic_form(self, v: Params) -> Scalar:
        r"""$v^\top H v$: one pass over the rows."""
        flat = self._wide(_tree.flatten(v))

        def square(rows: Array, part: Array) -> Scalar:
            product = matmul(self._wide(rows), part)
            return jnp.vdot(product, product)

        total = self.ridge * jnp.vdot(flat, flat)
        for rows, part in zip(self.rows, self._split(flat), strict=True):
            total += jnp.sum(jax.lax.map(lambda pair: square(*pair), (rows, part)))
        return total

    def diagonal(self) -> Params:
        """Diagonal of $H$, shaped like the params."""

        def squares(rows: Array) -> Array:
            rows = self._wide(rows)
            return _linsolve.column_dots(rows, rows)

        parts = [jax.lax.map(squares, rows) for rows in self.rows]
        return self.layout.split(self.blocks.join(parts) + self.ridge)

    def columns(self, index: Int[Array, "s"]) -> Float[Array, "n s"]:
        """Columns of $H$ at flat indices, shape `(n, s)`."""

        def column(i: Array) -> Array:
            unit = jnp.zeros(self.blocks.size, self.ridge.dtype).at[i].set(1)
            return _tree.flatten(self.matvec(self.layout.split(unit)))

        return jax.lax.map(column, index).T

    def gram(self, batch: int) -> Float[Array, "b w w"]:
        r"""$X_b^\top X_b$ of all blocks of one batch, without the ridge."""
        return jax.lax.map(
            lambda x: matmul(self._wide(x).T, self._wide(x)), self.rows[batch]
        )

    def solve_on(self, mask: Mask, rhs: Params, damping: Scalar) -> LinearSolve:
        """Solve on the support, block by block, zero off it."""
        shift = self.ridge + jnp.asarray(damping, self.ridge.dtype)
        supports = self._split(_tree.flatten(mask))
        targets = self._split(self._wide(_tree.flatten(rhs)))
        values, succeeded = [], jnp.bool_(True)
        for rows, support, target in zip(self.rows, supports, targets, strict=True):
            value, good = _each_block(_apply_solve, shift, rows, support, target)
            values.append(value)
            succeeded &= jnp.all(good)
        solution = self._joined(values, rhs)
        return LinearSolve(solution, _linsolve.direct_status(succeeded, solution))

    def minimise_on(
        self, mask: Mask, slope: Params, start: Params, damping: Scalar
    ) -> Minimum:
        r"""The minimiser on a support of a quadratic with this matrix, in one pass.

        Of $\langle g,d\rangle + \tfrac12 d^\top (H+\lambda I)d$ for the slope $g$. Off
        the support, and everywhere if the solve fails, $d$ stays what `start` is.
        """
        shift = self.ridge + jnp.asarray(damping, self.ridge.dtype)
        flat = self._wide(_tree.flatten(slope)), self._wide(_tree.flatten(start))
        supports = self._split(_tree.flatten(mask))
        slopes, starts = (self._split(x) for x in flat)
        steps, values, succeeded = [], [], jnp.bool_(True)
        for given in zip(self.rows, supports, slopes, starts, strict=True):
            step, value, good = _each_block(_minimise_block, shift, *given)
            steps.append(step)
            values.append(jnp.sum(value, axis=0))
            succeeded &= jnp.all(good)
        moved = self.blocks.join(steps)
        before, after = functools.reduce(jnp.add, values)
        status = _linsolve.direct_status(succeeded, moved)
        usable = _linsolve.usable(status)
        step = self.layout.split(jnp.where(usable, moved, flat[1]))
        value = jnp.where(usable, after, before)
        return Minimum(_tree.cast_like(step, start), value, status)

    def inverse_diagonal(self, damping: Scalar) -> Params:
        r"""Diagonal of $(H+\lambda I)^{-1}$; NaN where it does not exist."""
        shift = self.ridge + jnp.asarray(damping, self.ridge.dtype)

        def block(rows: Array) -> Array:
            rows = self._wide(rows)
            m, w = rows.shape
            if w <= m:
                matrix = matmul(rows.T, rows) + shift * jnp.eye(w, dtype=rows.dtype)
                return jnp.diagonal(_linsolve.inverse_positive(matrix)[0])
            kernel = matmul(rows, rows.T) + shift * jnp.eye(m, dtype=rows.dtype)
            inverse, _ = _linsolve.inverse_positive(kernel)
            return (1 - jnp.sum(rows * matmul(inverse, rows), axis=0)) / shift

        parts = [jax.lax.map(block, rows) for rows in self.rows]
        return self.layout.split(self.blocks.join(parts))

    def effective_dimension(self, damping: Scalar) -> Scalar:
        r"""Trace of $(H+\lambda I)^{-1}H$, at most $n$."""
        inverse = _tree.flatten(self.inverse_diagonal(damping))
        shift = jnp.asarray(damping, inverse.dtype)
        lost = jnp.where(shift > 0, shift * jnp.sum(inverse), 0)
        return inverse.shape[0] - lost

    def with_ridge(self, ridge: Scalar | float) -> Self:
        """The same rows with another ridge; nothing recompiles."""
        return dataclasses.replace(self, ridge=jnp.asarray(ridge, self.ridge.dtype))


def _each_block(function: Callable, shift: Scalar, rows: Array, *rest: Array) -> Any:
    """All blocks of a batch: side by side, or on CPU with no more work than needed.

    `function(solve, shift, rows, *rest)` of one block solves by `solve`.
    """
    side_by_side = max(1, _SCRATCH // (rows.shape[2] * sum(rows.shape[1:])))

    def on_cpu(*given: Array):
        return jax.lax.map(
            lambda block: function(_solve_in_buffer, shift, *block), given
        )

    def elsewhere(*given: Array):
        return jax.lax.map(
            lambda block: function(_solve_block, shift, *block),
            given,
            batch_size=min(side_by_side, rows.shape[0]),
        )

    return jax.lax.platform_dependent(rows, *rest, cpu=on_cpu, default=elsewhere)


def _apply_solve(solve: Callable, shift: Scalar, *given: Array) -> tuple[Array, Array]:
    return solve(shift, *given)


def _minimise_block(
    solve: Callable,
    shift: Scalar,
    rows: Float[Array, "m w"],
    support: Bool[Array, "w"],
    slope: Float[Array, "w"],
    start: Float[Array, "w"],
) -> tuple[Float[Array, "w"], Float[Array, "2"], Bool[Array, ""]]:
    """The step to the minimiser of one block; values at the start and there."""
    wide = rows.astype(slope.dtype)
    product = matmul(wide, start)
    target = slope + matmul(product, wide) + shift * start
    found, good = solve(shift, rows, support, target)
    step = start - found

    def value(step: Array, product: Array) -> Array:
        bend = jnp.vdot(product, product) + shift * jnp.vdot(step, step)
        return jnp.vdot(slope, step) + jnp.asarray(0.5, bend.dtype) * bend

    after = value(step, product - matmul(wide, found))
    return step, jnp.stack([value(start, product), after]), good


def _solve_in_buffer(
    shift: Scalar,
    rows: Float[Array, "m w"],
    support: Bool[Array, "w"],
    target: Float[Array, "w"],
) -> tuple[Float[Array, "w"], Bool[Array, ""]]:
    """Copies the columns on the support into the smallest buffer that holds them."""
    width = rows.shape[1]
    sizes = sorted({max(1, math.ceil(width * share)) for share in _BUFFERS})

    def solve(size: int):
        if size == width:
            return _solve_block(shift, rows, support, target)
        index = jnp.nonzero(support, size=size, fill_value=width)[0]
        live = jnp.take(rows, index, axis=1, mode="fill", fill_value=0)
        inside = index < width
        rhs = jnp.take(target, index, mode="fill", fill_value=0)
        value, good = _solve_block(shift, live, inside, rhs)
        return jnp.zeros_like(target).at[index].set(value, mode="drop"), good

    choice = jnp.searchsorted(jnp.asarray(sizes), jnp.sum(support))
    return jax.lax.switch(choice, [functools.partial(solve, size) for size in sizes])


def _solve_block(
    shift: Scalar,
    rows: Float[Array, "m w"],
    support: Bool[Array, "w"],
    target: Float[Array, "w"],
) -> tuple[Float[Array, "w"], Bool[Array, ""]]:
    r"""$(X_Q^\top X_Q + \lambda I)^{-1} b_Q$ by the smaller of the two systems."""
    live = jnp.where(support[None], rows.astype(target.dtype), 0)
    target = jnp.where(support, target, 0)
    if live.shape[1] <= live.shape[0]:
        gram = _linsolve.restrict(matmul(live.T, live), support, shift)
        value, good = _linsolve.solve_positive(gram, target)
        return jnp.where(support, value, 0), good
    solved = push_through(
        lambda v: matmul(live, v),
        lambda u: matmul(u, live),
        matmul(live, live.T),
        target,
        support,
        shift,
    )
    return solved.value, _linsolve.usable(solved.status)
