"""Masks, smaller arrays, gates and scores of groups."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer

from sparserec.structure._costs import Extent, Keep, alive
from sparserec.structure._groups import Groups, Member, path_name


def checked_keep(groups: Groups, keep: Keep) -> Keep:
    """Refuse a choice of units that cannot be carried out.

    Args:
      groups: result of `groups`.
      keep: group name -> bool array of shape `(units,)`, True = kept.

    Returns:
      The same choice as numpy arrays.

    Raises:
      ValueError: for an unknown group, a wrong shape or dtype, or an empty group.
    """
    checked = {}
    for name, kept in keep.items():
        if name not in groups.sizes:
            known = ", ".join(repr(each) for each in list(groups.sizes)[:12])
            raise ValueError(
                f"There is no group {name!r}; the {len(groups.groups)} groups start "
                f"with {known or 'none'}."
            )
        kept, count = np.asarray(kept), groups.sizes[name]
        if kept.dtype != bool or kept.shape != (count,):
            raise ValueError(
                f"`keep[{name!r}]` must be a bool array of shape ({count},), True "
                f"for a unit that stays; got {kept.dtype} of shape {kept.shape}."
            )
        if not kept.any():
            raise ValueError(
                f"`keep[{name!r}]` keeps none of its {count} units, which would "
                "empty a layer; keep at least one."
            )
        checked[name] = kept
    return checked


def checked_leaves(groups: Groups, params: Any) -> list[Any]:
    """Leaves of `params`, after a check that they are those that were traced."""
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    if treedef != groups.treedef:
        paths = [path_name(path) for path, _ in flat]
        missing = [path for path in groups.paths if path not in paths]
        extra = [path for path in paths if path not in groups.paths]
        raise ValueError(
            "`params` do not have the structure that was traced"
            + (f"; missing {missing[:5]}" if missing else "")
            + (f"; unexpected {extra[:5]}" if extra else "")
            + "."
        )
    leaves = [leaf for _, leaf in flat]
    for path, shape, leaf in zip(groups.paths, groups.shapes, leaves, strict=True):
        if tuple(leaf.shape) != shape:
            raise ValueError(
                f"`params` do not match the trace: {path!r} has shape "
                f"{tuple(leaf.shape)}, but {shape} was traced."
            )
    return leaves


def _along(values: Any, axis: int, rank: int) -> Array:
    """A vector shaped to act along one axis of an array."""
    return jnp.asarray(values).reshape([-1 if i == axis else 1 for i in range(rank)])


def mask(params: Any, groups: Groups, keep: Keep) -> Any:
    """Which weights stay, as booleans shaped like the parameters.

    Args:
      params: the parameters that were traced.
      groups: result of `groups`.
      keep: group name -> bool array of shape `(units,)`, True = kept; groups that
        are not named stay complete.

    Returns:
      Pytree of bool arrays with the structure and shapes of `params`.

    Raises:
      ValueError: if `params` or `keep` do not fit the groups.
    """
    keep = checked_keep(groups, keep)
    masks = []
    for leaf, axes in zip(checked_leaves(groups, params), groups.axes, strict=True):
        kept = np.ones(leaf.shape, bool)
        for i, axis in enumerate(axes):
            shape = [-1 if j == i else 1 for j in range(len(axes))]
            kept = kept & alive(axis, keep).reshape(shape)
        masks.append(jnp.asarray(kept))
    return jax.tree.unflatten(groups.treedef, masks)


def _cut(leaf: Any, axes: Sequence[Extent], keep: Keep) -> Any:
    """The kept positions of one array, with its kind and its place."""
    kept = [np.nonzero(alive(axis, keep))[0] for axis in axes]
    short = [i for i, axis in enumerate(axes) if len(kept[i]) < axis.size]
    if not short:
        return leaf
    if isinstance(leaf, np.ndarray):
        return leaf[np.ix_(*kept)]
    traced = isinstance(leaf, Tracer)
    if not traced and len(leaf.devices()) == 1:
        # Through the host: a gather per shape would have to be compiled.
        device = leaf.sharding if getattr(leaf, "committed", True) else None
        return jax.device_put(np.asarray(leaf)[np.ix_(*kept)], device)
    for i in short:
        leaf = jnp.take(leaf, kept[i], axis=i)
    return leaf


def shrink(params: Any, groups: Groups, keep: Keep) -> Any:
    """Remove the dropped units from the arrays.

    Args:
      params: the parameters that were traced, or any pytree that contains subtrees
        of the same structure and shapes, such as the state of an optimizer. What is
        no such subtree (step counts) and scalars inside one are left alone.
      groups: result of `groups`.
      keep: group name -> bool array of shape `(units,)`, True = kept; groups that
        are not named stay complete.

    Returns:
      The same pytree with smaller arrays.

    Raises:
      ValueError: if nothing in `params` matches what was traced, a shape differs, or
        `keep` does not fit the groups.
    """
    keep = checked_keep(groups, keep)
    if jax.tree.structure(params) == groups.treedef:
        checked_leaves(groups, params)

    def matches(tree: Any) -> bool:
        return jax.tree.structure(tree) == groups.treedef

    found = 0

    def cut(tree: Any) -> Any:
        nonlocal found
        if not matches(tree):
            return tree
        leaves = jax.tree.leaves(tree)
        bare = len(leaves) == 1 and tree is leaves[0]
        shrunk = []
        for leaf, path, axes in zip(leaves, groups.paths, groups.axes, strict=True):
            shape = tuple(axis.size for axis in axes)
            if np.shape(leaf) == shape:
                shrunk.append(_cut(leaf, axes, keep))
            elif np.ndim(leaf) == 0 or bare:
                shrunk.append(leaf)
                continue
            else:
                raise ValueError(
                    f"A subtree has the structure of the parameters, but {path!r} has "
                    f"shape {np.shape(leaf)} in it instead of {shape}."
                )
            found += 1
        return jax.tree.unflatten(groups.treedef, shrunk)

    result = jax.tree.map(cut, params, is_leaf=matches)
    if not found and groups.paths:
        checked_leaves(groups, params)
    return result


def ones(groups: Groups, dtype: Any = jnp.float32) -> dict[str, Array]:
    """Open gates for every group.

    Args:
      groups: from `groups`.
      dtype: of the gates.

    Returns:
      Group name -> ones of shape `(units,)`.
    """
    return {group.name: jnp.ones(group.size, dtype) for group in groups.groups}


def _factor(member: Member, size: int, per_unit: Array) -> Array:
    """What each position of a member's axis is multiplied by."""
    factor = jnp.ones(size, per_unit.dtype)
    return factor.at[member.positions].multiply(
        per_unit[member.units], unique_indices=True
    )


