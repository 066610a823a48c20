"""How far an answer is from its best neighbor, whoever found it."""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Int

from sparserec import _tree
from sparserec._solution import Solution
from sparserec._types import LossFn, Params, Prunable, Scalar
from sparserec.budget import make_budget, matrices, prunable_leaves
from sparserec.quadratic import CurvatureFn, QuadraticModel, hessian, make_objective
from sparserec.solvers import _box
from sparserec.solvers._box_search import place, refitted
from sparserec.solvers._columns import make_problem, rounded
from sparserec.solvers._l0cd_types import problem_value
from sparserec.solvers._members import factorise
from sparserec.solvers._members import objective as refitted_value
from sparserec.solvers._starts import slots_of
from sparserec.solvers._swaps import best_move


class Certificate(NamedTuple):
    """How far a solution is from its best neighbor.

    Attributes:
      gain: by how much the best exchange, addition or removal of one weight, with a
        full refit, would lower the objective, shape `()`; negative where every one
        raises it, minus infinity where there is none.
      relative: the same as a share of the magnitude of the objective.
      entering: flat index of the weight that it would bring in, int32; -1 if none.
      leaving: flat index of the weight that it would take out, int32; -1 if none.
      refit: by how much a refit on the same support would lower the objective.
    """

    gain: Scalar
    relative: Scalar
    entering: Int[Array, ""]
    leaving: Int[Array, ""]
    refit: Scalar


def certificate(
    loss_fn: LossFn | QuadraticModel,
    solution: Solution,
    k: int | Array | Mapping[str, int | Array] | None = None,
    *,
    args: tuple = (),
    curvature: CurvatureFn = hessian,
    penalty: Scalar | float = 0.0,
    l2: Scalar | float = 0.0,
    lower: Params | float | None = None,
    upper: Params | float | None = None,
    prunable: Prunable = matrices,
) -> Certificate:
    r"""The best that one exchange, addition or removal could still do.

    Computed from nothing but the model and the support of the solution, whoever found
    it. For a loss that is no quadratic model, it speaks of its local model at the
    solution.

    Args:
      loss_fn: what was minimised: a loss, or a `QuadraticModel`.
      solution: of any solver.
      k: the budget; `None` for as many as the solution keeps.
      args: data handed to the loss.
      curvature: builds the local model.
      penalty: $\lambda_0$, as in `l0cd`.
      l2: $\lambda_2$, as in `l0cd`.
      lower: least values of the weights, as in `l0cd`. Within bounds there is no closed
        form for a refit: all exchanges are refitted one by one, k(n - k) small solves.
      upper: largest values, as in `l0cd`.
      prunable: which leaves may be pruned.

    Returns:
      A `Certificate`. NaN where the curvature on the support is not positive
      definite.

    Raises:
      TypeError: a traced solution.
      ValueError: see `sparserec.l0cd`.
    """
    if isinstance(solution.status, Tracer):
        raise TypeError(
            "`certificate` sizes its arrays by the support, so it must be called "
            "outside `jax.jit` and `jax.vmap`."
        )
    params = _tree.to_working_precision(solution.params)
    flags = prunable_leaves(params, prunable)
    kept = sum(
        int(jnp.sum(m))
        for m, c in zip(jax.tree.leaves(solution.mask), flags, strict=True)
        if c
    )
    budget = make_budget(kept if k is None else k, params, prunable)
    objective = make_objective(loss_fn, curvature)
    fixed = sum(
        x.size for x, c in zip(jax.tree.leaves(params), flags, strict=True) if not c
    )
    wide = _tree.dtype(params)
    prices = jnp.asarray(penalty, wide), jnp.asarray(l2, wide)
    box = _box.make_box(lower, upper, params, prunable)
    if box is not None:
        slots = min(kept + fixed + 1, _tree.size(params))
        return _certify_within(
            objective, params, solution.mask, budget, args, *prices, box, slots=slots
        )
    slots = rounded(kept + fixed + 1, _tree.size(params))
    return _certify(
        objective, params, solution.mask, budget, args, *prices, slots=slots
    )


