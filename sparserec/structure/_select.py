"""Which units to keep within a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparserec.structure._apply import checked_keep
from sparserec.structure._costs import Keep, evaluate, marginal
from sparserec.structure._groups import Groups, complete, cost_terms

Cost = str | Callable[[dict[str, np.ndarray]], float]

# The price of a unit depends on how many units the other groups keep. Prices taken
# at the last choice settle after a few rounds.
ROUNDS = 6
# Bisection on the exchange rate between score and cost, in sorted order of the
# units: 40 halvings resolve any ordering of fewer than 2^40 units.
HALVINGS = 40


def total_cost(groups: Groups, cost: Cost = "flops", keep: Keep | None = None) -> float:
    """Cost of the function, whole or with a choice of units.

    Args:
      groups: result of `groups`.
      cost: `"flops"` (two per multiply-add of all products and convolutions of the
        traced call), `"params"`, or a function from the kept units to a number.
      keep: group name -> bool array of shape `(units,)`, True = kept; default all.

    Returns:
      The cost in its own unit; an integer for the two named costs.

    Raises:
      ValueError: for an unknown cost or a `keep` that does not fit the groups.
    """
    chosen = {**complete(groups), **checked_keep(groups, keep or {})}
    if callable(cost):
        return float(cost(dict(chosen)))
    return evaluate(cost_terms(groups, cost), chosen)


def unit_costs(
    groups: Groups, cost: str = "flops", keep: Keep | None = None
) -> dict[str, np.ndarray]:
    """What each unit costs while all the others stay as they are.

    Args:
      groups: result of `groups`.
      cost: `"flops"` or `"params"`.
      keep: group name -> bool array of shape `(units,)`, True = kept; default all.

    Returns:
      Group name -> float64 array of shape `(units,)`: what is saved by dropping a
      kept unit, or spent by bringing back a dropped one.

    Raises:
      ValueError: for an unknown cost or a `keep` that does not fit the groups.
    """
    chosen = checked_keep(groups, keep or {})
    return marginal(cost_terms(groups, cost), groups.sizes, chosen)


def select(
    groups: Groups,
    scores: Mapping[str, Any],
    budget: float,
    *,
    cost: Cost = "flops",
    min_keep: int | Mapping[str, int] = 1,
    multiple_of: int = 1,
) -> dict[str, np.ndarray]:
    r"""Keep the units that are worth their cost, within a budget.

    Maximizes $\sum_u S_u z_u$ over $z \in \{0, 1\}$ subject to $c(z) \le B$ by one
    exchange rate between score and cost: unit u stays if $S_u > \lambda c_u$. The
    costs $c_u$ depend on the other groups (a product of widths), so they are taken
    at the last choice and the rate is found again, a few times; at the end units
    that still fit are added in order of score per cost. The result is a good choice,
    not a proven optimum.

    Args:
      groups: result of `groups`.
      scores: group name -> importance, shape `(units,)`, higher = keep rather;
        groups that are not named stay complete. Units with a negative score are the
        first to go, but none goes unless the budget asks for it.
      budget: largest allowed cost, in the unit of `cost`; a share of the whole is
        `0.5 * total_cost(groups, cost)`.
      cost: `"flops"`, `"params"`, or a function that takes the kept units (group
        name -> bool array) and returns a number that does not grow when units go.
      min_keep: fewest units of a group that stay, for all groups or by name.
      multiple_of: kept counts are multiples of this, or the full size.

    Returns:
      Group name -> bool array of shape `(units,)` for every group, True = kept.
      Everything is kept when the budget allows it. Of equal scores the unit with the
      lower index stays.

    Raises:
      ValueError: if the budget cannot be met (the message says the smallest cost
        that can), a group does not exist, or scores have a wrong shape or are NaN.
    """
    order = _orders(groups, scores)
    counts = _allowed_counts(groups, order, min_keep, multiple_of)
    values = {name: np.asarray(scores[name], np.float64) for name in order}

    def chosen(kept: Mapping[str, int]) -> dict[str, np.ndarray]:
        keep = dict(complete(groups))
        for name, count in kept.items():
            keep[name] = np.zeros(groups.sizes[name], bool)
            keep[name][order[name][:count]] = True
        return keep

    def price(kept: Mapping[str, int]) -> float:
        return total_cost(groups, cost, chosen(kept))

    kept = {name: int(allowed[-1]) for name, allowed in counts.items()}
    if price(kept) <= budget:
        return chosen(kept)
    smallest = price({name: int(allowed[0]) for name, allowed in counts.items()})
    if smallest > budget:
        raise ValueError(
            f"The budget of {budget:.6g} cannot be met: with `min_keep`={min_keep!r} "
            f"and `multiple_of`={multiple_of} the smallest reachable cost is "
            f"{smallest:.6g}, {smallest / price(kept):.1%} of the whole, which costs "
            f"{price(kept):.6g}."
        )
    best, best_value = kept, -np.inf
    for _ in range(ROUNDS):
        unit_price = _prices(groups, cost, kept, counts, chosen, price)
        found = _at_rate(values, order, counts, unit_price, budget, price)
        found = _filled(values, order, counts, unit_price, budget, price, found)
        value = sum(values[n][order[n][:count]].sum() for n, count in found.items())
        if value > best_value:
            best, best_value = found, value
        if found == kept:
            break
        kept = found
    return chosen(best)


def _orders(groups: Groups, scores: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Units of each scored group from the most to the least important."""
    order = {}
    for name, score in scores.items():
        if name not in groups.sizes:
            raise ValueError(
                f"`scores` name the group {name!r}, which does not exist; the groups "
                f"are {list(groups.sizes)[:12]}."
            )
        score = np.asarray(score, np.float64)
        if score.shape != (groups.sizes[name],):
            raise ValueError(
                f"`scores[{name!r}]` has shape {score.shape}, but the group has "
                f"{groups.sizes[name]} units."
            )
        if np.isnan(score).any():
            raise ValueError(f"`scores[{name!r}]` contain NaN.")
        order[name] = np.argsort(-score, kind="stable")
    return order


