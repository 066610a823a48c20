"""Solves with few rows and many weights, through the matrix over the rows."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sparserec import _linsolve
from sparserec._linsolve import LinearSolve
from sparserec._types import Scalar


def push_through(
    times: Callable[[Float[Array, "n"]], Float[Array, "m"]],
    transposed_times: Callable[[Float[Array, "m"]], Float[Array, "n"]],
    kernel: Float[Array, "m m"],
    rhs: Float[Array, "n"],
    support: Bool[Array, "n"],
    shift: Scalar,
) -> LinearSolve:
    r"""$(X_Q^\top X_Q + \lambda I)^{-1} b_Q$ with one m by m factorisation.

    $$x = \lambda^{-1}\bigl(b - X^\top (XX^\top + \lambda I)^{-1} X b\bigr)$$

    loses digits where $\lambda$ is small beside $XX^\top$, so that it only
    preconditions conjugate gradients, which restore them.

    Args:
      times: product of $X_Q$ with a vector that is zero off the support.
      transposed_times: product of a vector over the rows with $X_Q$.
      kernel: $X_Q X_Q^\top$, shape `(m, m)`.
      rhs: $b$, shape `(n,)`; entries off the support are ignored.
      support: $Q$, shape `(n,)`.
      shift: $\lambda \ge 0$, shape `()`.

    Returns:
      The solution, zero off the support, and a status. With `shift=0` and a right
      side outside the span of the rows there is none: `NOT_POSITIVE_DEFINITE`.
    """
    mean = jnp.trace(kernel) / rhs.shape[0]
    # Below this floor the small system would lose the digits that CG restores.
    floor = jnp.maximum(shift, mean * jnp.finfo(kernel.dtype).eps ** 0.5)
    safe = jnp.where(floor > 0, floor, 1)
    identity = jnp.eye(kernel.shape[0], dtype=kernel.dtype)
    factor = _linsolve.cholesky(kernel + safe * identity)

    def precondition(residual: Array) -> Array:
        inner = _linsolve.cholesky_solve(factor, times(residual))
        return (residual - transposed_times(inner)) / safe

    return _linsolve.conjugate_gradients(
        lambda v: transposed_times(times(v)),
        rhs.astype(kernel.dtype),
        support,
        damping=shift,
        tol=float(jnp.finfo(kernel.dtype).eps) ** 0.75,
        max_steps=20,
        precondition=precondition,
    )
