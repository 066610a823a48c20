"""Selection within a budget of cost, and of count: one multiplier around top-k."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, PyTree

from sparserec import _tree
from sparserec._top_k import support_of
from sparserec._types import Mask, Scalar

_HALVINGS = 64  # of the bracket around the multiplier: beyond the digits of a float


def within_cost(
    scores: PyTree,
    costs: PyTree,
    limit: Scalar | float,
    k: Int[Array, ""] | int | None = None,
) -> Mask:
    r"""Keep what is worth most, within a total cost and at most k entries.

    $$\max_{z \in \{0,1\}^n} \sum_i |s_i| z_i \quad\text{subject to}\quad
      \sum_i f_i z_i \le F,\ \sum_i z_i \le k.$$

    For a multiplier $\lambda$ of the cost the best choice is the k largest positive
    $|s_i| - \lambda f_i$; bisection finds the smallest $\lambda$ whose choice fits.
    What the budget still has room for is filled by the same search on the rest, once.

    Args:
      scores: pytree of floating arrays; magnitudes count, NaN as zero.
      costs: what an entry costs, non-negative: a pytree with the structure of
        `scores`, every leaf of its shape or a scalar for all of its entries (the
        operations of one weight of a convolution).
      limit: largest total cost $F \ge 0$, in the unit of `costs`; may be traced.
      k: largest number of entries; all if `None`; may be traced.

    Returns:
      Mask with the structure and shapes of `scores`. Its value is at most that of the
      two dearest entries below the best possible one. Entries with a score of zero
      are not kept; with `limit=0` only free ones are. Ties go to the lowest index.

    Raises:
      ValueError: structures differ, or a cost has neither the shape of its scores nor
        that of a scalar.

    Source: FALCON (Meng et al., 2024), the projection onto two budgets.
    """
    leaves, structure = jax.tree.flatten(scores)
    prices, price_structure = jax.tree.flatten(costs)
    shapes = [
        (jnp.shape(c), jnp.shape(s)) for c, s in zip(prices, leaves, strict=False)
    ]
    if structure != price_structure or any(c not in ((), s) for c, s in shapes):
        raise ValueError(
            "`costs` must have the structure of `scores`, and every leaf the shape of "
            f"its scores or none; got {price_structure} with shapes (cost, score) "
            f"{shapes} for {structure}."
        )
    wide = _tree.dtype(_tree.to_working_precision(scores))
    values = [jnp.nan_to_num(jnp.abs(x.astype(wide)), nan=0.0) for x in leaves]
    spread = [
        jnp.broadcast_to(jnp.asarray(c, wide), x.shape)
        for c, x in zip(prices, values, strict=True)
    ]
    size = sum(x.size for x in values)
    count = jnp.asarray(size if k is None else k, jnp.int32)
    budget = jnp.asarray(limit, wide)
    first = _search(values, spread, budget, count)
    spent = _total(spread, first)
    taken = _tree.count(first)
    rest = [jnp.where(m, 0, v) for v, m in zip(values, first, strict=True)]
    rest = [
        jnp.where(c <= budget - spent, v, 0) for v, c in zip(rest, spread, strict=True)
    ]
    more = _search(rest, spread, budget - spent, count - taken)
    kept = [a | b for a, b in zip(first, more, strict=True)]
    return jax.tree.unflatten(structure, kept)


def _total(costs: list[Array], masks: list[Array]) -> Array:
    terms = [jnp.sum(jnp.where(m, c, 0)) for c, m in zip(costs, masks, strict=True)]
    return sum(terms[1:], terms[0])


def _search(
    values: list[Array], costs: list[Array], limit: Array, count: Array
) -> list[Array]:
    """The choice at the smallest multiplier that fits."""

    def at(multiplier: Array) -> list[Array]:
        worth = [
            # Free entries keep their value under an infinite multiplier.
            jnp.maximum(v - jnp.where(c > 0, multiplier * c, 0), 0)
            for v, c in zip(values, costs, strict=True)
        ]
        chosen = support_of(tuple(worth), jnp.maximum(count, 0), (0,) * len(worth))
        return [m & (w > 0) for m, w in zip(chosen, worth, strict=True)]

    def halve(_: Any, bracket: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bracket
        middle = low + (high - low) / 2
        fits = _total(costs, at(middle)) <= limit
        return jnp.where(fits, low, middle), jnp.where(fits, middle, high)

    rates = [
        jnp.max(jnp.where(c > 0, v / jnp.where(c > 0, c, 1), 0), initial=0)
        for v, c in zip(values, costs, strict=True)
    ]
    ceiling = 2 * jnp.max(jnp.stack(rates)) + jnp.finfo(limit.dtype).tiny
    zero = jnp.zeros_like(limit)
    _, high = jax.lax.fori_loop(0, _HALVINGS, halve, (zero, ceiling))
    high = jnp.where(_total(costs, at(zero)) <= limit, zero, high)
    return at(high)
