"""Weights that no gradient row sees: the loss does not need them."""

import dataclasses

import jax
import jax.numpy as jnp

from sparserec import _tree, select
from sparserec._types import Mask, Params
from sparserec.budget import Budget
from sparserec.quadratic import QuadraticModel


def unseen(model: QuadraticModel) -> Mask | None:
    """Where neither the gradient nor any row has an entry; `None` if it is unknown.

    Units that are never active make them. What the rounding of the ridge swallows
    counts as no entry.
    """
    curvature = model.curvature
    ridge = getattr(curvature, "ridge", None)
    if ridge is None or not hasattr(curvature, "diagonal"):
        return None
    return jax.tree.map(
        lambda d, g: (d <= ridge.astype(d.dtype)) & (g == 0),
        curvature.diagonal(),
        model.gradient,
    )


def without_unseen(
    model: QuadraticModel, params: Params, budget: Budget
) -> tuple[QuadraticModel, Params]:
    """The model and the params with unseen weights at zero, where the budget is short.

    Only the ridge holds such weights where they are, and its pull is no loss: with
    their center at zero it pulls there. A budget with room for more than the weights
    seen keeps the largest of the others.
    """
    blind = unseen(model)
    if blind is None:
        return model, params
    room = list(budget.counts)
    for mask, group in zip(jax.tree.leaves(blind), budget.groups, strict=True):
        if group >= 0:
            room[group] = room[group] - jnp.sum(~mask, dtype=jnp.int32)
    counts = jnp.maximum(jnp.stack(room), 0)
    # Leaves that are never pruned are whole in this mask.
    spared = select.support(_tree.keep(blind, params), counts, budget.groups)
    kept = jax.tree.map(lambda b, s: ~b | s, blind, spared)
    center = _tree.keep(kept, model.center)
    return dataclasses.replace(model, center=center), _tree.keep(kept, params)
