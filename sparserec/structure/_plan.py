"""How a cut of the inputs of a jaxpr reaches every value inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from sparserec.structure._dims import Dim, find, freeze, leaves, places
from sparserec.structure._trace import new_notes, walk
from sparserec.structure._values import Record, Value, fresh, shape_of


class Plan(NamedTuple):
    """A walked jaxpr together with what is cut.

    Attributes:
      jaxpr: the open jaxpr.
      constants: its constants.
      records: one record per equation.
      cut: `id` of a leaf -> (leaf, kept units); only leaves that lose units.
      known: `id` of a dimension tree -> (tree, kept positions); filled on demand.
    """

    jaxpr: Any
    constants: Sequence[Any]
    records: Sequence[Record]
    cut: Mapping[int, tuple[Dim, np.ndarray]]
    known: dict[int, tuple[Dim, np.ndarray]]


def kept_positions(plan: Plan, dim: Dim) -> np.ndarray:
    """Which positions of an axis stay, bool, shape `(size,)`."""
    dim = find(dim)
    if id(dim) not in plan.known:
        kept = np.ones(dim.size, bool)
        if any(id(node) in plan.cut for node in leaves(dim)):
            for node, positions, units in places(dim):
                if id(node) in plan.cut:
                    kept[positions[~plan.cut[id(node)][1][units]]] = False
        plan.known[id(dim)] = (dim, kept)
    return plan.known[id(dim)][1]


def count(plan: Plan, dim: Dim) -> int:
    """How many positions of an axis stay."""
    return int(kept_positions(plan, dim).sum())


def new_shape(plan: Plan, value: Value) -> tuple[int, ...]:
    """Shape of a value after the cut."""
    return tuple(count(plan, axis.dim) for axis in value.axes)


def make_plan(
    jaxpr: Any,
    constants: Sequence[Any],
    masks: Sequence[Sequence[np.ndarray]],
    names: Sequence[str],
    pinned: int | None = None,
) -> Plan:
    """Walk a jaxpr and carry the cut of its inputs through it.

    Args:
      jaxpr: an open jaxpr.
      constants: its constants.
      masks: for every input and axis, the kept positions.
      names: for every input, its name in error messages.
      pinned: inputs from this number on keep their size.

    Returns:
      The plan.

    Raises:
      ValueError: if the function ties a cut axis to something that is not cut.
    """
    ins = [Value(fresh(shape_of(variable))) for variable in jaxpr.invars]
    for value in ins[len(ins) if pinned is None else pinned :]:
        for axis in value.axes:
            freeze(axis.dim, "an axis of an input")
    _, records = walk(new_notes(), jaxpr, constants, ins)
    cut: dict[int, tuple[Dim, np.ndarray]] = {}
    for value, axes in zip(ins, masks, strict=True):
        for axis, kept in zip(value.axes, axes, strict=True):
            if kept.all():
                continue
            for node, positions, units in places(axis.dim):
                units_kept = np.zeros(node.size, bool)
                units_kept[units[kept[positions]]] = True
                if not units_kept.all():
                    cut.setdefault(id(node), (node, units_kept))
    plan = Plan(jaxpr, constants, records, cut, {})
    for value, axes, name in zip(ins, masks, names, strict=True):
        for i, (axis, kept) in enumerate(zip(value.axes, axes, strict=True)):
            why = [
                node.marks["frozen"]
                for node in leaves(axis.dim)
                if id(node) in cut and "frozen" in node.marks
            ]
            if why or not np.array_equal(kept_positions(plan, axis.dim), kept):
                why.append("it is tied to an axis that is cut otherwise")
                raise ValueError(
                    f"The function cannot run on the smaller arrays: axis {i} of "
                    f"{name!r} was cut, but here {why[0]}. Find the groups with this "
                    "function, or exclude the axis."
                )
    return plan
