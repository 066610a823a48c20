"""Budgets that change from step to step: down for pruning, up for recovery."""

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Int

from sparserec.budget import Budget

Schedule = Literal["down", "up"] | Callable[[Int[Array, ""]], Array] | None


def check_schedule(schedule: Schedule) -> None:
    """Raises for anything that is not a schedule."""
    if not (schedule in (None, "down", "up") or callable(schedule)):
        raise ValueError(
            "`schedule` must be None, 'down' (pruning: from all weights to k), 'up' "
            "(recovery: from few weights to k), or a function from the step's index "
            f"to the number of weights to keep; got {schedule!r}."
        )


def budget_at(
    schedule: Schedule, budget: Budget, index: Int[Array, ""], stages: int
) -> Budget:
    r"""The budget of one step; the final one from step `stages - 1` on.

    With $s = \min(1, (t+1)/\text{stages})$, `"down"` keeps $n (k/n)^s$ weights,
    rounded (a constant fraction goes at every stage), `"up"` keeps
    $\lceil k s\rceil$.

    Args:
      schedule: `None`, `"down"`, `"up"`, or a function from the index (traced
        int32) to a count for all groups together or to one count per group.
      budget: the final budget.
      index: number of the step, from zero.
      stages: length of the built-in schedules; static.

    Returns:
      A budget between zero and the sizes of the groups.
    """
    if schedule is None:
        return budget
    sizes = jnp.asarray(budget.sizes, jnp.float32)
    if callable(schedule):
        counts = jnp.broadcast_to(
            jnp.asarray(schedule(index), jnp.int32), budget.counts.shape
        )
    else:
        share = jnp.minimum((index + 1).astype(jnp.float32) / stages, 1)
        target = budget.counts.astype(jnp.float32)
        if schedule == "down":
            fraction = jnp.maximum(target, 1) / jnp.maximum(sizes, 1)
            moving = jnp.round(sizes * fraction**share)
        else:
            moving = jnp.ceil(target * share)
        # The end is exact whatever float32 makes of it.
        counts = jnp.where(share >= 1, budget.counts, moving.astype(jnp.int32))
        inside = jnp.maximum if schedule == "down" else jnp.minimum
        counts = inside(counts, budget.counts)
    counts = jnp.clip(counts, 0, jnp.asarray(budget.sizes, jnp.int32))
    return dataclasses.replace(budget, counts=counts)
