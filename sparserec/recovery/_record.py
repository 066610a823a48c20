"""What a path finds: the best support of every budget.

Legend: s slots (places for members of a support), K budgets from 1 to K.
"""

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec import _tree
from sparserec._types import Count, Mask, Params, Scalar, Status
from sparserec.budget import Budget
from sparserec.solvers._columns import group_of_entries
from sparserec.solvers._swaps import Slots


class Path(NamedTuple):
    """Solutions for every number of weights kept, along a leading axis.

    Attributes:
      ks: budgets 1, 2, ..., K, int32, shape `(K,)`.
      params: pytree like the params, leaves of shape `(K, ...)`.
      mask: booleans shaped like `params`; `True` where a weight is kept. Leaves that
        are not prunable are all `True`.
      kept: prunable weights (or groups) kept, at most k, int32, shape `(K,)`.
      objective: loss with its penalty at each k, shape `(K,)`; never rises in k.
      gain: by how much the best exchange of one weight would still lower the
        objective (of the local model), shape `(K,)`; negative where every one
        raises it, and NaN where groups or bounds are given.
      status: `Status` codes, int32, shape `(K,)`.
      moves: additions, removals and exchanges made in all, int32, shape `()`.
    """

    ks: Int[Array, "K"]
    params: Params
    mask: Mask
    kept: Int[Array, "K"]
    objective: Float[Array, "K"]
    gain: Float[Array, "K"]
    status: Int[Array, "K"]
    moves: Count


class Records(NamedTuple):
    """Supports with their values; one without the leading axis is that of one k.

    Attributes:
      index: entry in each slot, int32, shape `(K, s)`.
      filled: which slots are in use, shape `(K, s)`.
      values: refitted values, zeros in empty slots, shape `(K, s)`.
      value: objective, infinite before a first support, shape `(K,)`.
      gain: of the best exchange still available, shape `(K,)`.
      status: `Status` codes, int32, shape `(K,)`.
    """

    index: Int[Array, "K s"]
    filled: Bool[Array, "K s"]
    values: Float[Array, "K s"]
    value: Float[Array, "K"]
    gain: Float[Array, "K"]
    status: Int[Array, "K"]

    @classmethod
    def empty(cls, k_max: int, start: Slots, dtype: jnp.dtype) -> Self:
        """Nothing found yet; supports are those of the start."""
        shape = (k_max, start.index.shape[0])
        return cls(
            index=jnp.broadcast_to(start.index, shape),
            filled=jnp.broadcast_to(start.filled, shape),
            values=jnp.zeros(shape, dtype),
            value=jnp.full(k_max, jnp.inf, dtype),
            gain=jnp.full(k_max, jnp.nan, dtype),
            status=jnp.full(k_max, int(Status.NONFINITE), jnp.int32),
        )


def improve(
    records: Records, row: Count, found: Records, slack: Scalar
) -> tuple[Records, Bool[Array, ""]]:
    """Takes what is found into a row if it is better than what is there.

    Returns:
      The records, and whether what is found is worse by more than the slack.
    """
    old = records.value[row]
    better = found.value < old - jnp.where(jnp.isfinite(old), slack, 0)
    new = jax.tree.map(
        lambda all_, one: all_.at[row].set(jnp.where(better, one, all_[row])),
        records,
        found,
    )
    return new, found.value > old + slack


def monotone(value: Float[Array, "K"]) -> Int[Array, "K"]:
    """For every k, the place of the smallest support that is not worse."""
    lowest = jax.lax.cummin(value)
    place = jnp.arange(value.shape[0], dtype=jnp.int32)
    earlier = jnp.concatenate([jnp.full(1, jnp.inf, lowest.dtype), lowest[:-1]])
    return jax.lax.cummax(jnp.where(value < earlier, place, 0))


def as_path(records: Records, moves: Count, like: Params, budget: Budget) -> Path:
    """The records as params and masks, with objectives that do not rise in k."""
    best = monotone(records.value)
    records = jax.tree.map(lambda x: x[best], records)
    rows = jnp.arange(records.value.shape[0])[:, None]
    shape = (records.value.shape[0], _tree.size(like))
    flat = jnp.zeros(shape, records.values.dtype)
    flat = flat.at[rows, records.index].add(records.values)
    inside = jnp.zeros(shape, bool).at[rows, records.index].max(records.filled)
    split = jax.vmap(_tree.layout(like).split)
    fixed = group_of_entries(budget, _tree.layout(like)) < 0
    kept = jnp.sum(inside & ~fixed[None, :], axis=1, dtype=jnp.int32)
    leaves, structure = jax.tree.flatten(split(inside))
    mask = [
        x if g >= 0 else jnp.ones_like(x)
        for x, g in zip(leaves, budget.groups, strict=True)
    ]
    return Path(
        ks=jnp.arange(1, shape[0] + 1, dtype=jnp.int32),
        params=_tree.cast_like(split(flat), like),
        mask=jax.tree.unflatten(structure, mask),
        kept=kept,
        objective=records.value,
        gain=records.gain,
        status=records.status,
        moves=moves,
    )
