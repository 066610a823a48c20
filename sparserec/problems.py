r"""Problems with known answers, for tests, notebooks and comparisons.

Legend: n examples (rows), p or dim weights, k nonzero weights of the answer.

Every problem is a pure function of a typed PRNG key, so a batch of problems is
`jax.vmap(lambda key: gaussian_design(key, n, p, k))(keys)`. The losses receive their
data as arguments: a compiled solver is shared by all instances of one shape.

Random answers have exactly $k$ nonzero entries at uniformly random places, of
magnitude $0.5 + |z|$, $z \sim N(0, 1)$, and of random sign: no entry is close to
zero, so a support is either found or clearly missed.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int, Key

from sparserec.theory import Constants

__all__ = [
    "DesignProblem",
    "LogCoshProblem",
    "NearTightProblem",
    "QuadraticProblem",
    "correlated_design",
    "gaussian_design",
    "ill_conditioned_quadratic",
    "log_cosh",
    "log_cosh_loss",
    "near_tight_log_cosh",
    "quadratic_loss",
]

# |d^3 log cosh| peaks where tanh^2 = 1/3; placing the minimizer there makes
# the third derivative largest at the answer.
_TANH_AT_MINIMIZER = 1 / math.sqrt(3)
_LARGEST_THIRD_DERIVATIVE = 4 / (3 * math.sqrt(3))
# Small against the unit quadratic part: the bound is attained up to 1 / (1 + 2/300).
_NEAR_TIGHT_SCALE = 0.01


class DesignProblem(NamedTuple):
    r"""A linear regression $y = X\theta^\star + \text{noise}$ with a sparse answer.

    Attributes:
      design: $X$, shape `(n, p)`; columns have expected squared norm 1.
      response: $y$, shape `(n,)`.
      coefficients: $\theta^\star$, shape `(p,)`, with exactly k nonzero entries.
    """

    design: Float[Array, "n p"]
    response: Float[Array, " n"]
    coefficients: Float[Array, " p"]


class QuadraticProblem(NamedTuple):
    """A strongly convex quadratic with a sparse minimizer.

    Attributes:
      matrix: Hessian, symmetric positive definite, shape `(dim, dim)`.
      minimizer: shape `(dim,)`, with exactly k nonzero entries.
    """

    matrix: Float[Array, "dim dim"]
    minimizer: Float[Array, " dim"]

    @property
    def args(self) -> tuple[Array, Array]:
        """What `quadratic_loss` expects after `params`."""
        return self.matrix, self.minimizer


class LogCoshProblem(NamedTuple):
    r"""A smooth loss with a sparse minimizer and constants that hold everywhere.

    Attributes:
      matrix: $A$, symmetric positive definite, shape `(dim, dim)`.
      minimizer: $\theta^\star$, shape `(dim,)`, with exactly k nonzero entries.
      scale: $c \ge 0$, weight of the non-quadratic part, shape `()`.
      constants: $\mu = \lambda_{\min}(A)$, $L = \lambda_{\max}(A) + c$ and
        $M = 4c / (3\sqrt 3)$, each of shape `()`.
    """

    matrix: Float[Array, "dim dim"]
    minimizer: Float[Array, " dim"]
    scale: Float[Array, ""]
    constants: Constants

    @property
    def args(self) -> tuple[Array, Array, Array]:
        """What `log_cosh_loss` expects after `params`."""
        return self.matrix, self.minimizer, self.scale


class NearTightProblem(NamedTuple):
    """A problem and a start at which the Newton error bound is nearly attained.

    Attributes:
      problem: the loss and its constants.
      start: differs from the minimizer in one entry of its support, shape `(dim,)`.
    """

    problem: LogCoshProblem
    start: Float[Array, " dim"]


def _check(key: Array, k: int | Array, size: int) -> None:
    if not jnp.issubdtype(getattr(key, "dtype", float), jax.dtypes.prng_key):
        raise TypeError(f"`key` must be a typed key (`jax.random.key`), got {key!r}.")
    if isinstance(k, int) and not 0 <= k <= size:
        raise ValueError(f"`k` must lie in [0, {size}] ({size} weights), got {k}.")


def _sparse_vector(
    key: Key[Array, ""], size: int, k: int | Int[Array, ""]
) -> Float[Array, " size"]:
    place, magnitude, sign = jax.random.split(key, 3)
    support = jax.random.permutation(place, size) < k
    values = 0.5 + jnp.abs(jax.random.normal(magnitude, (size,)))
    signs = jax.random.rademacher(sign, (size,), dtype=values.dtype)
    return jnp.where(support, signs * values, 0)


def _respond(
    key: Key[Array, ""], design: Array, coefficients: Array, noise: ArrayLike
) -> DesignProblem:
    rows = design.shape[0]
    errors = jax.random.normal(key, (rows,)) / math.sqrt(rows)
    exact = jnp.matmul(design, coefficients, precision=jax.lax.Precision.HIGHEST)
    response = exact + jnp.asarray(noise, errors.dtype) * errors
    return DesignProblem(design=design, response=response, coefficients=coefficients)


def gaussian_design(
    key: Key[Array, ""],
    n: int,
    p: int,
    k: int | Int[Array, ""],
    noise: ArrayLike = 0.0,
) -> DesignProblem:
    r"""Draws a regression with independent Gaussian features.

    $X_{ij} \sim N(0, 1/n)$ and
    $y = X\theta^\star + \tfrac{\sigma}{\sqrt n} \varepsilon$,
    $\varepsilon \sim N(0, I)$: the familiar problem with features of unit variance
    and noise $\sigma$ per example, both sides divided by $\sqrt n$.

    Args:
      key: typed PRNG key, shape `()`.
      n: number of examples, static.
      p: number of weights, static.
      k: number of nonzero weights, `0 <= k <= p`; may be traced.
      noise: standard deviation $\sigma$ per example, shape `()`, in units of the
        response before the division by $\sqrt n$.

    Returns:
      A `DesignProblem` in the default float type. With `k=0` the response is noise.

    Raises:
      TypeError: if `key` is not a typed PRNG key.
      ValueError: if `k` is a Python integer outside `[0, p]`.
    """
    _check(key, k, p)
    design_key, answer_key, noise_key = jax.random.split(key, 3)
    design = jax.random.normal(design_key, (n, p)) / math.sqrt(n)
    coefficients = _sparse_vector(answer_key, p, k)
    return _respond(noise_key, design, coefficients, noise)


def correlated_design(
    key: Key[Array, ""],
    n: int,
    p: int,
    k: int | Int[Array, ""],
    correlation: ArrayLike,
    noise: ArrayLike = 0.0,
) -> DesignProblem:
    r"""Draws a regression whose neighboring features are correlated.

    Rows are independent $N(0, \Sigma/n)$ with $\Sigma_{ij} = \rho^{|i-j|}$, made by
    the recursion $x_1 = z_1$, $x_{j+1} = \rho x_j + \sqrt{1-\rho^2}\, z_{j+1}$;
    response and scaling are those of `gaussian_design`.

    Args:
      key: typed PRNG key, shape `()`.
      n: number of examples, static.
      p: number of weights, static.
      k: number of nonzero weights, `0 <= k <= p`; may be traced.
      correlation: $\rho$ in `[-1, 1]`, shape `()`; 1 gives p equal columns.
      noise: standard deviation per example, shape `()`, as in `gaussian_design`.

    Returns:
      A `DesignProblem` in the default float type; NaN where `correlation` lies
      outside `[-1, 1]`.

    Raises:
      TypeError: if `key` is not a typed PRNG key.
      ValueError: if `k` is a Python integer outside `[0, p]`.
    """
    _check(key, k, p)
    design_key, answer_key, noise_key = jax.random.split(key, 3)
    fresh = jax.random.normal(design_key, (p, n)) / math.sqrt(n)
    correlation = jnp.asarray(correlation, fresh.dtype)
    innovation = jnp.sqrt(1 - jnp.square(correlation))

    def next_column(column: Array, new: Array) -> tuple[Array, Array]:
        column = correlation * column + innovation * new
        return column, column

    _, later = jax.lax.scan(next_column, fresh[0], fresh[1:])
    design = jnp.concatenate([fresh[:1], later]).T
    coefficients = _sparse_vector(answer_key, p, k)
    return _respond(noise_key, design, coefficients, noise)


def _rotated_spectrum(
    key: Key[Array, ""], dim: int, condition: ArrayLike
) -> Float[Array, "dim dim"]:
    gaussian = jax.random.normal(key, (dim, dim))
    basis, triangle = jnp.linalg.qr(gaussian)
    # The signs of R's diagonal make Q uniform over all rotations.
    basis = basis * jnp.sign(jnp.diagonal(triangle))[None, :]
    exponents = jnp.linspace(0.0, 1.0, dim)
    spectrum = jnp.asarray(condition, basis.dtype) ** exponents
    scaled = basis * spectrum[None, :]
    matrix = jnp.matmul(scaled, basis.T, precision=jax.lax.Precision.HIGHEST)
    return (matrix + matrix.T) / 2


def ill_conditioned_quadratic(
    key: Key[Array, ""], dim: int, k: int | Int[Array, ""], condition: ArrayLike
) -> QuadraticProblem:
    r"""Draws a quadratic with a prescribed condition number and a sparse minimizer.

    $A = Q \operatorname{diag}(\kappa^{i/(dim-1)})_{i<dim} Q^\top$ with a uniformly
    random rotation $Q$; its eigenvalues run from 1 to $\kappa$. Minimize it with
    `quadratic_loss` and `args=problem.args`.

    Args:
      key: typed PRNG key, shape `()`.
      dim: number of weights, static.
      k: number of nonzero weights of the minimizer; may be traced.
      condition: condition number $\kappa \ge 1$, shape `()`.

    Returns:
      A `QuadraticProblem` in the default float type; eigenvalue 1 if `dim=1`.

    Raises:
      TypeError: if `key` is not a typed PRNG key.
      ValueError: if `k` is a Python integer outside `[0, dim]`.
    """
    _check(key, k, dim)
    rotation_key, answer_key = jax.random.split(key)
    return QuadraticProblem(
        matrix=_rotated_spectrum(rotation_key, dim, condition),
        minimizer=_sparse_vector(answer_key, dim, k),
    )


def quadratic_loss(
    params: Float[Array, " dim"],
    matrix: Float[Array, "dim dim"],
    minimizer: Float[Array, " dim"],
) -> Float[Array, ""]:
    r"""Evaluates $\tfrac12 (\theta-\theta^\star)^\top A (\theta-\theta^\star)$.

    Args:
      params: $\theta$, shape `(dim,)`.
      matrix: $A$, shape `(dim, dim)`, symmetric.
      minimizer: $\theta^\star$, shape `(dim,)`.

    Returns:
      The loss, shape `()`; 0 at the minimizer.
    """
    error = params - minimizer
    product = jnp.matmul(matrix, error, precision=jax.lax.Precision.HIGHEST)
    return jnp.vdot(error, product, precision=jax.lax.Precision.HIGHEST) / 2


@jax.custom_jvp
def _tilted_log_cosh(error: Array) -> Array:
    # log cosh(u + a) - log cosh(a) - u tanh(a), free of the cancellation that
    # would hide the last eight digits of u near the minimizer, and of overflow.
    distance = jnp.abs(error)
    tilt = jnp.log1p(_TANH_AT_MINIMIZER * jnp.tanh(error)) - _TANH_AT_MINIMIZER * error
    return distance + jnp.log1p(jnp.expm1(-2 * distance) / 2) + tilt


def _tilted_slope(error: Array) -> Array:
    # tanh(u + a) - tanh(a) by the addition theorem, with tanh(a)^2 = 1/3.
    tanh = jnp.tanh(error)
    return (1 - _TANH_AT_MINIMIZER**2) * tanh / (1 + _TANH_AT_MINIMIZER * tanh)


# Automatic differentiation of |u| would give a zero second derivative at u = 0.
_tilted_log_cosh.defjvps(lambda tangent, _, error: _tilted_slope(error) * tangent)


def log_cosh_loss(
    params: Float[Array, " dim"],
    matrix: Float[Array, "dim dim"],
    minimizer: Float[Array, " dim"],
    scale: Float[Array, ""],
) -> Float[Array, ""]:
    r"""Evaluates a quadratic plus tilted log-cosh terms with a known minimizer.

    $$f(\theta) = \tfrac12 u^\top A u + c \sum_i \bigl[\log\cosh(u_i + a)
    - \log\cosh a - u_i \tanh a\bigr],\quad u = \theta - \theta^\star,\quad
    \tanh a = 1/\sqrt 3.$$

    The gradient vanishes at $\theta^\star$. The shift $a$ puts the largest third
    derivative there: without it Newton's method would converge cubically.

    Args:
      params: $\theta$, shape `(dim,)`.
      matrix: $A$, symmetric positive definite, shape `(dim, dim)`.
      minimizer: $\theta^\star$, shape `(dim,)`.
      scale: $c \ge 0$, shape `()`.

    Returns:
      The loss, shape `()`; 0 at the minimizer, positive elsewhere.
    """
    terms = _tilted_log_cosh(params - minimizer)
    return quadratic_loss(params, matrix, minimizer) + scale * jnp.sum(terms)


def log_cosh(
    key: Key[Array, ""],
    dim: int,
    k: int | Int[Array, ""],
    condition: ArrayLike,
    curvature_scale: ArrayLike,
) -> LogCoshProblem:
    r"""Draws a non-quadratic problem whose $\mu$, $L$ and $M$ are known.

    $A$ has a random rotation and a geometric spectrum from 1 to $\kappa$. Because
    $0 < \operatorname{sech}^2 \le 1$ has Lipschitz constant $4/(3\sqrt 3)$, the
    Hessian $A + c\operatorname{diag}(\operatorname{sech}^2(u_i + a))$ satisfies
    $\mu = 1$, $L = \kappa + c$ and $M = 4c/(3\sqrt 3)$. Minimize it with
    `log_cosh_loss` and `args=problem.args`.

    Args:
      key: typed PRNG key, shape `()`.
      dim: number of weights, static; `condition` needs at least 2.
      k: number of nonzero weights of the minimizer; may be traced.
      condition: $\kappa \ge 1$, condition number of $A$, shape `()`.
      curvature_scale: $c \ge 0$, shape `()`; 0 gives a quadratic.

    Returns:
      A `LogCoshProblem` in the default float type.

    Raises:
      TypeError: if `key` is not a typed PRNG key.
      ValueError: if `k` is a Python integer outside `[0, dim]`.
    """
    matrix, minimizer = ill_conditioned_quadratic(key, dim, k, condition)
    scale = jnp.asarray(curvature_scale, matrix.dtype)
    constants = Constants(
        strong_convexity=jnp.ones((), matrix.dtype),
        smoothness=jnp.asarray(condition, matrix.dtype) + scale,
        hessian_lipschitz=_LARGEST_THIRD_DERIVATIVE * scale,
    )
    return LogCoshProblem(matrix, minimizer, scale, constants)


def near_tight_log_cosh(
    key: Key[Array, ""], dim: int, k: int | Int[Array, ""], error: ArrayLike
) -> NearTightProblem:
    r"""Draws a problem and a start that nearly attain the Newton error bound.

    $A = I$, $c = 0.01$, and the start is $\theta^\star + \text{error}\cdot e_j$ with
    $j$ the place of the largest entry of $\theta^\star$. In one coordinate the Newton
    step leaves $\tfrac{M/2}{1 + 2c/3}\,\text{error}^2$ to leading order, against the
    bound $\tfrac{M}{2\mu}\,\text{error}^2$ with $\mu = 1$: ratio 0.993.

    Args:
      key: typed PRNG key, shape `()`.
      dim: number of weights, static.
      k: number of nonzero weights of the minimizer, at least 1; may be traced.
      error: distance of the start from the minimizer, shape `()`.

    Returns:
      A `NearTightProblem` in the default float type.

    Raises:
      TypeError: if `key` is not a typed PRNG key.
      ValueError: if `k` is a Python integer outside `[0, dim]`.
    """
    problem = log_cosh(key, dim, k, 1.0, _NEAR_TIGHT_SCALE)
    place = jnp.argmax(jnp.abs(problem.minimizer))
    step = jnp.asarray(error, problem.minimizer.dtype)
    return NearTightProblem(problem, problem.minimizer.at[place].add(step))
