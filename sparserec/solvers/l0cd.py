"""L0 coordinate descent with exact swap search."""

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array, Key

from sparserec import _tree
from sparserec._run import Solver
from sparserec._solution import Solution
from sparserec._types import LossFn, Params, Prunable, Scalar, Status
from sparserec.budget import matrices, prunable_leaves
from sparserec.quadratic import (
    CurvatureFn,
    Objective,
    QuadraticModel,
    hessian,
)
from sparserec.solvers import _box, _front, _l0cd_box, _l0cd_steps
from sparserec.solvers._box import Box
from sparserec.solvers._columns import rounded
from sparserec.solvers._coordinate import ORDERS
from sparserec.solvers._l0cd_types import Options, Weights
from sparserec.solvers._search import START_NAMES

_TRACED_LIMIT = 512


def l0cd_solver(
    objective: Objective,
    *,
    options: Options,
    weights: Weights,
    box: Box | None = None,
) -> Solver:
    """L0 coordinate descent as a `Solver`, for use with `run`.

    Args:
      objective: what to minimise, from `sparserec.quadratic.make_objective`.
      options: static choices.
      weights: of the penalties, and the key.
      box: bounds of the weights; `None` for none.

    Returns:
      The pair of init and step.
    """
    if box is not None:
        return Solver(
            init=Partial(_l0cd_box.init, objective, options, weights, box),
            step=Partial(_l0cd_box.step, objective, options, weights, box),
        )
    return Solver(
        init=Partial(_l0cd_steps.init, objective, options, weights),
        step=Partial(_l0cd_steps.step, objective, options, weights),
    )


