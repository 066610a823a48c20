"""Backsolves for many budgets and ridges at about the cost of one Gram matrix."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from sparserec import _linsolve, _tree
from sparserec._linsolve import matmul
from sparserec._solution import History, Solution
from sparserec._types import Params, Prunable, Scalar
from sparserec.budget import Budget, make_budget, matrices
from sparserec.quadratic import LowRank, QuadraticModel
from sparserec.solvers._chita_backsolve import Split, positive_ridge, split_gradient
from sparserec.solvers._chita_rows import RowProblem, kernel, largest, row_problem
from sparserec.solvers._chita_variants import compressed
from sparserec.solvers.chita import Ridge, check_ridges

_SPECTRAL = 12
"""Ridges from which one eigendecomposition is cheaper than their factorisations."""


class _Cell(NamedTuple):
    params: Float[Array, "l n"]
    mask: Bool[Array, "n"]
    value: Float[Array, "l"]
    status: Int[Array, "l"]


def _inner(
    gram: Float[Array, "m m"], shifts: Float[Array, "l"], right: Float[Array, "l m"]
) -> tuple[Float[Array, "l m"], Bool[Array, "l"]]:
    """Solves with a shifted kernel for every shift, and whether each succeeded."""
    if shifts.shape[0] >= _SPECTRAL:
        values, vectors = _linsolve.eigh(gram)
        shifted = jnp.maximum(values, 0)[None, :] + shifts[:, None]
        solved = matmul(matmul(right, vectors) / shifted, vectors.T)
        return solved, jnp.all(jnp.isfinite(solved), axis=1)
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)

    def solve(shift_and_right: tuple[Array, Array]) -> tuple[Array, Array]:
        shift, vector = shift_and_right
        return _linsolve.solve_positive(gram + shift * identity, vector)

    return jax.lax.map(solve, (shifts, right))


def _cell(
    problem: RowProblem,
    split: Split,
    ridges: Float[Array, "l"],
    gram: Float[Array, "m m"],
    mask: Bool[Array, "n"],
) -> _Cell:
    """The minimisers on one support for every ridge; passes over rows are shared."""
    params = jnp.where(mask, problem.center, 0)
    distance = params - problem.center
    rest = jnp.where(mask, split.rest, 0)
    # Any other order of the axes is two to four times slower on CPU.
    products = matmul(problem.rows, jnp.stack([distance, rest]).T)
    start, bent = products[:, 0], products[:, 1]
    wanted = problem.ridge + ridges
    shifts = jax.vmap(positive_ridge, in_axes=(0, None))(wanted, gram)
    right = (split.dual + start)[None, :] - bent[None, :] / shifts[:, None]
    inner, succeeded = _inner(gram, shifts, right)
    moves = -matmul(inner, problem.rows) - rest[None, :] / shifts[:, None]
    moves = jnp.where(mask[None, :] & succeeded[:, None], moves, 0)
    after = start[None, :] + matmul(problem.rows, moves.T).T

    def value(ridge: Scalar, move: Array, product: Array) -> Scalar:
        ridged = dataclasses.replace(problem, ridge=ridge)
        return ridged.at(distance + move, product)

    values = jax.vmap(value)(wanted, moves, after)
    status = jax.vmap(_linsolve.direct_status)(succeeded, values)
    return _Cell(params[None, :] + moves, mask, values, status)


@jax.jit
def _path(
    problem: RowProblem,
    start: Float[Array, "n"],
    budget: Budget,
    ks: Int[Array, "a"],
    ridges: Float[Array, "l"],
) -> _Cell:
    problem = compressed(problem)
    split = split_gradient(problem)
    m, n = problem.rows.shape
    order = jnp.argsort(ks)

    def grow(
        carry: tuple[Array, Array], k: Int[Array, ""]
    ) -> tuple[tuple[Array, Array], _Cell]:
        gram, before = carry
        now = dataclasses.replace(budget, counts=k[None])
        mask = largest(start, now, problem.layout)
        # Supports of largest magnitudes are nested: only newcomers are multiplied.
        gram = kernel(problem.rows, mask & ~before, gram)
        return (gram, mask), _cell(problem, split, ridges, gram, mask)

    nothing = (jnp.zeros((m, m), problem.rows.dtype), jnp.zeros(n, bool))
    _, cells = jax.lax.scan(grow, nothing, ks[order])
    return jax.tree.map(lambda x: x[jnp.argsort(order)], cells)


def chita_path(
    model: QuadraticModel,
    params: Params,
    ks: Sequence[int] | Int[Array, "a"],
    ridges: Ridge = 0.0,
    *,
    prunable: Prunable = matrices,
) -> Solution:
    r"""Backsolves on the largest weights for every budget and every ridge.

    The supports are nested, so their kernels $X_Q X_Q^\top$ grow by the newcomers and
    cost one Gram matrix in all. For every budget the ridges share passes over the
    rows, and from 12 ridges on one eigendecomposition of the kernel.

    Args:
      model: a model with rows, such as those of `sparserec.quadratic.fisher(...)`.
      params: its weights, whose magnitudes choose the supports.
      ks: prunable weights to keep, integers, shape `(a,)`, in any order; traced.
      ridges: one number or several, shape `(l,)`, added to the ridge of the model, in
        units of curvature; traced.
      prunable: which leaves may be pruned; see `sparserec.matrices`.

    Returns:
      A `Solution` whose arrays have two leading axes `(a, l)`. The objective is the
      value of the model with the ridge. With `k=0` all prunable weights are zero. For
      ridges below 1e-5 of the mean kernel in float32, `chita(..., variant="bso")` is
      more exact: it refines.

    Raises:
      TypeError: a budget is not an integer.
      ValueError: a budget out of range, a negative ridge, a curvature without rows.
    """
    if not isinstance(model.curvature, LowRank):
        raise ValueError(
            "`chita_path` shares kernels of rows and needs a `LowRank` curvature, got "
            f"{type(model.curvature).__name__}. Use `sparserec.quadratic.fisher(...)` "
            "without `blocks` and `implicit`, or one `chita` for every budget."
        )
    if not isinstance(ks, jax.Array):
        budgets = [make_budget(k, params, prunable) for k in ks]
        counts = jnp.asarray([x for b in budgets for x in b.counts], jnp.int32)
        budget = budgets[0] if budgets else None
    else:
        budget = make_budget(0, params, prunable)
        counts = _checked(ks, budget)
    if budget is None or counts.ndim != 1 or counts.size == 0:
        raise ValueError("`ks` must hold at least one budget, as a vector.")
    values = check_ridges(ridges)
    problem = row_problem(model)
    start = _tree.flatten(params).astype(problem.rows.dtype)
    cells = _path(problem, start, budget, counts, values.astype(start.dtype))
    return _stacked(problem, params, cells)


def _checked(ks: Array, budget: Budget) -> Array:
    if not jnp.issubdtype(ks.dtype, jnp.integer):
        raise TypeError(f"`ks` must be integers, got dtype {ks.dtype}.")
    size = budget.sizes[0]
    if not isinstance(ks, Tracer) and not bool(jnp.all((ks >= 0) & (ks <= size))):
        raise ValueError(f"`ks` must lie in [0, {size}], got {ks}.")
    return jnp.clip(ks.astype(jnp.int32), 0, size)


def _stacked(problem: RowProblem, params: Params, cells: _Cell) -> Solution:
    shape = cells.value.shape
    masks = jnp.broadcast_to(cells.mask[:, None, :], cells.params.shape)
    split = jax.vmap(jax.vmap(problem.layout.split))
    blank = jnp.full((*shape, 1), jnp.nan, cells.value.dtype)
    kept = jnp.sum(masks, axis=-1, keepdims=True).astype(blank.dtype)
    return Solution(
        params=_tree.cast_like(split(cells.params), params),
        mask=split(masks),
        objective=cells.value,
        iterations=jnp.ones(shape, jnp.int32),
        status=cells.status,
        history=History(cells.value[..., None], jnp.zeros_like(blank), kept, blank),
    )


def compress_rows(model: QuadraticModel, rows: int) -> QuadraticModel:
    r"""The model with fewer rows: those along the leading directions of the Gram.

    With $XX^\top = U S U^\top$, eigenvalues falling, $\tilde X = U_r^\top X$; the
    curvature loses $\sum_{i>r} s_i$ of its trace. Costs about as much as one Gram.

    Args:
      model: a model with a `LowRank` curvature.
      rows: r, the rows to keep, at most those there are; static.

    Returns:
      A model with the same center, value and gradient.

    Raises:
      ValueError: a curvature without rows, or `rows` out of range.
    """
    curvature = model.curvature
    if not isinstance(curvature, LowRank):
        raise ValueError(
            f"only a `LowRank` curvature has rows, got {type(curvature).__name__}."
        )
    if not 1 <= rows <= curvature.rows.shape[0]:
        raise ValueError(
            f"`rows` must lie in [1, {curvature.rows.shape[0]}], got {rows}."
        )
    fewer = _leading(curvature.rows, rows)
    gram = None if curvature.gram is None else matmul(fewer.T, fewer)
    return dataclasses.replace(
        model, curvature=dataclasses.replace(curvature, rows=fewer, gram=gram)
    )


@functools.partial(jax.jit, static_argnames="number")
def _leading(rows: Float[Array, "m n"], number: int) -> Float[Array, "r n"]:
    _, vectors = _linsolve.eigh(kernel(rows, jnp.ones(rows.shape[1], bool)))
    return matmul(vectors[:, -number:].T, rows)