@functools.partial(jax.jit, static_argnames="slots")
def _certify(objective, params, mask, budget, args, penalty, l2, *, slots: int):
    model = objective.model(params, args)
    problem = make_problem(model, budget, penalty=penalty, l2=l2)
    flat = _tree.flatten(mask)
    members = factorise(problem, *slots_of(flat, slots))
    move = best_move(problem, members)
    intact = jnp.all(members.inside == flat)
    gain = jnp.where(intact, move.gain, jnp.nan)
    value = refitted_value(problem, members)
    own = problem_value(problem, model, params)
    tiny = jnp.finfo(value.dtype).tiny
    exists = jnp.isfinite(gain)
    leaving = jnp.where(move.leaves & exists, members.index[move.slot], -1)
    return Certificate(
        gain=gain,
        relative=gain / jnp.maximum(jnp.abs(value), tiny),
        entering=jnp.where(move.enters & exists, move.column, -1),
        leaving=leaving,
        refit=own - value,
    )


@functools.partial(jax.jit, static_argnames="slots")
def _certify_within(
    objective, params, mask, budget, args, penalty, l2, box, *, slots: int
):
    """All additions, removals and exchanges, each refitted within the bounds."""
    model = objective.model(params, args)
    problem = make_problem(model, budget, penalty=penalty, l2=l2)
    wide = problem.linear.dtype
    lower, upper = (_tree.flatten(x).astype(wide) for x in box)
    problem = problem._replace(lower=lower, upper=upper)
    flat = _tree.flatten(mask)
    present = refitted(
        problem, place(problem, slots_of(flat, slots), _tree.flatten(params))
    )
    group, inside = problem.group, jnp.zeros(flat.shape, bool)
    inside = inside.at[present.index].max(present.filled)
    owner = group[present.index]
    groups = jnp.arange(problem.capacity.shape[0], dtype=jnp.int32)
    held = jnp.sum(
        (owner[:, None] == groups[None, :]) & present.filled[:, None], 0, jnp.int32
    )
    room = (problem.capacity > held)[jnp.maximum(group, 0)]
    free = present.filled & (owner >= 0)

    def without(slot: Array) -> Array:
        gone = jnp.arange(slots, dtype=jnp.int32) == slot
        fewer = present._replace(
            filled=present.filled & ~gone, values=jnp.where(gone, 0, present.values)
        )
        return jnp.where(free[slot], refitted(problem, fewer).value, jnp.inf)

    def with_entry(pair: Array) -> Array:
        column, slot = pair // slots, pair % slots
        swap = free[slot] & (owner[slot] == group[column])
        add = ~present.filled[slot] & room[column]
        moved = present._replace(
            index=present.index.at[slot].set(column),
            filled=present.filled.at[slot].set(True),
            values=present.values.at[slot].set(0),
        )
        allowed = (swap | add) & ~inside[column] & (group[column] >= 0)
        return jax.lax.cond(
            allowed, lambda: refitted(problem, moved).value, lambda: jnp.inf + 0 * l2
        )

    pairs = jnp.arange(flat.shape[0] * slots, dtype=jnp.int32)
    entered = jax.lax.map(with_entry, pairs)
    removed = jax.lax.map(without, jnp.arange(slots, dtype=jnp.int32))
    pair, slot = jnp.argmin(entered), jnp.argmin(removed)
    enters = entered[pair] < removed[slot]
    gain = present.value - jnp.minimum(entered[pair], removed[slot])
    out = jnp.where(enters, pair % slots, slot)
    leaves = present.filled[out] & jnp.isfinite(gain)
    tiny = jnp.finfo(wide).tiny
    return Certificate(
        gain=gain,
        relative=gain / jnp.maximum(jnp.abs(present.value), tiny),
        entering=jnp.where(enters, pair // slots, -1).astype(jnp.int32),
        leaving=jnp.where(leaves, present.index[out], -1),
        refit=problem_value(problem, model, params) - present.value,
    )
