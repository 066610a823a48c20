"""Supports from which a local search begins.

Legend: n weights, s slots, g groups of a budget.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from sparserec import _linsolve, _tree, select
from sparserec._types import Scalar
from sparserec.budget import Budget
from sparserec.solvers._columns import Problem, block, product_on
from sparserec.solvers._members import Slots

HTP_STEPS = 12
"""Most rounds of hard thresholding pursuit; few supports change after the eighth."""

# Added to the diagonal of a refit, relative to its mean: only supports come out of
# these solves, so a bias does no harm and a dependent column does not either.
_JITTER = 1e-6


def slots_of(mask: Bool[Array, "n"], slots: int) -> Slots:
    """The entries of a mask in ascending order; those beyond `slots` are dropped."""
    # Ties go to the lowest index; compiles in half the time of `jnp.nonzero`.
    found, index = jax.lax.top_k(mask.astype(jnp.float32), slots)
    filled = found > 0
    return Slots(jnp.where(filled, index, 0).astype(jnp.int32), filled)


def support_of(
    problem: Problem, scores: Float[Array, "n"], budget: Budget
) -> Bool[Array, "n"]:
    """The largest scores within the budget; entries that are never pruned too."""
    layout = _tree.layout(problem.template)
    mask = select.support(layout.split(scores), budget.counts, budget.groups)
    return _tree.flatten(mask)


def empty(problem: Problem, slots: int) -> Slots:
    """Nothing but the entries that are never pruned: the start of forward selection."""
    return slots_of(problem.group < 0, slots)


def screening(problem: Problem, budget: Budget, slots: int) -> Slots:
    r"""The largest $b_j^2 / H_{jj}$: what each entry explains on its own."""
    return slots_of(support_of(problem, _explained_alone(problem), budget), slots)


def _explained_alone(problem: Problem) -> Float[Array, "n"]:
    positive = problem.diagonal > 0
    scores = jnp.square(problem.linear) / jnp.where(positive, problem.diagonal, 1)
    return jnp.where(positive, scores, 0)


def random(problem: Problem, budget: Budget, slots: int, key: Key[Array, ""]) -> Slots:
    """Entries drawn uniformly."""
    size = problem.linear.shape[0]
    scores = jax.random.uniform(key, (size,), problem.linear.dtype, minval=0.1)
    return slots_of(support_of(problem, scores, budget), slots)


def refitted(problem: Problem, slots: Slots) -> Float[Array, "s"]:
    """Values that minimise the problem on a support, up to a relative jitter."""
    inner = block(problem, slots.index)
    present = jnp.where(slots.filled, jnp.diagonal(inner), 0)
    count = jnp.maximum(jnp.sum(slots.filled, dtype=jnp.int32), 1)
    jitter = _JITTER * jnp.sum(present) / count.astype(inner.dtype)
    inner = _linsolve.restrict(inner, slots.filled, jitter)
    target = jnp.where(slots.filled, problem.linear[slots.index], 0)
    return _linsolve.solve_positive(inner, target)[0]


class _Pursuit(NamedTuple):
    scores: Float[Array, "n"]  # the largest are the next support
    mask: Bool[Array, "n"]
    best: Slots
    explained: Scalar
    steps: Int[Array, ""]
    moving: Bool[Array, ""]


def thresholding_pursuit(problem: Problem, budget: Budget, slots: int) -> Slots:
    r"""Hard thresholding pursuit with the diagonal as step.

    $$S \leftarrow \text{top}_k\bigl(H_{jj} u_j^2\bigr), \qquad
      u = v + D^{-1}(b - H v), \quad v \text{ refitted on } S,$$

    from the support of `screening` until one repeats.

    Args:
      problem: what is minimised.
      budget: weights to keep.
      slots: places for members.

    Returns:
      The support with the lowest refitted value among those visited.

    Source: Foucart (2011); step by the diagonal as in Jacobi's method.
    """
    positive = problem.diagonal > 0
    scale = jnp.where(positive, problem.diagonal, 1)

    def visit(state: _Pursuit, mask: Bool[Array, "n"]) -> _Pursuit:
        here = slots_of(mask, slots)
        values = jnp.where(here.filled, refitted(problem, here), 0)
        explained = jnp.vdot(values, problem.linear[here.index])
        better = explained > state.explained
        slope = problem.linear - product_on(problem, here.index, values)
        point = (slope / scale).at[here.index].add(values)
        return _Pursuit(
            scores=jnp.where(positive, jnp.square(point) * scale, 0),
            mask=mask,
            best=jax.tree.map(lambda a, b: jnp.where(better, a, b), here, state.best),
            explained=jnp.maximum(state.explained, explained),
            steps=state.steps + 1,
            moving=jnp.bool_(True),
        )

    def step(state: _Pursuit) -> _Pursuit:
        mask = support_of(problem, state.scores, budget)
        return jax.lax.cond(
            jnp.any(mask != state.mask) | (state.steps == 0),
            lambda: visit(state, mask),
            lambda: state._replace(moving=jnp.bool_(False)),
        )

    nothing = jnp.zeros(slots, jnp.int32)
    first = _Pursuit(
        scores=_explained_alone(problem),
        mask=jnp.zeros(problem.linear.shape, bool),
        best=Slots(nothing, nothing > 0),
        explained=jnp.full((), -jnp.inf, problem.linear.dtype),
        steps=jnp.int32(0),
        moving=jnp.bool_(True),
    )
    end = jax.lax.while_loop(
        lambda state: state.moving & (state.steps < HTP_STEPS), step, first
    )
    return end.best
