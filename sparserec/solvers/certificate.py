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
from sparserec._types import LossFn, Prunable, Scalar
from sparserec.budget import make_budget, matrices, prunable_leaves
from sparserec.quadratic import CurvatureFn, QuadraticModel, hessian, make_objective
from sparserec.solvers._columns import make_problem, rounded
from sparserec.solvers._l0cd_types import problem_value
from sparserec.solvers._starts import slots_of
from sparserec.solvers._swaps import best_move, factorise
from sparserec.solvers._swaps import objective as refitted_value


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
    slots = rounded(kept + fixed + 1, _tree.size(params))
    wide = _tree.dtype(params)
    return _certify(
        objective,
        params,
        solution.mask,
        budget,
        args,
        jnp.asarray(penalty, wide),
        jnp.asarray(l2, wide),
        slots=slots,
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
