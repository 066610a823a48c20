r"""Bounds of the weights: the projection onto them, and what they leave of a score.

A weight that is not kept is zero, so zero lies within the bounds of every weight that
may be pruned. Then the k-sparse point of a box $[l, u]$ nearest to v in the metric of
a diagonal d keeps the k largest

$$d_j \bigl(v_j^2 - (v_j - c_j)^2\bigr) = d_j\, c_j (2 v_j - c_j), \qquad
  c_j = \min(\max(v_j, l_j), u_j).$$
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparserec import _tree
from sparserec._types import Mask, Params, Prunable
from sparserec.budget import prunable_leaves


class Box(NamedTuple):
    """Least and largest values.

    Attributes:
      lower: shaped like the params, minus infinity where there is none.
      upper: the same, infinity where there is none.
    """

    lower: Params
    upper: Params


def make_box(lower: Any, upper: Any, params: Params, prunable: Prunable) -> Box | None:
    """The bounds as pytrees, or what is wrong with them.

    Args:
      lower: a number, an array or a pytree that fits `params`; `None` for none.
      upper: the same.
      params: pytree of floating arrays.
      prunable: which leaves may be pruned.

    Returns:
      The box, in working precision; `None` where neither is given. Bounds that are
      traced are not looked at.

    Raises:
      TypeError: bounds that are no numbers.
      ValueError: NaN, shapes that do not fit, lower above upper, or bounds of a
        prunable weight that leave zero out.
    """
    if lower is None and upper is None:
        return None
    chosen = prunable_leaves(params, prunable)
    working = _tree.to_working_precision(params)
    box = Box(
        _filled("lower", lower, working, -jnp.inf),
        _filled("upper", upper, working, jnp.inf),
    )
    rows = zip(
        _tree.paths(params),
        jax.tree.leaves(box.lower),
        jax.tree.leaves(box.upper),
        chosen,
        strict=True,
    )
    for name, low, high, may_go in rows:
        _check_order(f" of the leaf {name!r}" if name else "", low, high, may_go)
    return box


def _filled(name: str, bound: Any, params: Params, default: float) -> Params:
    """One bound for every weight."""
    if bound is None:
        return jax.tree.map(lambda x: jnp.full_like(x, default), params)
    structure = jax.tree.structure(params)
    # One number, or one array for a single array of weights, needs no pytree.
    alone = jax.tree.structure(bound) == jax.tree.structure(0) and np.ndim(bound) == 0
    if not alone and jax.tree.structure(bound) != structure:
        raise ValueError(
            f"`{name}` must be a number, or a pytree of them like the params, "
            f"{structure}; got {jax.tree.structure(bound)}."
        )
    parts = [bound] * structure.num_leaves if alone else jax.tree.leaves(bound)
    leaves = [
        _as_leaf(name, part, leaf)
        for part, leaf in zip(parts, jax.tree.leaves(params), strict=True)
    ]
    return jax.tree.unflatten(structure, leaves)


def _as_leaf(name: str, bound: Any, leaf: jax.Array) -> jax.Array:
    dtype = getattr(bound, "dtype", np.result_type(type(bound)))
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"`{name}` must hold real numbers, got dtype {dtype}.")
    if np.shape(bound) not in ((), leaf.shape):
        raise ValueError(
            f"`{name}` has shape {np.shape(bound)} where the weights have "
            f"{leaf.shape}; give one number, or one for every weight."
        )
    if not isinstance(bound, Tracer) and np.any(np.isnan(np.asarray(bound, float))):
        raise ValueError(
            f"`{name}` holds NaN; for no bound write `None`, or an infinity in its "
            "place."
        )
    return jnp.broadcast_to(jnp.asarray(bound, leaf.dtype), leaf.shape)


def _check_order(where: str, lower: Any, upper: Any, may_go: bool) -> None:
    if isinstance(lower, Tracer) or isinstance(upper, Tracer):
        return
    low, high = (np.asarray(x, float).reshape(-1) for x in (lower, upper))
    crossed = np.flatnonzero((low > high) | (low == np.inf) | (high == -np.inf))
    if crossed.size:
        i = crossed[0]
        raise ValueError(
            f"`lower` is above `upper`{where} for {crossed.size} of {low.size} "
            f"weights, the first of them number {i}: {low[i]:g} and {high[i]:g}."
        )
    outside = np.flatnonzero((low > 0) | (high < 0)) if may_go else crossed
    if outside.size:
        i = outside[0]
        raise ValueError(
            f"zero lies outside of the bounds{where} for {outside.size} of {low.size} "
            f"weights, the first of them number {i}: [{low[i]:g}, {high[i]:g}]. A "
            "weight that is not kept is zero, so its bounds must allow that; keep it "
            "always, in a leaf that `prunable` leaves out, or widen the bounds."
        )


def clip(box: Box | None, params: Params) -> Params:
    """The nearest point within the bounds."""
    if box is None:
        return params
    return jax.tree.map(
        lambda x, low, high: jnp.clip(x, low.astype(x.dtype), high.astype(x.dtype)),
        params,
        box.lower,
        box.upper,
    )


def worth(box: Box | None, point: Params, bend: Params) -> Params:
    r"""$d_j c_j (2 v_j - c_j)$: what each entry of a point explains within its bounds.

    Twice the fall of a loss with diagonal d whose minimiser along j is $v_j$.
    """
    if box is None:
        return jax.tree.map(lambda v, d: d * jnp.square(v), point, bend)
    return jax.tree.map(
        lambda v, c, d: d * c * (2 * v - c), point, clip(box, point), bend
    )


def magnitudes(box: Box | None, point: Params) -> Params:
    """The root of `worth` for equal diagonals: by what the projection selects."""
    if box is None:
        return point
    # The two have one sign, and their product might underflow.
    return jax.tree.map(
        lambda v, c: jnp.sqrt(jnp.abs(c)) * jnp.sqrt(jnp.abs(2 * v - c)),
        point,
        clip(box, point),
    )


def movable(box: Box | None, mask: Mask, params: Params, gradient: Params) -> Mask:
    """The support without the weights that a descent would press against a bound."""
    if box is None:
        return mask
    return jax.tree.map(
        lambda m, x, g, low, high: (
            m
            & ~((x <= low.astype(x.dtype)) & (g > 0))
            & ~((x >= high.astype(x.dtype)) & (g < 0))
        ),
        mask,
        params,
        gradient,
        box.lower,
        box.upper,
    )
