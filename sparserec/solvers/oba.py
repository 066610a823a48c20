"""Pruning by Optimal Brain Apoptosis: all scores in one product, once or in stages."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Int

from sparserec import _tree, select
from sparserec._run import Solver, State
from sparserec._solution import Solution
from sparserec._types import LossFn, Mask, Params, Prunable, Status, first_status
from sparserec.budget import Budget, matrices
from sparserec.quadratic import Objective, QuadraticModel
from sparserec.saliency._data import CurvatureChoice, mean_over, resolve
from sparserec.saliency._oba import gradient_and_product, shares
from sparserec.solvers import _front, _states
from sparserec.solvers._schedule import budget_at


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Options:
    """The static choices of the step; see `oba`."""

    stages: int = 1
    first_order: bool = False


def in_order(scores: Params) -> Params:
    """Non-negative floats in the order of signed ones, for selection by magnitude.

    The bits of a float, with those of negative ones inverted, count upwards; half of
    that count, shifted to start at zero, fills the range of the non-negative finite
    floats. Two neighbouring floats may tie.
    """

    def ordered(x: Array) -> Array:
        bits = jnp.finfo(x.dtype).bits
        unsigned = jnp.dtype(f"uint{bits}")
        sign = jnp.asarray(1 << (bits - 1), unsigned)
        largest = jnp.asarray(jnp.finfo(x.dtype).max, x.dtype)
        finite = jnp.clip(x, -largest, largest)
        code = jax.lax.bitcast_convert_type(finite, unsigned)
        code = jnp.where(code >= sign, ~code, code | sign)
        lowest = ~jax.lax.bitcast_convert_type(-largest, unsigned)
        return jax.lax.bitcast_convert_type((code - lowest) >> 1, x.dtype)

    return jax.tree.map(ordered, scores)


def _ranking(scores: Params, alive: Mask, *, signed: bool) -> Params:
    """Magnitudes in which every weight alive comes before every weight gone."""
    order = in_order(scores) if signed else jax.tree.map(jnp.abs, scores)
    return jax.tree.map(
        lambda s, a: jnp.where(a, jnp.maximum(s, jnp.finfo(s.dtype).tiny), 0),
        order,
        alive,
    )


def _step(
    objective: Objective,
    options: Options,
    state: State,
    budget: Budget,
    args: tuple,
    index: Int[Array, ""],
) -> State:
    now = budget_at("down", budget, index, options.stages)
    gradient, product = mean_over(
        lambda piece: gradient_and_product(
            objective.curvature, objective.loss_fn, state.params, piece
        ),
        args,
        None,
        objective.batch_size,
    )
    scores = shares(state.params, gradient, product, first_order=options.first_order)
    finite = _tree.all_finite(scores)
    # Without scores there are still magnitudes, and no reason to wait.
    counts = jnp.where(finite, now.counts, budget.counts)
    ranking = _ranking(scores, state.mask, signed=options.first_order)
    ranking = _tree.where(finite, ranking, state.params)
    mask = select.support(ranking, counts, budget.groups)
    params = _tree.keep(mask, state.params)
    settled = jnp.all(counts == budget.counts)
    return State(
        params=params,
        mask=mask,
        objective=objective.value(params, args),
        # The last stage leaves nothing to change.
        change=jnp.where(settled, jnp.zeros_like(state.change), state.change),
        stationarity=state.stationarity,
        damping=state.damping,
        settled=settled,
        failure=first_status((~finite, Status.NONFINITE)),
    )


def oba_solver(
    objective: Objective, *, stages: int = 1, first_order: bool = False
) -> Solver:
    """Pruning by Optimal Brain Apoptosis as a `Solver`, for use with `run`.

    Args:
      objective: what to prune, from `sparserec.quadratic.make_objective`.
      stages: number of times that scores are computed; static.
      first_order: whether the first-order term counts; static.

    Returns:
      The pair of init and step.
    """
    return Solver(
        init=Partial(_states.dense_start, objective),
        step=Partial(_step, objective, Options(stages, first_order)),
    )


def oba(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: int | Array | Mapping[str, int | Array],
    *,
    args: tuple = (),
    stages: int = 1,
    curvature: CurvatureChoice = "hessian",
    first_order: bool = False,
    prunable: Prunable = matrices,
    batch_size: int | None = None,
) -> Solution:
    r"""Prunes by Optimal Brain Apoptosis, at once or in stages.

    Every stage computes $s_i = \theta_i (H\theta)_i$ at the weights left and keeps the
    largest $|s_i|$; after stage t of T there are $n (k/n)^{t/T}$ left. The weights
    kept do not change. `sparserec.saliency.oba` is the score itself.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, or a `QuadraticModel`; static.
      params: $\theta$, trained weights, any pytree of floating arrays.
      k: prunable weights to keep in all, an integer, or a mapping from leaf path to
        count; traced.
      args: data handed to the loss; traced.
      stages: number of times that the scores are computed; static.
      curvature: `"hessian"`; `"gauss_newton"`, for a loss that is the `loss` of
        `sparserec.quadratic.gauss_newton(...)`; or any builder of local models.
      first_order: whether to rank by $-\theta_i g_i + \frac12 \theta_i (H\theta)_i$,
        with its sign: what is predicted to lower the loss goes first. Static.
      prunable: which leaves may be pruned; see `sparserec.matrices`. The others count
        in $H\theta$.
      batch_size: visit the data in pieces of this many examples, on the host; for
        data or convolutions that one program cannot hold. Static.

    Returns:
      A `Solution` after at most `stages` iterations, status `CONVERGED`. With `k=0`
      nothing prunable stays; ties go to the lowest index. Where the scores are not
      finite, status `NONFINITE`, and magnitudes decide.

    Raises:
      TypeError: `k` or `params` of the wrong type.
      ValueError: `k` out of range, unknown paths, an unknown curvature, a loss that is
        no scalar or not finite.

    Source: Sun et al. (2025), Optimal Brain Apoptosis, with the exact product.
    """
    _front.check_positive_int("stages", stages)
    return _front.solve(
        lambda objective, _: oba_solver(
            objective, stages=stages, first_order=first_order
        ),
        loss_fn,
        params,
        k,
        args=args,
        curvature=resolve(curvature, loss_fn),
        prunable=prunable,
        batch_size=batch_size,
        tol=0.0,
        max_steps=stages,
    )