def _allowed_counts(
    groups: Groups,
    order: Mapping[str, np.ndarray],
    min_keep: int | Mapping[str, int],
    multiple_of: int,
) -> dict[str, np.ndarray]:
    """Numbers of units each group may keep, increasing."""
    if isinstance(min_keep, Mapping) and (extra := set(min_keep) - set(groups.sizes)):
        raise ValueError(f"`min_keep` names groups that do not exist: {sorted(extra)}.")
    if multiple_of < 1:
        raise ValueError(f"`multiple_of` must be at least 1, got {multiple_of}.")
    allowed = {}
    for name in order:
        size = groups.sizes[name]
        least = min_keep.get(name, 1) if isinstance(min_keep, Mapping) else min_keep
        if least < 1:
            raise ValueError(
                f"`min_keep` must be at least 1, got {least} for {name!r}: a group "
                "without units would empty a layer."
            )
        steps = np.arange(multiple_of, size, multiple_of)
        allowed[name] = np.append(steps[steps >= least], size)
    return allowed


def _prices(
    groups: Groups,
    cost: Cost,
    kept: Mapping[str, int],
    counts: Mapping[str, np.ndarray],
    chosen: Callable[[Mapping[str, int]], dict[str, np.ndarray]],
    price: Callable[[Mapping[str, int]], float],
) -> dict[str, np.ndarray]:
    """Cost of one unit of each group at the current choice, shape `(units,)`."""
    if not callable(cost):
        return marginal(cost_terms(groups, cost), groups.sizes, chosen(kept))
    now, prices = price(kept), {}
    for name, allowed in counts.items():
        at = int(np.searchsorted(allowed, kept[name]))
        other = int(allowed[at - 1] if at else allowed[min(1, len(allowed) - 1)])
        change = abs(now - price({**kept, name: other}))
        each = change / max(abs(kept[name] - other), 1)
        prices[name] = np.full(groups.sizes[name], each)
    return prices


def _rates(value: np.ndarray, price: np.ndarray) -> np.ndarray:
    """Score per cost; a free unit with a positive score is worth any rate."""
    with np.errstate(divide="ignore", invalid="ignore"):
        rate = np.where(value > 0, value / price, value * np.maximum(price, 1))
    return np.where(np.isnan(rate), 0.0, rate)


def _at_rate(
    values: Mapping[str, np.ndarray],
    order: Mapping[str, np.ndarray],
    counts: Mapping[str, np.ndarray],
    prices: Mapping[str, np.ndarray],
    budget: float,
    price: Callable[[Mapping[str, int]], float],
) -> dict[str, int]:
    """Counts at the lowest exchange rate whose choice fits the budget."""
    rates = {n: _rates(values[n], prices[n])[order[n]] for n in order}
    levels = np.unique(np.concatenate([*rates.values(), [-np.inf, np.inf]]))

    def at(level: float) -> dict[str, int]:
        found = {}
        for name, rate in rates.items():
            wanted = int((rate > level).sum())
            below = counts[name][counts[name] <= wanted]
            found[name] = int(below[-1] if below.size else counts[name][0])
        return found

    low, high = 0, len(levels) - 1
    for _ in range(HALVINGS):
        if high - low <= 1:
            break
        middle = (low + high) // 2
        if price(at(levels[middle])) <= budget:
            high = middle
        else:
            low = middle
    return at(levels[high])


def _filled(
    values: Mapping[str, np.ndarray],
    order: Mapping[str, np.ndarray],
    counts: Mapping[str, np.ndarray],
    prices: Mapping[str, np.ndarray],
    budget: float,
    price: Callable[[Mapping[str, int]], float],
    kept: Mapping[str, int],
) -> dict[str, int]:
    """Bring back the units that still fit, the best score per cost first."""
    found = dict(kept)
    open_groups = set(found)
    while open_groups:
        gains = {}
        for name in open_groups:
            larger = counts[name][counts[name] > found[name]]
            if larger.size:
                added = order[name][found[name] : int(larger[0])]
                spent = max(float(prices[name][added].sum()), 1e-300)
                gains[name] = float(values[name][added].sum()) / spent, int(larger[0])
        open_groups &= set(gains)
        if not gains:
            break
        name = max(sorted(gains), key=lambda each: gains[each][0])
        tried = {**found, name: gains[name][1]}
        if gains[name][0] > 0 and price(tried) <= budget:
            found = tried
        else:
            open_groups.discard(name)
    return found
