"""One call from a trained network to a pruned one, of weights or of whole units."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

from sparserec import _tree, saliency, select
from sparserec import structure as _structure
from sparserec._run import Incumbent, Solver, State
from sparserec._solution import Solution
from sparserec._types import LossFn, Params, Prunable
from sparserec.budget import Budget, matrices
from sparserec.quadratic import Objective, QuadraticModel
from sparserec.solvers import _front, _states
from sparserec.solvers.chita import chita
from sparserec.solvers.iht import iht
from sparserec.solvers.iobs import iobs
from sparserec.solvers.l0cd import l0cd
from sparserec.solvers.oba import oba
from sparserec.solvers.one_shot import obd, obs
from sparserec.structure._gate_model import gate_model, gate_scores
from sparserec.structure._groups import Groups
from sparserec.structure._joint import count_units, joint

# --- weights -------------------------------------------------------------------------


def _magnitude_init(
    objective: Objective, params: Params, budget: Budget, args: tuple
) -> tuple[State, Incumbent]:
    mask = select.support(params, budget.counts, budget.groups)
    projection = _tree.keep(mask, params)
    value = objective.value(projection, args)
    state = _states.begin(projection, mask, value, settled=True, measured=False)
    state = state._replace(change=jnp.zeros_like(value))
    return state, Incumbent(projection, mask, value)


def _unchanged(state: State, budget: Budget, args: tuple, index: Array) -> State:
    del budget, args, index
    return state


def _by_magnitude(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: int | Array | Mapping[str, int | Array],
    *,
    args: tuple = (),
    prunable: Prunable = matrices,
    batch_size: int | None = None,
) -> Solution:
    """Keeps the largest weights as they are."""
    return _front.solve(
        lambda objective, _: Solver(
            Partial(_magnitude_init, objective), Partial(_unchanged)
        ),
        loss_fn,
        params,
        k,
        args=args,
        prunable=prunable,
        batch_size=batch_size,
        tol=0.0,
        max_steps=1,
    )


WEIGHT_METHODS: dict[str, tuple[Callable[..., Solution], dict[str, Any]]] = {
    "chita": (chita, {"stages": 16, "schedule": "geometric"}),
    "iht": (iht, {}),
    "iobs": (iobs, {"schedule": "down"}),
    "l0cd": (l0cd, {}),
    "magnitude": (_by_magnitude, {}),
    "oba": (oba, {"stages": 16}),
    "obd": (obd, {}),
    "obs": (obs, {}),
}
"""Name -> solver, and what pruning a trained network wants of it."""

# --- units ---------------------------------------------------------------------------


def _summed(score: Callable[..., Params]) -> Callable[..., dict[str, np.ndarray]]:
    """Scores of weights as scores of units: the magnitude of their sum."""

    def scores(loss_fn, params, groups, args, batch_size, **options):
        each = score(loss_fn, params, args=args, batch_size=batch_size, **options)
        summed = _structure.unit_scores(groups, each)
        return {name: np.abs(np.asarray(values)) for name, values in summed.items()}

    return scores


def _largest(loss_fn, params, *, args, batch_size):
    del loss_fn, args, batch_size
    return saliency.magnitude(params)


def _alone(loss_fn, params, groups, args, batch_size, **options):
    size = 32 if batch_size is None else batch_size
    model = gate_model(loss_fn, params, groups, args=args, batch_size=size, **options)
    return {name: np.asarray(values) for name, values in gate_scores(model).items()}


UNIT_SCORES: dict[str, Callable[..., dict[str, np.ndarray]]] = {
    "magnitude": _summed(_largest),
    "taylor": _summed(saliency.taylor),
    "oba": _summed(saliency.oba),
    "obd": _summed(saliency.obd),
    "gates": _alone,
}
"""Name -> scores of units, chosen once by `structure.select`."""

JOINT_METHODS: dict[str, Callable[..., Solution] | None] = {
    "joint": None,
    "chita": chita,
    "iht": iht,
    "iobs": iobs,
    "l0cd": l0cd,
}
"""Name -> solver that exchanges units within their groups at every stage."""

_SELECTION = ("min_keep", "multiple_of")


def _prune_units(
    loss_fn: LossFn,
    params: Params,
    groups: Groups,
    budget: float,
    cost: str,
    method: str,
    args: tuple,
    batch_size: int | None,
    options: dict[str, Any],
) -> Solution:
    """Gates folded into weights, and the units without one set to zero."""
    if method in JOINT_METHODS:
        size = {} if batch_size is None else {"batch_size": batch_size}
        solved = joint(
            loss_fn,
            params,
            groups,
            budget,
            args=args,
            cost=cast(Any, cost),
            solver=JOINT_METHODS[method],
            **size,
            **options,
        )
        params = _structure.gate(params, groups, solved.params)
        keep = {name: np.asarray(kept) for name, kept in solved.mask.items()}
    else:
        limits = {n: options.pop(n) for n in _SELECTION if n in options}
        scores = UNIT_SCORES[method](
            loss_fn, params, groups, args, batch_size, **options
        )
        price: Any = count_units if cost == "units" else cost
        keep = _structure.select(groups, scores, budget, cost=price, **limits)
        solved = None
    mask = _structure.mask(params, groups, keep)
    pruned = _tree.keep(mask, params)
    if solved is not None:
        return solved._replace(params=pruned, mask=mask)
    # Only the loss is left to find, for which any solver that keeps all will do.
    everything = jax.tree.map(lambda _: True, params)
    return _by_magnitude(
        loss_fn,
        pruned,
        _tree.size(params),
        args=args,
        prunable=everything,
        batch_size=batch_size,
    )._replace(mask=mask)


def prune(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: int | Array | Mapping[str, int | Array] | None = None,
    *,
    args: tuple = (),
    method: str = "iobs",
    structure: Groups | None = None,
    budget: float | None = None,
    cost: str = "flops",
    batch_size: int | None = None,
    **options: Any,
) -> Solution:
    r"""Prunes a trained network to k weights, or to whole units within a cost.

    Without `structure`, single weights go: `"iobs"` (with `schedule="down"`),
    `"chita"` and `"oba"` (in 16 stages), `"iht"`, `"l0cd"` (for a few hundred weights
    kept), `"obd"`, `"obs"`, `"magnitude"`. With it, whole units go: `"joint"`,
    `"iobs"`, `"chita"`, `"iht"` and `"l0cd"` solve for all of them together
    (`structure.joint`; all but the first also exchange units within groups by that
    solver), `"gates"`, `"oba"`, `"obd"`, `"taylor"`, `"magnitude"` rank single units.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, a mean over examples; static.
      params: trained weights, any pytree of floating arrays.
      k: weights to keep, an integer or a mapping from leaf path to count; with
        `structure`, units to keep in all, an integer. `None` where `budget` is given.
      args: data handed to the loss.
      method: one of the names above.
      structure: result of `sparserec.structure.groups` for the same params; `None`
        prunes single weights.
      budget: with `structure`, instead of `k`: the largest cost, in the unit of
        `cost`, for example `0.5 * structure.total_cost(groups)`.
      cost: `"flops"` or `"params"`; what `budget` counts.
      batch_size: visit the examples in pieces of this many, on the host; set it for
        convolutions and for data that one program cannot hold.
      **options: of the solver of that name; with `structure` those of
        `structure.joint`, `structure.select` (`min_keep`, `multiple_of`) or the score.

    Returns:
      A `Solution` over weights, shaped like `params`. With `structure` its mask keeps
      whole units, and `structure.kept_units(groups, solution.mask)` are the units that
      `structure.shrink` and `structure.resized` take. Batch statistics are not
      touched: estimate them again. Nothing of a group goes below one unit. Half
      precision is solved in float32 and cast back. Edges (`k=0`, ties, NaN) are those
      of the solver.

    Raises:
      ValueError: a method that does not exist (lists those that do), a budget that
        cannot be met, both or neither of `k` and `budget`, or what the solver refuses.
      TypeError: `k` or `params` of the wrong type.
    """
    if structure is None:
        if k is None or budget is not None:
            raise ValueError(
                "give `k`, the number of weights to keep; `budget` counts the cost of "
                "whole units and needs `structure=sparserec.structure.groups(...)`."
            )
        solver, defaults = _known(method, WEIGHT_METHODS, "weights")
        if batch_size is not None:
            options = {"batch_size": batch_size, **options}
        return solver(loss_fn, params, k, args=args, **{**defaults, **options})
    if (k is None) == (budget is None):
        raise ValueError(
            "give either `k`, the number of units to keep, or `budget`, the largest "
            "cost."
        )
    if isinstance(loss_fn, QuadraticModel):
        raise ValueError("a quadratic model has no units; leave `structure` out.")
    _known(method, {**JOINT_METHODS, **UNIT_SCORES}, "units")
    if budget is None:
        budget, cost = _count(k), "units"
    elif cost == "units":
        raise ValueError("`cost='units'` is what `k` stands for; give `k` instead.")
    working = _tree.to_working_precision(params)
    solution = _prune_units(
        loss_fn,
        working,
        structure,
        budget,
        cost,
        method,
        args,
        batch_size,
        dict(options),
    )
    return solution._replace(params=_tree.cast_like(solution.params, params))


def _known(method: str, table: Mapping[str, Any], what: str) -> Any:
    if method not in table:
        raise ValueError(
            f"`method` must be one of {sorted(table)} for {what}, got {method!r}."
        )
    return table[method]


def _count(k: Any) -> int:
    """Units to keep, or what is wrong with the number."""
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(
            f"with `structure`, `k` is the number of units to keep, an integer; got "
            f"{k!r}. For a share of the cost use `budget=`."
        )
    return int(k)
