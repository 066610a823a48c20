"""Rules for primitives that move, repeat, join or cut entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparserec.structure._dims import (
    Dim,
    freeze,
    leaf,
    product,
    split_product,
    split_sum,
    total,
    unify,
)
from sparserec.structure._values import (
    NOWHERE,
    Axis,
    Notes,
    Value,
    fresh,
    rearranged,
    shape_of,
    size,
)


def _broadcast(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    axes = list(fresh(equation.params["shape"]))
    if ins[0].number == 0:
        axes = [axis._replace(zero=True) for axis in axes]
    for axis, target in zip(
        ins[0].axes, equation.params["broadcast_dimensions"], strict=True
    ):
        if size(axis) == size(axes[target]):
            axes[target] = axis
    return [rearranged(ins[0], axes)]


def _fold(sizes: Sequence[int], wanted: Sequence[int]) -> list[tuple[list, list]]:
    """Smallest runs of axes on both sides of a reshape with equal products."""
    old = [i for i, n in enumerate(sizes) if n != 1]
    new = [j for j, n in enumerate(wanted) if n != 1]
    runs = []
    while old:
        left, right = [old.pop(0)], [new.pop(0)]
        count, target = sizes[left[0]], wanted[right[0]]
        while count != target:
            if count < target:
                left.append(old.pop(0))
                count *= sizes[left[-1]]
            else:
                right.append(new.pop(0))
                target *= wanted[right[-1]]
        runs.append((left, right))
    return runs


def _reshape(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    axes, wanted = ins[0].axes, shape_of(equation.outvars[0])
    sizes = [size(axis) for axis in axes]
    out = list(fresh(wanted))
    if 0 in sizes or equation.params.get("dimensions") is not None:
        for axis in axes:
            freeze(axis.dim, "an empty or permuting reshape")
        return [rearranged(ins[0], fresh(wanted, "an empty or permuting reshape"))]
    for left, right in _fold(sizes, wanted):
        merged = product([axes[i].dim for i in left])
        zero = all(axes[i].zero for i in left)
        origin = NOWHERE.union(*(axes[i].origin for i in left))
        dims = split_product(merged, [wanted[j] for j in right])
        if dims is None:
            freeze(merged, "a reshape across its blocks")
            dims = [leaf(wanted[j], "a reshape across its blocks") for j in right]
        for j, dim in zip(right, dims, strict=True):
            out[j] = Axis(dim, zero, origin)
    return [rearranged(ins[0], out)]


def _transpose(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    order = equation.params["permutation"]
    return [rearranged(ins[0], [ins[0].axes[i] for i in order])]


def _squeeze(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    gone = equation.params["dimensions"]
    axes = [axis for i, axis in enumerate(ins[0].axes) if i not in gone]
    return [rearranged(ins[0], axes)]


def _expand(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    shape, new = shape_of(equation.outvars[0]), equation.params["dimensions"]
    given = iter(ins[0].axes)
    axes = [Axis(leaf(1)) if i in new else next(given) for i in range(len(shape))]
    return [rearranged(ins[0], axes)]


def _concatenate(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    along, axes = equation.params["dimension"], []
    for i, axis in enumerate(ins[0].axes):
        others = [value.axes[i] for value in ins]
        if i == along:
            dim = total([other.dim for other in others])
        else:
            dim = axis.dim
            for other in others[1:]:
                unify(dim, other.dim, "concatenate")
        zero = all(other.zero for other in others)
        axes.append(Axis(dim, zero, NOWHERE.union(*(o.origin for o in others))))
    numbers = {value.number for value in ins}
    return [
        Value(
            axes=tuple(axes),
            recent=frozenset().union(*(value.recent for value in ins)),
            param=all(value.param for value in ins),
            number=numbers.pop() if len(numbers) == 1 else None,
        )
    ]


def _stack(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    axes = []
    for i, axis in enumerate(ins[0].axes):
        others = [value.axes[i] for value in ins]
        for other in others[1:]:
            unify(axis.dim, other.dim, "stack")
        zero = all(other.zero for other in others)
        axes.append(Axis(axis.dim, zero, NOWHERE.union(*(o.origin for o in others))))
    axes.insert(equation.params["axis"], Axis(leaf(len(ins), "a stack of values")))
    recent = frozenset().union(*(value.recent for value in ins))
    return [Value(tuple(axes), recent, param=all(value.param for value in ins))]


def _unstack(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    along, axes = equation.params["axis"], list(ins[0].axes)
    freeze(axes.pop(along).dim, "a stack of values")
    return [rearranged(ins[0], axes)] * len(equation.outvars)


def _parts(axis: Axis, sizes: Sequence[int], why: str) -> list[Axis]:
    """Cut one axis into consecutive pieces, or freeze it."""
    dims = split_sum(axis.dim, sizes)
    if dims is None:
        freeze(axis.dim, why)
        dims = [leaf(count, why) for count in sizes]
    return [axis._replace(dim=dim) for dim in dims]


def _split(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    along, axes = equation.params["axis"], ins[0].axes
    sizes = [int(count) for count in equation.params["sizes"]]
    pieces = _parts(axes[along], sizes, "a split inside its blocks")
    return [
        rearranged(ins[0], [*axes[:along], piece, *axes[along + 1 :]])
        for piece in pieces
    ]


def _slice(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    given = equation.params
    strides = given["strides"] or [1] * len(ins[0].axes)
    bounds = given["start_indices"], given["limit_indices"]
    axes = []
    for axis, start, end, stride in zip(ins[0].axes, *bounds, strides, strict=True):
        count = size(axis)
        if (start, end, stride) == (0, count, 1):
            axes.append(axis)
        elif stride == 1:
            sizes = [int(start), int(end - start), int(count - end)]
            axes.append(_parts(axis, sizes, "a slice inside its blocks")[1])
        else:
            freeze(axis.dim, "a strided slice")
            length = -(-(int(end) - int(start)) // int(stride))
            axes.append(Axis(leaf(length, "a strided slice"), origin=axis.origin))
    return [rearranged(ins[0], axes)]


def _pad(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    axes, padded = [], shape_of(equation.outvars[0])
    filled = ins[1].number == 0
    for axis, length, (low, high, inside) in zip(
        ins[0].axes, padded, equation.params["padding_config"], strict=True
    ):
        if (low, high, inside) == (0, 0, 0):
            # Padding another axis puts the fill value at cut positions of this one.
            axes.append(axis._replace(zero=axis.zero and filled))
        elif inside == 0 and low >= 0 and high >= 0:
            parts = [leaf(low, "padding"), axis.dim, leaf(high, "padding")]
            axes.append(Axis(total(parts), axis.zero and filled))
        else:
            freeze(axis.dim, "padding between or before entries")
            axes.append(Axis(leaf(length, "padding between or before entries")))
    return [rearranged(ins[0], axes)._replace(param=False, number=None, total=None)]


def _tile(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes

    def repeated(axis: Axis, count: int) -> Dim:
        return product([leaf(count, "copies of an axis"), axis.dim])

    axes = [
        axis if count == 1 else axis._replace(dim=repeated(axis, int(count)))
        for axis, count in zip(ins[0].axes, equation.params["reps"], strict=True)
    ]
    return [rearranged(ins[0], axes)]


def _iota(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes, ins
    axes = list(fresh(equation.params["shape"]))
    freeze(axes[equation.params["dimension"]].dim, "positions are counted (iota)")
    return [Value(axes=tuple(axes))]


def _created(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    """Random numbers and keys: new axes, nothing is known about the entries."""
    del notes, ins
    return [Value(axes=fresh(shape_of(out))) for out in equation.outvars]


def _ordered(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    """Scans, sorts and reversals: every position along the axis counts."""
    del notes
    name, given = equation.primitive.name, equation.params
    along = given.get("axis", given.get("dimension", given.get("dimensions")))
    along = along if isinstance(along, (tuple, list)) else (along,)
    first = ins[0]
    for value in ins:
        for i, axis in enumerate(value.axes):
            if i in along:
                freeze(axis.dim, f"the order along it matters ({name})")
            unify(axis.dim, first.axes[i].dim, name)
    kept = ("cumsum", "rev")
    return [
        Value(
            axes=tuple(
                Axis(axis.dim, axis.zero and name in kept) for axis in value.axes
            ),
            recent=value.recent,
        )
        for value in ins
    ]


def _top_k(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    along = equation.params.get("axis", -1) % len(ins[0].axes)
    freeze(ins[0].axes[along].dim, "the largest along it are chosen (top_k)")
    values = []
    for out in equation.outvars:
        axes = [Axis(axis.dim) for axis in ins[0].axes]
        axes[along] = Axis(leaf(shape_of(out)[along], "chosen by top_k"))
        values.append(Value(axes=tuple(axes), recent=ins[0].recent))
    return values


RULES = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "expand_dims": _expand,
    "concatenate": _concatenate,
    "stack": _stack,
    "unstack": _unstack,
    "split": _split,
    "slice": _slice,
    "pad": _pad,
    "tile": _tile,
    "iota": _iota,
    "top_k": _top_k,
    **dict.fromkeys(
        ("cumsum", "cumlogsumexp", "cummax", "cummin", "cumprod", "rev", "sort"),
        _ordered,
    ),
    **dict.fromkeys(
        (
            "random_bits",
            "random_wrap",
            "random_unwrap",
            "random_seed",
            "random_fold_in",
            "random_split",
            "random_clone",
            "empty",
        ),
        _created,
    ),
}
