"""Curvatures whose entries are stored: dense, diagonal, block diagonal, low rank."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec import _linsolve, _tree
from sparserec._linsolve import LinearSolve, matmul
from sparserec._types import Mask, Params, Scalar
from sparserec.quadratic._model import StoredCurvature
from sparserec.quadratic._push_through import push_through

GRAM_LIMIT = 2048
"""Widest Gram matrix that `LowRank` keeps: 32 MB in float64, 3 Gflop a Cholesky."""

_register = functools.partial(jax.tree_util.register_dataclass, meta_fields=["layout"])


def _shaped(flat: Array, layout: _tree.Layout | None) -> Params:
    return flat if layout is None else layout.split(flat)


def _shaped_like(flat: Array, template: Params) -> Params:
    return _tree.cast_like(_tree.layout(template).split(flat), template)


def _solve_in_matrix(
    matrix: Float[Array, "n n"], mask: Mask, rhs: Params, damping: Scalar
) -> LinearSolve:
    """Cholesky on the support of a stored matrix."""
    support = _tree.flatten(mask)
    target = jnp.where(support, _tree.flatten(rhs), 0)
    value, succeeded = _linsolve.solve_positive(
        _linsolve.restrict(matrix, support, damping), target
    )
    value = jnp.where(support, value, 0)
    status = _linsolve.direct_status(succeeded, value)
    return LinearSolve(_shaped_like(value, rhs), status)


def _effective_dimension(curvature: StoredCurvature, damping: Scalar) -> Scalar:
    r"""$\mathrm{tr}\,(H+\lambda I)^{-1}H$, as n less $\lambda$ times the inverse's."""
    inverse = _tree.flatten(curvature.inverse_diagonal(damping))
    shift = jnp.asarray(damping, inverse.dtype)
    # Without damping the trace is n by definition, even where H is singular.
    lost = jnp.where(shift > 0, shift * jnp.sum(inverse), 0)
    return inverse.shape[0] - lost


