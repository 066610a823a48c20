r"""Designs that stay as they are: sparse, uncentered, shared by many models.

$$A = \bigl[(X - 1\mu^\top) D, \; 1\bigr], \qquad
  H = A^\top W A + \operatorname{diag}(\rho)$$

with means $\mu$, scales D and, for losses with an intercept, a last column of ones.
Centering is a correction of rank one, so a sparse X stays sparse.

Legend: m examples, n columns of X, q columns of A, s columns asked for.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental.sparse import BCOO
from jaxtyping import Array, Float, Int

from sparserec import _linsolve, _tree
from sparserec._linsolve import LinearSolve, matmul
from sparserec._types import Mask, Params, Scalar

_CG_TOL = 1e-8


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["matrix", "mean", "scale"],
    meta_fields=["intercept"],
)
@dataclasses.dataclass(frozen=True)
class Design:
    r"""The matrix A, by its products.

    Attributes:
      matrix: $X$, shape `(m, n)`, an array or a `BCOO`.
      mean: $\mu$, shape `(n,)`.
      scale: diagonal of D, shape `(n,)`.
      intercept: whether A ends in a column of ones; static.
    """

    matrix: Float[Array, "m n"] | BCOO
    mean: Float[Array, "n"]
    scale: Float[Array, "n"]
    intercept: bool = False

    def times(self, v: Float[Array, "q"]) -> Float[Array, "m"]:
        """Product $Av$."""
        size = self.mean.shape[0]
        scaled = v[:size] * self.scale
        found = _product(self.matrix, scaled) - jnp.vdot(self.mean, scaled)
        return found + v[-1] if self.intercept else found

    def transposed_times(self, u: Float[Array, "*s m"]) -> Float[Array, "*s q"]:
        r"""Products $u^\top A$, one for every row of `u`."""
        total = jnp.sum(u, axis=-1, keepdims=True)
        mean = self.mean.reshape((1,) * (u.ndim - 1) + (-1,))
        scale = self.scale.reshape(mean.shape)
        found = (_left_product(u, self.matrix) - total * mean) * scale
        return jnp.concatenate([found, total], -1) if self.intercept else found

    def rows_of(self, index: Int[Array, "s"]) -> Float[Array, "s m"]:
        """Columns of A at the given places, one in each row."""
        size = self.mean.shape[0]
        place = jnp.minimum(index, size - 1)
        if isinstance(self.matrix, BCOO):
            units = jnp.zeros((size, index.shape[0]), self.mean.dtype)
            units = units.at[place, jnp.arange(index.shape[0])].set(1)
            found = (self.matrix @ units).T
        else:
            found = self.matrix[:, place].T
        found = (found - self.mean[place][:, None]) * self.scale[place][:, None]
        return jnp.where((index < size)[:, None], found, 1)

    def energy(self, weights: Float[Array, "m"]) -> Float[Array, "q"]:
        r"""Diagonal of $A^\top W A$."""
        total = jnp.sum(weights)
        squares = _left_product(weights, _squared(self.matrix))
        sums = _left_product(weights, self.matrix)
        # Never negative but by rounding, where a column is nearly constant.
        spread = squares - 2 * self.mean * sums + jnp.square(self.mean) * total
        found = jnp.maximum(spread, 0) * jnp.square(self.scale)
        return jnp.append(found, total) if self.intercept else found


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["design", "weights", "ridge"],
    meta_fields=["layout"],
)
@dataclasses.dataclass(frozen=True)
class WeightedRows:
    r"""The curvature $A^\top W A + \operatorname{diag}(\rho)$ of a design.

    Attributes:
      design: A.
      weights: diagonal of W, non-negative, shape `(m,)`.
      ridge: $\rho$, shape `(q,)`.
      layout: static layout of the params.
    """

    design: Design
    weights: Float[Array, "m"]
    ridge: Float[Array, "q"]
    layout: _tree.Layout

    def matvec(self, v: Params) -> Params:
        """Product $Hv$, shaped like `v`: two passes over the rows."""
        flat = _tree.flatten(v)
        bent = self.weights * self.design.times(flat)
        product = self.design.transposed_times(bent) + self.ridge * flat
        return _tree.cast_like(self.layout.split(product), v)

    def diagonal(self) -> Params:
        """Diagonal of $H$, shaped like the params."""
        return self.layout.split(self.design.energy(self.weights) + self.ridge)

    def columns(self, index: Int[Array, "s"]) -> Float[Array, "q s"]:
        """Columns of $H$ at flat indices, shape `(q, s)`: one pass over the rows."""
        bent = self.design.rows_of(index) * self.weights[None, :]
        found = self.design.transposed_times(bent)
        slots = jnp.arange(index.shape[0])
        return found.at[slots, index].add(self.ridge[index]).T

    def block(self, index: Int[Array, "s"]) -> Float[Array, "s s"]:
        """$H$ between the entries of `index`, shape `(s, s)`."""
        rows = self.design.rows_of(index)
        inner = matmul(rows * self.weights[None, :], rows.T)
        same = index[:, None] == index[None, :]
        return inner + same.astype(inner.dtype) * self.ridge[index][None, :]

    def solve_on(self, mask: Mask, rhs: Params, damping: Scalar) -> LinearSolve:
        """Conjugate gradients on the support, zero off it."""
        return _linsolve.conjugate_gradients(
            self.matvec, rhs, mask, damping=damping, tol=_CG_TOL, max_steps=100
        )


def _product(matrix: Array | BCOO, v: Float[Array, "n"]) -> Float[Array, "m"]:
    return matrix @ v if isinstance(matrix, BCOO) else matmul(matrix, v)


def _left_product(u: Float[Array, "*s m"], matrix: Array | BCOO) -> Array:
    return u @ matrix if isinstance(matrix, BCOO) else matmul(u, matrix)


def _squared(matrix: Array | BCOO) -> Array | BCOO:
    if isinstance(matrix, BCOO):
        return BCOO((jnp.square(matrix.data), matrix.indices), shape=matrix.shape)
    return jnp.square(matrix)
