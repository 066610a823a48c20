"""What a path finds: the best support of every budget.

Legend: s slots (places for members of a support), K budgets from 1 to K.
"""

from collections.abc import Callable
from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec import _tree
from sparserec._types import Count, Mask, Params, Scalar, Status
from sparserec.budget import Budget
from sparserec.solvers._members import Slots


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

    Two arrays in place of six: what is written and read together compiles as one.

    Attributes:
      places: entry in each slot, -1 in empty ones, and last the `Status` code, int32,
        shape `(K, s + 1)`.
      numbers: refitted values, zeros in empty slots, then the objective, infinite
        before a first support, and the gain of the best exchange still available,
        shape `(K, s + 2)`.
    """

    places: Int[Array, "K s1"]
    numbers: Float[Array, "K s2"]

    @classmethod
    def of(
        cls, slots: Slots, values: Array, value: Scalar, gain: Scalar, status: Array
    ) -> Self:
        """The entry for one k."""
        places = jnp.where(slots.filled, slots.index, -1)
        return cls(
            jnp.append(places, status.astype(jnp.int32)),
            jnp.concatenate([values, value[None], gain[None]]),
        )

    @classmethod
    def empty(cls, k_max: int, start: Slots, dtype: jnp.dtype) -> Self:
        """Nothing found yet; supports are those of the start."""
        infinite, unknown = (jnp.full((), x, dtype) for x in (jnp.inf, jnp.nan))
        nothing = jnp.zeros(start.index.shape, dtype)
        status = jnp.int32(Status.NONFINITE)
        one = cls.of(start, nothing, infinite, unknown, status)
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (k_max, *x.shape)), one)

    def slots(self, row: Count) -> Slots:
        """The support of one k."""
        places = self.places[row, :-1]
        return Slots(jnp.maximum(places, 0), places >= 0)

    @property
    def values(self) -> Float[Array, "K s"]:
        """Refitted values."""
        return self.numbers[..., :-2]

    @property
    def value(self) -> Float[Array, "K"]:
        """Objectives."""
        return self.numbers[..., -2]


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
    place = jnp.arange(value.shape[0], dtype=jnp.int32)
    before = place[None, :] < place[:, None]
    earlier = jnp.min(jnp.where(before, value[None, :], jnp.inf), axis=1)
    lower = jnp.where(value < earlier, place, 0)
    return jnp.max(jnp.where(place[None, :] <= place[:, None], lower[None, :], 0), 1)


def as_path(
    records: Records,
    moves: Count,
    like: Params,
    budget: Budget,
    sound: Callable[[Array], Array] = lambda value: value,
) -> Path:
    """The records as params and masks, with objectives that do not rise in k.

    `sound` takes from values what is rounding.
    """
    value = sound(records.value)
    best = monotone(value)
    places, numbers = records.places[best], records.numbers[best]
    index, filled = jnp.maximum(places[:, :-1], 0), places[:, :-1] >= 0
    rows = jnp.arange(places.shape[0])[:, None]
    shape = (places.shape[0], _tree.size(like))
    flat = jnp.zeros(shape, numbers.dtype).at[rows, index].add(numbers[:, :-2])
    inside = jnp.zeros(shape, bool).at[rows, index].max(filled)
    split = jax.vmap(_tree.layout(like).split)
    owners = budget.groups
    fixed = sum(
        x.size for x, g in zip(jax.tree.leaves(like), owners, strict=True) if g < 0
    )
    leaves, structure = jax.tree.flatten(split(inside))
    mask = [
        x if g >= 0 else jnp.ones_like(x)
        for x, g in zip(leaves, budget.groups, strict=True)
    ]
    return Path(
        ks=jnp.arange(1, shape[0] + 1, dtype=jnp.int32),
        params=_tree.cast_like(split(flat), like),
        mask=jax.tree.unflatten(structure, mask),
        # Weights that are never pruned are on every support.
        kept=jnp.sum(filled, axis=1, dtype=jnp.int32) - fixed,
        objective=sound(numbers[:, -2]),
        gain=numbers[:, -1],
        status=places[:, -1],
        moves=moves,
    )
