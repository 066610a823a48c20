"""The same function on smaller arrays, without touching its code."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparserec.structure._apply import checked_keep, mask, shrink
from sparserec.structure._costs import Keep, alive
from sparserec.structure._evaluate import evaluate
from sparserec.structure._groups import Groups, path_name
from sparserec.structure._plan import Plan, make_plan

# Traces kept per resized function; a training and an evaluation batch need two.
REMEMBERED = 8


def resized(
    apply_fn: Callable[..., Any], groups: Groups, keep: Keep
) -> Callable[..., Any]:
    """Make a function run on shrunken parameters.

    The function is traced at the full sizes and its jaxpr evaluated at the small
    ones. Numbers that the code derived from a full size (a head size under a root,
    the length of a mean) keep their value, so the result is that of the full
    function with the dropped units set to zero.

    Args:
      apply_fn: `apply_fn(params, *args)`: the function that was given to `groups`,
        or any other function of the same parameters, such as a loss.
      groups: result of `groups`.
      keep: group name -> bool array of shape `(units,)`, True = kept; groups that
        are not named stay complete.

    Returns:
      `small_fn(small_params, *args)`. It can be jitted, vectorized and
      differentiated; outside of `jax.jit` it runs operation by operation. A custom
      backward pass (`jax.custom_vjp`) of a part that is cut is replaced by the
      derivative of its forward pass. Calling it raises ValueError if the parameters
      have other shapes than `shrink` gives, or if `apply_fn` ties a cut axis to
      something that is not cut.

    Raises:
      ValueError: if `keep` does not fit the groups.
    """
    keep = checked_keep(groups, keep)
    masks = [[alive(axis, keep) for axis in axes] for axes in groups.axes]
    small = [tuple(int(kept.sum()) for kept in axes) for axes in masks]
    plans: dict[Any, tuple[Plan, Any]] = {}

    def planned(dtypes: tuple, args: tuple) -> tuple[Plan, Any]:
        full = [
            jax.ShapeDtypeStruct(shape, dtype)
            for shape, dtype in zip(groups.shapes, dtypes, strict=True)
        ]
        closed, out = jax.make_jaxpr(apply_fn, return_shape=True)(
            jax.tree.unflatten(groups.treedef, full), *args
        )
        flat = jax.tree_util.tree_leaves_with_path(args)
        names = [*groups.paths, *(path_name(path) for path, _ in flat)]
        fixed = [
            [np.ones(length, bool) for length in variable.aval.shape]
            for variable in closed.jaxpr.invars[len(masks) :]
        ]
        plan = make_plan(
            closed.jaxpr, closed.consts, [*masks, *fixed], names, len(masks)
        )
        return plan, jax.tree.structure(out)

    def small_fn(params: Any, *args: Any) -> Any:
        leaves = jax.tree.leaves(params)
        _check_small(groups, params, small)
        dtypes = tuple(leaf.dtype for leaf in leaves)
        flat, treedef = jax.tree.flatten(args)
        key = (dtypes, treedef, tuple(_signature(each) for each in flat))
        if key in plans:
            plan, out = plans[key]
        else:
            plan, out = planned(dtypes, args)
            # A constant of an outer trace must not outlive that trace.
            if not any(isinstance(c, Tracer) for c in plan.constants):
                while len(plans) >= REMEMBERED:
                    plans.pop(next(iter(plans)))
                plans[key] = (plan, out)
        values = evaluate(
            plan, plan.jaxpr, plan.constants, plan.records, [*leaves, *flat]
        )
        return jax.tree.unflatten(out, values)

    return small_fn


def _signature(value: Any) -> tuple:
    """What a trace depends on: shape, dtype and whether the dtype is weak."""
    aval = jax.typeof(value)
    return getattr(aval, "shape", ()), str(aval), getattr(aval, "weak_type", False)


def _check_small(groups: Groups, params: Any, shapes: list[tuple[int, ...]]) -> None:
    """Refuse parameters that `shrink` did not make."""
    if jax.tree.structure(params) != groups.treedef:
        raise ValueError("`params` do not have the structure that was traced.")
    for path, shape, leaf in zip(
        groups.paths, shapes, jax.tree.leaves(params), strict=True
    ):
        if jnp.shape(leaf) != shape:
            raise ValueError(
                f"{path!r} has shape {jnp.shape(leaf)}, but the units that stay make "
                f"it {shape}; shrink the parameters with the same `keep`."
            )


def check(
    apply_fn: Callable[..., Any],
    params: Any,
    groups: Groups,
    keep: Keep,
    *args: Any,
    tol: float = 1e-5,
) -> float:
    """Compare the small function with the full one whose units are set to zero.

    Args:
      apply_fn: `apply_fn(params, *args)` returning a pytree of arrays whose shapes
        do not depend on the cut.
      params: the full parameters, concrete arrays.
      groups: result of `groups`.
      keep: group name -> bool array of shape `(units,)`, True = kept.
      *args: arguments for one call.
      tol: largest difference allowed, relative to the largest output.

    Returns:
      The largest absolute difference over all outputs divided by the largest
      absolute output (by one where that is zero).

    Raises:
      ValueError: if the difference is above `tol` or not a number.
    """

    @jax.jit
    def zeroed(params: Any, kept: Any, *args: Any) -> Any:
        clear = jax.tree.map(
            lambda leaf, k: jnp.where(k, leaf, jnp.zeros_like(leaf)), params, kept
        )
        return apply_fn(clear, *args)

    masked = jax.tree.leaves(zeroed(params, mask(params, groups, keep), *args))
    small = jax.jit(resized(apply_fn, groups, keep))
    shrunk = jax.tree.leaves(small(shrink(params, groups, keep), *args))
    gap = scale = 0.0
    for full, cut in zip(masked, shrunk, strict=True):
        if full.size:
            full, cut = np.asarray(full, np.float64), np.asarray(cut, np.float64)
            gap = np.maximum(gap, np.max(np.abs(full - cut)))
            scale = np.maximum(scale, np.max(np.abs(full)))
    difference = float(gap / scale) if scale else float(gap)
    if not difference <= tol:
        raise ValueError(
            f"The shrunken function differs from the masked one by {difference:.3g} "
            f"of its largest output, more than {tol:.3g}."
        )
    return difference
