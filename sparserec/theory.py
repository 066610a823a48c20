r"""Constants and bounds of the convergence theorems, as functions of numbers.

Notation: $f$ is minimized over vectors with at most $k$ of $d$ entries nonzero;
$\theta^\star$ has $k^\star \le k$ nonzeros and $\nabla f(\theta^\star) = 0$;
$e_t = \|\theta_t - \theta^\star\|_2$; $H_t$, $g_t$ are Hessian and gradient at
$\theta_t$; $\theta_t^+ = \theta_t - H_t^{-1} g_t$ is the Newton point; $T_k$ keeps the
$k$ largest magnitudes. I-OBS projects $\theta_t^+$ onto the $k$-sparse vectors in the
norm of $H_t$ (best mask and values), Topk-I-OBS is $T_k(\theta_t^+)$.

Arguments are numbers or arrays of one common shape, results have that shape and the
default float type. Nothing is checked: outside its assumptions a bound means nothing.
A rate $C$, in units of one over weight, stands for $e_{t+1} \le C e_t^2$.

"Wu et al." is Wu, Modoranu, Safaryan, Kuznedelev & Alistarh (NeurIPS 2024), "Corrected"
marks what differs from its text. Without a source the docstring holds the derivation.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

__all__ = [
    "Constants",
    "Counts",
    "FinalRate",
    "LinearQuadraticRate",
    "damped_topk_rate",
    "hard_thresholding_constant",
    "iht_contraction",
    "iobs_rate",
    "iobs_rate_energy_norm",
    "newton_rate",
    "noise_floor",
    "oblique_projection_bound",
    "quadratic_convergence_steps",
    "step_size_theorem",
    "stochastic_step_size",
    "topk_iobs_rate",
    "truncation_ratio",
]

Real = Float[Array, "..."]


class Constants(NamedTuple):
    r"""Bounds on a loss, valid everywhere: $\mu I \preceq \nabla^2 f \preceq L I$, $M$.

    Attributes:
      strong_convexity: $\mu > 0$, in units of curvature.
      smoothness: $L \ge \mu$, in units of curvature.
      hessian_lipschitz: $M \ge 0$ with $\|\nabla^2 f(a) - \nabla^2 f(b)\|_2 \le
        M \|a - b\|_2$, in units of curvature over weight; 0 for a quadratic.
    """

    strong_convexity: float | Array
    smoothness: float | Array
    hessian_lipschitz: float | Array


class Counts(NamedTuple):
    r"""Sizes of a sparse problem, $k^\star \le k \le d$.

    Attributes:
      dim: $d$, number of weights.
      k: number of weights kept.
      k_star: $k^\star$, number of nonzeros of the minimizer.
    """

    dim: float | Array
    k: float | Array
    k_star: float | Array


class LinearQuadraticRate(NamedTuple):
    r"""A bound $e_{t+1} \le a\, e_t + b\, e_t^2$.

    Attributes:
      linear: $a$, without unit; contraction on a quadratic if below 1.
      quadratic: $b$, in units of one over weight.
    """

    linear: Real
    quadratic: Real


class FinalRate(NamedTuple):
    r"""A linear rate that holds exactly from a known step on.

    Attributes:
      contraction: $\rho$ in $e_{t+1} = \rho\, e_t$.
      steps: the $t$ from which it holds, a whole number as a float.
    """

    contraction: Real
    steps: Real


def _real(*values: ArrayLike) -> tuple[Array, ...]:
    # Counts are integers, and strict promotion refuses to mix them with floats.
    return tuple(jnp.asarray(value, float) for value in values)


def hard_thresholding_constant(counts: Counts) -> Real:
    r"""Tight constant $\nu$ by which hard thresholding can expand a squared error.

    For every $b$ and every $k^\star$-sparse $x$: $\|T_k b - x\|^2 \le \nu \|b - x\|^2$,
    $\nu = 1 + \tfrac12 (\rho + \sqrt{(4 + \rho)\rho})$,
    $\rho = \min(k^\star, d-k) / (k - k^\star + \min(k^\star, d-k))$.

    Args:
      counts: $d$, $k$, $k^\star$.

    Returns:
      $\nu$ in `[1, 2.618...]`; 1 at `k = dim`.

    Source: Shen & Li, "A tight bound of hard thresholding", JMLR 18 (2018).
    """
    dim, k, k_star = _real(*counts)
    exchanged = jnp.minimum(k_star, dim - k)
    pool = k - k_star + exchanged
    ratio = exchanged / jnp.where(pool > 0, pool, 1)
    return 1 + (ratio + jnp.sqrt((4 + ratio) * ratio)) / 2


def truncation_ratio(counts: Counts) -> Real:
    r"""Share of a squared distance that cutting down to k entries can lose.

    For every $u$ with at most $d$ nonzeros and every $v$ with at most $k^\star$:
    $\|T_k u - u\|^2 \le \tfrac{d-k}{d-k^\star} \|u - v\|^2$. It is attained by
    $u = (1, \dots, 1)$ and $v$ equal to $u$ on $k^\star$ entries and 0 elsewhere.

    Args:
      counts: most nonzeros of $u$ (`dim`), $T_k u$ (`k`) and $v$ (`k_star`).

    Returns:
      The ratio in `[0, 1]`; 0 at `k = dim`.

    Source: Wu et al., Lemma 8 (from Peste et al., NeurIPS 2021).
    """
    dim, k, k_star = _real(*counts)
    return (dim - k) / jnp.where(dim > k_star, dim - k_star, 1)


def newton_rate(constants: Constants) -> Real:
    r"""Rate of Newton's method: $\|\theta_t^+ - \theta^\star\| \le M/(2\mu)\, e_t^2$.

    Args:
      constants: $\mu$ and $M$; $L$ does not enter.

    Returns:
      $M / (2\mu)$; 0 for a quadratic.

    Source: classical; first step in the proof of Wu et al., Theorem 1.
    """
    strong_convexity, _, hessian_lipschitz = _real(*constants)
    return hessian_lipschitz / (2 * strong_convexity)


def iobs_rate(constants: Constants, counts: Counts, *, printed: bool = False) -> Real:
    r"""Rate of I-OBS with the exact projection.

    $C = \bigl(1 + \sqrt{\tfrac L\mu \tfrac{d-k}{d-k^\star}}\bigr) \tfrac{M}{2\mu}$: the
    Newton error plus the projection error; the best of all $\binom dk$ masks is not
    worse than that of $T_k(\theta_t^+)$, which `truncation_ratio` governs.

    Args:
      constants: $\mu$, $L$, $M$.
      counts: $d$, $k$, $k^\star$.
      printed: use the inverse ratio $\tfrac{d-k^\star}{d-k}$ of the printed theorem;
        true as well, never smaller, and without limit as $k \to d$.

    Returns:
      $C$; at `k = dim` equal to `newton_rate`, or infinite if `printed`.

    Source: Wu et al., Theorem 1; corrected unless `printed`.
    """
    ratio = truncation_ratio(counts)
    condition = jnp.divide(*_real(constants.smoothness, constants.strong_convexity))
    projection = jnp.sqrt(condition / ratio if printed else condition * ratio)
    return (1 + projection) * newton_rate(constants)


def iobs_rate_energy_norm(constants: Constants) -> Real:
    r"""Rate of I-OBS with the exact projection, free of the counts.

    $\theta^\star$ is feasible, so the projection at most doubles the distance from it
    in the norm of $H_t$; in the 2-norm $C = 2\sqrt{L/\mu}\, \tfrac{M}{2\mu}$.

    Args:
      constants: $\mu$, $L$, $M$.

    Returns:
      $C$; never below `iobs_rate`.
    """
    condition = jnp.divide(*_real(constants.smoothness, constants.strong_convexity))
    return 2 * jnp.sqrt(condition) * newton_rate(constants)


def topk_iobs_rate(
    constants: Constants, counts: Counts, *, printed: bool = False
) -> Real:
    r"""Rate of Topk-I-OBS, $C = \sqrt\nu\, \tfrac{M}{2\mu}$.

    `hard_thresholding_constant` applied to $b = \theta_t^+$; free of $L$.

    Args:
      constants: $\mu$ and $M$.
      counts: $d$, $k$, $k^\star$.
      printed: use $1 + \sqrt{k^\star/k}$ in place of $\sqrt\nu$; never smaller.

    Returns:
      $C$; equal to `newton_rate` at `k = dim` unless `printed`.

    Source: Wu et al., Lemma 3; $\sqrt\nu$ is Shen & Li's.
    """
    if printed:
        _, k, k_star = _real(*counts)
        return (1 + jnp.sqrt(k_star / k)) * newton_rate(constants)
    return jnp.sqrt(hard_thresholding_constant(counts)) * newton_rate(constants)


def quadratic_convergence_steps(rate: ArrayLike, tolerance: ArrayLike) -> Real:
    r"""Steps of a quadratic rate to a tolerance from any start with $e_0 \le 1/(2C)$.

    Then $C e_t \le 2^{-2^t}$, hence
    $t = \lceil \log_2 \log_2 \tfrac{1}{C \epsilon} \rceil$.

    Args:
      rate: $C > 0$ in units of one over weight.
      tolerance: $\epsilon > 0$ in units of weight.

    Returns:
      A whole number as a float; 0 where the start is within the tolerance.
    """
    rate, tolerance = _real(rate, tolerance)
    return jnp.ceil(jnp.log2(jnp.maximum(-jnp.log2(rate * tolerance), 1)))


def damped_topk_rate(
    constants: Constants,
    counts: Counts,
    *,
    damping: ArrayLike = 0.0,
    step_size: ArrayLike = 1.0,
) -> LinearQuadraticRate:
    r"""Rate of $T_k(\theta_t - \eta (H_t + \lambda I)^{-1} g_t)$.

    With $B = H_t + \lambda I$ and $\bar H$ the mean Hessian between $\theta_t$ and
    $\theta^\star$, the error before $T_k$ is
    $(I - \eta B^{-1} H_t) e + \eta B^{-1} (H_t - \bar H) e$, so
    $e_{t+1} \le \sqrt\nu \bigl[ \max(|1 - \tfrac{\eta\mu}{\mu+\lambda}|, |1-\eta|)\,
    e_t + \tfrac{\eta M}{2(\mu+\lambda)}\, e_t^2 \bigr]$.

    Args:
      constants: $\mu$ and $M$.
      counts: $d$, $k$, $k^\star$.
      damping: $\lambda \ge 0$ in units of curvature, not relative.
      step_size: $\eta \ge 0$.

    Returns:
      The two coefficients; 0 and `topk_iobs_rate` for the default arguments. With
      step 1 the linear one is below 1 if and only if $\lambda < \mu/(\sqrt\nu - 1)$.
    """
    convexity, _, lipschitz, damping, step_size = _real(*constants, damping, step_size)
    expansion = jnp.sqrt(hard_thresholding_constant(counts))
    slowest = 1 - step_size * (convexity / (convexity + damping))
    linear = jnp.maximum(jnp.abs(slowest), jnp.abs(1 - step_size))
    quadratic = step_size * lipschitz / (2 * (convexity + damping))
    return LinearQuadraticRate(expansion * linear, expansion * quadratic)


def step_size_theorem(
    step_size: ArrayLike,
    start_error: ArrayLike,
    largest: ArrayLike,
    smallest: ArrayLike,
) -> FinalRate:
    r"""Rate of Topk-I-OBS with a step size on a quadratic, from any start.

    $\theta_{t+1} = T_k((1-\eta)\theta_t + \eta\theta^\star)$ for any Hessian and any
    $k \ge k^\star$. With $\rho = |1-\eta|$ and
    $B = \max(\|\theta_0 - \theta^\star\|_\infty, \|\theta^\star\|_\infty)$, from
    $T_0 = \lceil \log\tfrac{2B}{\min(\eta, 2-\eta)\, m} / \log\tfrac1\rho \rceil$ on
    the support of $\theta^\star$ is kept and $e_{t+1} = \rho\, e_t$. Off the support
    entries are at most $\rho^t B$; on it the error shrinks by $\rho$, or the entry is
    cut and comes back at least $\min(\eta, 2-\eta)\, m$ large.

    Args:
      step_size: $\eta$.
      start_error: $\|\theta_0 - \theta^\star\|_\infty$, in units of weight.
      largest: $\|\theta^\star\|_\infty$, in units of weight.
      smallest: $m > 0$, least magnitude of the nonzeros of $\theta^\star$.

    Returns:
      $\rho$ and $T_0 \ge 1$; 0 and 1 for step 1, infinite $T_0$ outside `(0, 2)`.
    """
    step, start_error, largest, smallest = _real(
        step_size, start_error, largest, smallest
    )
    contraction = jnp.abs(1 - step)
    least_return = jnp.minimum(step, 2 - step) * smallest
    bound = 2 * jnp.maximum(start_error, largest)
    steps = jnp.ceil(jnp.log(bound / least_return) / -jnp.log(contraction))
    steps = jnp.where(contraction < 1, jnp.maximum(steps, 1), jnp.inf)
    return FinalRate(contraction=contraction, steps=steps)


def oblique_projection_bound(condition: ArrayLike) -> Real:
    r"""Largest 2-norm $\tfrac{\kappa+1}{2\sqrt\kappa}$ of the I-OBS update, corrected.

    $P = H^{-1} I_S^\top ([H^{-1}]_{SS})^{-1} I_S$ and $I - P$ are orthogonal projectors
    in the inner product of $H$, not in the Euclidean one; the value is attained.
    What remains true of the printed step is $\|P H^{-1}\|_2 \le 1/\mu$.

    Args:
      condition: $\kappa \ge 1$, condition number of $H$.

    Returns:
      The bound, at least 1.

    Source: Wu et al., Lemma 7, corrected: it prints 1.
    """
    condition = _real(condition)[0]
    return (condition + 1) / (2 * jnp.sqrt(condition))


def stochastic_step_size(
    gradient: Float[Array, " n"],
    params: Float[Array, " n"],
    mask: Bool[Array, " n"],
    smoothness: ArrayLike,
    *,
    printed: bool = False,
) -> Float[Array, ""]:
    r"""Step of stochastic I-OBS on a fixed mask.

    The minimizer of $g^\top(x - \theta) + \tfrac12 (x-\theta)^\top (\lambda I +
    gg^\top/\|g\|)(x - \theta)$ over $x$ with $x_S = 0$ is $x_Q = \theta_Q - s\, g_Q$,
    $s = (1 - g_S^\top\theta_S/\|g\|) / (\lambda + \|g_Q\|^2/\|g\|)$.

    Args:
      gradient: $g \ne 0$, shape `(n,)`.
      params: $\theta$, shape `(n,)`.
      mask: `True` on the kept set $Q$, `False` on its complement $S$, shape `(n,)`.
      smoothness: $\lambda > 0$ in units of curvature, shape `()`.
      printed: use the printed numerator 1, right only if $g_S^\top\theta_S = 0$.

    Returns:
      $s$ in units of one over curvature, shape `()`; NaN for a zero gradient.

    Source: Wu et al., Lemma 4; corrected unless `printed`.
    """
    norm = jnp.linalg.norm(gradient)
    kept = jnp.sum(jnp.where(mask, jnp.square(gradient), 0))
    removed = jnp.sum(jnp.where(mask, 0, gradient * params))
    numerator = 1.0 if printed else 1 - removed / norm
    return numerator / (jnp.asarray(smoothness, gradient.dtype) + kept / norm)


def noise_floor(rate: ArrayLike, residual: ArrayLike) -> Real:
    r"""Error that remains where the gradient at the target is not zero.

    If $\nabla f(\theta^\star) \ne 0$, Topk-I-OBS satisfies $e_{t+1} \le C e_t^2 + r$
    with $C$ from `topk_iobs_rate` and
    $r = \sqrt\nu\, \sup_t \|H_t^{-1} \nabla f(\theta^\star)\|$. From any
    $e_0 < (1 + \sqrt{1-4Cr})/(2C)$ the errors end at or below the smaller root
    $2r / (1 + \sqrt{1 - 4Cr})$ of $e = Ce^2 + r$.

    Args:
      rate: $C \ge 0$ in units of one over weight.
      residual: $r \ge 0$ in units of weight.

    Returns:
      The floor in units of weight; NaN where $4Cr > 1$ and nothing is guaranteed.
    """
    rate, residual = _real(rate, residual)
    return 2 * residual / (1 + jnp.sqrt(1 - 4 * rate * residual))


def iht_contraction(condition: ArrayLike, counts: Counts) -> Real:
    r"""Guaranteed factor per step of IHT with step $1/L$ on a quadratic.

    $I - H/L$ has norm $1 - 1/\kappa$, so $e_{t+1} \le \sqrt\nu\, (1 - 1/\kappa)\, e_t$.
    If $d - k \ge k^\star$ the factor is below 1 for
    $k > k^\star \bigl(\tfrac{\kappa(\kappa-1)}{2\kappa-1}\bigr)^2$ (because
    $\rho = (\nu-1)^2/\nu$), about $\tfrac{\kappa^2}{4} k^\star$: at $k = k^\star$ only
    for $\kappa < 2.618...$, while `damped_topk_rate` is free of $\kappa$.

    Args:
      condition: $\kappa \ge 1$.
      counts: $d$, $k$, $k^\star$.

    Returns:
      The factor; a guarantee only if below 1.
    """
    slowest = 1 - 1 / _real(condition)[0]
    return jnp.sqrt(hard_thresholding_constant(counts)) * slowest
