"""Values on a support, within bounds: Newton steps on the weights that are free."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sparserec import _linsolve, _tree
from sparserec._linsolve import while_loop
from sparserec._types import Mask, Params, Scalar, Status
from sparserec.quadratic import Objective
from sparserec.solvers import _box, _states
from sparserec.solvers._box import Box
from sparserec.solvers._refit import Fit, Scales, by_products, refit, solve_on
from sparserec.solvers._starts import slots_of

_ROUNDS = 300
"""Most models built in one refit; about one for every bound that is met."""

_RAISE, _LARGEST = 100, 1e12
"""Factor between dampings, and the one, in mean curvatures, at which to give up."""


class _Round(NamedTuple):
    fit: Fit
    held: Mask  # left at their bounds until the others are minimised
    solved: Mask  # the weights over which the last step has minimised the loss, if any
    mark: Scalar  # loss when nothing was held the last time
    damping: Scalar  # absolute
    rounds: Int[Array, ""]
    done: Bool[Array, ""]


def refit_within(
    objective: Objective,
    mask: Mask,
    params: Params,
    args: tuple,
    scales: Scales,
    slots: int,
    box: Box | None,
) -> Fit:
    r"""Minimises a loss on a support within bounds.

    A Newton step on the members that are free (not at a bound which a descent would
    cross), cut off at the bounds, is taken if the loss falls. If not, the step goes
    only as far as the first bound, and the weights that meet it are held there until
    the others are minimised. Damping as in `refit`.

    Args:
      objective: what is minimised.
      mask: the support.
      params: where to start; entries off the support are dropped.
      args: data of the loss.
      scales: see `Scales`.
      slots: most weights on a support; static.
      box: bounds of the weights; `None` for a plain `refit`.

    Returns:
      The refitted point. It ends where the gradient of the free members is gone, or
      where the same members are free after a full step. Its loss is never above that
      of the start, moved into the bounds.

    Source: Bertsekas (1982) for projected Newton steps; Lawson & Hanson (1974) and
    Stark & Parker (1995) for the steps to the first bound.
    """
    part = _on_support(objective, mask, params, args, slots, box)
    if part is not None:
        places, index, values, (own, data), own_box = part
        fit = refit_within(own, places, values, data, scales, slots, own_box)
        zeros = _tree.zeros_like(params)
        return fit._replace(params=_tree.with_entries(zeros, index, fit.params))
    if box is None:
        return refit(objective, mask, params, args, scales, slots)
    info = jnp.finfo(_tree.dtype(params))
    small = float(info.eps) ** 0.625
    floor = (scales.damping + 16 * float(info.eps)) * scales.curvature
    nothing = jax.tree.map(jnp.zeros_like, mask)

    def body(state: _Round) -> _Round:
        fit, shift = state.fit, state.damping
        model = objective.model(fit.params, args)
        free = _box.movable(box, mask, fit.params, model.gradient)
        bend = scales.curvature * _tree.norm(fit.params)
        scale = _states.gradient_scale(fit.gradient, model.gradient, bend)
        slope = _tree.norm(_tree.keep(free, model.gradient)) / scale
        there = (slope <= small) | _equal(free, state.solved)
        live = jax.tree.map(lambda f, h: f & ~h, free, state.held)
        target = _tree.scale(-1, _tree.keep(live, model.gradient))
        solved = solve_on(model.curvature, live, target, shift, slots)
        sound = _linsolve.usable(solved.status) & ~there
        aim = _tree.add(fit.params, solved.value)
        whole = _tree.keep(mask, _box.clip(box, aim))
        part, met = _to_first_bound(box, live, fit.params, solved.value)
        cut = ~_equal(whole, aim)
        values = [objective.value(point, args) for point in (whole, part)]
        slack = jnp.where(cut, -scales.loss, scales.loss)
        taken = sound & (values[0] <= fit.value + slack)
        partly = sound & ~taken & cut & (values[1] <= fit.value + scales.loss)
        stored = objective.is_quadratic and not by_products(model.curvature)
        exact = (solved.status == Status.CONVERGED) & (shift <= floor) & stored
        minimised = taken & ~cut & exact & (scales.damping == 0)
        holding = jnp.any(_tree.flatten(state.held))
        # Letting go of what was held has led back to the same point.
        stalled = minimised & holding & (values[0] > state.mark - scales.loss)
        value = jnp.where(taken, values[0], jnp.where(partly, values[1], fit.value))
        point = _tree.where(partly, part, fit.params)
        hopeless = ~taken & ~partly & (shift > _LARGEST * scales.curvature)
        lower = jnp.maximum(shift / _RAISE, floor)
        return _Round(
            fit=Fit(
                params=_tree.where(taken, whole, point),
                value=value,
                slope=jnp.where(stalled | there, jnp.minimum(slope, small), slope),
                gradient=scale,
            ),
            held=jax.tree.map(
                lambda h, m: (h | (m & partly)) & ~taken, state.held, met
            ),
            solved=jax.tree.map(lambda x: x & minimised, live),
            mark=jnp.where(taken, value, state.mark),
            damping=jnp.where(taken, lower, jnp.where(partly, shift, _RAISE * shift)),
            rounds=state.rounds + 1,
            done=there | stalled | hopeless | ~jnp.isfinite(fit.value),
        )

    start = _tree.keep(mask, _box.clip(box, params))
    value = objective.value(start, args)
    first = Fit(start, value, jnp.ones_like(value), scales.gradient)
    end = while_loop(
        lambda state: ~state.done & (state.rounds < _ROUNDS),
        body,
        _Round(first, nothing, nothing, value, floor, jnp.int32(0), jnp.bool_(False)),
        on_host=objective.on_host,
    )
    return end.fit


def _on_support(
    objective: Objective,
    mask: Mask,
    params: Params,
    args: tuple,
    slots: int,
    box: Box | None,
):
    """Everything that a refit needs as vectors of the slots, if models are cheaper so.

    A Hessian that is known by products only stays so: there a solve takes fewer
    products than there are members.
    """
    size = _tree.size(params)
    stored = size <= getattr(objective.curvature, "dense_limit", size)
    if slots >= size or not stored:
        return None
    places = slots_of(_tree.flatten(mask), slots)
    index = places.index
    own = objective.on_support(params, args, index)
    if own is None:
        return None
    values = jnp.where(places.filled, _tree.flatten(params)[index], 0)
    if box is not None:
        wide = values.dtype
        box = Box(*(_tree.flatten(x).astype(wide)[index] for x in box))
    return places.filled, index, values, own, box


def _to_first_bound(
    box: Box, live: Mask, params: Params, step: Params
) -> tuple[Params, Mask]:
    """The point where a step meets its first bound, and the weights that meet one."""

    def room(m, x, s, low, high):
        ahead = jnp.where(s > 0, high.astype(x.dtype), low.astype(x.dtype)) - x
        share = ahead / jnp.where(s == 0, 1, s)
        return jnp.where(m & (s != 0), jnp.maximum(share, 0), jnp.inf)

    shares = jax.tree.map(room, live, params, step, box.lower, box.upper)
    length = jnp.minimum(jnp.min(_tree.flatten(shares)), 1)
    met = jax.tree.map(lambda s: s <= length, shares)
    point = _box.clip(box, _tree.add_scaled(params, length, step))
    # Not a rounding away from the bound.
    point = jax.tree.map(
        lambda m, p, s, low, high: jnp.where(
            m, jnp.where(s > 0, high.astype(p.dtype), low.astype(p.dtype)), p
        ),
        met,
        point,
        step,
        box.lower,
        box.upper,
    )
    return jax.tree.map(lambda p, x, m: jnp.where(m, p, x), point, params, live), met


def _equal(a: Params, b: Params) -> Bool[Array, ""]:
    return jnp.all(_tree.flatten(a) == _tree.flatten(b))
