"""A low-rank curvature whose rows are never in memory as one matrix of float32.

Legend: m rows, n weights, s columns asked for.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec import _linsolve, _tree
from sparserec._linsolve import LinearSolve, matmul
from sparserec._types import Mask, Params, Scalar
from sparserec.quadratic._explicit import LowRank
from sparserec.quadratic._layer_rows import Leaf, OuterLeaf, by_pieces, fold
from sparserec.quadratic._push_through import push_through


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaves", "ridge"],
    meta_fields=["layout"],
)
@dataclasses.dataclass(frozen=True)
class GradientRows:
    r"""$H = X^\top X + \rho I$ from rows that are kept leaf by leaf.

    The rows of a dense layer are outer products of its inputs and the slopes at its
    outputs, and only those are stored; rows in half precision are raised to float32
    a piece at a time. The operations are those of `LowRank`; none of them needs
    more than a few thousand columns of $X$ at once.

    Attributes:
      leaves: rows of every leaf in tree order, see `OuterLeaf` and `StoredLeaf` in
        this package.
      ridge: $\rho \ge 0$, in units of curvature, shape `()`.
      layout: static layout of the params.
    """

    leaves: list[Leaf]
    ridge: Float[Array, ""]
    layout: _tree.Layout

    def _parts(self, flat: Array) -> list[Array]:
        parts = jax.tree.leaves(self.layout.split(flat))
        return [part.reshape(-1) for part in parts]

    def _sum(self, terms: list[Array]) -> Array:
        wide = [term.astype(self.ridge.dtype) for term in terms]
        return functools.reduce(operator.add, wide)

    def _joined(self, parts: list[Array]) -> Float[Array, "n"]:
        return jnp.concatenate([part.astype(self.ridge.dtype) for part in parts])

    def times(self, v: Float[Array, "n"]) -> Float[Array, "m"]:
        """$Xv$ for a flat vector."""
        pairs = zip(self.leaves, self._parts(v), strict=True)
        return self._sum([leaf.times(part.astype(leaf.dtype)) for leaf, part in pairs])

    def transposed_times(self, u: Float[Array, "m"]) -> Float[Array, "n"]:
        r"""$X^\top u$ as a flat vector."""
        return self._joined(
            [leaf.transposed_times(u.astype(leaf.dtype)) for leaf in self.leaves]
        )

    def row_columns(self, index: Int[Array, "s"]) -> Float[Array, "m s"]:
        """Columns of $X$ at flat indices, zeros where an index is n or more."""
        total, start = jnp.zeros((1, index.shape[0]), self.ridge.dtype), 0
        for leaf in self.leaves:
            here = (index >= start) & (index < start + leaf.width)
            local = jnp.clip(index - start, 0, max(leaf.width - 1, 0))
            if leaf.width:
                total = total + jnp.where(
                    here[None], leaf.take(local).astype(total.dtype), 0
                )
            start += leaf.width
        return total

    def kernel(self, mask: Bool[Array, "n"] | None = None) -> Float[Array, "m m"]:
        r"""$X_Q X_Q^\top$, of all columns without a mask."""
        if mask is None:
            return self._sum([_full_kernel(leaf) for leaf in self.leaves])
        pairs = zip(self.leaves, self._parts(mask), strict=True)
        return self._sum([_masked_kernel(leaf, part) for leaf, part in pairs])

    def to_low_rank(self) -> LowRank:
        """The same curvature with its rows written out, shape `(m, n)`."""
        size = self.layout.size
        rows = self.row_columns(jnp.arange(size, dtype=jnp.int32))
        return LowRank(rows, self.ridge, None, self.layout)

    def with_ridge(self, ridge: Scalar | float) -> Self:
        """The same rows with another ridge; nothing recompiles."""
        return dataclasses.replace(self, ridge=jnp.asarray(ridge, self.ridge.dtype))

    def _flat(self, v: Params) -> Float[Array, "n"]:
        return _tree.flatten(v).astype(self.ridge.dtype)

    def matvec(self, v: Params) -> Params:
        """Product $Hv$, shaped like `v`: two passes over the rows."""
        flat = self._flat(v)
        product = self.transposed_times(self.times(flat)) + self.ridge * flat
        return _tree.cast_like(self.layout.split(product), v)

    def quadratic_form(self, v: Params) -> Scalar:
        r"""$v^\top H v$: one pass over the rows."""
        flat = self._flat(v)
        product = self.times(flat)
        return jnp.vdot(product, product) + self.ridge * jnp.vdot(flat, flat)

    def _each_column(
        self, function: Callable[[Float[Array, "m p"]], Float[Array, "p"]]
    ) -> Float[Array, "n"]:
        return self._joined([by_pieces(leaf, function) for leaf in self.leaves])

    def diagonal(self) -> Params:
        """Diagonal of $H$, shaped like the params."""
        squares = self._each_column(lambda x: _linsolve.column_dots(x, x))
        return self.layout.split(squares + self.ridge)

    def columns(self, index: Int[Array, "s"]) -> Float[Array, "n s"]:
        """Columns of $H$ at flat indices, shape `(n, s)`: one pass over the rows."""
        chosen = self.row_columns(index)
        found = jax.lax.map(self.transposed_times, chosen.T)
        slots = jnp.arange(index.shape[0])
        return found.at[slots, index].add(self.ridge).T

    def solve_on(self, mask: Mask, rhs: Params, damping: Scalar) -> LinearSolve:
        """Solve on the support through the matrix over the rows, zero off it."""
        shift = self.ridge + jnp.asarray(damping, self.ridge.dtype)
        support = _tree.flatten(mask)
        # Small Grams give the kernel of all columns many times faster.
        kernel = jax.lax.cond(
            jnp.all(support), lambda: self.kernel(), lambda: self.kernel(support)
        )
        solved = push_through(
            lambda v: self.times(jnp.where(support, v, 0)),
            lambda u: jnp.where(support, self.transposed_times(u), 0),
            kernel,
            self._flat(rhs),
            support,
            shift,
        )
        value = _tree.cast_like(self.layout.split(solved.value), rhs)
        return LinearSolve(value, solved.status)

    def _inverse_kernel(self, shift: Scalar) -> Float[Array, "m m"]:
        kernel = self.kernel()
        identity = jnp.eye(kernel.shape[0], dtype=kernel.dtype)
        return _linsolve.inverse_positive(kernel + shift * identity)[0]

    def inverse_diagonal(self, damping: Scalar) -> Params:
        r"""Diagonal of $(H+\lambda I)^{-1}$; NaN where it does not exist."""
        shift = self.ridge + jnp.asarray(damping, self.ridge.dtype)
        inverse = self._inverse_kernel(shift)
        explained = self._each_column(
            lambda x: _linsolve.column_dots(x, matmul(inverse, x))
        )
        return self.layout.split((1 - explained) / shift)

    def effective_dimension(self, damping: Scalar) -> Scalar:
        r"""Trace of $(H+\lambda I)^{-1}H$, at most $n$."""
        damping = jnp.asarray(damping, self.ridge.dtype)
        shift = self.ridge + damping
        inverse = self._inverse_kernel(shift)
        # All but m eigenvalues of X'X are zero.
        zeros = self.layout.size - inverse.shape[0]
        trace = jnp.trace(inverse) + zeros / shift
        return self.layout.size - jnp.where(damping > 0, damping * trace, 0)


def _full_kernel(leaf: Leaf) -> Float[Array, "m m"]:
    known = leaf.kernel() if isinstance(leaf, OuterLeaf) else None
    if known is not None:
        return known
    return _masked_kernel(leaf, jnp.ones(leaf.width, bool))


def _masked_kernel(leaf: Leaf, mask: Bool[Array, "w"]) -> Float[Array, "m m"]:
    count = jax.tree.leaves(leaf)[0].shape[0]

    def add(total: Array, piece: Array, start: Array) -> Array:
        here = jax.lax.dynamic_slice_in_dim(mask, start, piece.shape[1])
        live = jnp.where(here[None], piece, 0)
        return total + matmul(live, live.T)

    return fold(leaf, add, jnp.zeros((count, count), leaf.dtype))
