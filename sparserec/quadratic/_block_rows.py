"""A block-diagonal curvature from rows: every block is a low-rank problem of its own.

Legend: m rows, b blocks of w columns, n weights.
"""

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparserec import _linsolve, _tree
from sparserec._linsolve import LinearSolve, matmul
from sparserec._types import Mask, Params, Scalar
from sparserec.quadratic._push_through import push_through

_SCRATCH = 1 << 24  # entries of the systems that are solved side by side
_BUFFERS = (1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)  # shares of a block's width


class BlockLayout(NamedTuple):
    """Where blocks lie: runs of consecutive entries, by batches of equal width.

    Attributes:
      size: number of entries in all.
      batches: for every batch the `(start, length)` of its blocks; the width of a
        batch is the longest of them, shorter blocks are padded.
    """

    size: int
    batches: tuple[tuple[tuple[int, int], ...], ...]

    def index(self) -> list[np.ndarray]:
        """Entries of every block, int32, shape `(b, w)` per batch; padded with n."""
        found = []
        for batch in self.batches:
            width = max(length for _, length in batch)
            offsets = np.arange(width)[None]
            starts = np.array([start for start, _ in batch])[:, None]
            lengths = np.array([length for _, length in batch])[:, None]
            places = np.where(offsets < lengths, starts + offsets, self.size)
            found.append(places.astype(np.int32))
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
        flat = jnp.zeros(self.size, parts[0].dtype)
        for index, part in zip(self.index(), parts, strict=True):
            flat = flat.at[index.reshape(-1)].set(part.reshape(-1), mode="drop")
        return flat


def block_layout(sizes: list[int], width: int | None) -> BlockLayout:
    """Blocks aligned with leaves: whole leaves, or equal parts of at most `width`.

    Args:
      sizes: entries of every leaf.
      width: largest block; `None` for one block per leaf.

    Returns:
      The layout: all blocks in one batch where there is a width, padded to the
      widest, else a batch for every distinct size of a leaf.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    if width is None:
        distinct = sorted(set(sizes))
        return BlockLayout(
            starts[-1],
            tuple(
                tuple(
                    (s, size)
                    for s, size in zip(starts, sizes, strict=False)
                    if size == wanted
                )
                for wanted in distinct
                if wanted
            ),
        )
    blocks = []
    for start, size in zip(starts, sizes, strict=False):
        count = math.ceil(size / width)
        edges = [start + size * i // count for i in range(count + 1)] if count else []
        blocks += [(a, b - a) for a, b in itertools.pairwise(edges)]
    return BlockLayout(starts[-1], (tuple(blocks),))


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

        flat = self._wide(_tree.flatten(v))
        parts = [
            jax.lax.map(lambda pair: product(*pair), (rows, part))
            for rows, part in zip(self.rows, self._split(flat), strict=True)
        ]
        return self._joined(parts, v)

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
            value, good = _solve_blocks(rows, support, target, shift)
            values.append(value)
            succeeded &= jnp.all(good)
        solution = self._joined(values, rhs)
        return LinearSolve(solution, _linsolve.direct_status(succeeded, solution))

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


def _solve_blocks(
    rows: Float[Array, "b m w"],
    support: Bool[Array, "b w"],
    target: Float[Array, "b w"],
    shift: Scalar,
) -> tuple[Float[Array, "b w"], Bool[Array, "b"]]:
    """All blocks of a batch: side by side, or on CPU with no more work than needed."""
    side_by_side = max(1, _SCRATCH // (rows.shape[2] * sum(rows.shape[1:])))

    def on_cpu(*given: Array):
        return jax.lax.map(lambda block: _solve_in_buffer(shift, *block), given)

    def elsewhere(*given: Array):
        return jax.lax.map(
            lambda block: _solve_block(shift, *block),
            given,
            batch_size=min(side_by_side, rows.shape[0]),
        )

    return jax.lax.platform_dependent(
        rows, support, target, cpu=on_cpu, default=elsewhere
    )


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