@functools.partial(_register, data_fields=["matrix"])
@dataclasses.dataclass(frozen=True)
class Dense:
    r"""A stored symmetric matrix; solves by Cholesky, $n^3/3$ operations.

    Attributes:
      matrix: $H$, shape `(n, n)`, symmetric, over the entries in tree order.
      layout: static layout of the params; `None` if they are one vector.
    """

    matrix: Float[Array, "n n"]
    layout: _tree.Layout | None = None

    def matvec(self, v: Params) -> Params:
        """Product $Hv$, shaped like `v`."""
        return _shaped_like(matmul(self.matrix, _tree.flatten(v)), v)

    def diagonal(self) -> Params:
        """Diagonal of $H$, shaped like the params."""
        return _shaped(jnp.diagonal(self.matrix), self.layout)

    def columns(self, index: Int[Array, "s"]) -> Float[Array, "n s"]:
        """Columns of $H$ at flat indices, shape `(n, s)`."""
        # Rows of a symmetric matrix: contiguous.
        return self.matrix[index].T

    def solve_on(self, mask: Mask, rhs: Params, damping: Scalar) -> LinearSolve:
        """Exact solve on the support, zero off it."""
        return _solve_in_matrix(self.matrix, mask, rhs, damping)

    def to_matrix(self) -> Float[Array, "n n"]:
        """$H$ itself, shape `(n, n)`."""
        return self.matrix

    def inverse_diagonal(self, damping: Scalar) -> Params:
        r"""Diagonal of $(H+\lambda I)^{-1}$; NaN where it does not exist."""
        everything = jnp.ones(self.matrix.shape[0], bool)
        inverse, _ = _linsolve.inverse_positive(
            _linsolve.restrict(self.matrix, everything, damping)
        )
        return _shaped(jnp.diagonal(inverse), self.layout)

    def effective_dimension(self, damping: Scalar) -> Scalar:
        r"""Trace of $(H+\lambda I)^{-1}H$, at most $n$."""
        return _effective_dimension(self, damping)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["entries"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Diagonal:
    """A diagonal matrix, stored as a pytree shaped like the params.

    Attributes:
      entries: the diagonal of $H$.
    """

    entries: Params

    def matvec(self, v: Params) -> Params:
        """Product $Hv$, shaped like `v`."""
        return jax.tree.map(lambda h, x: h.astype(x.dtype) * x, self.entries, v)

    def diagonal(self) -> Params:
        """Diagonal of $H$, shaped like the params."""
        return self.entries

    def columns(self, index: Int[Array, "s"]) -> Float[Array, "n s"]:
        """Columns of $H$ at flat indices, shape `(n, s)`."""
        flat = _tree.flatten(self.entries)
        slots = jnp.arange(index.shape[0])
        zeros = jnp.zeros((flat.shape[0], index.shape[0]), flat.dtype)
        return zeros.at[index, slots].set(flat[index])

    def solve_on(self, mask: Mask, rhs: Params, damping: Scalar) -> LinearSolve:
        """Exact solve on the support, zero off it."""
        shifted = jax.tree.map(
            lambda m, h: jnp.where(m, h + jnp.asarray(damping, h.dtype), 1),
            mask,
            self.entries,
        )
        value = jax.tree.map(
            lambda m, h, b: jnp.where(m, b / h.astype(b.dtype), 0), mask, shifted, rhs
        )
        positive = jnp.all(_tree.flatten(shifted) > 0)
        return LinearSolve(value, _linsolve.direct_status(positive, value))

    def inverse_diagonal(self, damping: Scalar) -> Params:
        r"""Diagonal of $(H+\lambda I)^{-1}$; infinite where it does not exist."""
        return jax.tree.map(
            lambda h: 1 / (h + jnp.asarray(damping, h.dtype)), self.entries
        )

    def effective_dimension(self, damping: Scalar) -> Scalar:
        r"""Trace of $(H+\lambda I)^{-1}H$."""
        flat = _tree.flatten(self.entries)
        shifted = flat + jnp.asarray(damping, flat.dtype)
        return jnp.sum(jnp.where(shifted > 0, flat / shifted, 0))


@functools.partial(_register, data_fields=["blocks"])
@dataclasses.dataclass(frozen=True)
class BlockDiagonal:
    """Square blocks along the diagonal; solves by one batched Cholesky.

    Attributes:
      blocks: shape `(number of blocks, width, width)`, each symmetric. Block `b`
        governs entries `b * width` to `(b + 1) * width - 1` of the flat params;
        where n is no multiple of the width, the last block is padded with rows
        and columns of zeros.
      layout: static layout of the params; `None` if they are one vector whose
        length fills the blocks.
    """

    blocks: Float[Array, "b w w"]
    layout: _tree.Layout | None = None

    def _folded(self, flat: Array) -> Array:
        count, width, _ = self.blocks.shape
        padding = count * width - flat.shape[0]
        return jnp.pad(flat, (0, padding)).reshape(count, width)

    def matvec(self, v: Params) -> Params:
        """Product $Hv$, shaped like `v`."""
        flat = _tree.flatten(v)
        product = matmul(self.blocks, self._folded(flat)[..., None]).reshape(-1)
        return _shaped_like(product[: flat.shape[0]], v)

    def diagonal(self) -> Params:
        """Diagonal of $H$, shaped like the params."""
        return self._unpadded(jnp.diagonal(self.blocks, axis1=1, axis2=2))

    def columns(self, index: Int[Array, "s"]) -> Float[Array, "n s"]:
        """Columns of $H$ at flat indices, shape `(n, s)`."""
        count, width, _ = self.blocks.shape
        block, place = jnp.divmod(index, width)
        slots = jnp.arange(index.shape[0])
        folded = jnp.zeros((index.shape[0], count, width), self.blocks.dtype)
        folded = folded.at[slots, block].set(self.blocks[block, place])
        return folded.reshape(index.shape[0], -1)[:, : self._size].T

    @property
    def _size(self) -> int:
        count, width, _ = self.blocks.shape
        return count * width if self.layout is None else self.layout.size

    def _unpadded(self, folded: Float[Array, "b w"]) -> Params:
        return _shaped(folded.reshape(-1)[: self._size], self.layout)

    def solve_on(self, mask: Mask, rhs: Params, damping: Scalar) -> LinearSolve:
        """Exact solve on the support, zero off it."""
        support: Bool[Array, "b w"] = self._folded(_tree.flatten(mask))
        target = jnp.where(support, self._folded(_tree.flatten(rhs)), 0)
        restricted = jax.vmap(_linsolve.restrict, in_axes=(0, 0, None))(
            self.blocks, support, damping
        )
        value, succeeded = jax.vmap(_linsolve.solve_positive)(restricted, target)
        value = jnp.where(support, value, 0).reshape(-1)
        status = _linsolve.direct_status(jnp.all(succeeded), value)
        return LinearSolve(_shaped_like(value[: _tree.size(rhs)], rhs), status)

    def inverse_diagonal(self, damping: Scalar) -> Params:
        r"""Diagonal of $(H+\lambda I)^{-1}$; NaN where it does not exist."""
        real = self._folded(jnp.ones(self._size, bool))
        restricted = jax.vmap(_linsolve.restrict, in_axes=(0, 0, None))(
            self.blocks, real, damping
        )
        inverse, _ = jax.vmap(_linsolve.inverse_positive)(restricted)
        return self._unpadded(jnp.diagonal(inverse, axis1=1, axis2=2))

    def effective_dimension(self, damping: Scalar) -> Scalar:
        r"""Trace of $(H+\lambda I)^{-1}H$."""
        return _effective_dimension(self, damping)


@functools.partial(_register, data_fields=["rows", "ridge", "gram"])
@dataclasses.dataclass(frozen=True)
class LowRank:
    r"""$H = X^\top X + \rho I$ from m rows: a design matrix, or example gradients.

    Solves on the support use whichever system is small: the Gram matrix $X^\top X$
    where it is stored (build with `low_rank`), else the push-through form with the
    m by m matrix $X_Q X_Q^\top + \lambda I$, polished by conjugate gradients so that
    small $\lambda$ loses no accuracy.

    Attributes:
      rows: $X$, shape `(m, n)`.
      ridge: $\rho \ge 0$, in units of curvature, shape `()`.
      gram: $X^\top X$, shape `(n, n)`, or `None` where it is not stored.
      layout: static layout of the params; `None` if they are one vector.
    """

    rows: Float[Array, "m n"]
    ridge: Float[Array, ""]
    gram: Float[Array, "n n"] | None = None
    layout: _tree.Layout | None = None

    def matvec(self, v: Params) -> Params:
        """Product $Hv$, shaped like `v`: two passes over the rows."""
        flat = _tree.flatten(v)
        # A row vector times the matrix is the fast order for XLA on CPU.
        product = matmul(matmul(self.rows, flat), self.rows) + self.ridge * flat
        return _shaped_like(product, v)

    def quadratic_form(self, v: Params) -> Scalar:
        r"""$v^\top H v$: one pass over the rows."""
        flat = _tree.flatten(v)
        product = matmul(self.rows, flat)
        return jnp.vdot(product, product) + self.ridge * jnp.vdot(flat, flat)

    def diagonal(self) -> Params:
        """Diagonal of $H$, shaped like the params."""
        squares = _linsolve.column_dots(self.rows, self.rows)
        return _shaped(squares + self.ridge, self.layout)

    def columns(self, index: Int[Array, "s"]) -> Float[Array, "n s"]:
        """Columns of $H$ at flat indices, shape `(n, s)`: one pass over the rows."""
        # Rows times the matrix is the fast order for XLA on CPU.
        if self.gram is None:
            found = matmul(self.rows[:, index].T, self.rows)
        else:
            found = self.gram[index]
        places = jnp.arange(found.shape[1], dtype=index.dtype)
        return (found + jnp.where(places[None, :] == index[:, None], self.ridge, 0)).T

    def solve_on(self, mask: Mask, rhs: Params, damping: Scalar) -> LinearSolve:
        """Solve on the support, zero off it."""
        shift = self.ridge + jnp.asarray(damping, self.ridge.dtype)
        if self.gram is not None:
            return _solve_in_matrix(self.gram, mask, rhs, shift)
        return self._push_through(mask, rhs, shift)

    def _push_through(self, mask: Mask, rhs: Params, shift: Scalar) -> LinearSolve:
        support = _tree.flatten(mask)
        live = jnp.where(support, self.rows, 0)
        solved = push_through(
            lambda v: matmul(live, v),
            lambda u: matmul(u, live),
            matmul(live, live.T),
            _tree.flatten(rhs),
            support,
            shift,
        )
        return LinearSolve(_shaped_like(solved.value, rhs), solved.status)

    def to_matrix(self) -> Float[Array, "n n"]:
        """$H$ as one array, shape `(n, n)`."""
        gram = matmul(self.rows.T, self.rows) if self.gram is None else self.gram
        return gram + self.ridge * jnp.eye(gram.shape[0], dtype=gram.dtype)

    def inverse_diagonal(self, damping: Scalar) -> Params:
        r"""Diagonal of $(H+\lambda I)^{-1}$; NaN where it does not exist."""
        if self.gram is not None:
            return Dense(self.to_matrix(), self.layout).inverse_diagonal(damping)
        shift = self.ridge + jnp.asarray(damping, self.ridge.dtype)
        identity = jnp.eye(self.rows.shape[0], dtype=self.rows.dtype)
        kernel = matmul(self.rows, self.rows.T) + shift * identity
        inverse, _ = _linsolve.inverse_positive(kernel)
        explained = _linsolve.column_dots(self.rows, matmul(inverse, self.rows))
        return _shaped((1 - explained) / shift, self.layout)

    def effective_dimension(self, damping: Scalar) -> Scalar:
        r"""Trace of $(H+\lambda I)^{-1}H$."""
        return _effective_dimension(self, damping)
