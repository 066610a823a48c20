"""The variants of CHITA: how one model becomes a sparse point, for every ridge."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec import _linsolve, _tree, select
from sparserec._linsolve import matmul
from sparserec._types import Mask, Params, Scalar, Status
from sparserec.budget import Budget
from sparserec.quadratic import LowRank, QuadraticModel
from sparserec.quadratic._block_rows import BlockLowRank
from sparserec.quadratic._gradient_curvature import GradientRows
from sparserec.solvers import (
    _chita_admm,
    _chita_compact,
    _chita_descent,
    _chita_exchange,
    _chita_iht,
    _row_baselines,
)
from sparserec.solvers._chita_backsolve import backsolve, split_gradient
from sparserec.solvers._chita_rows import (
    Point,
    RowProblem,
    better,
    kernel,
    row_problem,
)
from sparserec.solvers._chita_types import Found, Limits, for_each

_LENGTHS = 0.0, 0.5, 1.0, 2.0  # of a step, relative to the exact one on the support


class _Answer(NamedTuple):
    params: Float[Array, "n"]
    mask: Bool[Array, "n"]
    converged: Bool[Array, ""]
    status: Int[Array, ""]
    value: Scalar
    kernel: Float[Array, "m m"] | None = None


def _answer(point: Point, converged: Array | bool = True) -> _Answer:
    return _Answer(
        point.params,
        point.mask,
        jnp.asarray(converged),
        jnp.int32(Status.CONVERGED),
        point.value,
    )


def _answer_of(point: Point, status: Int[Array, ""]) -> _Answer:
    return _answer(point)._replace(status=status)


def compressed(problem: RowProblem) -> RowProblem:
    """The same model with at most as many rows as weights; static shapes decide."""
    m, n = problem.rows.shape
    if m <= n:
        return problem
    values, vectors = _linsolve.eigh(matmul(problem.rows.T, problem.rows))
    roots = jnp.sqrt(jnp.maximum(values, 0))
    return dataclasses.replace(problem, rows=roots[:, None] * vectors.T)


def _with(problem: RowProblem, ridge: Scalar) -> RowProblem:
    return dataclasses.replace(problem, ridge=problem.ridge + ridge)


def _middle(ridges: Float[Array, "l"]) -> Scalar:
    return ridges[ridges.shape[0] // 2]


def _each(solve: Callable[[Scalar], _Answer], ridges: Float[Array, "l"]) -> _Answer:
    if ridges.shape[0] == 1:
        return jax.tree.map(lambda x: x[None], solve(ridges[0]))
    return jax.lax.map(solve, ridges)


def _iht(problem: RowProblem, start: Array, budget: Budget, limits: Limits) -> _Answer:
    def solve(ridge: Scalar) -> _Answer:
        ridged = _with(problem, ridge)
        point, converged = _chita_iht.search_from_both(
            ridged,
            budget,
            start,
            tol=limits.tol,
            max_steps=limits.max_steps,
            power=limits.metric,
        )
        return _answer(point, converged)

    return _each(solve, limits.ridges)


def _descent(
    problem: RowProblem, start: Array, budget: Budget, limits: Limits, *, cyclic: bool
) -> _Answer:
    def solve(ridge: Scalar) -> _Answer:
        ridged = _with(problem, ridge)
        first = _chita_iht.thresholded_step(ridged, budget, start, limits.metric)
        end = _chita_descent.descend(
            ridged,
            first,
            cyclic=cyclic,
            tol=limits.tol,
            max_passes=limits.max_steps,
        )
        return _answer(end.point, end.converged)

    return _each(solve, limits.ridges)


def _solved(problem, mask, split, ridges, converged: Array | bool = True) -> _Answer:
    """Backsolves on one support for every ridge; they share its kernel."""
    gram = kernel(problem.rows, mask)

    def solve(ridge: Scalar) -> _Answer:
        answer = _answer_of(*backsolve(_with(problem, ridge), mask, split, gram))
        return answer._replace(converged=jnp.asarray(converged))

    return _each(solve, ridges)._replace(kernel=gram)


def _backsolve(
    problem: RowProblem, start: Array, budget: Budget, limits: Limits
) -> _Answer:
    ridged = _with(problem, _middle(limits.ridges))
    point = _chita_iht.thresholded_step(ridged, budget, start, limits.metric)

    def in_place() -> _Answer:
        split = split_gradient(problem, jnp.min(limits.ridges))
        return _solved(problem, point.mask, split, limits.ridges)

    def on_columns() -> _Answer:
        held = _chita_compact.hold(problem, point, size)
        return _each(
            lambda ridge: _answer_of(*_chita_compact.solve(held, point.mask, ridge)),
            limits.ridges,
        )

    size = _chita_compact.capacity(*problem.rows.shape)
    if limits.keep_kernel or not size:
        return in_place()
    return jax.lax.cond(
        jnp.sum(point.mask, dtype=jnp.int32) <= size,
        on_columns,
        lambda: in_place()._replace(kernel=None),
    )


def _best(problem: RowProblem, start: Array, budget: Budget, limits: Limits) -> _Answer:
    """IHT and one thresholded step each choose a support; the better is polished."""
    ridged = _with(problem, _middle(limits.ridges))
    split = split_gradient(problem, jnp.min(limits.ridges))
    one = _chita_iht.thresholded_step(ridged, budget, start, limits.metric)
    many = _chita_iht.search(
        ridged, budget, one, tol=limits.tol, max_steps=limits.max_steps
    )
    # One program for both: compiling is most of the time of a small problem.
    points, _ = jax.lax.map(
        lambda mask: backsolve(ridged, mask, split),
        jnp.stack([one.mask, many.point.mask]),
    )
    chosen = better(*(jax.tree.map(lambda x, i=i: x[i], points) for i in range(2)))
    chosen, done = _chita_exchange.polish(
        ridged, budget, chosen, split, rounds=limits.exchanges
    )
    done |= limits.exchanges < 1
    if limits.ridges.shape[0] == 1:
        answer = _answer(chosen, done)
        return jax.tree.map(lambda x: x[None], answer)
    return _solved(problem, chosen.mask, split, limits.ridges, done)


def _surgeon(
    model: QuadraticModel, params: Params, budget: Budget, limits: Limits
) -> Found:
    """The combinatorial brain surgeon: OBS saliencies, exchanges, one joint update.

    The gradient is taken to be zero.

    Source: Yu, Serra, Ramalingam & Zhe (2022): greedy selection and local exchange.
    """
    ridge = _middle(limits.ridges)
    mask, _ = _row_baselines.saliency_support(model, params, budget, ridge)
    flat = dataclasses.replace(model, gradient=_tree.zeros_like(model.gradient))
    if not isinstance(model.curvature, LowRank):
        return refit(flat, params, mask, limits.ridges)
    problem = compressed(row_problem(flat))
    split = split_gradient(problem, jnp.min(limits.ridges))
    ridged = _with(problem, ridge)
    point, _ = backsolve(ridged, _tree.flatten(mask), split)
    point, done = _chita_exchange.polish(
        ridged, budget, point, split, rounds=limits.exchanges
    )
    done |= limits.exchanges < 1
    answer = _solved(problem, point.mask, split, limits.ridges, done)
    # Its values are those of the model without its gradient.
    return _found(problem, answer)._replace(value=None)


def _found(problem: RowProblem, answer: _Answer) -> Found:
    split = jax.vmap(problem.layout.split)
    return Found(
        split(answer.params),
        split(answer.mask),
        answer.converged,
        answer.status,
        answer.kernel,
        answer.value,
    )


def _on_rows(solve: Callable[..., _Answer]) -> Callable[..., Found]:
    """A variant on flat rows as one on models and pytrees."""

    def variant(
        model: QuadraticModel, params: Params, budget: Budget, limits: Limits
    ) -> Found:
        problem = compressed(row_problem(model))
        dtype = problem.rows.dtype
        start = _tree.flatten(params).astype(dtype)
        limits = dataclasses.replace(
            limits,
            ridges=limits.ridges.astype(dtype),
            tol=limits.tol.astype(dtype),
            metric=limits.metric.astype(dtype),
        )
        return _found(problem, solve(problem, start, budget, limits))

    return variant


def _support_by_gradient(
    model: QuadraticModel, params: Params, budget: Budget, limits: Limits
) -> Mask:
    """The support of a thresholded step as in `_chita_iht`, for any curvature.

    Where the curvature knows no diagonal, the metric is the plain one.
    """
    curvature, ridge = model.curvature, _middle(limits.ridges)
    slope = jax.lax.cond(
        jnp.any(_tree.flatten(_tree.sub(params, model.center)) != 0),
        lambda: model.at(params).gradient,
        lambda: model.gradient,
    )
    if hasattr(curvature, "diagonal"):
        diagonal = jax.lax.cond(
            limits.metric != 0,
            lambda: jax.tree.map(
                lambda d, w: (d + ridge).astype(w.dtype), curvature.diagonal(), params
            ),
            lambda: jax.tree.map(jnp.ones_like, params),
        )
    else:
        diagonal = jax.tree.map(jnp.ones_like, params)
    weights = _chita_iht.metric(_tree.flatten(diagonal), limits.metric)
    scale = _tree.layout(params).split(jnp.sqrt(weights))
    damped = _tree.layout(params).split(weights + jnp.mean(weights))
    direction = jax.tree.map(lambda g, d: g / d.astype(g.dtype), slope, damped)

    def chosen(point: Params) -> Mask:
        scores = jax.tree.map(jnp.multiply, scale, point)
        return select.support(scores, budget.counts, budget.groups)

    first = chosen(params)

    def search() -> Mask:
        inside = _tree.keep(first, direction)
        bend = _tree.dot(inside, curvature.matvec(inside))
        bend += ridge * _tree.dot(inside, inside)
        length = _tree.dot(inside, slope) / jnp.where(bend > 0, bend, 1)
        lengths = length * jnp.asarray(_LENGTHS, length.dtype)
        masks = jax.vmap(
            lambda length: chosen(_tree.add_scaled(params, -length, direction))
        )(lengths)

        def value(trial: tuple[Scalar, Mask]) -> Scalar:
            point = _tree.add_scaled(params, -trial[0], direction)
            return model(_tree.keep(trial[1], point))

        # One program for all: compiling a pass over blocks takes a second.
        best = jnp.argmin(jax.lax.map(value, (lengths, masks)))
        return jax.tree.map(lambda x: x[best], masks)

    # Without first-order term there is no step to try.
    moves = jnp.any(_tree.flatten(direction) != 0)
    return jax.lax.cond(moves, search, lambda: first)


def solve_on_support(
    model: QuadraticModel, params: Params, budget: Budget, limits: Limits
) -> Found:
    """Backsolve for curvatures that are no rows: blocks, products of layers.

    The support is that of the best of a few thresholded gradient steps.
    """
    mask = _support_by_gradient(model, params, budget, limits)
    return refit(model, params, mask, limits.ridges)


def refit(
    model: QuadraticModel, params: Params, mask: Mask, ridges: Float[Array, "l"]
) -> Found:
    """The minimiser on one support for every ridge, by the curvature's own solve."""
    curvature = model.curvature
    masked = _tree.keep(mask, params)
    distance = _tree.sub(masked, model.center)

    def solve(ridge: Scalar) -> Found:
        if isinstance(curvature, BlockLowRank):
            least = curvature.minimise_on(mask, model.gradient, distance, ridge)
            refitted = _tree.keep(mask, _tree.add(model.center, least.step))
            value = (model.value + least.value).astype(model.value.dtype)
            return Found(refitted, mask, jnp.bool_(True), least.status, value=value)
        pull = _tree.add_scaled(curvature.matvec(distance), ridge, distance)
        slope = _tree.keep(mask, _tree.add(model.gradient, pull))
        solved = curvature.solve_on(mask, slope, ridge)
        usable = _linsolve.usable(solved.status)
        refitted = _tree.where(usable, _tree.sub(masked, solved.value), masked)
        return Found(refitted, mask, jnp.bool_(True), solved.status)

    return for_each(solve, ridges)


