"""What the walk over a jaxpr knows about each value."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sparserec.structure._dims import Dim, find, leaf, mark

Origin = frozenset[tuple[int, int]]
NOWHERE: Origin = frozenset()

# Half precision rounds a constant by up to 0.4 %.
CLOSE = 5e-3


class Axis(NamedTuple):
    """One axis of a value.

    Attributes:
      dim: its dimension tree.
      zero: whether the value is exactly zero at cut positions of this axis when all
        parameters of the cut units are set to zero.
      origin: parameter axes (leaf number, axis) it was taken from; only for values
        computed from parameters alone.
    """

    dim: Dim
    zero: bool = False
    origin: Origin = NOWHERE


class Total(NamedTuple):
    """A value is a sum over axes; recognizes means and softmax temperatures.

    Attributes:
      dims: the axes summed over.
      fact: what a division by the size ("mean") or by its square root
        ("temperature") would establish.
    """

    dims: tuple[Dim, ...]
    fact: str


class Value(NamedTuple):
    """An abstract value: its axes and where it comes from.

    Attributes:
      axes: one entry per axis.
      recent: parameters that entered since the last contraction.
      param: computed from parameters alone.
      number: the number every entry equals, or None.
      total: set while the value is a plain sum over axes.
    """

    axes: tuple[Axis, ...] = ()
    recent: frozenset[int] = frozenset()
    param: bool = False
    number: float | None = None
    total: Total | None = None


class Record(NamedTuple):
    """One equation of a walked jaxpr.

    Attributes:
      equation: the jaxpr equation.
      ins: values read.
      outs: values written.
      inner: for each jaxpr inside the equation, its records.
    """

    equation: Any
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    inner: tuple[tuple[Record, ...], ...] = ()


class Notes(NamedTuple):
    """Facts about the whole function, filled during a walk.

    Attributes:
      unknown: primitive name -> why it has no rule.
      readers: parameter axes that are contracted with a value.
      reads: (axis, parameters) of contractions and sums without a parameter: the
        parameters are those that write the operand which is zero at cut positions.
      pairs: axes contracted between two computed values.
    """

    unknown: dict[str, str]
    readers: set[tuple[int, int]]
    reads: list[tuple[Dim, frozenset[int]]]
    pairs: list[Dim]


Walk = Callable[[Any, Sequence[Any], Sequence[Value]], tuple[list[Value], tuple]]


def shape_of(variable: Any) -> tuple[int, ...]:
    """Shape of a jaxpr variable; tokens and the like count as scalars."""
    return tuple(int(size) for size in getattr(variable.aval, "shape", ()))


def fresh(shape: Sequence[int], frozen: str = "") -> tuple[Axis, ...]:
    """New, independent axes."""
    return tuple(Axis(leaf(size, frozen)) for size in shape)


def size(axis: Axis) -> int:
    """Number of positions of an axis."""
    return find(axis.dim).size


def rearranged(value: Value, axes: Sequence[Axis]) -> Value:
    """The same entries in another arrangement."""
    return value._replace(axes=tuple(axes))


def scaled(value: Value, factor: float | None) -> None:
    """Take note when a value is multiplied by one over a size or its root.

    Args:
      value: the value being scaled.
      factor: the number it is multiplied by, or None when unknown.
    """
    if factor is None or not math.isfinite(factor) or factor <= 0:
        return
    if value.total is not None:
        count = math.prod(find(dim).size for dim in value.total.dims)
        power = 1 if value.total.fact == "mean" else 2
        if count > 1 and abs(factor**power * count - 1) < CLOSE:
            for dim in value.total.dims:
                mark(dim, value.total.fact, f"scaled by {factor:.6g}")
    for axis in value.axes:
        if size(axis) > 1 and abs(factor**2 * size(axis) - 1) < CLOSE:
            mark(axis.dim, "root scaled", f"scaled by {factor:.6g}")


def merged(first: Value, second: Value) -> Value:
    """What holds for a value that may be either of two; axes must be unified."""
    axes = tuple(
        Axis(a.dim, a.zero and b.zero, a.origin | b.origin)
        for a, b in zip(first.axes, second.axes, strict=True)
    )
    same = first.number is not None and first.number == second.number
    return Value(
        axes=axes,
        recent=first.recent | second.recent,
        param=first.param and second.param,
        number=first.number if same else None,
        total=first.total if first.total == second.total else None,
    )