def l0cd(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: int | Array | Mapping[str, int | Array],
    *,
    args: tuple = (),
    curvature: CurvatureFn = hessian,
    penalty: Scalar | float = 0.0,
    l2: Scalar | float = 0.0,
    l1: Scalar | float = 0.0,
    swaps: bool = True,
    order: Literal["cyclic", "greedy"] = "cyclic",
    starts: tuple[str, ...] | None = None,
    effort: float = 1.0,
    key: Key[Array, ""] | None = None,
    max_kept: int | None = None,
    lower: Params | float | None = None,
    upper: Params | float | None = None,
    prunable: Prunable = matrices,
    tol: Scalar | float = 1e-6,
    max_steps: int = 30,
) -> Solution:
    r"""Minimises a loss over k-sparse params by coordinate descent and exact swaps.

    $$\min_w f(w) + \lambda_0\|w\|_0 + \lambda_1\|w\|_1 + \lambda_2\|w\|_2^2
      \quad\text{subject to}\quad \|w\|_0 \le k$$

    over the prunable weights ($\lambda_2$ counts all of them). With `swaps`, every
    exchange of one weight is scored with full refit, in closed form, until none
    lowers the objective; where the best of them is within the noise, further starts,
    exchanges of two and a tabu search follow. On a quadratic model one step does all
    of that. Other losses are modelled again at every step, and a new support is taken
    only if it lowers the loss itself after a refit.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, or a `QuadraticModel` such as
        `sparserec.quadratic.least_squares(X, y)`; static (pass the same function
        object again and nothing recompiles).
      params: where to start, any pytree of floating arrays. Zeros leave the start to
        the solver; otherwise the k most important weights are the first support.
      k: prunable weights to keep at most, an integer, or a mapping from leaf path to
        count; traced.
      args: data handed to the loss; traced.
      curvature: builds the local model; see `sparserec.quadratic`. Ignored where
        `loss_fn` is a model. One with `columns` is fastest, others give columns by
        products with unit vectors.
      penalty: $\lambda_0 \ge 0$, in units of loss per weight kept; traced. Where it
        is not the number zero, coordinate descent finds the first support.
      l2: $\lambda_2 \ge 0$, in units of curvature; traced.
      l1: $\lambda_1 \ge 0$, in units of loss per unit of weight; traced. Where it is
        not the number zero, the best exchanges are scored with the signs of the weights
        held, and eight of them refitted at a time; quadratic models only.
      swaps: exact swap search; `False` leaves coordinate descent and a refit, for
        quadratic models. Static.
      order: in which coordinate descent visits weights: `"cyclic"`, by decreasing
        gradient, or `"greedy"`, each time where the objective falls most; static.
      starts: names among `"htp"`, `"screening"`, `"forward"` and `"random"` (needs
        `key`): a descent from each, run together; `None` for hard thresholding
        pursuit, and what the problem asks for after it. Static.
      effort: scales the length of the search beyond the first local optimum (a tabu
        search; on losses that are no model, supports with more and fewer members); 0
        for none. Static.
      key: typed PRNG key for random starts; `None` for none.
      max_kept: largest k of a sweep, which sets the shapes; a little above k if
        `None`, so that neighboring k share a compilation. Static.
      lower: least values of the weights, a number, or numbers shaped like `params`;
        `None` for none. At most zero for prunable weights, which are zero when they
        are not kept. Within bounds the search is shorter: coordinate descent and
        exchanges; `starts`, `effort` and `key` have no effect. Traced.
      upper: largest values, at least zero for prunable weights; as `lower`.
      prunable: which leaves may be pruned; see `sparserec.matrices`. Other leaves are
        refitted along with the support.
      tol: relative change at which to stop on losses that are no quadratic model; the
        relative gradient on the support must be below its square root too. Traced.
      max_steps: largest number of steps, each from one model (the last ones from
        several, where the search goes on); static.

    Returns:
      A `Solution` with at most k prunable weights, whose objective includes the
      penalties. `CONVERGED` says that no exchange, addition or removal of one weight
      lowers the objective of the (last) model; see `certificate`. Fewer than k are
      kept where further ones would change nothing (columns that depend on those
      kept). With `k=0` all are zero; ties go to the lowest index. If a NaN appears
      on the way, the best finite iterate with status `NONFINITE`.

    Raises:
      TypeError: `k`, `params` or `key` of the wrong type.
      ValueError: `k` or a weight out of range, unknown paths or options, a model with
        NaN (says in which columns), a loss that is not a scalar or not finite at the
        start, a traced `k` without `max_kept` on many weights, contradicting bounds.

    Source: objectives and coordinate descent after Hazimeh & Mazumder (2020),
    L0Learn; exact scores of exchanges from block inverses; pursuit of Foucart (2011);
    tabu search of Glover (1989).
    """
    _check_choices(order, starts, effort, key)
    for name, value in (("penalty", penalty), ("l1", l1), ("l2", l2)):
        _front.check_weight(name, value)
    lasso = not _is_zero(l1)
    if isinstance(loss_fn, QuadraticModel):
        check_model(loss_fn)
    elif lasso or not swaps:
        raise ValueError(
            "`l1` and `swaps=False` need a quadratic model, such as "
            "`sparserec.quadratic.least_squares(X, y)`, in place of the loss."
        )
    chosen = prunable_leaves(params, prunable)
    box = _box.make_box(lower, upper, params, prunable)
    quadratic = isinstance(loss_fn, QuadraticModel)
    if box is not None and not (quadratic or (_is_zero(penalty) and _is_zero(l2))):
        raise ValueError(
            "`penalty` and `l2` together with bounds need a quadratic model; add a "
            "ridge such as `l2 * jnp.vdot(w, w)` to the loss itself."
        )
    options = Options(
        slots=_slots(params, k, chosen, max_kept),
        swaps=swaps,
        lasso=lasso,
        penalised=not _is_zero(penalty),
        order=order,
        starts=starts,
        effort=float(effort),
    )
    wide = _tree.dtype(_tree.to_working_precision(params))
    prices = [jnp.asarray(x, wide) for x in (penalty, l2, l1)]
    weights = Weights(prices[0], prices[1], prices[2], key)

    def solve(options: Options, params: Params) -> Solution:
        return _front.solve(
            lambda objective, _: l0cd_solver(
                objective, options=options, weights=weights, box=box
            ),
            loss_fn,
            params,
            k,
            args=args,
            curvature=curvature,
            prunable=prunable,
            tol=tol,
            max_steps=max_steps,
        )

    staged = isinstance(loss_fn, QuadraticModel) and options.swaps and box is None
    staged &= not lasso
    if not staged or _any_traced((loss_fn, params, k, tol, weights)):
        return solve(options, params)
    # Two programs: the search beyond the first local optimum takes longest to
    # compile, and most problems do without it.
    begin = "unknown" if _any_nonzero(params) else "zeros"
    first = solve(dataclasses.replace(options, begin=begin, whole=False), params)
    if int(first.status) != Status.MAX_STEPS:
        return first
    rest = dataclasses.replace(options, begin="sparse", starts=None, penalised=False)
    return solve(rest, first.params)


