"""Rules for primitives that read or write at computed positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparserec.structure._dims import freeze, leaf, unify
from sparserec.structure._values import Axis, Notes, Value, shape_of, size


def _dynamic_slice(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    axes = []
    for axis, length in zip(ins[0].axes, equation.params["slice_sizes"], strict=True):
        if size(axis) == length:
            axes.append(axis)
        else:
            freeze(axis.dim, "a slice at a computed position")
            axes.append(Axis(leaf(length, "a slice at a computed position")))
    return [ins[0]._replace(axes=tuple(axes), param=False, total=None)]


def _dynamic_update(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes, equation
    operand, update = ins[0], ins[1]
    axes = []
    for axis, new in zip(operand.axes, update.axes, strict=True):
        if size(axis) == size(new):
            unify(axis.dim, new.dim, "an update")
        else:
            freeze(axis.dim, "an update at a computed position")
            freeze(new.dim, "an update at a computed position")
        zero = (axis.zero or operand.number == 0) and new.zero
        axes.append(Axis(axis.dim, zero))
    return [Value(tuple(axes), recent=operand.recent | update.recent)]


def _gather(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    operand, indices = ins[0], ins[1]
    numbers = equation.params["dimension_numbers"]
    lengths = equation.params["slice_sizes"]
    batch = tuple(getattr(numbers, "operand_batching_dims", ()))
    index_batch = tuple(getattr(numbers, "start_indices_batching_dims", ()))
    window = [
        i
        for i in range(len(operand.axes))
        if i not in numbers.collapsed_slice_dims and i not in batch
    ]
    rest = list(indices.axes[:-1])
    for i, j in zip(batch, index_batch, strict=True):
        unify(operand.axes[i].dim, indices.axes[j].dim, "a batched look-up")
        rest[j] = Axis(operand.axes[i].dim, operand.axes[i].zero)
    out: list[Axis | None] = [None] * len(shape_of(equation.outvars[0]))
    for target, i in zip(numbers.offset_dims, window, strict=True):
        axis = operand.axes[i]
        if size(axis) != lengths[i]:
            freeze(axis.dim, "entries along it are looked up")
            axis = Axis(leaf(lengths[i], "entries along it are looked up"))
        # A look-up outside the table may be filled with something else than zero.
        out[target] = Axis(axis.dim, axis.zero and not _fills(equation))
    for i in numbers.collapsed_slice_dims:
        freeze(operand.axes[i].dim, "entries along it are looked up")
    given = iter(rest)
    axes = [next(given) if axis is None else axis for axis in out]
    return [Value(tuple(axes), recent=operand.recent)]


def _fills(equation: Any) -> bool:
    """Whether a gather writes a chosen non-zero value for bad positions.

    The default filling is NaN, which is the caller's mistake with or without a cut;
    only an explicit other value would make a cut unit visible.
    """
    value = equation.params.get("fill_value")
    return value is not None and value == value and value != 0


def _scatter(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    del notes
    operand, indices, update = ins
    numbers = equation.params["dimension_numbers"]
    batch = tuple(getattr(numbers, "operand_batching_dims", ()))
    index_batch = tuple(getattr(numbers, "scatter_indices_batching_dims", ()))
    inserted = tuple(numbers.inserted_window_dims)
    window = [
        i for i in range(len(operand.axes)) if i not in inserted and i not in batch
    ]
    axes = list(operand.axes)
    for i, target in zip(window, numbers.update_window_dims, strict=True):
        new = update.axes[target]
        if size(new) == size(axes[i]):
            unify(axes[i].dim, new.dim, "a scatter")
            zero = (axes[i].zero or operand.number == 0) and new.zero
            axes[i] = Axis(axes[i].dim, zero)
        else:
            freeze(axes[i].dim, "entries along it are written")
            freeze(new.dim, "entries along it are written")
    for i in inserted:
        freeze(axes[i].dim, "entries along it are written")
    free = [i for i in range(len(update.axes)) if i not in numbers.update_window_dims]
    for i, axis in zip(free, indices.axes[:-1], strict=True):
        unify(update.axes[i].dim, axis.dim, "a scatter")
    for i, j in zip(batch, index_batch, strict=True):
        unify(axes[i].dim, indices.axes[j].dim, "a scatter")
        axes[i] = Axis(axes[i].dim)
    for axis in indices.axes[-1:]:
        freeze(axis.dim, "positions of a scatter")
    axes = [Axis(axis.dim, axis.zero) for axis in axes]
    return [Value(tuple(axes), recent=operand.recent | update.recent)]


RULES = {
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update,
    "gather": _gather,
    **dict.fromkeys(
        (
            "scatter",
            "scatter-add",
            "scatter-sub",
            "scatter-mul",
            "scatter-min",
            "scatter-max",
        ),
        _scatter,
    ),
}
