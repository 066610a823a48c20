"""Structured pruning as one L0 problem over gates, within a budget of cost."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from sparserec import _tree
from sparserec._solution import History, Solution
from sparserec._types import LossFn, Status
from sparserec.quadratic._matrix_free import as_pytree
from sparserec.saliency._data import check_data, resolve
from sparserec.solvers._examples import divide
from sparserec.solvers._front import check_positive_int
from sparserec.structure._costs import Extent, Part, Term, evaluate
from sparserec.structure._eliminate import units_of
from sparserec.structure._gate_model import GateCurvature, gate_model
from sparserec.structure._groups import Groups, complete, cost_terms
from sparserec.structure._proposals import (
    SHRINKAGES,
    Candidate,
    Gates,
    GateSolver,
    Problem,
    arrays,
    polished,
    proposals,
    refit,
    shrunk,
)
from sparserec.structure._select import _allowed_counts as allowed_counts


def _stage(
    problem: Problem,
    gates: Mapping[str, np.ndarray],
    data: tuple,
    held_out: float,
    budget: float,
) -> Candidate:
    """Model at the present gates, competing proposals, the best by true loss."""
    parts = divide(data, held_out)
    model = problem.build(
        problem.loss_fn,
        problem.params,
        problem.groups,
        args=parts.build,
        gates=gates,
        batch_size=problem.batch_size,
    )
    tried = [
        Candidate(values, shrinkage, problem.loss(values, parts.judge))
        for values, shrinkage in proposals(problem, model, budget)
    ]
    # Infinite losses come last, NaN after them.
    best = min(tried, key=lambda each: (np.isnan(each.loss), each.loss))
    if problem.solver is not None:
        values = polished(problem, model, best)
        loss = problem.loss(values, parts.judge)
        if loss < best.loss:
            best = Candidate(values, best.shrinkage, loss)
    return best


def _refined(
    problem: Problem, best: Candidate, data: tuple, held_out: float
) -> Candidate:
    """Gates of the present units refitted on a model around them."""
    parts = divide(data, held_out)
    model = problem.build(
        problem.loss_fn,
        problem.params,
        problem.groups,
        args=parts.build,
        gates=best.gates,
        batch_size=problem.batch_size,
    )
    center, gradient, matrix = arrays(problem.units, model)
    for shrinkage in SHRINKAGES:
        flat = refit(shrunk(matrix, shrinkage), gradient, center, center != 0)
        values = problem.units.split(flat)
        loss = problem.loss(values, parts.judge)
        if loss < best.loss:
            best = Candidate(values, shrinkage, loss)
    return best


def _unit_terms(groups: Groups) -> tuple[Term, ...]:
    """The number of units as a cost."""
    return tuple(
        Term(1, (Extent(size, (Part(name, np.arange(size), np.arange(size)),)),))
        for name, size in groups.sizes.items()
    )


def count_units(keep: Mapping[str, np.ndarray]) -> float:
    """Number of kept units."""
    return float(sum(np.sum(kept) for kept in keep.values()))


def _checked(
    groups: Groups, budget: float, cost: str, min_keep: Any, multiple_of: int
) -> tuple[tuple[Term, ...], dict[str, np.ndarray]]:
    """The cost and the allowed counts, after a look at the budget."""
    terms = _unit_terms(groups) if cost == "units" else cost_terms(groups, cost)
    everything = {name: np.arange(size) for name, size in groups.sizes.items()}
    allowed = allowed_counts(groups, everything, min_keep, multiple_of)
    least = {n: np.arange(groups.sizes[n]) < each[0] for n, each in allowed.items()}
    smallest, whole = evaluate(terms, least), evaluate(terms, complete(groups))
    if not smallest <= budget:
        raise ValueError(
            f"The budget of {budget:.6g} cannot be met: with `min_keep`={min_keep!r} "
            f"and `multiple_of`={multiple_of} the smallest reachable cost is "
            f"{smallest:.6g}, {smallest / whole:.1%} of the whole, which costs "
            f"{whole:.6g}."
        )
    return terms, allowed


def joint(
    loss_fn: LossFn,
    params: Any,
    groups: Groups,
    budget: float,
    *,
    args: tuple = (),
    batches: Callable[[int], tuple] | None = None,
    cost: Literal["flops", "params", "units"] = "flops",
    stages: int = 8,
    refinements: int = 2,
    curvature: GateCurvature = "fisher",
    probes: int | None = None,
    held_out: float = 0.0,
    repair: Callable[[Any], Any] | None = None,
    solver: GateSolver | None = None,
    min_keep: int | Mapping[str, int] = 1,
    multiple_of: int = 1,
    batch_size: int = 32,
) -> Solution:
    r"""Choose units jointly, as an L0 problem over gates with a budget of cost.

    $$\min_m f(m \odot \theta) \quad\text{subject to}\quad
      \text{cost}(\{u : m_u \ne 0\}) \le \text{budget}.$$

    The budget falls geometrically. Every stage builds a `gate_model` at the present
    gates and removes units from it one by one, each time that of least rise per cost
    saved with all others refitted; prices follow the widths of the neighbors. Matrices
    drawn more or less towards their diagonal compete with each other, with the choice
    by `gate_scores`, with the largest weights, and with gates left as they are; the
    true loss decides.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, a mean over examples; an example
        must not depend on the others (normalization by stored statistics).
      params: the parameters that were traced.
      groups: result of `groups`.
      budget: largest allowed cost, in the unit of `cost`; a share of the whole is
        `0.5 * total_cost(groups, cost)`.
      args: data handed to the loss, the examples along the leading axis.
      batches: fresh data for every stage instead: from the stage's index to a tuple
        like `args`.
      cost: `"flops"`, `"params"`, or `"units"`, the number of units in all.
      stages: number of models on the way down.
      refinements: models at the final choice, to refit the gates.
      curvature: see `gate_model`.
      probes: see `gate_model`.
      held_out: share of the examples that decide and build nothing; with 0, all do
        both, which is safe as long as few proposals compete.
      repair: from params with units gated to params of the same structure, for what
        must follow the removal without being a gate, such as batch statistics. It is
        called for every proposal before its loss is taken, and after every stage; call
        it once more on the folded params.
      solver: `solver(model, start, k) -> Solution` with k a count for every group,
        such as `sparserec.iobs`: exchanges units within their groups at every stage,
        if the true loss agrees.
      min_keep: fewest units of a group that stay, for all groups or by name.
      multiple_of: kept counts are multiples of this, or the full size.
      batch_size: examples in a compiled step; see `gate_model`.

    Returns:
      A `Solution` over gates: `params` and `mask` are group name -> array of shape
      `(units,)`. `gate(params, groups, solution.params)` folds the gates into the
      weights, and `solution.mask` is the choice that `shrink` and `resized` take.
      The objective is the loss of the examples that decided last; the history has an
      entry for every stage, with the weight of
      the diagonal as its damping. Status `CONVERGED`, or `NONFINITE`
      where no proposal of a stage had a finite loss. If the budget allows everything,
      all gates stay open.

    Raises:
      ValueError: a budget that cannot be met (the message says the smallest cost that
        can), wrong options or data, params that do not fit the groups.

    Source: the cost per removal with refit as in Optimal Brain Surgeon (Hassibi &
    Stork, 1993), over gates; budgets of operations as in FALCON (Meng et al., 2024).
    """
    if batches is not None and args:
        raise ValueError("give either `args` or `batches`, not both.")
    check_positive_int("stages", stages)
    if not 0 <= held_out < 1:
        raise ValueError(f"`held_out` must lie in [0, 1), got {held_out!r}.")
    terms, allowed = _checked(groups, budget, cost, min_keep, multiple_of)
    check_data(args, None, batch_size)
    draw = (lambda _: args) if batches is None else batches
    # The wrapped loss below no longer knows its builder.
    builder: Any = curvature if curvature == "fisher" else resolve(curvature, loss_fn)
    build = functools.partial(gate_model, curvature=builder, probes=probes)
    problem = Problem(
        loss_fn=as_pytree(loss_fn),
        params=_tree.to_working_precision(params),
        groups=groups,
        units=units_of(groups),
        terms=terms,
        cost=count_units if cost == "units" else cost,
        allowed=allowed,
        multiple_of=multiple_of,
        batch_size=batch_size,
        build=build,
        solver=solver,
        repair=repair,
    )
    return _descend(problem, draw, budget, stages, refinements, held_out)


def _folded(
    problem: Problem, best: Candidate, folded: Gates
) -> tuple[Problem, Candidate, Gates]:
    """The gates moved into the weights, which are put right after it."""
    params = problem.folded(best.gates)
    alive = {n: (m != 0).astype(np.float64) for n, m in best.gates.items()}
    together = {n: folded[n] * m for n, m in best.gates.items()}
    return problem._replace(params=params), best._replace(gates=alive), together


def _descend(
    problem: Problem,
    draw: Callable[[int], tuple],
    budget: float,
    stages: int,
    refinements: int,
    held_out: float,
) -> Solution:
    """From all units to the budget, stage by stage."""
    dtype = _tree.dtype(problem.params)
    gates = {n: np.ones(s) for n, s in problem.groups.sizes.items()}
    best = Candidate(gates, np.nan, problem.loss(gates, draw(0)))
    if not np.isfinite(best.loss):
        raise ValueError("the loss is NaN or infinite at the starting params.")
    whole = evaluate(problem.terms, complete(problem.groups))
    status, past, folded = Status.CONVERGED, [], gates
    for stage in range(stages if whole > budget else 0):
        share = (stage + 1) / stages
        allowance = budget if share == 1 else whole * (budget / whole) ** share
        data = draw(stage)
        best = _stage(problem, best.gates, data, held_out, allowance)
        kept = sum(int((m != 0).sum()) for m in best.gates.values())
        past.append((best.loss, np.nan, kept, best.shrinkage))
        if not np.isfinite(best.loss):
            status = Status.NONFINITE
            break
        if problem.repair is not None:
            problem, best, folded = _folded(problem, best, folded)
    for number in range(refinements if past and status == Status.CONVERGED else 0):
        data = draw(stages + number)
        parts = divide(data, held_out)
        best = best._replace(loss=problem.loss(best.gates, parts.judge))
        best = _refined(problem, best, data, held_out)
    gates = {n: folded[n] * m for n, m in best.gates.items()}
    entries = np.asarray(past, np.float64).reshape(-1, 4).T
    return Solution(
        params={n: jnp.asarray(m, dtype) for n, m in gates.items()},
        mask={n: jnp.asarray(m != 0) for n, m in gates.items()},
        objective=jnp.asarray(best.loss, dtype),
        iterations=jnp.int32(len(past)),
        status=jnp.int32(status),
        history=History(*(jnp.asarray(each, dtype) for each in entries)),
    )
