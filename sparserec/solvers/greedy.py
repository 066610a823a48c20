"""The members of the pursuit family that take one unit at a time: OMP and FoBa.

See `pursuit.py` for the others.
"""

import functools
from typing import Literal

import jax.numpy as jnp

from sparserec._solution import Solution
from sparserec._types import LossFn, Params, Prunable, Scalar
from sparserec.budget import matrices
from sparserec.quadratic import CurvatureFn, QuadraticModel, hessian
from sparserec.solvers import _front, _pursuit_common
from sparserec.solvers._pursuit_common import Bound, UnitCount
from sparserec.solvers._pursuit_forward import foba_solver, omp_solver


def omp(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: UnitCount,
    *,
    args: tuple = (),
    rule: Literal["correlation", "gain"] = "correlation",
    curvature: CurvatureFn = hessian,
    damping: Scalar | float = 0.0,
    groups: Params | None = None,
    max_kept: int | None = None,
    lower: Bound = None,
    upper: Bound = None,
    prunable: Prunable = matrices,
    batch_size: int | None = None,
    tol: Scalar | float = 1e-6,
    max_steps: int | None = None,
) -> Solution:
    r"""Minimises a loss over k-sparse params by orthogonal matching pursuit.

    One unit after another comes in, and all are refitted.

    Args:
      loss_fn: a loss or a `QuadraticModel`, as in `htp`.
      params: as in `htp`, but only leaves that are never pruned take their start from
        it; the support grows from nothing.
      k: prunable weights, or groups, to keep, as in `htp`.
      args: data handed to the loss; traced.
      rule: what comes in; static. `"correlation"`: the largest $g_j^2/d_j$, the
        correlation with a column of unit length. `"gain"`: the same with what the
        support leaves, $d_j = H_{jj} - H_{jS} H_{SS}^{-1} H_{Sj}$, which is the exact
        gain, refit included (orthogonal least squares); on quadratic models with
        columns, without groups and bounds, elsewhere as `"correlation"`.
      curvature: builds the local model, as in `htp`.
      damping: least damping of the solves, as in `htp`.
      groups: labels of weights that come and go together, as in `htp`.
      max_kept: largest k of a sweep, as in `htp`. Static.
      lower: least values of the weights, as in `htp`.
      upper: largest values, as in `htp`.
      prunable: which leaves may be pruned; see `sparserec.matrices`.
      batch_size: examples visited at a time, as in `htp`. Static.
      tol: relative change at which to stop, as in `htp`.
      max_steps: largest number of steps; static. `None` for what a concrete k or
        `max_kept` asks for, else as many as there are units; too few leave fewer.

    Returns:
      As `htp`.

    Raises:
      TypeError: see `htp`.
      ValueError: an unknown rule; see `htp`.

    Source: Pati et al. (1993); Chen, Billings & Luo (1989) for the gain.
    """
    if rule not in ("correlation", "gain"):
        raise ValueError(f"`rule` must be 'correlation' or 'gain', got {rule!r}.")
    stored = isinstance(loss_fn, QuadraticModel) and hasattr(
        loss_fn.curvature, "columns"
    )
    plain = groups is None and lower is None and upper is None
    return _pursuit_common.solve(
        omp_solver,
        loss_fn,
        params,
        k,
        args=args,
        curvature=curvature,
        damping=damping,
        groups=groups,
        max_kept=max_kept,
        lower=lower,
        upper=upper,
        prunable=prunable,
        batch_size=batch_size,
        tol=tol,
        max_steps=max_steps,
        passes=1,
        choices={
            "warm": False,
            "exact": rule == "gain" and plain and stored,
        },
    )


def foba(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: UnitCount,
    *,
    args: tuple = (),
    share: Scalar | float = 0.5,
    curvature: CurvatureFn = hessian,
    damping: Scalar | float = 0.0,
    groups: Params | None = None,
    max_kept: int | None = None,
    lower: Bound = None,
    upper: Bound = None,
    prunable: Prunable = matrices,
    batch_size: int | None = None,
    tol: Scalar | float = 1e-6,
    max_steps: int | None = None,
) -> Solution:
    r"""Minimises a loss over k-sparse params by forward-backward selection.

    The unit of largest $g_j^2/d_j$ comes in; then, as long as some member costs less
    than a share of what the support last gained at its size, that one goes out again.

    Args:
      loss_fn: a loss or a `QuadraticModel`, as in `htp`.
      params: as in `htp`, but only leaves that are never pruned take their start from
        it; the support grows from nothing.
      k: prunable weights, or groups, to keep, as in `htp`.
      args: data handed to the loss; traced.
      share: $\nu$, in [0, 1): a member whose removal without a refit costs less than
        $\nu$ times that gain goes out; 0 for a forward selection. Traced.
      curvature: builds the local model, as in `htp`.
      damping: least damping of the solves, as in `htp`.
      groups: labels of weights that come and go together, as in `htp`.
      max_kept: largest k of a sweep, as in `htp`. Static.
      lower: least values of the weights, as in `htp`.
      upper: largest values, as in `htp`.
      prunable: which leaves may be pruned; see `sparserec.matrices`.
      batch_size: examples visited at a time, as in `htp`. Static.
      tol: relative change at which to stop, as in `htp`.
      max_steps: largest number of steps; static. `None` for what a concrete k or
        `max_kept` asks for, else as many as there are units; too few leave fewer.

    Returns:
      As `htp`.

    Raises:
      TypeError: see `htp`.
      ValueError: `share` below 0 or not finite; see `htp`.

    Source: Zhang (2011), FoBa.
    """
    _front.check_weight("share", share)
    return _pursuit_common.solve(
        functools.partial(foba_solver, share=jnp.asarray(share, float)),
        loss_fn,
        params,
        k,
        args=args,
        curvature=curvature,
        damping=damping,
        groups=groups,
        max_kept=max_kept,
        lower=lower,
        upper=upper,
        prunable=prunable,
        batch_size=batch_size,
        tol=tol,
        max_steps=max_steps,
        passes=3,
        choices={"warm": False},
    )
