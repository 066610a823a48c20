"""What the steps of L0 coordinate descent are given, and what they share."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Key

from sparserec import _tree
from sparserec._types import Mask, Params, Scalar
from sparserec.budget import Budget
from sparserec.quadratic import QuadraticModel
from sparserec.solvers._columns import Problem
from sparserec.solvers._search import SearchOptions


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Options:
    """The static choices; see `sparserec.l0cd`.

    Attributes:
      begin: what is known of the first params: `"zeros"`, `"sparse"` (a support
        within the budget, to begin with), or `"unknown"`.
      whole: whether to go on beyond the first local optimum of a model; otherwise
        one step ends with `MAX_STEPS` where going on may help.
    """

    slots: int
    swaps: bool = True
    lasso: bool = False
    penalised: bool = False
    order: str = "cyclic"
    starts: tuple[str, ...] | None = None
    effort: float = 1.0
    begin: str = "unknown"
    whole: bool = True

    @property
    def search(self) -> SearchOptions:
        """The choices of the search alone."""
        return SearchOptions(self.slots, self.starts, self.effort, self.whole)


class Weights(NamedTuple):
    """Weights of the penalties, each of shape `()`, and a key for random starts."""

    penalty: Scalar
    l2: Scalar
    l1: Scalar
    key: Key[Array, ""] | None


def _prunable(params: Params, budget: Budget) -> list[Array]:
    leaves = jax.tree.leaves(params)
    return [x for x, g in zip(leaves, budget.groups, strict=True) if g >= 0]


def penalties(params: Params, budget: Budget, weights: Weights) -> Scalar:
    """The three penalties at `params`, shape `()`."""
    wide = _tree.dtype(params)
    chosen = _prunable(params, budget)
    count = _tree.count([x != 0 for x in chosen]).astype(wide)
    length = functools.reduce(
        jnp.add, [jnp.sum(jnp.abs(x)).astype(wide) for x in chosen]
    )
    energy = _tree.dot(params, params)
    return weights.penalty * count + weights.l1 * length + weights.l2 * energy


def problem_value(problem: Problem, model: QuadraticModel, params: Params) -> Scalar:
    """Value of the problem at the center of its model, shape `()`."""
    flat = _tree.flatten(params)
    half = jnp.asarray(0.5, flat.dtype)
    count = jnp.sum((flat != 0) & (problem.group >= 0), dtype=jnp.int32)
    ridge = half * problem.ridge * jnp.vdot(flat, flat)
    return model.value + ridge + problem.penalty * count.astype(flat.dtype)


def mask_of(inside: Bool[Array, "n"], like: Params, budget: Budget) -> Mask:
    """A flat support as a mask; leaves that are never pruned are all `True`."""
    leaves, structure = jax.tree.flatten(_tree.layout(like).split(inside))
    whole = [
        x if g >= 0 else jnp.ones(x.shape, bool)
        for x, g in zip(leaves, budget.groups, strict=True)
    ]
    return jax.tree.unflatten(structure, whole)


def fixed_entries(mask: Mask, budget: Budget) -> Bool[Array, "n"]:
    """The entries that are never pruned, as a flat mask."""
    leaves, structure = jax.tree.flatten(mask)
    flags = [
        jnp.full(x.shape, g < 0) for x, g in zip(leaves, budget.groups, strict=True)
    ]
    return _tree.flatten(jax.tree.unflatten(structure, flags))