def gate(params: Any, groups: Groups, gates: Mapping[str, Array]) -> Any:
    """Multiply every unit by its gate where it is read.

    A gate of one changes nothing and a gate of zero removes the unit, so a loss of
    gated parameters is a loss over units: it has one variable per unit instead of
    one per weight, and a quadratic model of it is small. The gates act on the
    arrays that sum over the units. Units that meet in a product of two computed
    values (the head size of queries and keys) are gated where one side is written.

    Args:
      params: the parameters that were traced.
      groups: result of `groups`.
      gates: group name -> float array of shape `(units,)`; may be traced.

    Returns:
      Parameters of the same structure, shapes and dtypes.

    Raises:
      ValueError: if `params` do not fit, or a gate has no group or a wrong shape.
    """
    leaves = checked_leaves(groups, params)
    members = {group.name: group.members for group in groups.groups}
    for name, values in gates.items():
        if np.shape(values) != (groups.sizes.get(name),):
            raise ValueError(
                f"`gates[{name!r}]` has shape {np.shape(values)}; the groups have "
                f"sizes {groups.sizes}."
            )
        for member in members[name]:
            leaf = leaves[member.leaf]
            if member.reads and jnp.issubdtype(leaf.dtype, jnp.inexact):
                factor = _factor(member, leaf.shape[member.axis], jnp.asarray(values))
                factor = _along(factor, member.axis, leaf.ndim)
                leaves[member.leaf] = leaf * factor.astype(leaf.dtype)
    return jax.tree.unflatten(groups.treedef, leaves)


