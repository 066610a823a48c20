"""What the members of the pursuit family share: how they begin, what they look at.

Legend: n weights, u units of selection.
"""

import dataclasses
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from sparserec import _tree
from sparserec._run import Incumbent, Solver, State
from sparserec._solution import Solution
from sparserec._types import LossFn, Params, Prunable, Scalar
from sparserec.budget import Budget
from sparserec.quadratic import Objective, QuadraticModel
from sparserec.quadratic._model import mean_curvature
from sparserec.solvers import _box, _front, _states
from sparserec.solvers._box import Box
from sparserec.solvers._columns import flat_diagonal, rounded
from sparserec.solvers._refit import Fit, Scales, by_products
from sparserec.solvers._refit_within import refit_within
from sparserec.solvers._selection import (
    Selection,
    known_counts,
    make_selection,
    most_entries,
)

UnitCount = int | Array | Mapping[str, int | Array]
"""Units to keep: in all, or by leaf path."""

Bound = Params | float | None
"""Least or largest values: one for all weights, or shaped like the params."""


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Options:
    """The static choices of the family.

    Attributes:
      slots: most weights on a support, merged ones included.
      propose: from a view to the next support, for those that exchange.
      warm: whether the start says more than the values of what is never pruned.
      merge: how many times k units are merged into a support.
      local: whether a merged support is fitted by the local model alone.
      exact: whether gains of single weights include the refit.
    """

    slots: int
    propose: Any = None
    warm: bool = True
    merge: int = 1
    local: bool = True
    exact: bool = False


def solve(
    make_solver: Callable[..., Solver],
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: UnitCount,
    *,
    groups: Params | None,
    max_kept: int | None,
    damping: Scalar | float,
    lower: Bound,
    upper: Bound,
    prunable: Prunable,
    max_steps: Any,
    passes: int | None = None,
    choices: Mapping[str, Any] = types.MappingProxyType({}),
    **common: Any,
) -> Solution:
    """The way from the user's call to a `Solution` that the family shares.

    `choices` are those of `Options`. Shapes follow from k, or from `max_kept`: places
    for the members of a support, and for the solvers that pass over the units one
    by one, `passes` times at most, the steps.
    """
    selection, budget = make_selection(k, params, prunable, groups)
    _front.check_weight("damping", damping)
    counts = known_counts(k, params, budget)
    if max_kept is not None:
        budget, counts = _limited(budget, counts, max_kept)
    times = 1 + choices.get("merge", 0)
    merged = None if counts is None else [times * count for count in counts]
    slots = rounded(most_entries(selection, budget, merged), selection.layout.size)
    if passes is not None and max_steps is None:
        units = sum(budget.sizes if counts is None else counts)
        max_steps = passes * rounded(units + 1, sum(budget.sizes) + 1)
    options = Options(slots, **choices)
    wide = _tree.dtype(_tree.to_working_precision(params))
    box = _box.make_box(lower, upper, params, prunable)
    return _front.solve(
        lambda objective, _: make_solver(
            objective, selection, options, damping=jnp.asarray(damping, wide), box=box
        ),
        loss_fn,
        params,
        budget,
        prunable=prunable,
        max_steps=max_steps,
        **common,
    )


def _limited(
    budget: Budget, counts: list[int] | None, max_kept: int
) -> tuple[Budget, list[int]]:
    """The budget of a sweep, and the units that its shapes are made for."""
    _front.check_positive_int("max_kept", max_kept)
    if counts is not None and sum(counts) > max_kept:
        raise ValueError(
            f"`max_kept={max_kept}` is below the number to keep, {sum(counts)}."
        )
    # More than there are places for must not be lost on the way.
    largest = jnp.minimum(budget.counts, jnp.int32(max_kept))
    limits = [min(max_kept, size) for size in budget.sizes]
    return dataclasses.replace(budget, counts=largest), limits


def check_exchange(exchange: Any) -> None:
    """Raises unless the largest exchange is an integer of at least one."""
    if isinstance(exchange, jax.Array) and exchange.ndim == 0:
        exchange = exchange if isinstance(exchange, Tracer) else exchange.item()
    if not isinstance(exchange, Tracer):
        _front.check_positive_int("exchange", exchange)


class Memory(NamedTuple):
    """What the solvers of the family carry along.

    Attributes:
      chosen: units on the support, shape `(u,)`.
      diagonal: diagonal of $H$, positive, shape `(n,)`.
      scales: to what numbers are compared.
      refused: supports refused since the last one that was accepted.
      extra: whatever one member needs besides.
    """

    chosen: Bool[Array, "u"]
    diagonal: Float[Array, "n"]
    scales: Scales
    refused: Int[Array, ""]
    extra: Any = ()


