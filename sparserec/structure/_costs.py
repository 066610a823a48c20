"""Arithmetic and parameters of a function as polynomials in the kept sizes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from sparserec.structure._dims import Dim, find, places
from sparserec.structure._values import Record, size

Keep = Mapping[str, np.ndarray]


class Part(NamedTuple):
    """The units of one group on one axis.

    Attributes:
      group: name of the group.
      positions: positions of the axis that belong to a unit, int, shape `(p,)`.
      units: the unit of each of these positions, int, shape `(p,)`.
    """

    group: str
    positions: np.ndarray
    units: np.ndarray


class Extent(NamedTuple):
    """One axis and the units on it; a position stays if all its units stay.

    Attributes:
      size: number of positions in the full function.
      parts: units on the axis; empty for an axis that is never cut.
    """

    size: int
    parts: tuple[Part, ...]


class Term(NamedTuple):
    """One product of axis sizes: `coefficient` times the kept size of every axis.

    Attributes:
      coefficient: a count, with the axes that are never cut multiplied in.
      axes: the axes that can be cut.
    """

    coefficient: int
    axes: tuple[Extent, ...]


def alive(extent: Extent, keep: Keep) -> np.ndarray:
    """Which positions of an axis stay, bool, shape `(extent.size,)`."""
    kept = np.ones(extent.size, bool)
    for part in extent.parts:
        if part.group in keep:
            kept[part.positions[~keep[part.group][part.units]]] = False
    return kept


class Extents:
    """Turns dimension trees into extents, each tree only once.

    The table lives as long as one analysis; it is what keeps wide concatenations
    cheap.
    """

    def __init__(self, names: Mapping[int, str]):
        """Remember the names of the groups by the `id` of their leaf."""
        self._names = names
        self._known: dict[int, Extent] = {}

    def __call__(self, dim: Dim) -> Extent:
        """The extent of an axis."""
        dim = find(dim)
        if id(dim) not in self._known:
            parts = tuple(
                Part(self._names[id(node)], positions, units)
                for node, positions, units in places(dim)
                if id(node) in self._names
            )
            self._known[id(dim)] = Extent(dim.size, parts)
        return self._known[id(dim)]


def term(coefficient: int, extents: Sequence[Extent]) -> Term:
    """A term with the axes that cannot be cut folded into its coefficient."""
    fixed = [extent.size for extent in extents if not extent.parts]
    cut = tuple(extent for extent in extents if extent.parts)
    return Term(int(coefficient) * int(np.prod(fixed, dtype=object)), cut)


def flop_terms(
    records: Sequence[Record], extents: Extents, times: int = 1
) -> Iterator[Term]:
    """Floating-point operations of all products and convolutions.

    Args:
      records: the walked equations.
      extents: from dimension trees to extents.
      times: how often these equations run.

    Yields:
      One term per product: two operations for every multiply-add. The body of a scan
      counts once per step, that of a `while` once, all branches of a conditional
      once each. Other primitives count nothing.
    """
    for record in records:
        name, given = record.equation.primitive.name, record.equation.params
        inner = times * int(given["length"]) if name == "scan" else times
        for records_inside in record.inner:
            yield from flop_terms(records_inside, extents, inner)
        if name == "dot_general":
            summed = [record.ins[0].axes[i] for i in given["dimension_numbers"][0][0]]
        elif name == "conv_general_dilated":
            layout = given["dimension_numbers"]
            summed = [record.ins[1].axes[i] for i in layout.rhs_spec[1:]]
        else:
            continue
        axes = [*record.outs[0].axes, *summed]
        if all(size(axis) for axis in axes):
            yield term(2 * times, [extents(axis.dim) for axis in axes])


def gathered(terms: Sequence[Term]) -> tuple[Term, ...]:
    """Terms with the same axes added up."""
    sums: dict[tuple[int, ...], Term] = {}
    for each in terms:
        axes = tuple(sorted(each.axes, key=id))
        key = tuple(id(axis) for axis in axes)
        before = sums[key].coefficient if key in sums else 0
        sums[key] = Term(before + each.coefficient, axes)
    return tuple(sums.values())


def evaluate(terms: Sequence[Term], keep: Keep) -> int:
    """Value of the polynomial when only the kept units remain."""
    counts: dict[int, int] = {}
    result = 0
    for each in terms:
        value = each.coefficient
        for axis in each.axes:
            if id(axis) not in counts:
                counts[id(axis)] = int(alive(axis, keep).sum())
            value *= counts[id(axis)]
        result += value
    return result


def _positions_per_unit(
    extent: Extent, group: str, count: int, keep: Keep
) -> np.ndarray:
    """Positions of an axis that each unit of a group holds, were the unit kept."""
    others = {name: kept for name, kept in keep.items() if name != group}
    kept = alive(extent, others)
    held = np.zeros(count)
    for part in extent.parts:
        if part.group == group:
            held += np.bincount(
                part.units, weights=kept[part.positions], minlength=count
            )
    return held


def marginal(
    terms: Sequence[Term], sizes: Mapping[str, int], keep: Keep
) -> dict[str, np.ndarray]:
    """What each unit adds to the polynomial at the current choice.

    Args:
      terms: the polynomial.
      sizes: group name -> number of units.
      keep: group name -> kept units; a group that is not named is complete.

    Returns:
      Group name -> cost saved by dropping a kept unit, or spent by bringing back a
      dropped one, with everything else as in `keep`; float64, shape `(units,)`.
    """
    counts: dict[int, int] = {}
    held: dict[tuple[int, str], np.ndarray] = {}
    result = {name: np.zeros(count) for name, count in sizes.items()}
    for each in terms:
        for axis in each.axes:
            if id(axis) not in counts:
                counts[id(axis)] = int(alive(axis, keep).sum())
        for name in dict.fromkeys(p.group for axis in each.axes for p in axis.parts):
            kept = keep.get(name, np.ones(sizes[name], bool))
            sign = np.where(kept, -1.0, 1.0)
            changed = np.full(sizes[name], float(each.coefficient))
            now = float(each.coefficient)
            for axis in each.axes:
                key = (id(axis), name)
                if key not in held:
                    held[key] = _positions_per_unit(axis, name, sizes[name], keep)
                changed *= counts[id(axis)] + sign * held[key]
                now *= counts[id(axis)]
            result[name] += np.abs(changed - now)
    return result
