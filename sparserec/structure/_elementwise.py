"""Rules for primitives that act on every entry alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from sparserec.structure._dims import mark, unify
from sparserec.structure._values import (
    Axis,
    Notes,
    Value,
    fresh,
    scaled,
    shape_of,
    size,
)


def _names(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


# f(0) = 0, so zeros at cut positions stay zeros.
KEEPS_ZERO = _names(
    """neg sign floor ceil round expm1 log1p tanh sin tan asin atan sinh asinh atanh
    sqrt cbrt abs square convert_element_type stop_gradient copy copy_p real imag conj
    reduce_precision erf erf_inv name sharding_constraint layout_constraint pvary pcast
    population_count bitcast_convert_type reshard mesh_cast"""
)
FREE_OF_ZERO = _names(
    """not exp exp2 log log2 cos acos acosh cosh logistic erfc rsqrt is_finite lgamma
    digamma atan2 nextafter eq ne lt le gt ge eq_to lt_to le_to shift_left
    shift_right_logical shift_right_arithmetic clz bessel_i0e bessel_i1e igamma igammac
    regularized_incomplete_beta polygamma zeta complex xor one_minus_square"""
)
SPECIAL = _names(
    """add add_any sub mul and or div rem max min pow integer_pow select_n
    clamp"""
)
ELEMENTWISE = KEEPS_ZERO | FREE_OF_ZERO | SPECIAL

# Homogeneous of degree one in the operand: a factor on the input is one on the output.
HOMOGENEOUS = _names(
    """neg abs convert_element_type stop_gradient copy copy_p real imag conj
    reduce_precision name sharding_constraint layout_constraint pvary pcast reshard
    mesh_cast"""
)
PASSES_TOTAL = _names(
    """convert_element_type stop_gradient copy copy_p reduce_precision name
    sharding_constraint layout_constraint pvary pcast"""
)

FOLD: dict[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "max": lambda a, b: max(a, b),
    "min": lambda a, b: min(a, b),
    "pow": lambda a, b: a**b,
    "neg": lambda a: -a,
    "abs": lambda a: abs(a),
    "sqrt": math.sqrt,
    "square": lambda a: a * a,
    "rsqrt": lambda a: 1 / math.sqrt(a),
    "exp": math.exp,
    "log": math.log,
    "convert_element_type": lambda a: a,
    "stop_gradient": lambda a: a,
    "copy": lambda a: a,
}


def _folded(name: str, equation: Any, ins: Sequence[Value]) -> float | None:
    """The number every entry of the result equals, or None."""
    numbers = [value.number for value in ins]
    if any(number is None for number in numbers):
        return None
    known = [float(number) for number in numbers if number is not None]
    try:
        if name == "integer_pow":
            return known[0] ** int(equation.params["y"])
        return float(FOLD[name](*known)) if name in FOLD else None
    except (ArithmeticError, ValueError, TypeError):
        return None


def _zero(name: str, equation: Any, ins: Sequence[Value], flags: list[bool]) -> bool:
    """Whether the result is zero where the flagged operands are.

    Args:
      name: the primitive.
      equation: its equation, for exponents.
      ins: the operands, for known numbers.
      flags: per operand, whether it is zero at the cut positions of the axis.

    Returns:
      True only where it is certain.
    """
    if name in KEEPS_ZERO:
        return flags[0]
    if name in ("mul", "and"):
        return any(flags)
    if name in ("add", "add_any", "sub", "or"):
        return all(flags)
    if name in ("div", "rem"):
        return flags[0] and not flags[1]
    if name == "select_n":
        return all(flags[1:])
    if name == "integer_pow":
        return flags[0] and int(equation.params["y"]) > 0
    if name == "pow":
        return flags[0] and (ins[1].number or 0) > 0
    if name in ("max", "min"):
        # max(0, c) = 0 for c <= 0 and min(0, c) = 0 for c >= 0.
        sign = 1 if name == "max" else -1
        harmless = [v.number is not None and sign * v.number <= 0 for v in ins]
        return any(flags) and all(f or h for f, h in zip(flags, harmless, strict=True))
    if name == "clamp":
        low, high = ins[0].number, ins[2].number
        inside = low is not None and high is not None and low <= 0 <= high
        return flags[1] and inside
    return False


def _homogeneous(name: str, ins: Sequence[Value]) -> bool:
    """Whether scaling the parameters of every operand scales the result alike."""
    written = [bool(value.recent) for value in ins]
    if name in HOMOGENEOUS:
        return True
    if name in ("mul", "div"):
        return written == [True, False] or (name == "mul" and written == [False, True])
    if name in ("add", "add_any", "sub", "select_n"):
        cases = list(zip(ins, written, strict=True))[name == "select_n" :]
        return all(value.number == 0 or by_params for value, by_params in cases)
    return False


def elementwise(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    """Tie the axes of all operands; scalars and axes of length one are broadcast."""
    del notes
    name = equation.primitive.name
    shape = shape_of(equation.outvars[0])
    if any(len(value.axes) not in (0, len(shape)) for value in ins):
        raise NotImplementedError("operands of different rank")
    out = []
    for index, fallback in enumerate(fresh(shape)):
        columns = [value.axes[index] if value.axes else None for value in ins]
        full = [axis for axis in columns if axis and size(axis) == shape[index]]
        dim = full[0].dim if full else fallback.dim
        for axis in full[1:]:
            unify(dim, axis.dim, name)
        flags = [
            value.number == 0
            or (axis is not None and size(axis) == shape[index] and axis.zero)
            for value, axis in zip(ins, columns, strict=True)
        ]
        origin = frozenset().union(*(axis.origin for axis in full))
        out.append(Axis(dim, _zero(name, equation, ins, flags), origin))
    recent = frozenset().union(*(value.recent for value in ins))
    if recent and not _homogeneous(name, ins):
        for axis in out:
            mark(axis.dim, "nonlinear", name)
    if name == "mul":
        scaled(ins[0], ins[1].number)
        scaled(ins[1], ins[0].number)
    elif name == "div" and ins[1].number:
        scaled(ins[0], 1 / ins[1].number)
    return [
        Value(
            axes=tuple(out),
            recent=recent,
            param=any(v.param for v in ins)
            and all(v.param or v.number is not None for v in ins),
            number=_folded(name, equation, ins),
            total=ins[0].total if name in PASSES_TOTAL else None,
        )
    ]


def passthrough(notes: Notes, equation: Any, ins: Sequence[Value]) -> list[Value]:
    """Results are the operands (barriers and transfers of several values)."""
    del notes, equation
    return list(ins)


RULES = dict.fromkeys(ELEMENTWISE, elementwise) | dict.fromkeys(
    ("optimization_barrier", "device_put"), passthrough
)
