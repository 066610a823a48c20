"""All budgets by a solver that starts at its neighbors: groups, and bounds.

Up, every k starts from the answer at k - 1, and down again from that at k + 1; the
better of the two is kept.

Legend: K budgets from 1 to K, g budget groups.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparserec import _tree
from sparserec._run import Solver, run
from sparserec._types import Count, Mask, Params
from sparserec.budget import Budget
from sparserec.quadratic import Objective
from sparserec.recovery._record import Path, monotone
from sparserec.solvers._box import Box
from sparserec.solvers._l0cd_types import Options as DescentOptions
from sparserec.solvers._l0cd_types import Weights
from sparserec.solvers._pursuit_common import Options
from sparserec.solvers._pursuit_exchange import by_splicing, exchange_solver
from sparserec.solvers._selection import Selection
from sparserec.solvers.l0cd import l0cd_solver

_MAX_STEPS = 200
_TOL = 1e-6
_EXCHANGE = 5  # most units that splicing exchanges at a time


class _Point(NamedTuple):
    params: Params
    mask: Mask
    objective: Float[Array, ""]
    status: Int[Array, ""]
    moves: Count


@functools.partial(jax.jit, static_argnames=("slots", "k_max"))
def warm_path(
    objective: Objective,
    selection: Selection,
    params: Params,
    budget: Budget,
    args: tuple,
    weights: Weights,
    box: Box | None,
    *,
    slots: int,
    k_max: int,
) -> Path:
    """Supports, values and objectives for every k from 1 to `k_max`.

    Args:
      objective: what is minimised.
      selection: the units that are counted.
      params: where the weights that are never pruned start.
      budget: which units may go; its count is not used.
      args: data of the loss.
      weights: of the penalties; only for single weights.
      box: bounds of the weights; `None` for none.
      slots: places for members; static.
      k_max: largest budget; static.

    Returns:
      The path, with objectives that do not rise in k.
    """
    solver = _solver(objective, selection, weights, box, slots)
    ks = jnp.arange(1, k_max + 1, dtype=jnp.int32)

    def visit(start: Params, k: Count) -> tuple[Params, _Point]:
        here = dataclasses.replace(budget, counts=k[None])
        found = run(solver, start, here, args, tol=_TOL, max_steps=_MAX_STEPS)
        point = _Point(
            found.params, found.mask, found.objective, found.status, found.iterations
        )
        return found.params, point

    # One scan, so that the solver is compiled once.
    _, points = jax.lax.scan(visit, params, jnp.concatenate([ks, ks[::-1]]))
    rising = jax.tree.map(lambda x: x[:k_max], points)
    falling = jax.tree.map(lambda x: x[k_max:][::-1], points)
    better = falling.objective < rising.objective

    def choose(a: Array, b: Array) -> Array:
        return jnp.where(better.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

    chosen = jax.tree.map(choose, falling, rising)
    finite = jnp.isfinite(chosen.objective)
    order = monotone(jnp.where(finite, chosen.objective, jnp.inf))
    best = jax.tree.map(lambda x: x[order], chosen)
    return Path(
        ks=ks,
        params=best.params,
        mask=best.mask,
        kept=jax.vmap(functools.partial(_kept, selection, budget))(best.mask),
        objective=best.objective,
        gain=jnp.full_like(best.objective, jnp.nan),
        status=best.status,
        moves=jnp.sum(points.moves),
    )


def _solver(
    objective: Objective,
    selection: Selection,
    weights: Weights,
    box: Box | None,
    slots: int,
) -> Solver:
    """Splicing for groups, for single weights the exact exchanges of l0cd."""
    if selection.unit is None:
        options = DescentOptions(slots)
        return l0cd_solver(objective, options=options, weights=weights, box=box)
    return exchange_solver(
        objective,
        selection,
        Options(slots, propose=by_splicing),
        damping=jnp.zeros_like(weights.l2),
        extra=_EXCHANGE,
        box=box,
    )


def _kept(selection: Selection, budget: Budget, mask: Mask) -> Count:
    """Units of which a weight is kept, without those that are always in."""
    flat = _tree.flatten(mask)
    if selection.unit is not None:
        unit = jnp.asarray(selection.unit)
        flat = jnp.zeros(selection.units.size, bool).at[unit].max(flat)
    return jnp.sum(selection.count(flat, budget))
