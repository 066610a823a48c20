r"""Several outputs that share their features: responses, or classes.

$$f(W) = \sum_i \ell(\eta_i, y_i), \quad \eta = AW, \qquad
  H = \sum_i B_i \otimes a_i a_i^\top$$

with $B_i = \omega_i I$ for squares, and $\omega_i (\operatorname{diag} p_i
- p_i p_i^\top)$ for classes with probabilities $p_i$.

Legend: m examples, n columns of X, q rows of W (n, and one for an intercept), t
outputs, s entries asked for.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparserec import _linsolve, _tree
from sparserec._linsolve import LinearSolve, matmul
from sparserec._types import LossFn, Mask, Params, Scalar
from sparserec.quadratic import QuadraticModel
from sparserec.recovery._rows import Design

_CG_TOL = 1e-8


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["design", "weights", "chances", "ridge"],
    meta_fields=["layout"],
)
@dataclasses.dataclass(frozen=True)
class JointRows:
    r"""The curvature of several outputs over one design.

    Attributes:
      design: A.
      weights: $\omega$, non-negative, shape `(m,)`.
      chances: p, shape `(m, t)`; `None` for squares.
      ridge: added to the diagonal, shape `(q, t)`.
      layout: static layout of the params, whose entries in order are W row by row.
    """

    design: Design
    weights: Float[Array, "m"]
    chances: Float[Array, "m t"] | None
    ridge: Float[Array, "q t"]
    layout: _tree.Layout

    def _bent(self, eta: Float[Array, "m t"]) -> Float[Array, "m t"]:
        r"""Products $B_i \eta_i$."""
        if self.chances is not None:
            mean = jnp.sum(self.chances * eta, axis=1, keepdims=True)
            eta = self.chances * (eta - mean)
        return self.weights[:, None] * eta

    def matvec(self, v: Params) -> Params:
        """Product $Hv$, shaped like `v`: two passes over the rows."""
        flat = _tree.flatten(v)
        matrix = flat.reshape(self.ridge.shape)
        bent = self._bent(predictor(self.design, matrix))
        product = self.design.transposed_times(bent.T).T + self.ridge * matrix
        return _tree.cast_like(self.layout.split(product.reshape(-1)), v)

    def diagonal(self) -> Params:
        """Diagonal of $H$, shaped like the params."""
        outputs = self.ridge.shape[1]
        if self.chances is None:
            shares = jnp.broadcast_to(self.weights, (1, *self.weights.shape))
        else:
            spread = self.chances * (1 - self.chances)
            shares = (self.weights[:, None] * spread).T
        found = jax.lax.map(self.design.energy, shares)
        found = jnp.broadcast_to(found, (outputs, found.shape[1])).T
        return self.layout.split((found + self.ridge).reshape(-1))

    def columns(self, index: Int[Array, "s"]) -> Float[Array, "n s"]:
        """Columns of $H$ at flat indices, shape `(q t, s)`: one pass over the rows."""
        outputs = self.ridge.shape[1]
        rows = self.design.rows_of(index // outputs)
        unit = jax.nn.one_hot(index % outputs, outputs, dtype=rows.dtype)
        bent = jax.vmap(lambda row, e: self._bent(row[:, None] * e[None, :]))(
            rows, unit
        )
        found = jax.vmap(lambda b: self.design.transposed_times(b.T).T)(bent)
        found = found.reshape(index.shape[0], -1)
        slots = jnp.arange(index.shape[0])
        return found.at[slots, index].add(self.ridge.reshape(-1)[index]).T

    def block(self, index: Int[Array, "s"]) -> Float[Array, "s s"]:
        """$H$ between the entries of `index`, shape `(s, s)`."""
        outputs = self.ridge.shape[1]
        rows = self.design.rows_of(index // outputs)
        own = index % outputs
        together = (own[:, None] == own[None, :]).astype(rows.dtype)
        if self.chances is None:
            inner = together * matmul(rows * self.weights[None, :], rows.T)
        else:
            share = self.chances.T[own]
            bent = rows * share
            alone = matmul(bent * self.weights[None, :], rows.T)
            inner = together * alone - matmul(bent * self.weights[None, :], bent.T)
        same = index[:, None] == index[None, :]
        ridge = self.ridge.reshape(-1)[index]
        return inner + same.astype(inner.dtype) * ridge[None, :]

    def solve_on(self, mask: Mask, rhs: Params, damping: Scalar) -> LinearSolve:
        """Conjugate gradients on the support, zero off it."""
        return _linsolve.conjugate_gradients(
            self.matvec, rhs, mask, damping=damping, tol=_CG_TOL, max_steps=200
        )


def predictor(design: Design, matrix: Float[Array, "q t"]) -> Float[Array, "m t"]:
    """The linear predictor $AW$."""
    return jax.vmap(design.times, in_axes=1, out_axes=1)(matrix)


def _matrix(params: Params, outputs: int) -> Float[Array, "q t"]:
    return _tree.flatten(params).reshape(-1, outputs)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class JointLikelihood:
    r"""The negative log-likelihood of classes, with a penalty; static.

    $$\sum_i \omega_i \bigl(\log\sum_c e^{\eta_{ic}} - y_i^\top\eta_i\bigr)
      + \lambda\|\beta\|^2$$

    Args of the loss: the design A, the classes as rows of ones and zeros, the weights
    and $\lambda$. Params are `{"coefficients": (n, t)}`, and `"intercept"` where the
    design has one.
    """

    def __call__(
        self,
        params: Params,
        design: Design,
        response: Float[Array, "m t"],
        weights: Float[Array, "m"],
        l2: Scalar,
    ) -> Scalar:
        """The penalised negative log-likelihood."""
        eta = predictor(design, _matrix(params, response.shape[1]))
        terms = jax.nn.logsumexp(eta, axis=1) - jnp.sum(response * eta, axis=1)
        slopes = params["coefficients"]
        return jnp.vdot(weights, terms) + l2 * jnp.vdot(slopes, slopes)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class JointCurvature:
    """The exact local model of a `JointLikelihood`; static."""

    def __call__(self, loss_fn: LossFn, params: Params, args: tuple) -> QuadraticModel:
        """The local quadratic model at `params`."""
        design, response, weights, l2 = args
        matrix = _matrix(params, response.shape[1])
        chances = jax.nn.softmax(predictor(design, matrix), axis=1)
        slope = design.transposed_times((weights[:, None] * (chances - response)).T).T
        ridge = jnp.full_like(matrix, 2) * l2
        if design.intercept:
            ridge = ridge.at[-1].set(0)
        layout = _tree.layout(params)
        gradient = (slope + ridge * matrix).reshape(-1)
        return QuadraticModel(
            params,
            loss_fn(params, *args),
            layout.split(gradient),
            JointRows(design, weights, chances, ridge, layout),
        )
