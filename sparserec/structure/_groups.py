"""Which axes of the parameters of a function must be cut together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from sparserec.structure._costs import (
    Extent,
    Extents,
    Term,
    flop_terms,
    gathered,
    term,
)
from sparserec.structure._dims import Dim, freeze, leaves, places
from sparserec.structure._trace import new_notes, parameter, walk
from sparserec.structure._values import Notes, Value, fresh, shape_of


class Member(NamedTuple):
    """Where the units of a group sit on one axis of one parameter.

    Attributes:
      path: path of the parameter, such as `"Dense_0/kernel"`.
      leaf: its number in flattening order.
      axis: the axis.
      positions: positions on the axis, int, shape `(p,)`.
      units: the unit of each position, int, shape `(p,)`.
      reads: whether this axis reads the units (it is summed over) rather than
        writes them. `gate` multiplies the readers.
    """

    path: str
    leaf: int
    axis: int
    positions: np.ndarray
    units: np.ndarray
    reads: bool


class Group(NamedTuple):
    """Units that can be removed one by one, each from several arrays at once.

    Attributes:
      name: parameter path and axis of its first member, `"Dense_0/kernel:1"`.
      size: number of units.
      members: all places where the units sit.
      inexact: empty if removing a unit equals setting its parameters to zero,
        otherwise why it does not.
      temperature: whether the units are dimensions of a product whose result is
        divided by the root of their number (the head size of attention).
      linear: whether a factor on all members is a squared factor on that product.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    inexact: str
    temperature: bool
    linear: bool


class Frozen(NamedTuple):
    """Why (a part of) an axis keeps its size.

    Attributes:
      path: path of the parameter.
      axis: the axis.
      reason: what demands the full size.
    """

    path: str
    axis: int
    reason: str


class Groups(NamedTuple):
    """Result of `groups`; plain host data, nothing in it is traced.

    Attributes:
      groups: the groups, in the order of the parameters.
      frozen: axes that keep their size.
      unknown: primitive name -> why everything it touches was frozen.
      paths: path of every parameter.
      axes: for every parameter, its axes.
      flops: floating-point operations as a polynomial in the kept sizes.
      params: number of parameters, likewise.
      treedef: structure of the parameters.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    unknown: Mapping[str, str]
    paths: tuple[str, ...]
    axes: tuple[tuple[Extent, ...], ...]
    flops: tuple[Term, ...]
    params: tuple[Term, ...]
    treedef: Any

    @property
    def sizes(self) -> dict[str, int]:
        """Group name -> number of units."""
        return {group.name: group.size for group in self.groups}

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shape of every parameter."""
        return tuple(tuple(axis.size for axis in axes) for axes in self.axes)


def path_name(path: tuple[Any, ...]) -> str:
    """Readable path of a leaf, `"Dense_0/kernel"`, the same for dicts and modules."""
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    return name.removesuffix("/value") or "params"


def groups(
    apply_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    exclude: Iterable[str | tuple[str, int]] = (),
    inexact: bool = False,
) -> Groups:
    """Find the axes of the parameters that must be cut together.

    The function is traced once, without running it, and every axis is followed
    through the trace. What is not understood keeps its size, with the reason in
    `frozen`; the answer may be too small but never wrong.

    Args:
      apply_fn: any JAX function `apply_fn(params, *args)`. Its outputs keep their
        sizes, so it should return predictions or a loss and not, for example,
        updated batch statistics.
      params: pytree of arrays or `jax.ShapeDtypeStruct`. Arrays that follow the
        units without being trained (batch statistics) belong in here too.
      *args: remaining arguments, arrays or `jax.ShapeDtypeStruct`; their sizes
        stay. Static options must be bound beforehand (`functools.partial`).
      exclude: parameter paths, or pairs (path, axis), that keep their size.
      inexact: also offer groups whose removal differs from setting them to zero (a
        softmax, a maximum or a mean runs over the units). The residual stream of a
        network with layer normalization is such a group.

    Returns:
      The groups. A function without anything to cut has none.

    Raises:
      ValueError: if `exclude` names a parameter or an axis that does not exist.
    """
    closed = jax.make_jaxpr(apply_fn)(params, *args)
    flat, treedef = jax.tree_util.tree_flatten_with_path(params)
    paths = tuple(path_name(path) for path, _ in flat)
    notes, jaxpr = new_notes(), closed.jaxpr
    ins = [parameter(i, shape_of(v)) for i, v in enumerate(jaxpr.invars[: len(flat)])]
    others = [
        Value(fresh(shape_of(v), "an axis of an input"))
        for v in jaxpr.invars[len(flat) :]
    ]
    outs, records = walk(notes, jaxpr, closed.consts, [*ins, *others])
    for value in outs:
        for axis in value.axes:
            freeze(axis.dim, "an axis of the output")
    _exclude(ins, paths, exclude)
    if not inexact:
        _drop_inexact(ins)

    chosen, frozen = _choose(ins, paths)
    extents = Extents({id(node): name for name, node in chosen.items()})
    axes = tuple(tuple(extents(axis.dim) for axis in value.axes) for value in ins)
    return Groups(
        groups=_collect(chosen, ins, paths, notes),
        frozen=frozen,
        unknown=dict(notes.unknown),
        paths=paths,
        axes=axes,
        flops=gathered(list(flop_terms(records, extents))),
        params=gathered([term(1, each) for each in axes]),
        treedef=treedef,
    )


