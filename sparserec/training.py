"""Training after pruning: an optax transformation under which zeros stay zero."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sparserec import _tree
from sparserec._recalibrate import recalibrate
from sparserec._types import Mask, Params

__all__ = ["KeepMaskState", "keep_mask", "recalibrate"]


class KeepMaskState(NamedTuple):
    """State of `keep_mask`.

    Attributes:
      mask: booleans with the structure and shapes of the params; `True` where a
        weight is trained. An array like any other: another mask of the same shapes
        may take its place without compiling again.
    """

    mask: Mask


def keep_mask(mask: Mask) -> optax.GradientTransformationExtraArgs:
    r"""Trains the kept weights and holds the pruned ones at exactly zero.

    $$u_i \leftarrow \begin{cases} u_i & \text{where the mask is true} \\
      -w_i & \text{elsewhere} \end{cases}$$

    so that `optax.apply_updates` gives $w_i + u_i = 0$ off the mask, whatever the
    transformations before it did: momentum, weight decay, noise. It must therefore
    be the last one in the chain:

    ```python
    tx = optax.chain(optax.adamw(1e-3), sparserec.training.keep_mask(solution.mask))
    ```

    It works in `nnx.Optimizer` (the mask may be an nnx `State`) and in linen's
    `TrainState`. The mask lives in the state, so that
    `optax.tree.set(opt_state, mask=other)` exchanges it.

    Gradients of pruned weights still enter what comes before, for example the norm
    of `optax.clip_by_global_norm`.

    Args:
      mask: booleans with the leaf paths and shapes of the params, `True` where a
        weight is kept; `solution.mask` as it is.

    Returns:
      The transformation. Its `init(params)` raises a `ValueError` where the mask
      does not fit the params, and a `TypeError` where it is not boolean. Its
      `update` needs `params`, and raises a `ValueError` without them. A weight that
      is NaN or infinite stays so, no update can undo it.
    """

    def init(params: Params) -> KeepMaskState:
        _check_mask(mask, params)
        # Copies: whoever donates the optimizer's state must not lose the solution.
        flags = [jnp.array(flag, copy=True) for flag in jax.tree.leaves(mask)]
        return KeepMaskState(jax.tree.unflatten(jax.tree.structure(params), flags))

    def update(
        updates: optax.Updates,
        state: Any,  # a KeepMaskState, which optax's own type does not allow for
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del extra_args
        if params is None:
            raise ValueError(
                "`keep_mask` must know the params to hold the pruned ones at zero; "
                "call `tx.update(gradients, opt_state, params)`."
            )
        return jax.tree.map(_cancel, state.mask, updates, params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _cancel(flag: Array, change: Array, weight: Array) -> Array:
    """The update where the flag is true, minus the weight elsewhere."""
    # The wider of the two dtypes: rounding the weight would leave a remainder.
    wide = change if change.dtype.itemsize > weight.dtype.itemsize else weight
    return jnp.where(flag, change.astype(wide.dtype), -weight.astype(wide.dtype))


def _check_mask(mask: Mask, params: Params) -> None:
    """Raises unless there is one boolean for every weight."""
    names, flag_names = _tree.paths(params), _tree.paths(mask)
    if names != flag_names:
        raise ValueError(
            "the mask does not fit the params: leaves without a mask "
            f"{sorted(set(names) - set(flag_names))}, masks without a leaf "
            f"{sorted(set(flag_names) - set(names))}. Pass `solution.mask` of the "
            "params that are trained."
        )
    leaves = zip(names, jax.tree.leaves(mask), jax.tree.leaves(params), strict=True)
    for name, flag, leaf in leaves:
        shown = f"leaf {name!r}" if name else "the array"
        if jnp.shape(flag) != jnp.shape(leaf):
            raise ValueError(
                f"{shown} has shape {jnp.shape(leaf)} but its mask has shape "
                f"{jnp.shape(flag)}; there must be one boolean for every weight."
            )
        dtype = getattr(flag, "dtype", type(flag))
        if dtype != jnp.bool_ and dtype is not bool:
            raise TypeError(
                f"the mask of {shown} must be boolean, got {dtype}; compare first, "
                "e.g. `jax.tree.map(lambda x: x != 0, mask)`."
            )
