"""The pursuit family: HTP, subspace pursuit, CoSaMP, GraSP and splicing.

All refit on every support they look at, by restricted Newton steps (one solve on a
quadratic model), and count single weights or whole groups. Those that take one unit at
a time are in `greedy.py`; normalised iterative hard thresholding is `sparserec.iht`.
"""

import functools

from jaxtyping import Array

from sparserec._solution import Solution
from sparserec._types import LossFn, Params, Prunable, Scalar
from sparserec.budget import matrices
from sparserec.quadratic import CurvatureFn, QuadraticModel, hessian
from sparserec.solvers import _pursuit_common
from sparserec.solvers._pursuit_common import Bound, UnitCount
from sparserec.solvers._pursuit_exchange import (
    by_merging,
    by_splicing,
    by_threshold,
    exchange_solver,
)


def htp(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: UnitCount,
    *,
    args: tuple = (),
    curvature: CurvatureFn = hessian,
    damping: Scalar | float = 0.0,
    groups: Params | None = None,
    max_kept: int | None = None,
    lower: Bound = None,
    upper: Bound = None,
    prunable: Prunable = matrices,
    batch_size: int | None = None,
    tol: Scalar | float = 1e-6,
    max_steps: int = 100,
) -> Solution:
    r"""Minimises a loss over k-sparse params by hard thresholding pursuit.

    $$S^+ = \text{top}_k\bigl(d_j u_j^2\bigr), \qquad u = w - \eta\,g/d, \qquad
      w^+ = \arg\min_{\operatorname{supp} w \subseteq S^+} f(w)$$

    with $d$ the diagonal of the curvature and $\eta = 1$, halved where the loss does
    not fall, until the support repeats. Units of the columns do not matter.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, or a `QuadraticModel` such as
        `sparserec.quadratic.least_squares(X, y)`; static (pass the same function
        object again and nothing recompiles).
      params: where to start, any pytree of floating arrays. The k largest weights that
        are not zero are the first support; from zeros it is that of the largest
        $g_j^2/d_j$.
      k: prunable weights, or groups, to keep in all, an integer, or a mapping from
        leaf path to count; traced. A concrete k also sets the width of the solves.
      args: data handed to the loss; traced.
      curvature: builds the local model; see `sparserec.quadratic`. Where it is known by
        products, its mean stands for every $d_j$. Ignored where `loss_fn` is a model.
      damping: least damping of the solves, relative to the mean curvature, no unit; it
        leaves no bias. Raised where a solve fails or the loss rises. Traced.
      groups: integer labels shaped like the params, not traced: prunable weights of one
        label, wherever they are, come in and go out together, scored by the sum over
        the group, and k counts groups. `None` for every weight on its own.
      max_kept: largest k of a sweep in which k is traced, which then sets the width of
        the solves (and how many steps `omp` and `foba` are allowed); without it that is
        everything. A traced k above it counts as `max_kept`. Static.
      lower: least values of the weights, a number, or numbers shaped like `params`;
        `None` for none. At most zero for prunable weights: a weight that is not kept
        is zero. Refits obey the bounds, and scores count only what lies within them.
        Traced; traced bounds are not checked.
      upper: largest values, at least zero for prunable weights; as `lower`.
      prunable: which leaves may be pruned; see `sparserec.matrices`. Other leaves are
        refitted along with the support: variables that are always in.
      batch_size: visit the data in chunks of this many examples, with loops on the
        host; for data or convolutions that one program cannot hold. Static.
      tol: relative change at which to stop; the relative gradient on the support
        must be below its square root too. Traced.
      max_steps: largest number of supports looked at; static.

    Returns:
      A `Solution` with at most k prunable weights or groups, refitted; with `k=0` they
      are all zero. Ties go to the lowest index (the lowest label of groups). A support
      is taken only if the loss itself falls. If a NaN appears on the way, the best
      finite iterate.

    Raises:
      TypeError: `k`, `params` or `groups` of the wrong type.
      ValueError: `k` or `damping` out of range, unknown paths, labels that do not fit
        the params, a loss that is not a scalar or not finite at the start, data of the
        wrong form, bounds that contradict each other.

    Source: Foucart (2011); the diagonal as step and the halving are additions.
    """
    return _pursuit_common.solve(
        exchange_solver,
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
        choices={"propose": by_threshold},
    )


