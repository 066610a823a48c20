"""The walk over a jaxpr that finds which axes belong together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jax.extend import core

from sparserec.structure import (
    _contract,
    _control,
    _elementwise,
    _index,
    _rearrange,
)
from sparserec.structure._dims import freeze
from sparserec.structure._values import (
    Axis,
    Notes,
    Record,
    Value,
    fresh,
    shape_of,
    size,
)

RULES = _elementwise.RULES | _rearrange.RULES | _contract.RULES | _index.RULES


def new_notes() -> Notes:
    """Empty notes for one walk."""
    return Notes(unknown={}, readers=set(), reads=[], pairs=[])


def _number(constant: Any) -> float | None:
    """A concrete scalar as a float, or None."""
    try:
        return float(constant) if getattr(constant, "shape", ()) == () else None
    except (TypeError, ValueError):
        return None
    except Exception as error:  # a traced constant has no number
        if type(error).__module__.startswith("jax"):
            return None
        raise


def literal(constant: Any, shape: Sequence[int]) -> Value:
    """A constant of the function; its axes keep their size."""
    return Value(fresh(shape, "a captured constant"), number=_number(constant))


def parameter(number: int, shape: Sequence[int]) -> Value:
    """A parameter: zero at every cut position, by definition of the mask."""
    axes = [
        Axis(axis.dim, True, frozenset([(number, i)]))
        for i, axis in enumerate(fresh(shape))
    ]
    return Value(tuple(axes), recent=frozenset([number]), param=True)


def _frozen_result(
    notes: Notes, equation: Any, ins: Sequence[Value], why: str
) -> list[Value]:
    """Freeze everything that an equation touches."""
    name = equation.primitive.name
    notes.unknown.setdefault(name, why)
    reason = f"{why}: {name}"
    for value in ins:
        for axis in value.axes:
            freeze(axis.dim, reason)
    return [Value(fresh(shape_of(out), reason)) for out in equation.outvars]


def walk(
    notes: Notes, jaxpr: Any, constants: Sequence[Any], ins: Sequence[Value]
) -> tuple[list[Value], tuple[Record, ...]]:
    """Propagate axes through a jaxpr, equation by equation.

    Args:
      notes: facts about the function, added to in place.
      jaxpr: an open jaxpr.
      constants: values of its constant variables.
      ins: values of its inputs.

    Returns:
      The values of its outputs and one record per equation. An equation without a
      rule, or whose rule fails, freezes every axis that it touches.
    """
    known: dict[Any, Value] = {}

    def read(atom: Any) -> Value:
        if isinstance(atom, core.Literal):
            return literal(atom.val, shape_of(atom))
        return known[atom]

    for variable, constant in zip(jaxpr.constvars, constants, strict=True):
        known[variable] = literal(constant, shape_of(variable))
    known.update(zip(jaxpr.invars, ins, strict=True))
    records = []
    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        outs, inner = _apply(notes, equation, values)
        records.append(Record(equation, tuple(values), tuple(outs), inner))
        known.update(zip(equation.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars], tuple(records)


def _apply(notes: Notes, equation: Any, ins: Sequence[Value]) -> tuple:
    """Run the rule of one equation, or freeze what it touches."""
    name = equation.primitive.name

    def inside(jaxpr: Any, constants: Sequence[Any], values: Sequence[Value]) -> tuple:
        return walk(notes, jaxpr, constants, values)

    try:
        if name in _control.RULES:
            outs, inner = _control.RULES[name](inside, notes, equation, ins)
        elif name in RULES:
            outs, inner = RULES[name](notes, equation, ins), ()
        else:
            return _frozen_result(notes, equation, ins, "no rule for a primitive"), ()
        shapes = [tuple(size(axis) for axis in value.axes) for value in outs]
        if shapes != [shape_of(out) for out in equation.outvars]:
            raise NotImplementedError("an unexpected shape")
    except (KeyError, AttributeError, IndexError, TypeError, ValueError) as error:
        # Names of primitive parameters change between releases of JAX: an equation
        # that a rule cannot read is treated like one without a rule.
        why = f"its rule failed ({type(error).__name__}: {error})"
        return _frozen_result(notes, equation, ins, why), ()
    except NotImplementedError as error:
        return _frozen_result(notes, equation, ins, f"not supported, {error}"), ()
    return outs, inner
