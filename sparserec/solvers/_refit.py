"""Values on a support: Newton steps restricted to it, damped where the loss rises.

Legend: n weights, s slots (places for members of a support).
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sparserec import _linsolve, _tree
from sparserec._linsolve import LinearSolve, while_loop
from sparserec._types import Mask, Params, Scalar, Status
from sparserec.quadratic import Curvature, Dense, LowRank, Objective
from sparserec.solvers import _states
from sparserec.solvers._columns import stored_block
from sparserec.solvers._starts import slots_of

_ROUNDS = 60
"""Most models built in one refit."""

_RAISE, _LARGEST = 100, 1e12
"""Factor between dampings, and the one, in mean curvatures, at which to give up."""


class Scales(NamedTuple):
    """To what numbers are compared; none of them depends on units.

    Attributes:
      damping: smallest damping of a solve, relative to the mean curvature.
      curvature: mean absolute diagonal of $H$.
      gradient: largest norm of a full gradient so far.
      loss: by how much a loss may rise from rounding.
    """

    damping: Scalar
    curvature: Scalar
    gradient: Scalar
    loss: Scalar


class Fit(NamedTuple):
    """A point refitted on a support.

    Attributes:
      params: zero off the support.
      value: loss there.
      slope: norm of the gradient on the support, relative to the scale of gradients.
      gradient: that scale, the largest norm of a full gradient so far.
    """

    params: Params
    value: Scalar
    slope: Scalar
    gradient: Scalar


class _Round(NamedTuple):
    fit: Fit
    damping: Scalar  # absolute
    rounds: Int[Array, ""]
    done: Bool[Array, ""]


def by_products(curvature: Any) -> bool:
    """Whether a curvature is known by its products only."""
    return hasattr(curvature, "mean_diagonal")


def solve_on(
    curvature: Curvature, mask: Mask, rhs: Params, damping: Scalar, slots: int
) -> LinearSolve:
    """Solves on a support of at most `slots` weights, by a matrix of that width.

    Curvatures without columns, and supports that may be everything, are solved by
    the curvature itself.
    """
    size = _tree.size(rhs)
    stored = isinstance(curvature, Dense | LowRank) or hasattr(curvature, "block")
    if slots >= size or not stored:
        return curvature.solve_on(mask, rhs, damping)
    index, filled = slots_of(_tree.flatten(mask), slots)
    inner = _linsolve.restrict(stored_block(curvature, index), filled, damping)
    target = jnp.where(filled, _tree.flatten(rhs)[index], 0)
    found, succeeded = _linsolve.solve_positive(inner, target)
    found = jnp.where(filled, found, 0)
    flat = jnp.zeros(size, found.dtype).at[index].add(found)
    value = _tree.cast_like(_tree.layout(rhs).split(flat), rhs)
    return LinearSolve(value, _linsolve.direct_status(succeeded, found))


def refit(
    objective: Objective,
    mask: Mask,
    params: Params,
    args: tuple,
    scales: Scales,
    slots: int,
) -> Fit:
    r"""Minimises a loss on a support by damped Newton steps restricted to it.

    $$w_Q \leftarrow w_Q - (H_{QQ} + \lambda I)^{-1} g_Q$$

    The damping is next to nothing until a solve fails or the loss rises; then it
    grows until a step is accepted, and falls again. On a quadratic model with a
    stored curvature one solve ends it.

    Args:
      objective: what is minimised.
      mask: the support $Q$.
      params: where to start; entries off the support are dropped.
      args: data of the loss.
      scales: see `Scales`.
      slots: most weights on a support; static.

    Returns:
      The refitted point. Its loss is never above that of the start; where the loss
      of the start is not finite, the start itself.

    Source: Levenberg (1944), Marquardt (1963) for the damping.
    """
    info = jnp.finfo(_tree.dtype(params))
    small = float(info.eps) ** 0.625
    floor = (scales.damping + 16 * float(info.eps)) * scales.curvature
    start = _tree.keep(mask, params)

    def body(state: _Round) -> _Round:
        fit, shift = state.fit, state.damping
        model = objective.model(fit.params, args)
        gradient = _tree.keep(mask, model.gradient)
        bend = scales.curvature * _tree.norm(fit.params)
        scale = _states.gradient_scale(fit.gradient, model.gradient, bend)
        slope = _tree.norm(gradient) / scale
        solved = solve_on(
            model.curvature, mask, _tree.scale(-1, gradient), shift, slots
        )
        trial = _tree.add(fit.params, solved.value)
        value = objective.value(trial, args)
        # At an optimum a step is noise, which a singular curvature would blow up.
        there = slope <= small
        falls = _linsolve.usable(solved.status) & (value <= fit.value + scales.loss)
        accepted = falls & ~there
        # Steps that are full and solved exactly leave the square of the slope.
        full = accepted & (shift <= floor) & (scales.damping == 0)
        stored = objective.is_quadratic and not by_products(model.curvature)
        exact = solved.status == Status.CONVERGED
        ends = full & exact & (stored | (slope <= small**0.5))
        hopeless = ~accepted & (shift > _LARGEST * scales.curvature)
        left = jnp.where(ends, jnp.zeros_like(slope), slope)
        return _Round(
            fit=Fit(
                params=_tree.where(accepted, trial, fit.params),
                value=jnp.where(accepted, value, fit.value),
                slope=left,
                gradient=scale,
            ),
            damping=jnp.where(
                accepted, jnp.maximum(shift / _RAISE, floor), _RAISE * shift
            ),
            rounds=state.rounds + 1,
            done=there | ends | hopeless | ~jnp.isfinite(fit.value),
        )

    value = objective.value(start, args)
    first = Fit(start, value, jnp.ones_like(value), scales.gradient)
    end = while_loop(
        lambda state: ~state.done & (state.rounds < _ROUNDS),
        body,
        _Round(first, floor, jnp.int32(0), jnp.bool_(False)),
        on_host=objective.on_host,
    )
    return end.fit