def subspace_pursuit(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: UnitCount,
    *,
    args: tuple = (),
    curvature: CurvatureFn = hessian,
    damping: Scalar | float = 0.0,
    groups: Params | None = None,
    max_kept: int | None = None,
    lower: Bound = None,
    upper: Bound = None,
    prunable: Prunable = matrices,
    batch_size: int | None = None,
    tol: Scalar | float = 1e-6,
    max_steps: int = 100,
) -> Solution:
    r"""Minimises a loss over k-sparse params by subspace pursuit.

    $$S^+ = \text{top}_k\bigl(d_j v_j^2\bigr), \qquad
      v = \arg\min_{\operatorname{supp} v \subseteq S \cup T} q(v), \qquad
      T = \text{top}_k\bigl(g_j^2/d_j\bigr) \text{ outside } S,$$

    with $q$ the local quadratic model, and a refit on $S^+$. Where the loss does not
    fall, half as many are merged, down to none.

    Args:
      loss_fn: a loss or a `QuadraticModel`, as in `htp`.
      params: as in `htp`.
      k: prunable weights, or groups, to keep, as in `htp`.
      args: data handed to the loss; traced.
      curvature: builds the local model, as in `htp`.
      damping: least damping of the solves, as in `htp`.
      groups: labels of weights that come and go together, as in `htp`.
      max_kept: largest k of a sweep, as in `htp`. Static.
      lower: least values of the weights, as in `htp`.
      upper: largest values, as in `htp`.
      prunable: which leaves may be pruned; see `sparserec.matrices`.
      batch_size: examples visited at a time, as in `htp`. Static.
      tol: relative change at which to stop, as in `htp`.
      max_steps: largest number of supports looked at; static.

    Returns:
      As `htp`.

    Raises:
      TypeError: see `htp`.
      ValueError: see `htp`.

    Source: Dai & Milenkovic (2009); the halving is an addition.
    """
    return _pursuit_common.solve(
        exchange_solver,
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
        choices={"propose": by_merging, "merge": 1},
    )


def cosamp(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: UnitCount,
    *,
    args: tuple = (),
    curvature: CurvatureFn = hessian,
    damping: Scalar | float = 0.0,
    groups: Params | None = None,
    max_kept: int | None = None,
    lower: Bound = None,
    upper: Bound = None,
    prunable: Prunable = matrices,
    batch_size: int | None = None,
    tol: Scalar | float = 1e-6,
    max_steps: int = 100,
) -> Solution:
    r"""Minimises a loss over k-sparse params by compressive sampling matching pursuit.

    As `subspace_pursuit`, with 2k merged into the support instead of k.

    Args:
      loss_fn: a loss or a `QuadraticModel`, as in `htp`.
      params: as in `htp`.
      k: prunable weights, or groups, to keep, as in `htp`.
      args: data handed to the loss; traced.
      curvature: builds the local model, as in `htp`.
      damping: least damping of the solves, as in `htp`.
      groups: labels of weights that come and go together, as in `htp`.
      max_kept: largest k of a sweep, as in `htp`. Static.
      lower: least values of the weights, as in `htp`.
      upper: largest values, as in `htp`.
      prunable: which leaves may be pruned; see `sparserec.matrices`.
      batch_size: examples visited at a time, as in `htp`. Static.
      tol: relative change at which to stop, as in `htp`.
      max_steps: largest number of supports looked at; static.

    Returns:
      As `htp`: the answer is refitted, which the original leaves out.

    Raises:
      TypeError: see `htp`.
      ValueError: see `htp`.

    Source: Needell & Tropp (2009); refit and halving are additions.
    """
    return _pursuit_common.solve(
        exchange_solver,
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
        choices={"propose": by_merging, "merge": 2},
    )


