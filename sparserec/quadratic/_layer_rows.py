r"""Rows of gradients kept leaf by leaf, those of dense layers as outer products.

The gradient of a weight matrix is $\sum_t a_t \delta_t^\top$ with the inputs $a_t$ of
its layer and the slopes $\delta_t$ at its outputs.

Legend: m rows, q terms of an outer product, a and b the two sides of a matrix, w
entries of a leaf.
"""

import dataclasses
from collections.abc import Callable
from typing import Self, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparserec._linsolve import matmul

PIECE = 2048
"""Columns written out at a time: 8 MB for 1,000 rows of float32."""

_T = TypeVar("_T")


def _cast(x: Array, dtype: str | None) -> Array:
    return x if dtype is None else x.astype(dtype)


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype that sums are taken in."""
    return jnp.dtype(jnp.float32) if dtype.itemsize < 4 else dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StoredLeaf:
    """Rows of one leaf as they are, possibly in half precision.

    Attributes:
      rows: shape `(m, w)`.
    """

    rows: Float[Array, "m w"]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of products."""
        return _wide(self.rows.dtype)

    @property
    def width(self) -> int:
        """Number of entries of the leaf."""
        return self.rows.shape[-1]

    @property
    def step(self) -> int:
        """Columns in a piece."""
        return min(self.width, PIECE)

    def piece(self, start: Int[Array, ""]) -> Float[Array, "m p"]:
        """The `step` columns from `start` on, in wide precision."""
        part = jax.lax.dynamic_slice_in_dim(self.rows, start, self.step, axis=1)
        return part.astype(self.dtype)

    def take(self, index: Int[Array, "s"]) -> Float[Array, "m s"]:
        """Columns at an index."""
        return self.rows[:, index].astype(self.dtype)

    def times(self, v: Float[Array, "w"]) -> Float[Array, "m"]:
        """Rows times a vector."""
        if self.rows.dtype == self.dtype:
            return matmul(self.rows, v)
        zero = jnp.zeros(self.rows.shape[0], self.dtype)
        return fold(
            self,
            lambda total, piece, start: (
                total + matmul(piece, _slice(v, start, piece.shape[1]))
            ),
            zero,
        )

    def transposed_times(self, u: Float[Array, "m"]) -> Float[Array, "w"]:
        """A vector over the rows times the rows."""
        # A row vector times the matrix is the fast order for XLA on CPU.
        if self.rows.dtype == self.dtype:
            return matmul(u, self.rows)
        return by_pieces(self, lambda piece: matmul(u, piece))

    def written(self) -> Float[Array, "m w"]:
        """The rows as one matrix."""
        return self.rows.astype(self.dtype)

    def scaled(self, factor: float, dtype: str | None) -> Self:
        """The rows times a factor, stored in another dtype."""
        rows = jnp.asarray(factor, self.rows.dtype) * self.rows
        return dataclasses.replace(self, rows=_cast(rows, dtype))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OuterLeaf:
    r"""Rows $\sum_t l_t r_t^\top$ of one matrix, never written out as a whole.

    Attributes:
      left: $l$, shape `(m, q, a)`.
      right: $r$, shape `(m, q, b)`.
    """

    left: Float[Array, "m q a"]
    right: Float[Array, "m q b"]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of products."""
        return _wide(self.left.dtype)

    @property
    def width(self) -> int:
        """Number of entries of the leaf."""
        return self.left.shape[-1] * self.right.shape[-1]

    @property
    def step(self) -> int:
        """Columns in a piece: whole rows of the matrix."""
        side, other = self.left.shape[-1], self.right.shape[-1]
        return other * min(side, max(1, PIECE // other))

    def _factors(self) -> tuple[Array, Array]:
        return self.left.astype(self.dtype), self.right.astype(self.dtype)

    def piece(self, start: Int[Array, ""]) -> Float[Array, "m p"]:
        """The `step` columns from `start` on, in wide precision."""
        other = self.right.shape[-1]
        rows = jax.lax.dynamic_slice_in_dim(
            self.left, start // other, self.step // other, axis=2
        )
        written = _outer(rows.astype(self.dtype), self.right.astype(self.dtype))
        return written.reshape(self.left.shape[0], -1)

    def take(self, index: Int[Array, "s"]) -> Float[Array, "m s"]:
        """Columns at an index."""
        left, right = self._factors()
        row, column = jnp.divmod(index, right.shape[-1])
        return jnp.sum(left[:, :, row] * right[:, :, column], axis=1)

    def times(self, v: Float[Array, "w"]) -> Float[Array, "m"]:
        """Rows times a vector: one product of matrices."""
        left, right = self._factors()
        matrix = v.reshape(left.shape[-1], right.shape[-1])
        pushed = matmul(left.reshape(-1, left.shape[-1]), matrix)
        return jnp.sum(pushed.reshape(right.shape) * right, axis=(1, 2))

    def transposed_times(self, u: Float[Array, "m"]) -> Float[Array, "w"]:
        """A vector over the rows times the rows: one product of matrices."""
        left, right = self._factors()
        weighted = (u[:, None, None] * right).reshape(-1, right.shape[-1])
        return matmul(left.reshape(-1, left.shape[-1]).T, weighted).reshape(-1)

    def written(self) -> Float[Array, "m w"]:
        """The rows as one matrix."""
        return _outer(*self._factors()).reshape(self.left.shape[0], -1)

    def scaled(self, factor: float, dtype: str | None) -> Self:
        """The rows times a factor, stored in another dtype."""
        right = jnp.asarray(factor, self.right.dtype) * self.right
        return dataclasses.replace(
            self, left=_cast(self.left, dtype), right=_cast(right, dtype)
        )

    def kernel(self) -> Float[Array, "m m"] | None:
        """Products of all rows with each other by small Grams, where that is cheaper.

        The Gram of outer products is the entrywise product of the Grams of their
        factors, one for each pair of terms.
        """
        terms, side, other = *self.left.shape[1:], self.right.shape[-1]
        if terms * terms * (side + other) >= side * other:
            return None
        left, right = self._factors()
        total = jnp.zeros((left.shape[0], left.shape[0]), self.dtype)
        for i in range(terms):
            for j in range(terms):
                total += matmul(left[:, i], left[:, j].T) * matmul(
                    right[:, i], right[:, j].T
                )
        return total


Leaf = StoredLeaf | OuterLeaf


def _outer(left: Array, right: Array) -> Float[Array, "m a b"]:
    if left.shape[-2] == 1:
        return jnp.swapaxes(left, -1, -2) * right
    return matmul(jnp.swapaxes(left, -1, -2), right)


def _slice(v: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(v, start, size)


def fold(leaf: Leaf, function: Callable[[_T, Array, Array], _T], start_value: _T) -> _T:
    """Folds `function(carry, piece, start)` over all columns of a leaf, in pieces.

    Columns that an earlier piece had already are zero in the last one.
    """
    step, width = leaf.step, leaf.width

    def body(number: Array, carry: _T) -> _T:
        begin = number * step
        start = jnp.minimum(begin, width - step)
        fresh = start + jnp.arange(step, dtype=start.dtype) >= begin
        return function(carry, jnp.where(fresh[None], leaf.piece(start), 0), start)

    return jax.lax.fori_loop(0, -(-width // step), body, start_value)


def by_pieces(
    leaf: Leaf, function: Callable[[Array], Float[Array, "p"]]
) -> Float[Array, "w"]:
    """One number for every column; zero for a column of zeros."""

    def add(total: Array, piece: Array, start: Array) -> Array:
        here = _slice(total, start, piece.shape[1]) + function(piece)
        return jax.lax.dynamic_update_slice_in_dim(total, here, start, 0)

    return fold(leaf, add, jnp.zeros(leaf.width, leaf.dtype))
