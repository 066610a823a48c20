r"""Refinements of a stage: more steps on its support with the model it has.

A stage's model is built at its dense start, and its minimiser lies elsewhere. Gradients
at that minimiser, under the factorisation at hand, correct it at the price of a few
passes over the examples: no rows are computed, and nothing is factorised again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparserec import _linsolve, _tree
from sparserec._types import Mask, Params, Scalar
from sparserec.quadratic import LowRank, Objective, QuadraticModel
from sparserec.solvers._chita_backsolve import Split, positive_ridge, solve_with
from sparserec.solvers._chita_rows import kernel, row_problem
from sparserec.solvers._examples import Examples

_LENGTHS = 1.0, 1 / 2, 1 / 4, 1 / 16, 1 / 64
"""Of a step. Half steps average the batches; after pruning many weights at once the
loss bends far more than the model, and only short steps lower it."""


class _State(NamedTuple):
    params: Params
    value: Scalar
    number: Int[Array, ""]


class _Factored(NamedTuple):
    gram: Float[Array, "m m"]
    factor: Float[Array, "m m"]
    shift: Scalar


# Compiled for solvers whose loop runs on the host: piece by piece they would compile
# again at every call.
@jax.jit
def _factored(
    model: QuadraticModel, mask: Mask, ridge: Scalar, gram: Float[Array, "m m"] | None
) -> _Factored | None:
    if not isinstance(model.curvature, LowRank):
        return None
    problem = row_problem(model)
    gram = kernel(problem.rows, _tree.flatten(mask)) if gram is None else gram
    shift = positive_ridge(problem.ridge + ridge.astype(gram.dtype), gram)
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    return _Factored(gram, _linsolve.cholesky(gram + shift * identity), shift)


@jax.jit
def _newton(
    model: QuadraticModel,
    mask: Mask,
    ridge: Scalar,
    factored: _Factored | None,
    slope: Params,
) -> Params:
    """The Newton step on a support, factorised before where the curvature is rows."""
    if factored is None:
        solved = model.curvature.solve_on(mask, _tree.keep(mask, slope), ridge)
        return _tree.scale(-1, solved.value)
    problem, support = row_problem(model), _tree.flatten(mask)
    gram, factor, shift = factored
    none, still = jnp.zeros(gram.shape[0], gram.dtype), jnp.zeros_like(problem.center)
    live = jnp.where(support, _tree.flatten(slope).astype(gram.dtype), 0)
    found = solve_with(problem, support, gram, factor, shift, Split(none, live), still)
    return problem.layout.split(found.step)


def refine(
    objective: Objective,
    model: QuadraticModel,
    params: Params,
    mask: Mask,
    ridge: Scalar,
    gram: Float[Array, "m m"] | None,
    examples: Examples,
    rounds: int,
) -> Params:
    """Steps from the loss's own gradients, each taken where the judges agree.

    Args:
      objective: the loss.
      model: of the loss at the start of the stage; its curvature is used.
      params: zero off the support.
      mask: the support, which stays.
      ridge: added to the curvature.
      gram: kernel of the support where it is known.
      examples: gradients are of `build`, values of `judge`.
      rounds: number of steps tried; static.

    Returns:
      Params whose loss on the judging examples is nowhere above that at the start.
    """
    factored = _factored(model, mask, ridge, gram)

    def body(now: _State) -> _State:
        slope = objective.gradient(now.params, examples.build)
        step = _newton(model, mask, ridge, factored, slope)
        trials = [_tree.add_scaled(now.params, length, step) for length in _LENGTHS]
        best, value = now.params, now.value
        for trial in trials:
            found = objective.value(trial, examples.judge)
            lower = found < value  # false for NaN
            best = _tree.where(lower, trial, best)
            value = jnp.where(lower, found, value)
        return _State(best, value, now.number + 1)

    start = _State(params, objective.value(params, examples.judge), jnp.int32(0))
    end = _linsolve.while_loop(
        lambda now: now.number < rounds, body, start, on_host=objective.on_host
    )
    return end.params
