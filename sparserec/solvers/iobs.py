"""I-OBS: iterative Optimal Brain Surgeon, curvature-preconditioned thresholding.

Every step models the loss by a quadratic, takes the damped Newton point, lets
several supports compete, refits the weights on each (the OBS update), and keeps the
best only if it beats plain masking. How that is done depends on the curvature: see
`_iobs_stored.py` for matrices and `_iobs_products.py` for networks.
"""

from collections.abc import Callable, Mapping
from typing import Literal

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from sparserec import _tree
from sparserec._run import Solver
from sparserec._solution import Solution
from sparserec._types import LossFn, Params, Prunable, Scalar
from sparserec.budget import matrices
from sparserec.quadratic import CurvatureFn, Objective, QuadraticModel, hessian
from sparserec.quadratic._fisher import Fisher
from sparserec.solvers import _descent, _front, _iobs_products, _iobs_stored
from sparserec.solvers._descent import Descent
from sparserec.solvers._iobs_products import ProductOptions
from sparserec.solvers._iobs_stored import StoredOptions
from sparserec.solvers._schedule import Schedule, check_schedule
from sparserec.solvers._supports import EXACT_LIMIT, MASK_RULES, NEEDS

_HELD_OUT = 0.1  # share of fresh data
_REFINEMENTS = 6
_STORED = (
    "stored curvatures (`sparserec.quadratic.dense(...)`, small models) and for the "
    "bare iteration (`safeguard=False`, a fixed `damping`, or another `mask_rule`)"
)
_PRODUCTS = (
    "curvatures known by products such as `sparserec.quadratic.gauss_newton(...)`, "
    "with adaptive damping, the safeguard, and `mask_rule='top_k'`"
)


def iobs_solver(
    objective: Objective,
    *,
    options: StoredOptions,
    damping: Scalar | float,
    step_size: Scalar | float | None,
) -> Solver:
    """I-OBS on stored curvatures as a `Solver`, for use with `run`.

    Args:
      objective: what to minimise, from `sparserec.quadratic.make_objective`.
      options: static choices.
      damping: relative damping; the first one where it is adaptive.
      step_size: of the Newton point; `None` for the automatic one.

    Returns:
      The pair of init and step.
    """
    fixed = None if step_size is None else jnp.asarray(step_size)
    return Solver(
        init=Partial(_iobs_stored.init, objective, jnp.asarray(damping)),
        step=Partial(_iobs_stored.step, objective, options, fixed),
    )


def iobs_product_solver(objective: Objective, *, options: ProductOptions) -> Solver:
    """I-OBS on curvatures known by products as a `Solver`, for use with `run`.

    Args:
      objective: what to minimise, from `sparserec.quadratic.make_objective`; its
        models must have a `sparserec.quadratic.MatrixFree` curvature.
      options: static choices.

    Returns:
      The pair of init and step.
    """
    return Solver(
        init=Partial(_iobs_products.init, objective, options),
        step=Partial(_iobs_products.step, objective, options),
    )


