"""The local quadratic model of a loss, and what a curvature must be able to do."""

import dataclasses
from typing import Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparserec import _tree
from sparserec._linsolve import LinearSolve
from sparserec._types import Mask, Params, Scalar


@runtime_checkable
class Curvature(Protocol):
    r"""A symmetric matrix $H$ over the entries of a pytree.

    Stored curvatures offer more, see `StoredCurvature`; solvers that need one of
    those operations say so by name when it is missing.
    """

    def matvec(self, v: Params) -> Params:
        """Product $Hv$, shaped like `v`."""
        ...

    def diagonal(self) -> Params:
        """Diagonal of $H$, shaped like the params."""
        ...

    def solve_on(self, mask: Mask, rhs: Params, damping: Scalar) -> LinearSolve:
        r"""$x_Q = (H_{QQ} + \lambda I)^{-1} b_Q$ on the support $Q$, zero off it."""
        ...


class StoredCurvature(Curvature, Protocol):
    """A curvature whose entries are known, with what follows from them."""

    def inverse_diagonal(self, damping: Scalar) -> Params:
        r"""Diagonal of $(H+\lambda I)^{-1}$, shaped like the params."""
        ...

    def effective_dimension(self, damping: Scalar) -> Scalar:
        r"""Trace of $(H+\lambda I)^{-1}H$, at most $n$."""
        ...


class MatrixCurvature(StoredCurvature, Protocol):
    """A curvature that can be written down as one matrix."""

    def to_matrix(self) -> Float[Array, "n n"]:
        """$H$ as one array over the entries in tree order, shape `(n, n)`."""
        ...


def mean_curvature(curvature: Curvature) -> Scalar:
    """Mean of the absolute diagonal: the scale to which relative damping refers.

    Exact where the curvature has a cheap diagonal. Matrix-free curvatures give an
    estimate from one product with a fixed vector of signs, whose expectation over
    random signs is the mean of the diagonal.

    Args:
      curvature: any curvature.

    Returns:
      A scalar in units of curvature.
    """
    estimate = getattr(curvature, "mean_diagonal", None)
    if estimate is not None:
        return estimate()
    return jnp.mean(jnp.abs(_tree.flatten(curvature.diagonal())))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuadraticModel:
    r"""$q(w) = v + \langle g, w-c\rangle + \frac12 (w-c)^\top H (w-c)$.

    A model is callable and can be given wherever a loss is: `model(params)`. A
    curvature with `quadratic_form` (rows have it: one pass in place of two) is asked
    for no product.

    Attributes:
      center: the point $c$, a pytree of floating arrays.
      value: $v$, the loss at the center, shape `()`.
      gradient: $g$, shaped like `center`, in units of loss per unit of weight.
      curvature: $H$; see `Curvature`.
      least: what the value is never below, shape `()`: zero for a sum of squares,
        where anything less is rounding; `None` where nothing is known.
    """

    center: Params
    value: Float[Array, ""]
    gradient: Params
    curvature: Curvature
    least: Float[Array, ""] | None = None

    def __call__(self, params: Params) -> Scalar:
        """Value of the model at `params`, shape `()`."""
        step = _tree.sub(params, self.center)
        half = jnp.asarray(0.5, _tree.dtype(step))
        form = getattr(self.curvature, "quadratic_form", None)
        bend = form(step) if form else _tree.dot(step, self.curvature.matvec(step))
        return self.sound(self.value + _tree.dot(self.gradient, step) + half * bend)

    def sound(self, value: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Values without what rounding takes below the least one."""
        if self.least is None:
            return value
        missing = jnp.maximum(self.least.astype(value.dtype) - value, 0)
        return value + jax.lax.stop_gradient(missing)

    def at(self, params: Params) -> Self:
        """The same quadratic, expanded around `params` instead of the center."""
        step = _tree.sub(params, self.center)
        product = self.curvature.matvec(step)
        half = jnp.asarray(0.5, _tree.dtype(step))
        slope = _tree.dot(self.gradient, step)
        return dataclasses.replace(
            self,
            center=params,
            value=self.sound(self.value + slope + half * _tree.dot(step, product)),
            gradient=_tree.add(self.gradient, product),
        )