def unit_scores(groups: Groups, scores: Any) -> dict[str, Array]:
    r"""Sum a score per weight over all weights of each unit.

    $S_u = \sum_{i \in u} s_i$, where a weight that belongs to a unit through two
    axes counts once.

    Args:
      groups: result of `groups`.
      scores: pytree of float arrays shaped like the parameters, for example
        saliencies in units of loss; may be traced.

    Returns:
      Group name -> scores of shape `(units,)`, at least float32. A NaN reaches every
      unit it belongs to.

    Raises:
      ValueError: if `scores` do not have the structure and shapes of the parameters.
    """
    leaves = checked_leaves(groups, scores)
    result = {}
    for group in groups.groups:
        # Not `jnp.promote_types`: it refuses mixed leaves under strict promotion.
        dtypes = [leaves[member.leaf].dtype for member in group.members]
        dtype = max([jnp.dtype(jnp.float32), *dtypes], key=lambda each: each.itemsize)
        per_unit = jnp.zeros(group.size, dtype)
        by_leaf: dict[int, dict[int, list[Member]]] = {}
        for member in group.members:
            by_leaf.setdefault(member.leaf, {}).setdefault(member.axis, []).append(
                member
            )
        for number, by_axis in by_leaf.items():
            leaf = jnp.asarray(leaves[number]).astype(dtype)
            # Inclusion and exclusion over the axes that carry the unit.
            for count in range(1, len(by_axis) + 1):
                for chosen in itertools.combinations(by_axis.values(), count):
                    for members in itertools.product(*chosen):
                        sign = 1 if count % 2 else -1
                        per_unit += sign * _shared(leaf, members, group.size)
        result[group.name] = per_unit
    return result


def _shared(leaf: Array, members: Sequence[Member], size: int) -> Array:
    """Sum, per unit, of the entries that all members assign to it."""
    axes = [member.axis for member in members]
    rest = tuple(i for i in range(leaf.ndim) if i not in axes)
    kept = [i for i in range(leaf.ndim) if i in axes]
    table = leaf.sum(rest).transpose([kept.index(axis) for axis in axes])
    for i, member in enumerate(members):
        table = jnp.take(table, member.positions, axis=i)
    rank = len(members)
    first = members[0].units.reshape([-1] + [1] * (rank - 1))
    for i, member in enumerate(members[1:], start=1):
        units = member.units.reshape([-1 if j == i else 1 for j in range(rank)])
        table = jnp.where(jnp.asarray(first == units), table, 0)
    sums = table.reshape(table.shape[0], -1).sum(1)
    return jnp.zeros(size, leaf.dtype).at[members[0].units].add(sums)


def keep_temperature(params: Any, groups: Groups, keep: Keep) -> Any:
    r"""Correct the weights for code that reads the head size from its arrays.

    Attention divides the product of queries and keys by the root of the head size d.
    A function evaluated by `resized` keeps the old root and needs no correction.
    Code that is run again on smaller arrays computes $1/\sqrt{d'}$; multiplying
    queries and keys by $(d'/d)^{1/4}$ each restores the old logits.

    Args:
      params: the parameters that were traced, before `shrink`.
      groups: result of `groups`.
      keep: group name -> bool array of shape `(units,)`, True = kept.

    Returns:
      Parameters of the same structure, shapes and dtypes.

    Raises:
      ValueError: if a cut group sets a temperature, but something nonlinear acts on
        its units or they are used elsewhere too, so that no factor corrects it.
    """
    keep, leaves = checked_keep(groups, keep), checked_leaves(groups, params)
    for group in groups.groups:
        kept = keep.get(group.name, np.ones(group.size, bool))
        if not group.temperature or kept.all():
            continue
        if not group.linear:
            raise ValueError(
                f"Group {group.name!r} sets a temperature that no factor on its "
                "parameters corrects; run the smaller network through `resized`."
            )
        root = float((kept.sum() / group.size) ** 0.25)
        for member in group.members:
            leaf = leaves[member.leaf]
            factor = np.ones(leaf.shape[member.axis])
            factor[member.positions] = root
            factor = _along(factor, member.axis, leaf.ndim).astype(leaf.dtype)
            leaves[member.leaf] = leaf * factor
    return jax.tree.unflatten(groups.treedef, leaves)
