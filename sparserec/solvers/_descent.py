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
from sparserec._types import Mask, Params, Scalar
from sparserec.quadratic import Objective
from sparserec.solvers._examples import Examples


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Descent:
    """How the kept weights are tuned on the examples of a stage.

    Make one and pass the same object again: solvers compile anew for another one.

    Attributes:
      optimizer: any optax transformation; its state lives on through the stages, so
        that schedules in it count the mini-batches of all stages.
      minibatch: examples in a step; all of them where there are fewer.
      passes: times that the examples are visited; what is left over of a pass once
        no whole mini-batch remains is not.

    Raises:
      TypeError: `optimizer` is no optax transformation.
      ValueError: `minibatch` or `passes` is no integer of at least one.
    """

    optimizer: optax.GradientTransformation
    minibatch: int = 64
    passes: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, optax.GradientTransformation):
            raise TypeError(
                "`optimizer` must be an optax transformation such as "
                f"`optax.adam(1e-3)`, got {type(self.optimizer).__name__}."
            )
        for name in ("minibatch", "passes"):
            value = getattr(self, name)
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not whole or value < 1:
                raise ValueError(
                    f"`{name}` must be an integer of at least 1, got {value!r}."
                )


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


def check(descent: object) -> None:
    """Raises a `TypeError` for what is neither a `Descent` nor `None`."""
    if descent is not None and not isinstance(descent, Descent):
        raise TypeError(
            "`descent` must be `sparserec.Descent(optimizer)` or `None`, got "
            f"{type(descent).__name__}."
        )


# Compiled for loops on the host, where every operation by itself costs as much as a
# whole step should.
@jax.jit
def _taken(data: tuple, index: Int[Array, "b"]) -> tuple:
    return jax.tree.map(lambda x: jnp.asarray(x)[index], data)


@jax.jit
def _moved(
    descent: Descent, walk: _Walk, gradient: Params, mask: Mask, share: Scalar
) -> _Walk:
    """One step on the support, counted in the mean by `share`."""
    updates, optimizer = descent.optimizer.update(
        _tree.keep(mask, gradient), walk.optimizer, walk.params
    )
    moved = _tree.keep(mask, optax.apply_updates(walk.params, updates))
    tail = _tree.add_scaled(walk.tail, share, moved)
    return _Walk(moved, tail, optimizer, walk.number + 1)


def descend(
    descent: Descent | None,
    objective: Objective,
    examples: Examples,
    params: Params,
    mask: Mask,
    state: DescentState,
) -> tuple[Params, DescentState]:
    """Walks over the building examples in mini-batches, then lets the judge choose.

    The point before the walk, its end, and the mean of its second half compete on the
    judging examples. Gradients are masked, so that moments of weights that are gone
    fade; weights off the mask stay exactly zero. After a walk that ends in NaN the
    optimizer starts the next one as it started this one.

    Args:
      descent: how; `None` for not at all.
      objective: the loss.
      examples: `build` for the steps, `judge` for the choice.
      params: zero off the mask.
      mask: the support, which stays.
      state: of the optimizer.

    Returns:
      Params whose loss on the judging examples is not above that at the start, and the
      state of the optimizer.
    """
    if descent is None or examples.size == 0:
        return params, state
    order = jnp.asarray(_order(examples.size, descent))
    steps = order.shape[0]

    def body(walk: _Walk) -> _Walk:
        number = walk.number
        batch = _taken(examples.build, order[number])
        gradient = objective.gradient(walk.params, batch)
        late = (number >= steps // 2).astype(jnp.float32)
        share = late / (steps - steps // 2)
        return _moved(descent, walk, gradient, mask, share)

    walk = while_loop(
        lambda walk: walk.number < steps,
        body,
        _Walk(params, _tree.zeros_like(params), state.optimizer, jnp.int32(0)),
        on_host=objective.on_host,
    )
    candidates = jax.tree.map(lambda *xs: jnp.stack(xs), params, walk.params, walk.tail)
    best = jnp.argmin(objective.values(candidates, examples.judge))
    chosen = jax.tree.map(lambda x: x[best], candidates)
    finite = _tree.all_finite(walk.params)
    optimizer = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), walk.optimizer, state.optimizer
    )
    return chosen, DescentState(optimizer)
