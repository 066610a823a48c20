"""All budgets from one to the largest, in one compiled program."""

import jax
import jax.numpy as jnp

from sparserec import _tree
from sparserec._types import LossFn, Params, Prunable, Scalar
from sparserec.budget import make_budget, matrices, prunable_leaves
from sparserec.quadratic import CurvatureFn, QuadraticModel, hessian, make_objective
from sparserec.recovery._path_loss import loss_path
from sparserec.recovery._path_model import model_path
from sparserec.recovery._record import Path
from sparserec.solvers import _front
from sparserec.solvers.l0cd import check_model


def path(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k_max: int,
    *,
    args: tuple = (),
    curvature: CurvatureFn = hessian,
    l2: Scalar | float = 0.0,
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

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, or a `QuadraticModel` such as
        `sparserec.quadratic.least_squares(X, y)`; static, as in `l0cd`.
      params: a pytree like the weights. Leaves that are not prunable start from it,
        all others from zero.
      k_max: largest budget, a Python integer; sets the shapes.
      args: data handed to the loss; traced.
      curvature: builds the local model; ignored where `loss_fn` is a model.
      l2: $\lambda_2 \ge 0$, in units of curvature; traced.
      prunable: which leaves may be pruned; see `sparserec.matrices`. Other leaves are
        refitted along with every support.

    Returns:
      A `Path`. Where further weights would change nothing (no noise is left, or the
      columns depend on those kept) the smaller support is repeated. Ties go to the
      lowest index. A NaN in traced data ends in status `NONFINITE`.

    Raises:
      ValueError: `k_max` out of range, a model with NaN (says in which columns), a
        loss that is not a scalar.
      TypeError: `params` of the wrong type.

    Source: orthogonal least squares (Chen, Billings & Luo, 1989) going up, backward
    elimination going down, and the exact exchanges of `sparserec.l0cd` at every k.
    """
    _front.check_positive_int("k_max", k_max)
    chosen = prunable_leaves(params, prunable)
    working = _tree.to_working_precision(params)
    sizes = [x.size for x in jax.tree.leaves(params)]
    free = sum(s for s, c in zip(sizes, chosen, strict=True) if c)
    if k_max > free:
        raise ValueError(
            f"`k_max` must lie in [1, {free}] ({free} prunable weights), got {k_max}."
        )
    budget = make_budget(int(k_max), working, prunable)
    slots = min(k_max + sum(sizes) - free + 1, sum(sizes))
    objective = make_objective(loss_fn, curvature)
    if isinstance(loss_fn, QuadraticModel):
        check_model(loss_fn)
        working = loss_fn.center
    _front.check_loss(objective, working, args, ())
    strength = jnp.asarray(l2, _tree.dtype(working))
    if isinstance(loss_fn, QuadraticModel):
        found = model_path(loss_fn, budget, strength, slots=slots, k_max=int(k_max))
    else:
        found = loss_path(
            objective, working, budget, args, strength, slots=slots, k_max=int(k_max)
        )
    return found._replace(params=_tree.cast_like(found.params, params))
