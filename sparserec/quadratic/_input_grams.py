"""A curvature with one Gram matrix of inputs for every layer, shared by its outputs.

Legend: l layers, o outputs of a layer, w inputs of it, n weights.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparserec import _linsolve, _tree
from sparserec._linsolve import LinearSolve, matmul
from sparserec._types import Mask, Params, Scalar

_SMALLEST = 32  # entries of a buffer
_SIDE_BY_SIDE = 1 << 24  # entries of the systems that are solved at once

Order = tuple[int, ...] | None


def as_matrix(leaf: Array, order: tuple[int, ...]) -> Float[Array, "o w"]:
    """A kernel as a matrix, outputs first; `order` has its axes, outputs first."""
    turned = jnp.transpose(leaf, order)
    return turned.reshape(turned.shape[0], -1)


def as_leaf(
    matrix: Float[Array, "o w"], order: tuple[int, ...], shape: tuple[int, ...]
) -> Array:
    """The kernel whose matrix this is."""
    turned = matrix.reshape([shape[axis] for axis in order])
    return jnp.transpose(turned, [order.index(axis) for axis in range(len(order))])


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["grams", "ridge"],
    meta_fields=["orders", "layout"],
)
@dataclasses.dataclass(frozen=True)
class InputGrams:
    r"""$H = \mathrm{diag}_l(A_l \otimes I) + \rho I$, $A_l$ the Gram matrix of inputs.

    $\tfrac12 d^\top (A_l \otimes I) d$ is half the mean squared change of the outputs
    of layer l when its weights change by d and its inputs stay what they are. All
    outputs of a layer share $A_l$, so that one factorisation serves them where nothing
    is pruned, and the memory is that of the widest layers squared.

    Attributes:
      grams: for every leaf in tree order $A_l$, shape `(w, w)`, or `None` for a leaf
        that is no kernel and has curvature $\rho$ alone.
      ridge: $\rho \ge 0$, in units of curvature, shape `()`.
      orders: static; for every leaf its axes, that of the outputs first, the others
        in the order of the entries of $A_l$; or `None`.
      layout: static layout of the params.
    """

    grams: list[Float[Array, "w w"] | None]
    ridge: Float[Array, ""]
    orders: tuple[Order, ...]
    layout: _tree.Layout

    def _each(
        self,
        v: Params,
        kernel: Callable[[Array, Array], Array],
        other: Callable[[Array], Array],
    ) -> Params:
        """What two functions make of matrices of kernels, and of all other leaves."""
        found = []
        leaves, structure = jax.tree.flatten(v)
        for leaf, gram, order in zip(leaves, self.grams, self.orders, strict=True):
            if gram is None or order is None:
                new = other(leaf.astype(self.ridge.dtype))
            else:
                matrix = as_matrix(leaf.astype(gram.dtype), order)
                new = as_leaf(kernel(matrix, gram), order, leaf.shape)
            found.append(new.astype(leaf.dtype))
        return jax.tree.unflatten(structure, found)

    def _zeros(self) -> Params:
        return self.layout.split(jnp.zeros(self.layout.size, self.ridge.dtype))

    def matvec(self, v: Params) -> Params:
        """Product $Hv$, shaped like `v`."""
        return self._each(
            v,
            lambda matrix, gram: matmul(matrix, gram) + self.ridge * matrix,
            lambda leaf: self.ridge * leaf,
        )

    def diagonal(self) -> Params:
        """Diagonal of $H$, shaped like the params."""
        return self._each(
            self._zeros(),
            lambda matrix, gram: matrix + jnp.diagonal(gram)[None] + self.ridge,
            lambda leaf: leaf + self.ridge,
        )

    def columns(self, index: Int[Array, "s"]) -> Float[Array, "n s"]:
        """Columns of $H$ at flat indices, shape `(n, s)`."""

        def column(i: Array) -> Array:
            unit = jnp.zeros(self.layout.size, self.ridge.dtype).at[i].set(1)
            return _tree.flatten(self.matvec(self.layout.split(unit)))

        return jax.lax.map(column, index).T

    def resolvent(self, damping: Scalar) -> Callable[[Params], Params]:
        r"""Products with $(H+\lambda I)^{-1}$: one inverse for every layer.

        Args:
          damping: $\lambda$, in units of curvature, shape `()`.

        Returns:
          A function of a pytree shaped like the params; NaN where there is no
          inverse.
        """
        shift = self.ridge + jnp.asarray(damping, self.ridge.dtype)
        inverses = [
            None if gram is None else _inverse(gram, shift) for gram in self.grams
        ]
        inverted = dataclasses.replace(self, grams=inverses)
        return lambda v: inverted._each(
            v,
            lambda matrix, inverse: matmul(matrix, inverse),
            lambda leaf: _divided(leaf, shift),
        )

    def solve_on(self, mask: Mask, rhs: Params, damping: Scalar) -> LinearSolve:
        """Solve on the support, output by output, zero off it."""
        shift = self.ridge + jnp.asarray(damping, self.ridge.dtype)
        targets, structure = jax.tree.flatten(rhs)
        supports = jax.tree.leaves(mask)
        values = [
            _divided(jnp.where(m, x, 0).astype(shift.dtype), shift)
            for m, x in zip(supports, targets, strict=True)
        ]
        succeeded = jnp.bool_(True)
        for width in sorted({len(gram) for gram in self.grams if gram is not None}):
            chosen = [
                (i, gram, order)
                for i, (gram, order) in enumerate(
                    zip(self.grams, self.orders, strict=True)
                )
                if gram is not None and order is not None and len(gram) == width
            ]
            value, good = _solve_layers(
                jnp.stack([gram for _, gram, _ in chosen]),
                [as_matrix(supports[i], order) for i, _, order in chosen],
                [as_matrix(targets[i].astype(shift.dtype), o) for i, _, o in chosen],
                shift,
            )
            succeeded &= good
            for (i, _, order), matrix in zip(chosen, value, strict=True):
                values[i] = as_leaf(matrix, order, targets[i].shape)
        solution = jax.tree.unflatten(structure, values)
        status = _linsolve.direct_status(succeeded, solution)
        return LinearSolve(_tree.cast_like(solution, rhs), status)

    def inverse_diagonal(self, damping: Scalar) -> Params:
        r"""Diagonal of $(H+\lambda I)^{-1}$; not finite where it does not exist."""
        shift = self.ridge + jnp.asarray(damping, self.ridge.dtype)
        return self._each(
            self._zeros(),
            lambda matrix, gram: matrix + jnp.diagonal(_inverse(gram, shift))[None],
            lambda leaf: leaf + 1 / shift,
        )

    def effective_dimension(self, damping: Scalar) -> Scalar:
        r"""Trace of $(H+\lambda I)^{-1}H$, at most $n$."""
        shift = jnp.asarray(damping, self.ridge.dtype)
        whole = dataclasses.replace(self, ridge=self.ridge + shift)
        products = jax.tree.map(
            lambda i, d: jnp.where(d > 0, i, 0),
            whole.inverse_diagonal(jnp.zeros_like(shift)),
            whole.diagonal(),
        )
        flat = _tree.flatten(products)
        return flat.shape[0] - jnp.where(shift > 0, shift * jnp.sum(flat), 0)

    def with_ridge(self, ridge: Scalar | float) -> Self:
        """The same matrices with another ridge; nothing recompiles."""
        return dataclasses.replace(self, ridge=jnp.asarray(ridge, self.ridge.dtype))


def _inverse(gram: Float[Array, "w w"], shift: Scalar) -> Float[Array, "w w"]:
    identity = jnp.eye(len(gram), dtype=gram.dtype)
    inverse, good = _linsolve.inverse_positive(gram + shift * identity)
    return jnp.where(good, inverse, jnp.nan)


def _divided(x: Array, shift: Scalar) -> Array:
    """`x / shift`, and zero where both are."""
    return jnp.where(x == 0, 0, x / shift)


def _solve_layers(
    grams: Float[Array, "l w w"],
    supports: Sequence[Bool[Array, "o w"]],
    targets: Sequence[Float[Array, "o w"]],
    shift: Scalar,
) -> tuple[list[Float[Array, "o w"]], Bool[Array, ""]]:
    """Solves all outputs of layers of one width; one array for each layer."""
    sizes = [len(support) for support in supports]
    layer = jnp.asarray(np.repeat(np.arange(len(sizes), dtype=np.int32), sizes))
    given = layer, jnp.concatenate(supports), jnp.concatenate(targets)
    width = grams.shape[-1]

    def on_cpu(grams: Array, *given: Array):
        return jax.lax.map(lambda x: _solve_in_buffer(grams, shift, *x), given)

    def elsewhere(grams: Array, *given: Array):
        def solve(x: tuple[Array, Array, Array]):
            which, support, target = x
            return _solve_output(grams[which], support, target, shift)

        together = max(1, _SIDE_BY_SIDE // width**2)
        return jax.lax.map(solve, given, batch_size=min(together, sum(sizes)))

    values, good = jax.lax.platform_dependent(
        grams, *given, cpu=on_cpu, default=elsewhere
    )
    ends = list(itertools.accumulate(sizes))[:-1]
    return jnp.split(values, ends), jnp.all(good)


def _solve_output(
    matrix: Float[Array, "s s"], inside: Bool[Array, "s"], rhs: Array, shift: Scalar
) -> tuple[Float[Array, "s"], Bool[Array, ""]]:
    restricted = _linsolve.restrict(matrix, inside, shift)
    value, good = _linsolve.solve_positive(restricted, jnp.where(inside, rhs, 0))
    return jnp.where(inside, value, 0), good


def _solve_in_buffer(
    grams: Float[Array, "l w w"],
    shift: Scalar,
    layer: Int[Array, ""],
    support: Bool[Array, "w"],
    target: Float[Array, "w"],
) -> tuple[Float[Array, "w"], Bool[Array, ""]]:
    """Copies the matrix on the support into the smallest buffer that holds it."""
    width = grams.shape[-1]
    rows, sizes = grams.reshape(-1, width), buffer_sizes(width)
    # What is on the support comes first. Here, once, and not in every branch.
    order = jnp.argsort(~support, stable=True).astype(jnp.int32)
    inside, rhs = support[order], target[order]

    def solve(size: int):
        index = order[:size]
        matrix = jnp.take(rows[layer * width + index], index, axis=1)
        value, good = _solve_output(matrix, inside[:size], rhs[:size], shift)
        return jnp.pad(value, (0, width - size)), good

    choice = jnp.searchsorted(jnp.asarray(sizes), jnp.sum(support))
    value, good = jax.lax.switch(choice, [functools.partial(solve, s) for s in sizes])
    return jnp.zeros_like(target).at[order].set(value), good


def buffer_sizes(width: int) -> list[int]:
    """Sizes of systems that are compiled for one width, ascending; by halves."""
    sizes = [width]
    while sizes[-1] // 2 >= _SMALLEST:
        sizes.append(math.ceil(sizes[-1] / 2))
    return sizes[::-1]
