"""All budgets from one to the largest, in one compiled program."""

import jax
import jax.numpy as jnp

from sparserec import _tree
from sparserec._types import LossFn, Params, Prunable, Scalar
from sparserec.budget import Budget, matrices
from sparserec.quadratic import CurvatureFn, QuadraticModel, hessian, make_objective
from sparserec.recovery._path_loss import loss_path
from sparserec.recovery._path_model import model_path
from sparserec.recovery._path_warm import warm_path
from sparserec.recovery._record import Path
from sparserec.solvers import _box, _front
from sparserec.solvers._columns import rounded
from sparserec.solvers._l0cd_types import Weights
from sparserec.solvers._selection import make_selection, most_entries
from sparserec.solvers.l0cd import check_model, known_zero


def path(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k_max: int,
    *,
    args: tuple = (),
    curvature: CurvatureFn = hessian,
    l2: Scalar | float = 0.0,
    groups: Params | None = None,
    lower: Params | float | None = None,
    upper: Params | float | None = None,
    prunable: Prunable = matrices,
) -> Path:
    r"""Sparse solutions for every k from 1 to `k_max`, each from its neighbors.

    $$\min_w f(w) + \lambda_2\|w\|_2^2 \quad\text{subject to}\quad \|w\|_0 \le k,
      \qquad k = 1, \dots, K$$

    One walk over supports: up, each time by the addition that lowers the objective
    most after a refit of all weights, and down again, by the removal that raises it
    least; at every k exchanges follow until none helps, and the better of the two
    supports is kept. A quadratic model costs about as much as one call of `l0cd` with
    `k_max`; other losses are modelled again for every support tried.

    With groups or bounds every k is solved by itself, from its neighbors: groups by
    `splicing`, single weights within bounds by `l0cd`.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, or a `QuadraticModel` such as
        `sparserec.quadratic.least_squares(X, y)`; static, as in `l0cd`.
      params: a pytree like the weights. Leaves that are not prunable start from it,
        all others from zero.
      k_max: largest budget, a Python integer; sets the shapes.
      args: data handed to the loss; traced.
      curvature: builds the local model; ignored where `loss_fn` is a model.
      l2: $\lambda_2 \ge 0$, in units of curvature; traced. Zero with groups, and with
        bounds on losses that are no model: add the ridge to the loss.
      groups: integer labels shaped like the params, as in `sparserec.htp`: k then
        counts groups.
      lower: least values of the weights, as in `sparserec.l0cd`; traced.
      upper: largest values, as in `sparserec.l0cd`; traced.
      prunable: which leaves may be pruned; see `sparserec.matrices`. Other leaves are
        refitted along with every support.

    Returns:
      A `Path`. Where further weights would change nothing (no noise is left, or the
      columns depend on those kept) the smaller support is repeated. Ties go to the
      lowest index. A NaN in traced data ends in status `NONFINITE`.

    Raises:
      ValueError: `k_max` out of range, a model with NaN (says in which columns), a
        loss that is not a scalar, labels that do not fit, bounds that contradict each
        other.
      TypeError: `params` or `groups` of the wrong type.

    Source: orthogonal least squares (Chen, Billings & Luo, 1989) going up, backward
    elimination going down, and the exact exchanges of `sparserec.l0cd` at every k.
    """
    _front.check_positive_int("k_max", k_max)
    working = _tree.to_working_precision(params)
    selection, budget = make_selection(0, working, prunable, groups)
    total, what = budget.sizes[0], "prunable weights" if groups is None else "groups"
    if k_max > total:
        raise ValueError(f"`k_max` must lie in [1, {total}] ({what}), got {k_max}.")
    objective = make_objective(loss_fn, curvature)
    if isinstance(loss_fn, QuadraticModel):
        check_model(loss_fn)
        working = _front.cast_to_center(working, loss_fn)
    _front.check_loss(objective, working, args, ())
    strength = jnp.asarray(l2, _tree.dtype(working))
    box = _box.make_box(lower, upper, working, prunable)
    if groups is not None or box is not None:
        _check_ridge(l2, loss_fn, groups)
        nothing = jnp.zeros_like(strength)
        found = warm_path(
            objective,
            selection,
            _fixed_only(working, budget),
            budget,
            args,
            Weights(nothing, strength, nothing, None),
            box,
            slots=rounded(
                most_entries(selection, budget, [int(k_max)]) + 2, _tree.size(working)
            ),
            k_max=int(k_max),
        )
        return found._replace(params=_tree.cast_like(found.params, params))
    fixed = _tree.size(working) - total
    slots = min(k_max + fixed + 1, _tree.size(working))
    if isinstance(loss_fn, QuadraticModel):
        found = model_path(
            loss_fn,
            budget,
            strength,
            slots=slots,
            k_max=int(k_max),
            around_zero=known_zero(loss_fn.center),
        )
    else:
        found = loss_path(
            objective, working, budget, args, strength, slots=slots, k_max=int(k_max)
        )
    return found._replace(params=_tree.cast_like(found.params, params))


def _fixed_only(params: Params, budget: Budget) -> Params:
    """Zeros for the weights that may be pruned."""
    leaves, structure = jax.tree.flatten(params)
    kept = [
        x if g < 0 else jnp.zeros_like(x)
        for x, g in zip(leaves, budget.groups, strict=True)
    ]
    return jax.tree.unflatten(structure, kept)


def _check_ridge(l2, loss_fn, groups) -> None:
    plain = isinstance(l2, int | float) and l2 == 0
    if not plain and (groups is not None or not isinstance(loss_fn, QuadraticModel)):
        raise ValueError(
            "`l2` with groups, or with bounds on a loss that is no quadratic model, is "
            "not taken apart: add `l2 * jnp.vdot(w, w)` to the loss itself, or a ridge "
            "to the model (`sparserec.quadratic.least_squares(X, y, ridge)`)."
        )