_ROWS: dict[str, Callable[..., Found]] = {
    "iht": _on_rows(_iht),
    "cd": _on_rows(functools.partial(_descent, cyclic=False)),
    "cyclic": _on_rows(functools.partial(_descent, cyclic=True)),
    "bso": _on_rows(_backsolve),
    "best": _on_rows(_best),
}


def _dispatch(name: str) -> Callable[..., Found]:
    def variant(model: QuadraticModel, *rest: Any) -> Found:
        curvature = model.curvature
        if name not in ("bso", "best") and isinstance(curvature, GradientRows):
            curvature = curvature.to_low_rank()
        if isinstance(curvature, LowRank):
            model = dataclasses.replace(model, curvature=curvature)
            return _ROWS[name](model, *rest)
        if name not in ("bso", "best"):
            raise ValueError(
                f"`variant={name!r}` visits rows one by one and needs a `LowRank` "
                f"curvature; this is a {type(curvature).__name__}. Use "
                "`variant='bso'`, or `sparserec.quadratic.fisher(...)` without "
                "`blocks`."
            )
        return solve_on_support(model, *rest)

    return variant


def _admm(
    model: QuadraticModel, params: Params, budget: Budget, limits: Limits
) -> Found:
    """The minimiser on the support that ADMM ends with, for any curvature."""
    mask = _chita_admm.support(
        model,
        params,
        budget,
        ridge=_middle(limits.ridges),
        power=limits.metric,
        steps=limits.max_steps,
    )
    return refit(model, params, mask, limits.ridges)


BASELINES: dict[str, Callable[..., Found]] = {
    "magnitude": _row_baselines.magnitude,
    "obs": _row_baselines.independent_obs,
    "cbs": _surgeon,
}

VARIANTS: dict[str, Callable[..., Found]] = {
    **{name: _dispatch(name) for name in _ROWS},
    "admm": _admm,
    **BASELINES,
}

NEEDS = {"obs": ("inverse_diagonal",), "cbs": ("inverse_diagonal",)}
"""Operations beyond the basic ones that a variant needs of the curvature."""
