"""Values on a support for l0cd on a loss: a few Newton steps.

Legend: n weights, s slots (places for members of a support).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sparserec import _tree
from sparserec._types import Params, Scalar
from sparserec.budget import Budget
from sparserec.quadratic import Objective
from sparserec.solvers import _starts
from sparserec.solvers._columns import group_of_entries, make_problem
from sparserec.solvers._l0cd_types import Weights, penalties
from sparserec.solvers._members import Slots

_REFITS = 4  # models on one support before its loss is compared
_HALVINGS = 10  # of a step of a refit


class Candidate(NamedTuple):
    """A support with its values and the objective there."""

    params: Params
    slots: Slots
    objective: Scalar


def refit(
    objective: Objective,
    weights: Weights,
    budget: Budget,
    args: tuple,
    params: Params,
    slots: Slots,
) -> Candidate:
    """A few Newton steps on a support, each halved until the loss falls.

    Where the loss can be restricted to it, no step sees the rest of the weights.
    """
    own = objective.on_support(params, args, slots.index)
    if own is None:
        inside = jnp.zeros(_tree.size(params), bool).at[slots.index].max(slots.filled)
        start = _tree.keep(_tree.layout(params).split(inside), params)

        def price(params: Params) -> Scalar:
            return penalties(params, budget, weights)

        found, best = _newton_steps(
            (objective, args), weights, budget, price, start, slots
        )
        return Candidate(found, slots, best)
    owner = group_of_entries(budget, _tree.layout(params))[slots.index]

    def price_of_part(part: Array) -> Scalar:
        count = jnp.sum((part != 0) & (owner >= 0), dtype=jnp.int32)
        ridge = weights.l2 * jnp.vdot(part, part)
        return weights.penalty * count.astype(part.dtype) + ridge

    part = jnp.where(slots.filled, _tree.flatten(params)[slots.index], 0)
    places = Slots(jnp.arange(part.size, dtype=jnp.int32), slots.filled)
    part, best = _newton_steps(own, weights, budget, price_of_part, part, places)
    whole = _tree.with_entries(_tree.zeros_like(params), slots.index, part)
    return Candidate(whole, slots, best)


def _newton_steps(
    objective: tuple[Objective, tuple],
    weights: Weights,
    budget: Budget,
    price: Callable[[Params], Scalar],
    start: Params,
    slots: Slots,
) -> tuple[Params, Scalar]:
    loss, args = objective
    layout = _tree.layout(start)
    # Solves look at the members alone: which budget they belong to says nothing.
    together = dataclasses.replace(
        budget, groups=(0,) * len(layout.shapes), sizes=(layout.size,)
    )

    def value(params: Params) -> Scalar:
        total = loss.value(params, args) + price(params)
        return jnp.where(jnp.isfinite(total), total, jnp.inf)

    def newton(_: Array, state: tuple[Params, Scalar]) -> tuple[Params, Scalar]:
        params, best = state
        model = loss.model(params, args)
        problem = make_problem(model, together, l2=weights.l2)
        target = _starts.refitted(problem, slots)
        usable = slots.filled & jnp.isfinite(target)
        flat = jnp.zeros_like(problem.linear)
        flat = flat.at[slots.index].add(jnp.where(usable, target, 0))
        goal = _tree.cast_like(layout.split(flat), params)
        step = _tree.sub(goal, params)

        def trial(length: Scalar) -> tuple[Params, Scalar, Scalar]:
            point = _tree.add_scaled(params, length, step)
            return point, value(point), length

        def halve(state: tuple[Params, Scalar, Scalar]):
            return trial(state[2] / 2)

        point, there, _ = jax.lax.while_loop(
            lambda s: (s[1] > best) & (s[2] > 2.0**-_HALVINGS),
            halve,
            trial(jnp.ones((), best.dtype)),
        )
        better = there <= best
        return _tree.where(better, point, params), jnp.where(better, there, best)

    params, best = jax.lax.fori_loop(0, _REFITS, newton, (start, value(start)))
    return params, best.astype(_tree.dtype(params))


def select(condition: Array, a: Candidate, b: Candidate) -> Candidate:
    """The first candidate where the condition holds, the second elsewhere."""
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