def _slots(params: Params, k, chosen: tuple[bool, ...], max_kept: int | None) -> int:
    """Places for members: those kept, those never pruned, and two for exchanges."""
    leaves = jax.tree.leaves(params)
    sizes = [x.size for x in leaves]
    total = sum(sizes)
    names = _tree.paths(params)
    if isinstance(k, Mapping):
        counts = [v for name, v in k.items() if name in names]
        governed = [n in k and c for n, c in zip(names, chosen, strict=True)]
    else:
        counts, governed = [k], list(chosen)
    free = sum(s for s, g in zip(sizes, governed, strict=True) if not g)
    if max_kept is not None:
        _front.check_positive_int("max_kept", max_kept)
        concrete = [v for v in counts if isinstance(v, int | np.integer)]
        if sum(concrete) > max_kept:
            raise ValueError(
                f"`max_kept={max_kept}` is below the number of weights to keep, "
                f"{sum(concrete)}."
            )
        return min(max_kept + free + 2, total)
    if any(isinstance(v, Tracer) for v in counts):
        if total > _TRACED_LIMIT:
            raise ValueError(
                f"`k` is traced and there are {total} weights: give the largest k of "
                "the sweep as `max_kept`, which sets the shapes."
            )
        return total
    # What is no count is refused later, in the words that all solvers share.
    known = [
        int(v)
        for v in counts
        if isinstance(v, int | np.integer | jax.Array) and np.ndim(v) == 0
    ]
    return rounded(max(sum(known), 0) + free + 2, total)


def _any_traced(tree: object) -> bool:
    return any(isinstance(x, Tracer) for x in jax.tree.leaves(tree))


def known_zero(tree: object) -> bool:
    """Whether all entries are zero and that can be seen: they are not traced."""
    return not _any_traced(tree) and not _any_nonzero(tree)


def _any_nonzero(tree: object) -> bool:
    return any(np.any(np.asarray(x)) for x in jax.tree.leaves(tree))


def _is_zero(weight: object) -> bool:
    return isinstance(weight, int | float) and weight == 0


def _check_choices(order: str, starts, effort: float, key) -> None:
    if order not in ORDERS:
        raise ValueError(f"`order` must be one of {list(ORDERS)}, got {order!r}.")
    if starts is not None:
        unknown = [name for name in starts if name not in START_NAMES]
        if isinstance(starts, str) or unknown or not starts:
            raise ValueError(
                f"`starts` must be a tuple of names among {list(START_NAMES)}, got "
                f"{starts!r}."
            )
        if "random" in starts and key is None:
            raise ValueError("`starts` with 'random' need `key=jax.random.key(...)`.")
    if not isinstance(effort, int | float) or not 0 <= effort < float("inf"):
        raise ValueError(f"`effort` must be a number of at least 0, got {effort!r}.")
    dtype = getattr(key, "dtype", float)
    if key is not None and not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        raise TypeError(f"`key` must be a typed key (`jax.random.key`), got {key!r}.")


def check_model(model: QuadraticModel) -> None:
    """Refuses data with NaN or infinities, by column; traced models pass."""
    if _any_traced(model.gradient):
        return
    leaves = [np.asarray(x) for x in jax.tree.leaves(model.gradient)]
    if all(np.all(np.isfinite(x)) for x in leaves):
        return
    bad = np.flatnonzero(~np.isfinite(np.concatenate([x.ravel() for x in leaves])))
    size = _tree.size(model.gradient)
    where = (
        "in every column: look for NaN in the response (or in whole rows)"
        if bad.size == size
        else f"in {bad.size} of {size} columns, the first of them "
        f"{bad[:10].tolist()}: look for NaN in these columns of the design"
    )
    raise ValueError(
        f"the gradient of the model is NaN or infinite {where}. Drop or impute what "
        "is missing, or scale what overflows."
    )
