"""Mini-batch descent of the kept weights between two choices of the support."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from sparserec import _tree
from sparserec._linsolve import while_loop
from sparserec._types import Mask, Params


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Descent:
    """How the kept weights are tuned on the examples of a stage.

    Attributes:
      optimizer: any optax transformation; its state lives on through the stages, so
        that schedules in it count the mini-batches of all stages.
      minibatch: examples in a step.
      passes: times that the examples are visited.
    """

    optimizer: optax.GradientTransformation
    minibatch: int = 64
    passes: int = 2


class DescentState(NamedTuple):
    """State of the optimizer; empty where there is no descent."""

    optimizer: Any


class _Walk(NamedTuple):
    params: Params
    tail: Params  # mean of the second half of the walk
    optimizer: Any
    number: Int[Array, ""]


def init(descent: Descent | None, params: Params) -> DescentState:
    """The state before the first stage."""
    return DescentState(() if descent is None else descent.optimizer.init(params))


def _order(total: int, descent: Descent) -> np.ndarray:
    """Indices of the examples in every mini-batch, mixed anew in every pass.

    Multiples of a number that has no factor in common with the total visit every
    example once; multiples of irrational shares of the total are spread evenly.
    """
    size = min(descent.minibatch, total)
    count = total // size
    passes = []
    for number in range(descent.passes):
        multiplier = max(1, int(total * (math.sqrt(5 + number) % 1)))
        while math.gcd(multiplier, total) != 1:
            multiplier += 1
        mixed = np.arange(count * size, dtype=np.int64) * multiplier % total
        passes.append(mixed.reshape(count, size))
    return np.concatenate(passes).astype(np.int32)


def descend(
    descent: Descent | None, solver, params: Params, mask: Mask, state: DescentState
) -> tuple[Params, DescentState]:
    """Walks over the building examples in mini-batches, then lets the judge choose.

    The end of the walk, the mean of its second half, and the point before it compete
    on the held-out examples. Gradients are masked, so that moments of weights that
    are gone fade; weights off the mask stay exactly zero.
    """
    if descent is None or solver.data.size == 0:
        return params, state
    objective, data = solver.objective, solver.data
    order = jnp.asarray(_order(data.size, descent))
    steps = order.shape[0]

    def body(walk: _Walk) -> _Walk:
        number = walk.number
        batch = jax.tree.map(lambda x: x[order[number]], data.build)
        gradient = _tree.keep(mask, objective.model(walk.params, batch).gradient)
        updates, optimizer = descent.optimizer.update(
            gradient, walk.optimizer, walk.params
        )
        moved = _tree.keep(mask, optax.apply_updates(walk.params, updates))
        late = (number >= steps // 2).astype(jnp.float32)
        share = late / (steps - steps // 2)
        return _Walk(
            params=moved,
            tail=_tree.add_scaled(walk.tail, share, moved),
            optimizer=optimizer,
            number=number + 1,
        )

    walk = while_loop(
        lambda walk: walk.number < steps,
        body,
        _Walk(params, _tree.zeros_like(params), state.optimizer, jnp.int32(0)),
        on_host=objective.on_host,
    )
    candidates = jax.tree.map(lambda *xs: jnp.stack(xs), walk.params, walk.tail, params)
    best = jnp.argmin(solver.losses(candidates))
    chosen = jax.tree.map(lambda x: x[best], candidates)
    return chosen, DescentState(walk.optimizer)