def grasp(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: UnitCount,
    *,
    args: tuple = (),
    curvature: CurvatureFn = hessian,
    damping: Scalar | float = 0.0,
    groups: Params | None = None,
    max_kept: int | None = None,
    lower: Bound = None,
    upper: Bound = None,
    prunable: Prunable = matrices,
    batch_size: int | None = None,
    tol: Scalar | float = 1e-6,
    max_steps: int = 100,
) -> Solution:
    r"""Minimises a loss over k-sparse params by gradient support pursuit.

    As `cosamp`, with the loss itself instead of its local model minimised on the merged
    support. On a quadratic model the two are the same.

    Args:
      loss_fn: a loss or a `QuadraticModel`, as in `htp`.
      params: as in `htp`.
      k: prunable weights, or groups, to keep, as in `htp`.
      args: data handed to the loss; traced.
      curvature: builds the local model, as in `htp`.
      damping: least damping of the solves, as in `htp`.
      groups: labels of weights that come and go together, as in `htp`.
      max_kept: largest k of a sweep, as in `htp`. Static.
      lower: least values of the weights, as in `htp`.
      upper: largest values, as in `htp`.
      prunable: which leaves may be pruned; see `sparserec.matrices`.
      batch_size: examples visited at a time, as in `htp`. Static.
      tol: relative change at which to stop, as in `htp`.
      max_steps: largest number of supports looked at; static.

    Returns:
      As `htp`.

    Raises:
      TypeError: see `htp`.
      ValueError: see `htp`.

    Source: Bahmani, Raj & Boufounos (2013), with debiasing; halving is an addition.
    """
    return _pursuit_common.solve(
        exchange_solver,
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
        choices={"propose": by_merging, "merge": 2, "local": False},
    )


def splicing(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: UnitCount,
    *,
    args: tuple = (),
    exchange: int | Array = 5,
    curvature: CurvatureFn = hessian,
    damping: Scalar | float = 0.0,
    groups: Params | None = None,
    max_kept: int | None = None,
    lower: Bound = None,
    upper: Bound = None,
    prunable: Prunable = matrices,
    batch_size: int | None = None,
    tol: Scalar | float = 1e-6,
    max_steps: int = 200,
) -> Solution:
    r"""Minimises a loss over k-sparse params by splicing, as abess and SCOPE do.

    From a refitted support, the s members of least $d_j w_j^2$ are exchanged for the s
    of largest $g_j^2/d_j$ outside, and all are refitted. If the loss falls the exchange
    is taken; if not s is halved, until a single one no longer helps. How far it must
    fall is relative to the loss (rounding alone), so units of the response do not
    matter.

    Args:
      loss_fn: a loss or a `QuadraticModel`, as in `htp`.
      params: as in `htp`.
      k: prunable weights, or groups, to keep, as in `htp`.
      args: data handed to the loss; traced.
      exchange: largest s, at least 1; traced.
      curvature: builds the local model, as in `htp`.
      damping: least damping of the solves, as in `htp`.
      groups: labels of weights that come and go together, as in `htp`.
      max_kept: largest k of a sweep, as in `htp`. Static.
      lower: least values of the weights, as in `htp`.
      upper: largest values, as in `htp`.
      prunable: which leaves may be pruned; see `sparserec.matrices`.
      batch_size: examples visited at a time, as in `htp`. Static.
      tol: relative change at which to stop, as in `htp`.
      max_steps: largest number of supports looked at; static.

    Returns:
      As `htp`.

    Raises:
      TypeError: see `htp`.
      ValueError: `exchange` below 1; see `htp`.

    Source: Zhu et al. (2020), abess; Wang et al. (2023), SCOPE.
    """
    _pursuit_common.check_exchange(exchange)
    return _pursuit_common.solve(
        functools.partial(exchange_solver, extra=exchange),
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
        choices={"propose": by_splicing},
    )
