"""What was kept where, and which leaves the pruning cost most."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparserec import _tree
from sparserec._solution import Solution
from sparserec._types import PRECISION, LossFn, Params, Scalar
from sparserec.quadratic import Objective, QuadraticModel, make_objective

_NODES = 16
"""Points of the quadrature; on small networks with ReLU, where the loss rose from
0.03 to 2, the changes then added up to within 1e-4 to 1e-3."""


class ReportRow(NamedTuple):
    """One leaf of the params.

    Attributes:
      path: readable path, such as `"Dense_0/kernel"`; empty for a single array.
      shape: shape of the leaf.
      kept: number of weights kept in it.
      total: number of weights in it.
      density: `kept / total`; 1 for an empty leaf.
      loss_change: the part of the change in loss that this leaf accounts for, in
        units of loss; `None` where no loss was given.
      share: `loss_change` over the sum of the magnitudes of all of them, in [-1, 1];
        NaN where no leaf has one, `None` where no loss was given.
    """

    path: str
    shape: tuple[int, ...]
    kept: int
    total: int
    density: float
    loss_change: float | None = None
    share: float | None = None


class Report(NamedTuple):
    """What `report` returns; `print(report)` shows a table.

    Attributes:
      rows: one `ReportRow` for every leaf, in tree order.
      loss_before: loss of the dense params; `None` where no loss was given.
      loss_after: loss of the pruned params; `None` where no loss was given.
    """

    rows: tuple[ReportRow, ...]
    loss_before: float | None = None
    loss_after: float | None = None

    @property
    def kept(self) -> int:
        """Number of weights kept over all leaves."""
        return sum(row.kept for row in self.rows)

    @property
    def total(self) -> int:
        """Number of weights over all leaves."""
        return sum(row.total for row in self.rows)

    @property
    def density(self) -> float:
        """Fraction kept over all leaves; 1 where there is no weight."""
        return _fraction(self.kept, self.total)

    def __str__(self) -> str:
        """The table, one line for every leaf, then the sums."""
        header = ["leaf", "shape", "kept", "of", "density"]
        measured = self.loss_after is not None
        if measured:
            header += ["loss change", "share"]
        lines = [_cells(row) for row in self.rows]
        for label, rows in self._sums():
            kept, total = sum(r.kept for r in rows), sum(r.total for r in rows)
            line = [label, "", *_counts(kept, total)]
            if measured:
                line += [f"{sum(row.loss_change or 0 for row in rows):+.3g}", ""]
            lines.append(line)
        table = _align([header, *lines], left=2)
        rule = "-" * max(map(len, table))
        body = len(self.rows) + 1
        text = [table[0], rule, *table[1:body], rule, *table[body:]]
        if measured:
            text.append(f"loss: {self.loss_before:.4g} -> {self.loss_after:.4g}")
        return "\n".join(line.rstrip() for line in text)

    def _sums(self) -> list[tuple[str, tuple[ReportRow, ...]]]:
        """The sum over all leaves, before it that over the pruned ones, if fewer."""
        pruned = tuple(row for row in self.rows if row.kept < row.total)
        sums = [("all leaves", self.rows)]
        if 0 < len(pruned) < len(self.rows):
            sums.insert(0, ("pruned leaves", pruned))
        return sums


def report(
    params: Params,
    solution: Solution,
    loss_fn: LossFn | QuadraticModel | None = None,
    args: tuple = (),
) -> Report:
    r"""Says how many weights every leaf kept and, given a loss, what that cost.

    With $f$ the loss, $w$ the dense and $\hat w$ the pruned params, leaf $l$ accounts
    for what is gained along the straight line from one to the other in its own
    coordinates,

    $$c_l = \int_0^1 \bigl\langle \nabla_l f(w + t(\hat w - w)),
      \hat w_l - w_l \bigr\rangle \, dt, \qquad
      \sum_l c_l = f(\hat w) - f(w), \qquad
      \text{share}_l = c_l \Big/ \sum_m |c_m|.$$

    No leaf comes first, and nothing is left over. Putting leaves back one at a time
    would not add up: a solver that refits adapts the leaves to one another, so that
    the dense values of one no longer suit the others.

    Args:
      params: the params before pruning, as given to the solver.
      solution: what the solver returned; one lane of it, if it was batched.
      loss_fn: `loss_fn(params, *args) -> scalar` or a `QuadraticModel`; `None`
        leaves the loss out of the table.
      args: data handed to the loss.

    Returns:
      A `Report`; counts and losses are Python numbers. The integral is evaluated at
      16 points (exact for polynomials up to degree 31), so the changes add up to the
      difference of the losses to that accuracy. A leaf whose new values lower the
      loss, which refitting solvers bring about, has a negative change and share.
      Where none has, the shares sum to one; where nothing changed or the loss is NaN
      they are NaN. With `k=0` the densities of the prunable leaves are 0.

    Raises:
      ValueError: `solution` does not have the leaf paths and shapes of `params`.
      TypeError: inside `jax.jit`, where masks cannot be counted.

    Source: Sundararajan et al. (2017), integrated gradients, applied to weights.
    """
    _check(params, solution)
    rows = tuple(
        ReportRow(path, flag.shape, kept, flag.size, _fraction(kept, flag.size))
        for path, flag, kept in _counted(solution)
    )
    if loss_fn is None:
        return Report(rows)
    objective = make_objective(loss_fn)
    dense, pruned = map(_tree.to_working_precision, (params, solution.params))
    changes = _changes(objective, dense, pruned, args)
    total = sum(map(abs, changes))
    shares = [c / total if total > 0 else math.nan for c in changes]
    before, after = (float(_value(objective, p, args)) for p in (dense, pruned))
    measured = tuple(
        row._replace(loss_change=change, share=share)
        for row, change, share in zip(rows, changes, shares, strict=True)
    )
    return Report(measured, before, after)


@jax.jit
def _value(objective: Objective, params: Params, args: tuple) -> Scalar:
    return objective.value(params, args)


@jax.jit
def _slopes(
    objective: Objective, dense: Params, pruned: Params, args: tuple, t: Scalar
) -> list[Scalar]:
    """Derivative of the loss along the line at `t`, leaf by leaf."""
    step = _tree.sub(pruned, dense)
    gradient = jax.grad(objective.value)(_tree.add_scaled(dense, t, step), args)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(step), strict=True)
    return [jnp.vdot(g, s, precision=PRECISION) for g, s in pairs]


def _changes(
    objective: Objective, dense: Params, pruned: Params, args: tuple
) -> list[float]:
    """What every leaf adds to the loss on the way from dense to pruned."""
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    # A loop on the host: convolutions are slow in compiled loops on CPU.
    slopes = [
        _slopes(objective, dense, pruned, args, jnp.asarray(t, _tree.dtype(dense)))
        for t in (nodes + 1) / 2
    ]
    return [float(weights @ np.asarray(c)) / 2 for c in zip(*slopes, strict=True)]


def _counted(solution: Solution) -> list[tuple[str, np.ndarray, int]]:
    """Path, mask and number kept of every leaf."""
    flags = [np.asarray(flag) for flag in jax.tree.leaves(solution.mask)]
    paths = _tree.paths(solution.mask)
    return [(p, f, int(f.sum())) for p, f in zip(paths, flags, strict=True)]


def _check(params: Params, solution: Solution) -> None:
    """Raises unless the solution belongs to the params and can be looked at."""
    leaves = jax.tree.leaves(solution.mask)
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        raise TypeError(
            "`sparserec.report` counts the mask and so must be called outside "
            "`jax.jit` and `jax.vmap`."
        )
    given, found = (
        dict(zip(_tree.paths(tree), map(jnp.shape, jax.tree.leaves(tree)), strict=True))
        for tree in (params, solution.mask)
    )
    if given != found:
        raise ValueError(
            "`solution` does not belong to `params`: the leaves are\n"
            f"  params:   {given}\n  solution: {found}\n"
            "Pass the params that were given to the solver; of a batched solution "
            "take one lane, `jax.tree.map(lambda x: x[0], solution)`."
        )


def _fraction(kept: int, total: int) -> float:
    return kept / total if total else 1.0


def _counts(kept: int, total: int) -> list[str]:
    return [f"{kept:,}", f"{total:,}", f"{100 * _fraction(kept, total):.1f} %"]


def _cells(row: ReportRow) -> list[str]:
    shape = " x ".join(map(str, row.shape)) or "scalar"
    cells = [row.path or "(the array)", shape, *_counts(row.kept, row.total)]
    if row.loss_change is not None and row.share is not None:
        shown = "-" if math.isnan(row.share) else f"{100 * row.share:.1f} %"
        cells += [f"{row.loss_change:+.3g}", shown]
    return cells


def _align(lines: list[list[str]], left: int) -> list[str]:
    """Columns of one width, the first `left` flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