def iobs(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: int | Array | Mapping[str, int | Array],
    *,
    args: tuple = (),
    curvature: CurvatureFn = hessian,
    mask_rule: Literal["top_k", "saliency", "backward", "exact"] = "top_k",
    values: Literal["obs", "top_k"] = "obs",
    damping: Scalar | float | Literal["auto"] = "auto",
    step_size: Scalar | float | Literal["auto"] = "auto",
    schedule: Schedule = None,
    stages: int = 16,
    batches: Callable[[int], tuple] | tuple | None = None,
    safeguard: bool = True,
    held_out: float | None = None,
    refinements: int | None = None,
    descent: Descent | None = None,
    prunable: Prunable = matrices,
    batch_size: int | None = None,
    tol: Scalar | float = 1e-6,
    max_steps: int = 100,
) -> Solution:
    r"""Minimises a loss over k-sparse params by iterative Optimal Brain Surgeon.

    Every step models the loss at $w$ by $g$ and $H$ and computes

    $$u = w - \eta (H + \lambda I)^{-1} g, \qquad
      Q = \text{rule}_k(u), \qquad
      w^+_Q = H_{QQ}^{-1} (H w - g)_Q, \quad w^+_{\bar Q} = 0.$$

    The support of the Newton point competes with that of the largest weights; each
    is refitted, and the best is taken only if its loss is not above that of plain
    masking. Otherwise plain masking is taken, and adaptive damping grows.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, or a `QuadraticModel`; static
        (pass the same function object again and nothing recompiles).
      params: where to start, any pytree of floating arrays: trained weights for
        pruning, zeros for recovery.
      k: prunable weights to keep in all, an integer, or a mapping from leaf path to
        count; traced.
      args: data handed to the loss; traced.
      curvature: builds the local model: `sparserec.quadratic.hessian` (exact; a
        stored matrix up to 512 weights), or
        `sparserec.quadratic.gauss_newton(...)` for networks; static. Ignored where
        `loss_fn` is a model.
      mask_rule: how a Newton point becomes a support; static. `"top_k"`: largest
        magnitudes; `"saliency"`: largest $u_i^2/[(H+\lambda I)^{-1}]_{ii}$;
        `"backward"`: backward elimination (OBC), $O(n^3)$, stored curvatures;
        `"exact"`: all supports, at most 16 weights.
      values: `"obs"` refits on the support; `"top_k"` takes the Newton point as it
        is, without safeguard: the practical variant of the paper. Static.
      damping: `"auto"` adapts it; a number $\ge 0$ is fixed. Relative to the mean
        curvature at the start, no unit; traced.
      step_size: $\eta$. `"auto"` is one for a curvature of full rank and about n
        over the rank otherwise; a number, traced, is for stored curvatures or a bare
        iteration.
      schedule: `None`; `"down"` lowers the budget from all weights to k (pruning);
        `"up"` raises it from few weights to k (recovery); or a function from the
        step's index to a count. Static.
      stages: steps that the built-in schedules take; static.
      batches: fresh data for every step instead of `args`: a tuple of arrays with
        one more leading axis over steps, or a callable from the step's index to
        such a tuple, called on the host.
      safeguard: competing supports and acceptance by loss. `False` gives the bare
        iteration that the theorems speak of. Static.
      held_out: share of the examples that judge candidates and build nothing, for
        curvatures known by products; by default 0.1 with `batches`, and none with
        `args`, so that the loss of all of them is minimised. Static.
      refinements: re-linearised refits on the support at every step, for curvatures
        known by products; six by default. Static.
      descent: `sparserec.Descent(optimizer)` tunes the kept weights by mini-batches
        between the choice of the support and the refinements; static.
      prunable: which leaves may be pruned; see `sparserec.matrices`. Other leaves
        are refitted along with the support.
      batch_size: visit the data in chunks of this many examples, with loops on the
        host; for data or convolutions that one program cannot hold. Static.
      tol: relative change at which to stop; the relative gradient on the support
        must be below its square root too. Traced.
      max_steps: largest number of steps, schedule included; static.

    Returns:
      A `Solution` with at most k prunable weights. With `k=0` they are all zero;
      ties go to the lowest index. If a NaN appears on the way, the best finite
      iterate with status `NONFINITE`; where a fixed damping leaves the curvature
      indefinite, the best iterate with status `NOT_POSITIVE_DEFINITE`.

    Raises:
      TypeError: `k`, `params` or `descent` of the wrong type.
      ValueError: `k` out of range, unknown paths or options, a rule that the
        curvature cannot serve, a loss that is not a scalar or not finite at the
        start, data of the wrong form, `batch_size` with rows of gradients.

    Source: Wu et al. (2024), I-OBS: Options 1 and 2; the OBS update in its support
    form. Competing supports, safeguard, damping and schedules are additions.
    """
    _descent.check(descent)
    _check_choices(params, mask_rule, values, damping, step_size)
    check_schedule(schedule)
    _front.check_positive_int("stages", stages)
    if schedule in ("down", "up") and stages > max_steps:
        raise ValueError(
            f"the schedule takes `stages={stages}` steps to arrive at k, more than "
            f"`max_steps={max_steps}`. Raise `max_steps` or lower `stages`."
        )
    if batch_size is not None and isinstance(curvature, Fisher):
        raise ValueError(
            "`batch_size` visits the data in chunks for curvatures known by products, "
            "and `quadratic.fisher(...)` stores rows: leave `batch_size` out, and "
            "bound the memory by `fisher(rows=..., chunk_size=...)`."
        )
    if held_out is not None and not 0 <= held_out < 1:
        raise ValueError(f"`held_out` must lie in [0, 1), got {held_out!r}.")
    adaptive = isinstance(damping, str)
    fixed_step = None if isinstance(step_size, str) else step_size
    bare = not (adaptive and safeguard and values == "obs" and mask_rule == "top_k")

    def make_solver(objective: Objective, known_by_products: bool) -> Solver:
        if known_by_products and not bare:
            _refuse(_STORED, step_size=fixed_step)
            default = 0.0 if batches is None else _HELD_OUT
            return iobs_product_solver(
                objective,
                options=ProductOptions(
                    schedule=schedule,
                    stages=stages,
                    held_out=default if held_out is None else held_out,
                    refinements=_REFINEMENTS if refinements is None else refinements,
                    descent=descent,
                ),
            )
        _refuse(_PRODUCTS, descent=descent, held_out=held_out, refinements=refinements)
        return iobs_solver(
            objective,
            options=StoredOptions(
                mask_rule, values, adaptive, schedule, stages, safeguard
            ),
            damping=_iobs_stored.FIRST_DAMPING if isinstance(damping, str) else damping,
            step_size=fixed_step,
        )

    return _front.solve(
        make_solver,
        loss_fn,
        params,
        k,
        args=args,
        batches=batches,
        curvature=curvature,
        needs=NEEDS[mask_rule],
        prunable=prunable,
        batch_size=batch_size,
        tol=tol,
        max_steps=max_steps,
    )


def _refuse(where: str, **options: object) -> None:
    """Raises for options that would have no effect."""
    given = [name for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"`{given[0]}` has no effect here: it is for {where}.")


def _check_choices(
    params: Params, mask_rule: str, values: str, damping: object, step_size: object
) -> None:
    if mask_rule not in MASK_RULES:
        raise ValueError(
            f"`mask_rule` must be one of {sorted(MASK_RULES)}, got {mask_rule!r}."
        )
    if values not in ("obs", "top_k"):
        raise ValueError(f"`values` must be 'obs' or 'top_k', got {values!r}.")
    for name, value in (("damping", damping), ("step_size", step_size)):
        if isinstance(value, str) and value != "auto":
            raise ValueError(f"`{name}` must be 'auto' or a number, got {value!r}.")
    if isinstance(damping, int | float) and not damping >= 0:
        raise ValueError(f"`damping` must be at least 0, got {damping!r}.")
    if mask_rule == "exact" and _tree.size(params) > EXACT_LIMIT:
        raise ValueError(
            f"`mask_rule='exact'` enumerates all supports of at most {EXACT_LIMIT} "
            f"weights; these params have {_tree.size(params)}. Use 'backward'."
        )
