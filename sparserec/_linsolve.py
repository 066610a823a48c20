"""Linear solves: Cholesky with a verdict, and conjugate gradients on pytrees."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg
from jaxtyping import Array, Bool, Float, Int

from sparserec import _tree
from sparserec._types import PRECISION, Mask, Params, Scalar, Status, first_status


class LinearSolve(NamedTuple):
    """Answer of a linear solve.

    Attributes:
      value: the solution, shaped like the right-hand side.
      status: `CONVERGED`; `MAX_STEPS` (an inner approximation, usable);
        `NOT_POSITIVE_DEFINITE` or `NONFINITE` (`value` must not be trusted).
    """

    value: Params
    status: Int[Array, ""]


def usable(status: Int[Array, ""]) -> Bool[Array, ""]:
    """Whether a solve ended well enough for its value to be used."""
    return (status == Status.CONVERGED) | (status == Status.MAX_STEPS)


def _one_by_one(solve: Callable[..., Any]) -> Callable[..., Any]:
    """Makes `jax.vmap` of a factorisation a loop on CPU, and a batch elsewhere.

    Batched LAPACK calls inside compiled loops can deadlock jaxlib's CPU thread pool
    (all workers wait for parts of batches that no worker is left to compute), and
    one core gains nothing from batching them.
    """
    wrapped = jax.custom_batching.custom_vmap(solve)

    @wrapped.def_vmap
    def rule(axis_size, in_batched, *operands):
        batched = [
            x if is_batched else jnp.broadcast_to(x, (axis_size, *x.shape))
            for x, is_batched in zip(operands, in_batched, strict=True)
        ]
        results = jax.lax.platform_dependent(
            *batched,
            cpu=lambda *xs: jax.lax.map(lambda x: wrapped(*x), xs),
            default=jax.vmap(solve),
        )
        return results, jax.tree.map(lambda _: True, results)

    return functools.wraps(solve)(wrapped)


@_one_by_one
def solve_positive(
    matrix: Float[Array, "n n"], rhs: Float[Array, "n"]
) -> tuple[Float[Array, "n"], Bool[Array, ""]]:
    """Cholesky solve of a symmetric positive definite system.

    Returns:
      The solution, shape `(n,)`, and whether the factorisation succeeded, shape
      `()`; where it did not the solution is NaN.
    """
    factor = jnp.linalg.cholesky(matrix)
    value = jax.scipy.linalg.cho_solve((factor, True), rhs[:, None])[:, 0]
    return value, jnp.all(jnp.isfinite(factor))


@_one_by_one
def inverse_positive(
    matrix: Float[Array, "n n"],
) -> tuple[Float[Array, "n n"], Bool[Array, ""]]:
    """Inverse of a symmetric positive definite matrix, and whether it is one."""
    factor = jnp.linalg.cholesky(matrix)
    identity = jnp.eye(matrix.shape[-1], dtype=matrix.dtype)
    inverse = jax.scipy.linalg.cho_solve((factor, True), identity)
    return inverse, jnp.all(jnp.isfinite(factor))


@_one_by_one
def cholesky_solve(
    factor: Float[Array, "n n"], rhs: Float[Array, "n"]
) -> Float[Array, "n"]:
    """Solves with a lower Cholesky factor."""
    return jax.scipy.linalg.cho_solve((factor, True), rhs[:, None])[:, 0]


@_one_by_one
def cholesky(matrix: Float[Array, "n n"]) -> Float[Array, "n n"]:
    """Lower Cholesky factor of one matrix, NaN where it does not exist."""
    return jnp.linalg.cholesky(matrix)


@_one_by_one
def eigh(matrix: Float[Array, "n n"]) -> tuple[Float[Array, "n"], Float[Array, "n n"]]:
    """Eigenvalues, ascending, and eigenvectors of one symmetric matrix."""
    values, vectors = jnp.linalg.eigh(matrix)
    return values, vectors


def direct_status(succeeded: Bool[Array, ""], value: Params) -> Int[Array, ""]:
    """Status of a factorisation: not positive definite, not finite, or converged."""
    finite = _tree.all_finite(value)
    return first_status(
        (~succeeded, Status.NOT_POSITIVE_DEFINITE),
        (~finite, Status.NONFINITE),
        (finite, Status.CONVERGED),
    )


def restrict(
    matrix: Float[Array, "n n"], mask: Bool[Array, "n"], damping: Scalar
) -> Float[Array, "n n"]:
    """`matrix + damping I` on the support, the identity elsewhere."""
    on_support = mask[:, None] & mask[None, :]
    diagonal = jnp.where(mask, jnp.asarray(damping, matrix.dtype), 1)
    return jnp.where(on_support, matrix, 0) + jnp.diag(diagonal)


def matmul(a: Array, b: Array) -> Array:
    """Matrix product at the precision of the package."""
    return jnp.matmul(a, b, precision=PRECISION)


def column_dots(a: Float[Array, "m n"], b: Float[Array, "m n"]) -> Float[Array, "n"]:
    """Inner products of the columns of two matrices."""
    # XLA on CPU reduces a leading axis many times slower than it adds rows up.
    return jax.lax.platform_dependent(
        a, b, cpu=_added_rows, default=lambda a, b: jnp.sum(a * b, axis=0)
    )


def _added_rows(a: Array, b: Array) -> Array:
    # Two rows at a time: the total is then read and written half as often.
    pairs = a.shape[0] // 2
    total = jax.lax.fori_loop(
        0,
        pairs,
        lambda i, total: total + a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1],
        jnp.zeros_like(a[0]),
    )
    return total + a[-1] * b[-1] if a.shape[0] % 2 else total


class _CGState(NamedTuple):
    value: Params
    residual: Params
    direction: Params
    energy: Scalar  # <residual, preconditioned residual>
    stiffest: Scalar  # largest curvature of a unit direction so far
    steps: Int[Array, ""]
    status: Int[Array, ""]


def while_loop(keep_going, body, state, *, on_host: bool):
    """`jax.lax.while_loop`, or the same loop in Python where the body asks for it.

    Convolutions inside a compiled loop run tens of times slower on CPU than
    outside, and data visited in chunks must not be in one program; such bodies
    run their loops on the host.
    """
    if not on_host:
        return jax.lax.while_loop(keep_going, body, state)
    while keep_going(state):
        state = body(state)
    return state


def conjugate_gradients(
    matvec: Callable[[Params], Params],
    rhs: Params,
    mask: Mask,
    *,
    damping: Scalar,
    tol: Scalar | float,
    max_steps: int,
    precondition: Callable[[Params], Params] | None = None,
    on_host: bool = False,
) -> LinearSolve:
    r"""Solves $M(H + \lambda I)M\,x = M\,b$ by preconditioned conjugate gradients.

    Args:
      matvec: product with the symmetric $H$ on pytrees.
      rhs: right-hand side $b$; entries off the mask are ignored.
      mask: support $M$; the answer is exactly zero off it.
      damping: $\lambda$, in units of $H$, shape `()`.
      tol: stop when the residual norm is below `tol` times that of $Mb$.
      max_steps: largest number of products; static.
      precondition: approximate inverse on the support; identity if `None`.
      on_host: run the loop in Python, one product at a time.

    Returns:
      The iterate with status `CONVERGED`, `MAX_STEPS` (the usual end when few
      steps are allowed: an inner approximation that lowers the model at every
      step), or `NOT_POSITIVE_DEFINITE` when a direction of non-positive curvature
      was met, or of none beside the stiffest one; then the iterate before it is
      returned.

    Source: Hestenes & Stiefel (1952); stopping at negative curvature as in
    Steihaug (1983).
    """

    def apply_inverse(residual: Params) -> Params:
        return residual if precondition is None else precondition(residual)

    def operator(v: Params) -> Params:
        return _tree.keep(mask, _tree.add_scaled(matvec(v), damping, v))

    target = _tree.keep(mask, rhs)
    first = _tree.keep(mask, apply_inverse(target))
    threshold = jnp.square(jnp.asarray(tol, _tree.dtype(rhs))) * _tree.dot(
        target, target
    )

    def body(state: _CGState) -> _CGState:
        product = operator(state.direction)
        curvature = _tree.dot(state.direction, product)
        norm_squared = _tree.dot(state.direction, state.direction)
        # Below this it is rounding: a singular matrix would send the iterate to
        # infinity. Far beyond the conditions that can be solved at all.
        noise = state.stiffest * jnp.finfo(norm_squared.dtype).eps ** 1.5
        positive = curvature > noise * norm_squared
        stiffness = curvature / jnp.where(norm_squared > 0, norm_squared, 1)
        length = jnp.where(
            positive, state.energy / jnp.where(positive, curvature, 1), 0
        )
        value = _tree.add_scaled(state.value, length, state.direction)
        residual = _tree.add_scaled(state.residual, -length, product)
        preconditioned = _tree.keep(mask, apply_inverse(residual))
        energy = _tree.dot(residual, preconditioned)
        ratio = energy / jnp.where(state.energy > 0, state.energy, 1)
        steps = state.steps + 1
        status = first_status(
            (~jnp.isfinite(curvature), Status.NONFINITE),
            (~positive, Status.NOT_POSITIVE_DEFINITE),
            (_tree.dot(residual, residual) <= threshold, Status.CONVERGED),
            (steps >= max_steps, Status.MAX_STEPS),
        )
        return _CGState(
            value=value,
            residual=residual,
            direction=_tree.add_scaled(preconditioned, ratio, state.direction),
            energy=energy,
            stiffest=jnp.maximum(state.stiffest, stiffness),
            steps=steps,
            status=status,
        )

    nothing_to_do = _tree.dot(target, target) <= 0
    start = _CGState(
        value=_tree.zeros_like(target),
        residual=target,
        direction=first,
        energy=_tree.dot(target, first),
        stiffest=jnp.zeros((), _tree.dtype(target)),
        steps=jnp.zeros((), jnp.int32),
        status=first_status((nothing_to_do, Status.CONVERGED)),
    )
    end = while_loop(
        lambda state: state.status == Status.RUNNING, body, start, on_host=on_host
    )
    return LinearSolve(end.value, end.status)


def shifted_solves(
    matvec: Callable[[Params], Params],
    rhs: Params,
    dampings: Float[Array, "s"],
    *,
    steps: int,
    on_host: bool = False,
) -> Params:
    r"""Approximates $(A + \lambda_i I)^{-1} b$ for several dampings at the cost of one.

    A Krylov space does not change when a multiple of the identity is added, so one
    Lanczos run serves every damping. Negative eigenvalues of the projected matrix
    count as zero, so that an indefinite $A$ cannot turn a step uphill.

    Args:
      matvec: product with the symmetric $A$ on pytrees.
      rhs: right-hand side $b$.
      dampings: $\lambda_i > 0$, in units of $A$, shape `(s,)`.
      steps: dimension of the Krylov space, one product each; static.
      on_host: run the loop in Python, one product at a time.

    Returns:
      Solutions in the Krylov space, shaped like `rhs` with one more leading axis s.

    Source: Lanczos (1950) with full reorthogonalisation; Frommer & Maass (1999) on
    shifted systems.
    """
    end = while_loop(
        lambda state: state.index < steps,
        lambda state: _lanczos_extend(state, matvec(state.newest)),
        _lanczos_start(rhs, steps),
        on_host=on_host,
    )
    return _lanczos_solve(end, dampings)


class _LanczosState(NamedTuple):
    basis: Params  # orthonormal, one more leading axis
    newest: Params  # the last of them
    diagonal: Float[Array, "steps"]  # of the projected, tridiagonal matrix
    side: Float[Array, "steps"]  # beside it; the last entry is not used
    length: Scalar  # of the right-hand side
    index: Int[Array, ""]


# The algebra around a product is compiled in pieces, for loops that run on the host.
@functools.partial(jax.jit, static_argnames="steps")
def _lanczos_start(rhs: Params, steps: int) -> _LanczosState:
    length = _tree.norm(rhs)
    first = _unit(rhs, length)
    basis = jax.tree.map(
        lambda b: jnp.zeros((steps, *b.shape), b.dtype).at[0].set(b), first
    )
    blank = jnp.zeros(steps, length.dtype)
    return _LanczosState(basis, first, blank, blank, length, jnp.int32(0))


@jax.jit
def _lanczos_extend(state: _LanczosState, product: Params) -> _LanczosState:
    index = state.index
    diagonal = _tree.dot(state.newest, product)
    for _ in range(2):  # once is not enough in floating point, twice is
        overlap = _basis_coefficients(state.basis, product)
        product = _tree.sub(product, _combine(overlap, state.basis))
    remainder = _tree.norm(product)
    newest = _unit(product, remainder)
    return _LanczosState(
        basis=jax.tree.map(
            lambda v, a: v.at[index + 1].set(a, mode="drop"), state.basis, newest
        ),
        newest=newest,
        diagonal=state.diagonal.at[index].set(diagonal),
        side=state.side.at[index].set(remainder),
        length=state.length,
        index=index + 1,
    )


@jax.jit
def _lanczos_solve(state: _LanczosState, dampings: Float[Array, "s"]) -> Params:
    side = state.side[:-1]
    values, vectors = eigh(
        jnp.diag(state.diagonal) + jnp.diag(side, 1) + jnp.diag(side, -1)
    )
    shifted = jnp.maximum(values, 0)[None, :] + dampings.astype(values.dtype)[:, None]
    weights = matmul(state.length * vectors[0][None, :] / shifted, vectors.T)
    return _combine(weights, state.basis)


def _unit(a: Params, length: Scalar) -> Params:
    """`a` divided by its length, zeros for zeros."""
    safe = jnp.maximum(length, jnp.finfo(length.dtype).tiny)
    return jax.tree.map(lambda x: x / safe.astype(x.dtype), a)


def _basis_coefficients(basis: Params, a: Params) -> Float[Array, "steps"]:
    wide = _tree.dtype(a)
    terms = jax.tree.map(
        lambda v, x: jnp.tensordot(v, x, x.ndim, precision=PRECISION).astype(wide),
        basis,
        a,
    )
    return functools.reduce(jnp.add, jax.tree.leaves(terms))


def _combine(coefficients: Float[Array, "*s steps"], basis: Params) -> Params:
    return jax.tree.map(
        lambda v: jnp.tensordot(
            coefficients.astype(v.dtype), v, 1, precision=PRECISION
        ),
        basis,
    )
