"""Units of selection: single weights, or groups of weights that come and go together.

Legend: n weights, u units, g budget groups.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from sparserec import _tree, select
from sparserec._types import Mask, Params, Prunable
from sparserec.budget import Budget, check_count, make_budget


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["unit"],
    meta_fields=["layout", "units", "owners"],
)
@dataclasses.dataclass(frozen=True)
class Selection:
    """How weights make up the units that a budget counts.

    Attributes:
      unit: unit of every weight in tree order, int32, shape `(n,)`; `None` where
        every weight is one.
      layout: of the params; static.
      units: layout of a pytree with one entry for each unit, and one leaf or more
        for each budget group; static.
      owners: budget group of every leaf of that tree, -1 where it is always in;
        static.
    """

    unit: Int[Array | np.ndarray, "n"] | None
    layout: _tree.Layout
    units: _tree.Layout
    owners: tuple[int, ...]

    @property
    def owner(self) -> np.ndarray:
        """Budget group of every unit, -1 where it is always in, `(u,)`; static."""
        sizes = [math.prod(shape) for shape in self.units.shapes]
        return np.repeat(np.asarray(self.owners, np.int32), sizes)

    def sums(self, terms: Params) -> Float[Array, "u"]:
        """Sum of the entries of every unit, shape `(u,)`."""
        flat = _tree.flatten(terms)
        if self.unit is None:
            return flat
        return jax.ops.segment_sum(flat, jnp.asarray(self.unit), self.units.size)

    def mask(self, chosen: Bool[Array, "u"]) -> Mask:
        """The mask that keeps the weights of the chosen units."""
        if self.unit is None:
            return self.layout.split(chosen)
        return self.layout.split(chosen[jnp.asarray(self.unit)])

    def top(
        self, scores: Float[Array, "u"], counts: Int[Array, "g"]
    ) -> Bool[Array, "u"]:
        """The units of largest score in every budget group, and those always in."""
        tree = self.units.split(scores)
        return _tree.flatten(select.support(tree, counts, self.owners))

    def count(self, chosen: Bool[Array, "u"], budget: Budget) -> Int[Array, "g"]:
        """Chosen units of every budget group, shape `(g,)`."""
        groups = np.arange(len(budget.sizes))
        member = jnp.asarray(self.owner[None, :] == groups[:, None])
        return jnp.sum(member & chosen[None, :], axis=1, dtype=jnp.int32)


def make_selection(
    k: Any, params: Params, prunable: Prunable, groups: Params | None
) -> tuple[Selection, Budget]:
    """The units of selection and the budget that counts them.

    Args:
      k: units to keep, an integer or a mapping from leaf path to count.
      params: pytree of floating arrays.
      prunable: which leaves may be pruned.
      groups: integer labels shaped like the params: weights of one label are one
        unit; `None` for every weight on its own.

    Returns:
      The selection, and the budget in units.

    Raises:
      TypeError: labels that are no integers, or that are traced; see `make_budget`.
      ValueError: labels of another structure, or shared by leaves with budgets of
        their own; see `make_budget`.
    """
    if groups is None:
        budget = make_budget(k, params, prunable)
        layout = _tree.layout(params)
        return Selection(None, layout, layout, budget.groups), budget
    # Zero weights are within any budget: only paths and types are looked at here.
    names = dict.fromkeys(k, 0) if isinstance(k, Mapping) else 0
    owners = make_budget(names, params, prunable).groups
    selection = _grouped(groups, _tree.layout(params), owners)
    if isinstance(k, Mapping):
        named = dict(zip(owners, _tree.paths(params), strict=True))
        wanted = [(k[named[g]], f"k[{named[g]!r}]") for g in range(max(owners) + 1)]
    else:
        wanted = [(k, "k")]
    sizes = tuple(size for (size,) in selection.units.shapes[: len(wanted)])
    counts = [
        check_count(value, size, label, f"{size} groups")
        for (value, label), size in zip(wanted, sizes, strict=True)
    ]
    return selection, Budget(jnp.stack(counts), owners, sizes)


def _grouped(
    groups: Params, layout: _tree.Layout, owners: tuple[int, ...]
) -> Selection:
    """Groups as units, in the order of their labels; one more for what is always in."""
    labels = list(zip(_check_labels(groups, layout), owners, strict=True))
    members = [
        np.unique(np.concatenate([x for x, owner in labels if owner == g]))
        for g in range(max(owners) + 1)
    ]
    sizes = [x.size for x in members]
    if functools.reduce(np.union1d, members).size < sum(sizes):
        raise ValueError(
            "leaves with budgets of their own (`k` is a mapping) must not share a "
            "label in `groups`: a group is counted once. Give each leaf labels of "
            "its own."
        )
    begins = np.cumsum([0, *sizes])
    unit = [
        np.full(x.size, begins[-1])
        if owner < 0
        else begins[owner] + np.searchsorted(members[owner], x)
        for x, owner in labels
    ]
    fixed = -1 in owners
    shapes = tuple((size,) for size in [*sizes, *([1] * fixed)])
    return Selection(
        # NumPy, so that inside a program its values are still there.
        unit=np.concatenate(unit).astype(np.int32),
        layout=layout,
        units=_tree.Layout(jax.tree.structure((0,) * len(shapes)), shapes),
        owners=(*range(len(sizes)), *([-1] * fixed)),
    )


def _check_labels(groups: Params, layout: _tree.Layout) -> list[np.ndarray]:
    """The labels leaf by leaf, flat, or what is wrong with them."""
    leaves = jax.tree.leaves(groups)
    shapes = tuple(np.shape(x) for x in leaves)
    if jax.tree.structure(groups) != layout.structure or shapes != layout.shapes:
        raise ValueError(
            "`groups` must hold one label for every weight, in the structure and "
            f"shapes of `params`, {layout.shapes}; got shapes {shapes}."
        )
    if any(isinstance(x, Tracer) for x in leaves):
        raise TypeError(
            "`groups` must be concrete: how many groups there are sets shapes. Build "
            "them outside `jax.jit` and `jax.vmap`."
        )
    arrays = [np.asarray(x).reshape(-1) for x in leaves]
    for x in arrays:
        if not np.issubdtype(x.dtype, np.integer):
            raise TypeError(
                f"`groups` must hold integer labels, got dtype {x.dtype}; write "
                "`groups.astype(int)`."
            )
    return arrays


def most_entries(selection: Selection, budget: Budget, units: list[int] | None) -> int:
    """Most weights that so many units of each budget group can hold; static.

    Args:
      selection: the units.
      budget: its groups.
      units: number of units in each budget group; `None` where it is not known.

    Returns:
      A count, with the weights that are always in.
    """
    if units is None:
        return selection.layout.size
    owner = selection.owner
    if selection.unit is None:
        widths = np.ones(owner.size, int)
    else:
        widths = np.bincount(np.asarray(selection.unit), minlength=owner.size)
    total = int(widths[owner < 0].sum())
    for group in range(len(budget.sizes)):
        widest = np.sort(widths[owner == group])[::-1]
        total += int(widest[: units[group]].sum())
    return total


def known_counts(k: Any, params: Params, budget: Budget) -> list[int] | None:
    """What `k` says of each budget group; `None` where it is traced."""
    if isinstance(k, Mapping):
        values = [k[name] for name in _tree.paths(params) if name in k]
    else:
        values = [k]
    if any(isinstance(value, Tracer) for value in values):
        return None
    return [min(int(v), size) for v, size in zip(values, budget.sizes, strict=True)]
