r"""Lower bounds on best-subset objectives, from the dual of the perspective relaxation.

With $H = G + \gamma I$ and $G \succeq 0$, a k-sparse w obeys

$$\tfrac12 w^\top H w - b^\top w
  = \max_\alpha \; -\tfrac12\alpha^\top G\alpha + (G\alpha - b)^\top w
    + \tfrac\gamma2 \|w\|^2,$$

so that exchanging minimum and maximum bounds the minimum over k-sparse w from below by

$$D(\alpha) = -\tfrac12\alpha^\top G\alpha
  - \tfrac1{2\gamma} \sum_{\text{k largest}} (b - G\alpha)_j^2$$

for every $\alpha$; with a penalty $\lambda_0$ a term counts only as far as it exceeds
$2\gamma\lambda_0$. D is concave; its maximum is the value of the perspective
relaxation with ridge $\gamma$. It is positive only where a ridge is part of the
problem, or H is positive definite.

Legend: n weights, m rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparserec import _tree, select
from sparserec._types import Count, Scalar
from sparserec.budget import make_budget
from sparserec.quadratic import QuadraticModel
from sparserec.solvers._columns import Problem, make_problem


class Bound(NamedTuple):
    """A proven lower bound.

    Attributes:
      value: no vector within the budget has a lower objective, shape `()`, up to
        rounding; minus infinity where there is no ridge to bound with.
      gap: `(objective - value) / |objective|` for the objective given, shape `()`;
        NaN without one.
      steps: iterations taken, int32, shape `()`.
    """

    value: Scalar
    gap: Scalar
    steps: Count


def lower_bound(
    model: QuadraticModel,
    k: int | Array,
    *,
    objective: Scalar | float | None = None,
    penalty: Scalar | float = 0.0,
    l2: Scalar | float = 0.0,
    ridge: Scalar | float = 0.0,
    tol: Scalar | float = 1e-6,
    max_steps: int = 2000,
) -> Bound:
    r"""A lower bound on a quadratic model over k-sparse vectors.

    Args:
      model: the quadratic model, over weights all of which may be pruned.
      k: weights to keep, an integer; traced.
      objective: value of a solution, for the gap.
      penalty: $\lambda_0 \ge 0$, in units of loss; traced.
      l2: $\lambda_2 \ge 0$, in units of curvature; traced.
      ridge: $\gamma_0$ with $H - \gamma_0 I \succeq 0$ that is part of the model
        already, such as the `ridge` of `least_squares`, or its smallest eigenvalue;
        traced. The bound uses $\gamma = \gamma_0 + 2\lambda_2$; what is given must
        be true, it is not checked.
      tol: relative progress in 50 steps at which to stop; traced.
      max_steps: largest number of steps, one product each; static.

    Returns:
      A `Bound`, valid wherever the iteration stops. The larger the ridge the tighter.
      It holds within bounds of the weights too, which leave fewer vectors to choose
      from, but is looser there.

    Raises:
      ValueError: `k` out of range, `max_steps` below 1.

    Source: perspective relaxation as in Hazimeh, Mazumder & Saab (2022), l0bnb, and
    Liu et al. (2023), OKRidge; solved by accelerated proximal gradients with the
    restarts of O'Donoghue & Candes (2015).
    """
    if isinstance(max_steps, bool) or max_steps < 1:
        raise ValueError(f"`max_steps` must be at least 1, got {max_steps!r}.")
    budget = make_budget(k, model.center, lambda _path, _leaf: True)
    wide = _tree.dtype(model.center)
    given = jnp.nan if objective is None else objective
    return _bound(
        model,
        budget,
        jnp.asarray(given, wide),
        *(jnp.asarray(x, wide) for x in (penalty, l2, ridge, tol)),
        max_steps=max_steps,
    )


class _Climb(NamedTuple):
    point: Float[Array, "n"]
    ahead: Float[Array, "n"]  # where the next gradient is taken
    momentum: Scalar
    best: Scalar
    earlier: Scalar  # the best 50 steps ago
    step: Count
    going: Array


_WINDOW = 50  # steps between two looks at the progress
_POWER_STEPS = 30
_BISECTIONS = 60


@functools.partial(jax.jit, static_argnames="max_steps")
def _bound(model, budget, objective, penalty, l2, ridge, tol, *, max_steps: int):
    problem = make_problem(model, budget, penalty=penalty, l2=l2)
    count = budget.counts[0]
    strength = ridge + 2 * l2

    def product(w: Float[Array, "n"]) -> Float[Array, "n"]:
        shaped = _tree.cast_like(_tree.layout(model.center).split(w), model.center)
        bent = _tree.flatten(model.curvature.matvec(shaped)).astype(w.dtype)
        return bent - ridge * w

    length = 1 / (1.1 * _largest_eigenvalue(product, problem.linear) + strength)

    def body(state: _Climb) -> _Climb:
        bent = product(state.ahead)
        value = _dual_value(problem, state.ahead, bent, strength, count)
        best = jnp.maximum(state.best, value)
        drift = state.ahead - length * (bent - problem.linear)
        point = _proximal(drift, length, strength, penalty, count)
        change = point - state.point
        # Momentum that points uphill is dropped.
        uphill = jnp.vdot(state.ahead - point, change) > 0
        momentum = (1 + jnp.sqrt(1 + 4 * jnp.square(state.momentum))) / 2
        momentum = jnp.where(uphill, 1, momentum)
        push = jnp.where(uphill, 0, (state.momentum - 1) / momentum)
        step = state.step + 1
        look = step % _WINDOW == 0
        slow = best - state.earlier <= tol * jnp.abs(best)
        return _Climb(
            point=point,
            ahead=point + push * change,
            momentum=momentum,
            best=best,
            earlier=jnp.where(look, best, state.earlier),
            step=step,
            going=~(look & slow) & (step < max_steps),
        )

    nothing = jnp.zeros_like(problem.linear)
    low = jnp.full((), -jnp.inf, nothing.dtype)
    start = _Climb(
        nothing, nothing, jnp.ones_like(low), low, low, jnp.int32(0), strength > 0
    )
    end = jax.lax.while_loop(lambda state: state.going, body, start)
    value = end.best + problem.constant
    gap = (objective - value) / jnp.abs(objective)
    return Bound(value, gap, end.step)


def _largest_eigenvalue(product, like: Float[Array, "n"]) -> Scalar:
    def body(_: Array, v: Array) -> Array:
        return product(v / jnp.maximum(jnp.linalg.norm(v), jnp.finfo(v.dtype).tiny))

    # The gradient at zero is rarely orthogonal to the stiffest direction.
    tilt = jnp.linspace(1, 2, like.shape[0], dtype=like.dtype)
    start = like + tilt * jnp.maximum(jnp.max(jnp.abs(like)), 1)
    return jnp.linalg.norm(jax.lax.fori_loop(0, _POWER_STEPS, body, start))


def _dual_value(
    problem: Problem,
    point: Float[Array, "n"],
    bent: Float[Array, "n"],
    strength: Scalar,
    count: Count,
) -> Scalar:
    """D at a point, whose product with G is given; without the constant."""
    slope = problem.linear - bent
    largest = select.support(slope, count[None], (0,))
    gain = jnp.square(slope) / (2 * strength) - problem.penalty
    gain = jnp.where(largest, jnp.maximum(gain, 0), 0)
    return -jnp.vdot(point, bent) / 2 - jnp.sum(gain)


def _proximal(
    x: Float[Array, "n"],
    length: Scalar,
    strength: Scalar,
    penalty: Scalar,
    count: Count,
) -> Float[Array, "n"]:
    r"""Proximal step of the relaxed penalty: shares $u_j \in [0, 1]$ that add up to k.

    $w_j = x_j u_j / (u_j + \gamma t)$ with $u_j = \operatorname{clip}((|x_j|/s - 1)
    \gamma t, 0, 1)$, where the level s is found by bisection.
    """
    scale = strength * length
    size = jnp.abs(x)

    def shares(level: Scalar) -> Float[Array, "n"]:
        safe = jnp.maximum(level, jnp.finfo(x.dtype).tiny)
        return jnp.clip((size / safe - 1) * scale, 0, 1)

    def halve(_: Array, bracket: tuple[Scalar, Scalar]) -> tuple[Scalar, Scalar]:
        low, high = bracket
        middle = (low + high) / 2
        over = jnp.sum(shares(middle)) > count.astype(x.dtype)
        return jnp.where(over, middle, low), jnp.where(over, high, middle)

    top = jnp.max(size)
    bottom = jnp.zeros_like(top)
    _, level = jax.lax.fori_loop(0, _BISECTIONS, halve, (bottom, top))
    # A penalty sets the least level at which a weight is worth its price.
    level = jnp.maximum(level, length * jnp.sqrt(2 * strength * penalty))
    share = shares(level)
    return x * share / (share + scale)
