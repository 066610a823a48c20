"""Members of the pursuit family that take one unit at a time: OMP and FoBa.

Legend: n weights, u units of selection, s slots (places for members of a support).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from sparserec import _tree
from sparserec._linsolve import matmul
from sparserec._run import Incumbent, Solver, State
from sparserec._types import Params, Scalar
from sparserec.budget import Budget
from sparserec.quadratic import Objective
from sparserec.solvers import _pursuit_common
from sparserec.solvers._box import Box
from sparserec.solvers._pursuit_common import Memory, Options, View
from sparserec.solvers._refit_within import refit_within
from sparserec.solvers._selection import Selection

_REFITTED = 1e-3


class Remaining(NamedTuple):
    r"""The curvature that the support leaves to every weight.

    Attributes:
      diagonal: $H_{jj} - H_{jQ} H_{QQ}^{-1} H_{Qj}$, shape `(n,)`.
      rows: the part of $H$ that the support explains, $H_{\cdot Q} L^{-\top}$ with
        $H_{QQ} = LL^\top$, one row for each member, shape `(s, n)`.
      used: number of rows in use.
    """

    diagonal: Float[Array, "n"]
    rows: Float[Array, "s n"]
    used: Int[Array, ""]


def _absorb(
    curvature: Any, left: Remaining, entry: Int[Array, ""], *, real: Bool[Array, ""]
) -> Remaining:
    """One more member: one column, and its part that the others do not explain."""
    column = curvature.columns(entry[None])[:, 0].astype(left.rows.dtype)
    rest = column - matmul(left.rows[:, entry], left.rows)
    noise = 64 * jnp.finfo(rest.dtype).eps * column[entry]
    pivot = rest[entry]
    usable = real & (pivot > noise)
    row = jnp.where(usable, rest / jnp.sqrt(jnp.where(usable, pivot, 1)), 0)
    return Remaining(
        diagonal=left.diagonal - jnp.square(row),
        rows=left.rows.at[left.used].set(row, mode="drop"),
        used=left.used + usable.astype(jnp.int32),
    )


def _begin_exact(
    objective: Objective,
    selection: Selection,
    options: Options,
    damping: Scalar,
    box: Box | None,
    params: Params,
    budget: Budget,
    args: tuple,
) -> tuple[State, Incumbent]:
    state, incumbent = _pursuit_common.begin(
        objective, selection, options, damping, box, params, budget, args
    )
    curvature: Any = objective.model(params, args).curvature
    diagonal = state.memory.diagonal
    rows = jnp.zeros((options.slots, diagonal.shape[0]), diagonal.dtype)
    left = Remaining(diagonal, rows, jnp.int32(0))
    free = np.flatnonzero(np.asarray(selection.owner) < 0)
    if free.size:
        entries = jnp.asarray(free, jnp.int32)
        left = jax.lax.fori_loop(
            0,
            free.size,
            lambda i, x: _absorb(curvature, x, entries[i], real=jnp.bool_(True)),
            left,
        )
    return state._replace(memory=state.memory._replace(extra=left)), incumbent


def _best_outside(
    selection: Selection,
    gain: Float[Array, "u"],
    chosen: Bool[Array, "u"],
    budget: Budget,
) -> tuple[Int[Array, ""], Bool[Array, ""]]:
    """The unit of largest gain among those that may come in, and whether there is one.

    Ties go to the lowest index.
    """
    room = selection.count(chosen, budget) < budget.counts
    allowed = ~chosen & (selection.owner >= 0) & room[selection.owner]
    known = jnp.where(jnp.isnan(gain), 0, gain)
    best = jnp.argmax(jnp.where(allowed, known, -1)).astype(jnp.int32)
    return best, jnp.any(allowed)


def _omp_step(
    objective: Objective,
    selection: Selection,
    options: Options,
    box: Box | None,
    state: State,
    budget: Budget,
    args: tuple,
    index: Int[Array, ""],
) -> State:
    del index
    view, memory = _pursuit_common.look(objective, selection, box, state, args)
    gain = view.gain
    if options.exact:
        diagonal = memory.extra.diagonal
        known = diagonal > 64 * jnp.finfo(diagonal.dtype).eps * memory.diagonal
        slope = _tree.flatten(view.model.gradient)
        gain = jnp.where(known, jnp.square(slope) / jnp.where(known, diagonal, 1), 0)
    best, found = _best_outside(selection, gain, memory.chosen, budget)
    chosen = memory.chosen.at[best].max(found)
    if options.exact:
        curvature: Any = view.model.curvature
        left = _absorb(curvature, memory.extra, best, real=found)
        memory = memory._replace(extra=left)
    fit = refit_within(
        objective,
        selection.mask(chosen),
        state.params,
        args,
        memory.scales,
        options.slots,
        box,
    )
    return _pursuit_common.conclude(
        state,
        fit,
        selection,
        memory._replace(chosen=chosen),
        accepted=jnp.bool_(True),
        final=~found,
    )


def omp_solver(
    objective: Objective,
    selection: Selection,
    options: Options,
    *,
    damping: Scalar,
    box: Box | None = None,
) -> Solver:
    """Orthogonal matching pursuit as a `Solver`, for use with `run`.

    Args:
      objective: what to minimise, from `sparserec.quadratic.make_objective`.
      selection: the units.
      options: static choices.
      damping: smallest damping of a solve, relative to the mean curvature.
      box: bounds of the weights; `None` for none.

    Returns:
      The pair of init and step.
    """
    begin = _begin_exact if options.exact else _pursuit_common.begin
    return Solver(
        init=Partial(begin, objective, selection, options, damping, box),
        step=Partial(_omp_step, objective, selection, options, box),
    )


def _begin_foba(
    objective: Objective,
    selection: Selection,
    options: Options,
    damping: Scalar,
    box: Box | None,
    params: Params,
    budget: Budget,
    args: tuple,
) -> tuple[State, Incumbent]:
    state, incumbent = _pursuit_common.begin(
        objective, selection, options, damping, box, params, budget, args
    )
    gains = jnp.zeros(selection.units.size + 1, state.objective.dtype)
    return state._replace(memory=state.memory._replace(extra=gains)), incumbent


def _foba_step(
    objective: Objective,
    selection: Selection,
    options: Options,
    share: Scalar,
    box: Box | None,
    state: State,
    budget: Budget,
    args: tuple,
    index: Int[Array, ""],
) -> State:
    del index
    view, memory = _pursuit_common.look(objective, selection, box, state, args)
    gains = memory.extra
    size = jnp.sum(selection.count(memory.chosen, budget))
    worst, cost = _cheapest(objective, selection, view, memory, state, args)
    # Where a refit got stuck, gains and costs are no longer those of optimal values.
    refitted = state.stationarity <= _REFITTED
    backward = refitted & (size > 0) & (cost < share.astype(cost.dtype) * gains[size])
    best, found = _best_outside(selection, view.gain, memory.chosen, budget)
    forward = found & ~backward
    chosen = memory.chosen.at[best].max(forward)
    chosen = chosen.at[worst].min(~backward)
    fit = refit_within(
        objective,
        selection.mask(chosen),
        state.params,
        args,
        memory.scales,
        options.slots,
        box,
    )
    gained = jnp.where(forward, state.objective - fit.value, gains[size + 1])
    gains = gains.at[size + 1].set(gained, mode="drop")
    return _pursuit_common.conclude(
        state,
        fit,
        selection,
        memory._replace(chosen=chosen, extra=gains),
        accepted=jnp.bool_(True),
        final=~forward & ~backward,
    )


def _cheapest(
    objective: Objective,
    selection: Selection,
    view: View,
    memory: Memory,
    state: State,
    args: tuple,
) -> tuple[Int[Array, ""], Scalar]:
    """The unit whose loss costs least without a refit, and by how much."""
    member = memory.chosen & (selection.owner >= 0)
    loss = jnp.where(member, view.loss, jnp.inf)
    # The last of equal ones, so that ties leave the lowest indices.
    worst = (loss.shape[0] - 1 - jnp.argmin(loss[::-1])).astype(jnp.int32)
    without = selection.mask(memory.chosen.at[worst].set(False))
    value = objective.value(_tree.keep(without, state.params), args)
    return worst, value - state.objective


def foba_solver(
    objective: Objective,
    selection: Selection,
    options: Options,
    *,
    damping: Scalar,
    share: Scalar,
    box: Box | None = None,
) -> Solver:
    """Forward-backward selection as a `Solver`, for use with `run`.

    Args:
      objective: what to minimise, from `sparserec.quadratic.make_objective`.
      selection: the units.
      options: static choices.
      damping: smallest damping of a solve, relative to the mean curvature.
      share: of the last gain, below which a unit is taken out again.
      box: bounds of the weights; `None` for none.

    Returns:
      The pair of init and step.
    """
    return Solver(
        init=Partial(_begin_foba, objective, selection, options, damping, box),
        step=Partial(_foba_step, objective, selection, options, share, box),
    )
