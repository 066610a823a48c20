"""Rules for primitives that sum over axes: products, convolutions, reductions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparserec.structure._dims import find, freeze, leaf, mark, product, unify
from sparserec.structure._values import (
    Axis,
    Notes,
    Total,
    Value,
    fresh,
    rearranged,
    shape_of,
    size,
)


def _read(notes: Notes, left: Value, right: Value, i: int, j: int) -> None:
    """Tie two contracted axes and note who reads their units.

    Args:
      notes: facts collected so far.
      left: first operand, contracted over its axis `i`.
      right: second operand, contracted over its axis `j`.
      i: axis of `left`.
      j: axis of `right`.
    """
    first, second = left.axes[i], right.axes[j]
    unify(first.dim, second.dim, "a contraction")
    if not (first.zero or second.zero):
        mark(first.dim, "inexact", "a sum over entries that are not zero when cut")
    if right.param:
        notes.readers.update(second.origin)
    elif left.param:
        notes.readers.update(first.origin)
    else:
        # Zeroing one side is enough, provided that side really becomes zero.
        sides = [v.recent for v, a in ((left, first), (right, second)) if a.zero]
        notes.pairs.append(first.dim)
        notes.reads.append((first.dim, sides[0] if sides else frozenset()))


def _dot_general(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    (contract, batch), (left, right) = equation.params["dimension_numbers"], ins
    for i, j in zip(*contract, strict=True):
        _read(notes, left, right, i, j)
    axes = []
    for i, j in zip(*batch, strict=True):
        first, second = left.axes[i], right.axes[j]
        unify(first.dim, second.dim, "a batch axis")
        origin = first.origin | second.origin
        axes.append(Axis(first.dim, first.zero or second.zero, origin))
    for value, used in ((left, 0), (right, 1)):
        gone = {*contract[used], *batch[used]}
        axes += [axis for i, axis in enumerate(value.axes) if i not in gone]
    both = left.param == right.param
    recent = left.recent | right.recent
    if not both:
        recent = left.recent if left.param else right.recent
    summed = tuple(left.axes[i].dim for i in contract[0])
    total = Total(summed, "temperature") if both and not left.param else None
    param = left.param and right.param
    return [Value(tuple(axes), recent=recent, param=param, total=total)]


def _conv(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    given, (image, kernel) = equation.params, ins
    layout = given["dimension_numbers"]
    groups = int(given["feature_group_count"])
    if int(given.get("batch_group_count", 1)) != 1:
        raise NotImplementedError("a convolution with batch groups")
    for value, spec in ((image, layout.lhs_spec), (kernel, layout.rhs_spec)):
        for i in spec[2:]:
            freeze(value.axes[i].dim, "a spatial or kernel window axis")
    channel, read, written = (
        layout.lhs_spec[1],
        layout.rhs_spec[1],
        layout.rhs_spec[0],
    )
    target = kernel.axes[written]
    zero = target.zero
    if groups == 1:
        _read(notes, image, kernel, channel, read)
    else:
        group, inner = leaf(groups), kernel.axes[read].dim
        each = leaf(size(target) // groups)
        unify(image.axes[channel].dim, product([group, inner]), "a grouped convolution")
        unify(target.dim, product([group, each]), "a grouped convolution")
        if find(inner).size > 1:
            notes.readers.update(kernel.axes[read].origin)
        if not (image.axes[channel].zero or kernel.axes[read].zero):
            mark(inner, "inexact", "a sum over entries that are not zero when cut")
        zero = zero or (image.axes[channel].zero and find(each).size == 1)
    out = list(fresh(shape_of(equation.outvars[0]), "a spatial axis"))
    out[layout.out_spec[0]] = image.axes[layout.lhs_spec[0]]
    out[layout.out_spec[1]] = Axis(target.dim, zero)
    return [Value(tuple(out), recent=kernel.recent or image.recent)]


def _reduce(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    name, gone, value = equation.primitive.name, equation.params["axes"], ins[0]
    dims = tuple(value.axes[i].dim for i in gone)
    for i in gone:
        axis = value.axes[i]
        if name != "reduce_sum" and not (name == "reduce_or" and axis.zero):
            mark(axis.dim, "inexact", f"{name} runs over it")
        elif not axis.zero:
            mark(axis.dim, "inexact", "a sum over entries that are not zero when cut")
        notes.reads.append((axis.dim, value.recent))
    kept = [axis for i, axis in enumerate(value.axes) if i not in gone]
    total = Total(dims, "mean") if name == "reduce_sum" else None
    return [Value(tuple(kept), value.recent, value.param, total=total)]


def _argument(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    gone = equation.params["axes"]
    for i in gone:
        freeze(ins[0].axes[i].dim, "a position along it is the result (argmax)")
    kept = [Axis(axis.dim) for i, axis in enumerate(ins[0].axes) if i not in gone]
    return [Value(tuple(kept), recent=ins[0].recent)]


def _window(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    out = list(fresh(shape_of(equation.outvars[0]), "a pooling window"))
    given = equation.params
    ones = (1,) * len(out)
    untouched = zip(
        given["window_dimensions"],
        given.get("window_strides") or ones,
        given.get("padding") or ((0, 0),) * len(out),
        given.get("base_dilation") or ones,
        strict=True,
    )
    for i, (window, stride, padding, base) in enumerate(untouched):
        if (window, stride, tuple(padding), base) == (1, 1, (0, 0), 1):
            out[i] = ins[0].axes[i]
        else:
            freeze(ins[0].axes[i].dim, "a pooling window")
    return [rearranged(ins[0], out)._replace(param=False, number=None, total=None)]


RULES = {
    "dot_general": _dot_general,
    "conv_general_dilated": _conv,
    **dict.fromkeys(
        (
            "reduce_sum",
            "reduce_max",
            "reduce_min",
            "reduce_prod",
            "reduce_and",
            "reduce_or",
        ),
        _reduce,
    ),
    "argmax": _argument,
    "argmin": _argument,
    **dict.fromkeys(
        ("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _window
    ),
}