class View(NamedTuple):
    r"""What a refitted point says about its units.

    Attributes:
      model: local model there.
      diagonal: $d$, positive, shaped like the params.
      gain: $\sum_j g_j^2/d_j$ of every unit, shape `(u,)`; less within bounds.
      loss: $\sum_j d_j w_j^2$ of every unit, shape `(u,)`; more at a bound.
      box: bounds of the weights; `None` for none.
    """

    model: QuadraticModel
    diagonal: Params
    gain: Float[Array, "u"]
    loss: Float[Array, "u"]
    box: Box | None


def _positive_diagonal(model: QuadraticModel) -> tuple[Float[Array, "n"], Scalar]:
    """The diagonal, its mean where it is not positive or not known, and that mean."""
    wide = _tree.dtype(model.center)
    mean = mean_curvature(model.curvature).astype(wide)
    mean = jnp.maximum(mean, jnp.finfo(wide).tiny)
    if by_products(model.curvature):
        return jnp.full(_tree.size(model.center), mean), mean
    diagonal = flat_diagonal(model.curvature).astype(wide)
    noise = jnp.finfo(wide).eps * mean
    return jnp.where(diagonal > noise, diagonal, mean), mean


def begin(
    objective: Objective,
    selection: Selection,
    options: Options,
    damping: Scalar,
    box: Box | None,
    params: Params,
    budget: Budget,
    args: tuple,
) -> tuple[State, Incumbent]:
    """A refit on the support of the start; what is never pruned is always in it.

    Returns:
      The state, and the projection of the start as the point to fall back to.
    """
    params = _box.clip(box, params)
    sizes = selection.sums(jax.tree.map(jnp.square, params))
    top = selection.top(sizes, budget.counts)
    largest = selection.mask(top)
    projection = _tree.keep(largest, params)
    value = objective.value(projection, args)
    free = jnp.asarray(selection.owner < 0)
    chosen = free | (top & (sizes > 0)) if options.warm else free
    mask = selection.mask(chosen)
    model = objective.model(_tree.keep(mask, params), args)
    diagonal, mean = _positive_diagonal(model)
    bend = mean * _tree.norm(projection)
    scales = Scales(
        damping=damping.astype(value.dtype),
        curvature=mean,
        gradient=_states.gradient_scale(-jnp.ones_like(value), model.gradient, bend),
        loss=8
        * jnp.finfo(value.dtype).eps
        * jnp.maximum(jnp.abs(value), jnp.abs(model.value)),
    )
    fit = refit_within(objective, mask, params, args, scales, options.slots, box)
    memory = Memory(
        chosen, diagonal, scales._replace(gradient=fit.gradient), jnp.int32(0)
    )
    state = _states.begin(fit.params, mask, fit.value, memory, settled=True)
    return state, Incumbent(projection, largest, value)


def look(
    objective: Objective,
    selection: Selection,
    box: Box | None,
    state: State,
    args: tuple,
) -> tuple[View, Memory]:
    """The view from the iterate, and the memory with its diagonal and scales."""
    model = objective.model(state.params, args)
    memory = state.memory
    if not objective.is_quadratic:
        diagonal, mean = _positive_diagonal(model)
        memory = memory._replace(
            diagonal=diagonal, scales=memory.scales._replace(curvature=mean)
        )
    wide = _tree.layout(state.params).split(memory.diagonal)
    shaped = _tree.cast_like(wide, state.params)
    if box is None:
        gain = jax.tree.map(lambda g, d: jnp.square(g) / d, model.gradient, shaped)
        loss = jax.tree.map(lambda w, d: jnp.square(w) * d, state.params, shaped)
    else:
        # Outside the weights are zero, and members at a bound have a gradient.
        point = jax.tree.map(
            lambda w, g, d: w - g / d, state.params, model.gradient, shaped
        )
        gain = loss = _box.worth(box, point, shaped)
    view = View(model, shaped, selection.sums(gain), selection.sums(loss), box)
    return view, memory


def conclude(
    state: State,
    fit: Fit,
    selection: Selection,
    memory: Memory,
    *,
    accepted: Bool[Array, ""],
    final: Bool[Array, ""],
) -> State:
    """The state after a refit, or the old one where its support is refused.

    Args:
      state: before the step.
      fit: refit on the units chosen in `memory`.
      selection: the units.
      memory: of the new support.
      accepted: whether the new support is taken.
      final: whether there is nothing else to try, so that little change is the end.

    Returns:
      The next state.
    """
    old = state.memory
    params = _tree.where(accepted, fit.params, state.params)
    chosen = jnp.where(accepted, memory.chosen, old.chosen)
    change = _states.relative_change(params, state.params)
    return State(
        params=params,
        mask=selection.mask(chosen),
        objective=jnp.where(accepted, fit.value, state.objective),
        change=jnp.where(final, change, jnp.maximum(change, 1)),
        stationarity=jnp.where(accepted, fit.slope, state.stationarity),
        damping=state.damping,
        settled=state.settled,
        failure=state.failure,
        memory=memory._replace(
            chosen=chosen, scales=memory.scales._replace(gradient=fit.gradient)
        ),
    )