def _exclude(
    ins: Sequence[Value],
    paths: Sequence[str],
    exclude: Iterable[str | tuple[str, int]],
) -> None:
    """Freeze the axes that the caller wants to keep."""
    for entry in [exclude] if isinstance(exclude, str) else exclude:
        path, axis = (entry, None) if isinstance(entry, str) else entry
        if path not in paths:
            raise ValueError(
                f"`exclude` names the parameter {path!r}, which does not exist; "
                f"the parameters are {_listed(paths)}."
            )
        axes = ins[paths.index(path)].axes
        if axis is not None and not -len(axes) <= axis < len(axes):
            raise ValueError(
                f"`exclude` names axis {axis} of {path!r}, which has {len(axes)} axes."
            )
        for each in axes if axis is None else [axes[axis]]:
            freeze(each.dim, "excluded")


def _listed(names: Iterable[str]) -> str:
    """The first few names of a list."""
    names = list(names)
    more = f" and {len(names) - 12} more" if len(names) > 12 else ""
    return (", ".join(repr(name) for name in names[:12]) or "none") + more


def _why_inexact(node: Dim) -> str:
    """Why removing units of a leaf differs from zeroing them, or nothing."""
    if "mean" in node.marks:
        return f"a mean runs over it ({node.marks['mean']})"
    return node.marks.get("inexact", "")


def _drop_inexact(ins: Sequence[Value]) -> None:
    """Freeze what cannot be removed by setting it to zero."""
    for value in ins:
        for axis in value.axes:
            for node in list(leaves(axis.dim)):
                if why := _why_inexact(node):
                    freeze(node, f"{why}; `inexact=True` offers it")


def _choose(
    ins: Sequence[Value], paths: Sequence[str]
) -> tuple[dict[str, Dim], tuple[Frozen, ...]]:
    """Name the leaves that can be cut and list the others."""
    firsts: dict[int, tuple[Dim, str]] = {}
    frozen: dict[Frozen, None] = {}
    for value, path in zip(ins, paths, strict=True):
        for i, axis in enumerate(value.axes):
            for node in leaves(axis.dim):
                if "frozen" in node.marks:
                    if node.size > 1:
                        frozen[Frozen(path, i, node.marks["frozen"])] = None
                else:
                    firsts.setdefault(id(node), (node, f"{path}:{i}"))
    named: dict[str, list[Dim]] = {}
    for node, name in firsts.values():
        named.setdefault(name, []).append(node)
    chosen = {}
    for name, nodes in named.items():
        for j, node in enumerate(nodes):
            chosen[name if len(nodes) == 1 else f"{name}.{j}"] = node
    return chosen, tuple(frozen)


def _readers(
    chosen: Mapping[str, Dim], notes: Notes
) -> dict[int, list[frozenset[int]]]:
    """For every chosen leaf, the writers of each contraction without a parameter."""
    wanted = {id(node) for node in chosen.values()}
    found: dict[int, list[frozenset[int]]] = {}
    for dim, writers in notes.reads:
        for node in leaves(dim):
            if id(node) in wanted:
                found.setdefault(id(node), []).append(writers)
    return found


def _collect(
    chosen: Mapping[str, Dim], ins: Sequence[Value], paths: Sequence[str], notes: Notes
) -> tuple[Group, ...]:
    """Build the groups from their leaves."""
    members: dict[int, list[Member]] = {id(node): [] for node in chosen.values()}
    for number, value in enumerate(ins):
        for i, axis in enumerate(value.axes):
            for node, positions, units in places(axis.dim):
                if id(node) in members:
                    reads = (number, i) in notes.readers
                    members[id(node)].append(
                        Member(paths[number], number, i, positions, units, reads)
                    )
    reads = _readers(chosen, notes)
    paired = {id(node) for dim in notes.pairs for node in leaves(dim)}
    result = []
    for name, node in chosen.items():
        mine, marks = members[id(node)], node.marks
        by_parameter = any(member.reads for member in mine)
        scaled = "temperature" in marks or "root scaled" in marks
        result.append(
            Group(
                name=name,
                size=node.size,
                members=_gated(mine, reads.get(id(node), [])),
                inexact=_why_inexact(node),
                temperature=id(node) in paired and scaled,
                linear=not by_parameter and "nonlinear" not in marks,
            )
        )
    return tuple(result)


def _gated(
    members: Sequence[Member], reads: Sequence[frozenset[int]]
) -> tuple[Member, ...]:
    """Mark the members that carry the gate: readers, and writers nobody else reads.

    A sum over units that involves no parameter (the product of queries and keys) can
    only be gated where the units are written.
    """
    everywhere = not any(member.reads for member in members) and not reads
    extra: set[int] = set()
    for writers in reads:
        mine = {member.leaf for member in members} & writers
        everywhere = everywhere or not mine
        extra |= mine
    return tuple(
        member._replace(reads=member.reads or everywhere or (member.leaf in extra))
        for member in members
    )


def cost_terms(groups: Groups, cost: str) -> tuple[Term, ...]:
    """The polynomial of a named cost.

    Args:
      groups: result of `groups`.
      cost: `"flops"` or `"params"`.

    Returns:
      Its terms.

    Raises:
      ValueError: for any other name.
    """
    if cost not in ("flops", "params"):
        raise ValueError(
            f"`cost` must be 'flops', 'params' or a function of the kept units, "
            f"got {cost!r}."
        )
    return groups.flops if cost == "flops" else groups.params


def complete(groups: Groups) -> dict[str, np.ndarray]:
    """Every unit of every group kept."""
    return {group.name: np.ones(group.size, bool) for group in groups.groups}
