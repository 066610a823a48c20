"""Evaluation of a jaxpr whose parameters have become smaller."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from sparserec.structure import _control
from sparserec.structure._dims import find, leaves
from sparserec.structure._plan import (
    Plan,
    count,
    kept_positions,
    make_plan,
    new_shape,
)
from sparserec.structure._values import Record, Value


def evaluate(
    plan: Plan,
    jaxpr: Any,
    constants: Sequence[Any],
    records: Sequence[Record],
    values: Sequence[Any],
) -> list[Any]:
    """Run a jaxpr on cut arrays.

    Args:
      plan: what is cut.
      jaxpr: the jaxpr to run, the plan's own or one inside it.
      constants: its constants.
      records: its records.
      values: its cut inputs.

    Returns:
      Its cut outputs.
    """
    known: dict[Any, Any] = {}

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    known.update(zip(jaxpr.constvars, constants, strict=True))
    known.update(zip(jaxpr.invars, values, strict=True))
    for record in records:
        equation = record.equation
        given = [read(atom) for atom in equation.invars]
        touched = any(
            id(node) in plan.cut
            for value in (*record.ins, *record.outs)
            for axis in value.axes
            for node in leaves(axis.dim)
        )
        if touched:
            results = _resized_equation(plan, record, given)
        else:
            results = _unchanged(equation, given)
        for variable, value, result in zip(
            equation.outvars, record.outs, results, strict=True
        ):
            if touched and jnp.shape(result) != new_shape(plan, value):
                raise RuntimeError(
                    f"{equation.primitive.name} gave shape {jnp.shape(result)} where "
                    f"{new_shape(plan, value)} was expected; exclude what it touches."
                )
            known[variable] = result
    return [read(atom) for atom in jaxpr.outvars]


def _bind(equation: Any, values: Sequence[Any], params: dict) -> Sequence[Any]:
    """Run one equation with given parameters, in the context it was traced in."""
    context = getattr(getattr(equation, "ctx", None), "manager", None)
    with context or contextlib.nullcontext():
        result = equation.primitive.bind(*values, **params)
    return result if equation.primitive.multiple_results else [result]


def _unchanged(equation: Any, values: Sequence[Any]) -> Sequence[Any]:
    """Run one equation as it is, derivative rules included."""
    return _bind(equation, values, equation.primitive.get_bind_params(equation.params))


def _resized_equation(plan: Plan, record: Record, values: list[Any]) -> Sequence[Any]:
    """Run one equation that touches a cut axis."""
    equation = record.equation
    name, given = equation.primitive.name, dict(equation.params)
    if name in _NESTED:
        return _NESTED[name](plan, record, values)
    if name.startswith("random_"):
        # Draw as much as before, so that the kept units see the same numbers.
        outs = _bind(equation, values, given)
        return [_taken(plan, out, v) for out, v in zip(outs, record.outs, strict=True)]
    if name in _RESIZED:
        given |= _RESIZED[name](plan, record, values)
    return _bind(equation, values, given)


def _taken(plan: Plan, array: Any, value: Value) -> Any:
    """The kept positions of a full array."""
    for i, axis in enumerate(value.axes):
        kept = kept_positions(plan, axis.dim)
        if not kept.all():
            array = jnp.take(array, np.nonzero(kept)[0], axis=i)
    return array


def _shape(plan: Plan, record: Record, values: Sequence[Any]) -> dict[str, Any]:
    del values
    return {"shape": new_shape(plan, record.outs[0])}


def _new_sizes(plan: Plan, record: Record, values: Sequence[Any]) -> dict[str, Any]:
    del values
    return {"new_sizes": new_shape(plan, record.outs[0])}


def _slice_bounds(plan: Plan, record: Record, values: Sequence[Any]) -> dict[str, Any]:
    del values
    kept = [kept_positions(plan, axis.dim) for axis in record.ins[0].axes]

    def moved(bounds: Sequence[int]) -> tuple[int, ...]:
        return tuple(int(k[:b].sum()) for k, b in zip(kept, bounds, strict=True))

    names = ("start_indices", "limit_indices")
    return {name: moved(record.equation.params[name]) for name in names}


def _split_sizes(plan: Plan, record: Record, values: Sequence[Any]) -> dict[str, Any]:
    del values
    along = record.equation.params["axis"]
    return {"sizes": tuple(count(plan, out.axes[along].dim) for out in record.outs)}


def _slice_sizes(plan: Plan, record: Record, values: Sequence[Any]) -> dict[str, Any]:
    del values
    lengths = record.equation.params["slice_sizes"]
    return {
        "slice_sizes": tuple(
            count(plan, axis.dim) if find(axis.dim).size == length else length
            for axis, length in zip(record.ins[0].axes, lengths, strict=True)
        )
    }


def _conv_groups(plan: Plan, record: Record, values: Sequence[Any]) -> dict[str, Any]:
    del plan
    given = record.equation.params
    if given["feature_group_count"] == 1:
        return {}
    layout = given["dimension_numbers"]
    channels = values[0].shape[layout.lhs_spec[1]]
    return {"feature_group_count": channels // values[1].shape[layout.rhs_spec[1]]}


_RESIZED: dict[str, Callable[[Plan, Record, Sequence[Any]], dict[str, Any]]] = {
    "broadcast_in_dim": _shape,
    "iota": _shape,
    "empty": _shape,
    "reshape": _new_sizes,
    "slice": _slice_bounds,
    "split": _split_sizes,
    "gather": _slice_sizes,
    "dynamic_slice": _slice_sizes,
    "conv_general_dilated": _conv_groups,
}


def _inner(plan: Plan, inner: Any, records: Sequence[Record]) -> Callable[..., list]:
    """A jaxpr inside an equation as a function of its cut inputs."""
    jaxpr, constants = _control.body_of(inner)
    return lambda *values: evaluate(plan, jaxpr, constants, records, values)


def _call(plan: Plan, record: Record, values: Sequence[Any]) -> Sequence[Any]:
    run = _inner(plan, _control.called(record.equation), record.inner[0])
    return run(*values)


def _remat(plan: Plan, record: Record, values: Sequence[Any]) -> Sequence[Any]:
    given = record.equation.params
    run = _inner(plan, _control.called(record.equation), record.inner[0])
    return jax.checkpoint(
        run, prevent_cse=given.get("prevent_cse", True), policy=given.get("policy")
    )(*values)


def _custom_jvp(plan: Plan, record: Record, values: Sequence[Any]) -> Sequence[Any]:
    """Keep a custom derivative (that of ReLU at zero) where it can be resized.

    Its jaxpr is only made when the function is differentiated; releases of JAX
    differ in how. Where it cannot be had, the function is differentiated as written.
    """
    run = _inner(plan, _control.called(record.equation), record.inner[0])
    derivative = None
    with contextlib.suppress(
        KeyError, AttributeError, TypeError, ValueError, IndexError
    ):
        derivative = _derivative_plan(plan, record)
    if derivative is None:
        return run(*values)
    inner, zeros = derivative

    @jax.custom_jvp
    def function(*primals: Any) -> tuple:
        return tuple(run(*primals))

    @function.defjvp
    def _(primals: tuple, tangents: tuple) -> tuple:
        found = evaluate(
            inner, inner.jaxpr, inner.constants, inner.records, [*primals, *tangents]
        )
        outs, rest = found[: len(zeros)], iter(found[len(zeros) :])
        changes = [
            jnp.zeros_like(out) if zero else next(rest)
            for out, zero in zip(outs, zeros, strict=True)
        ]
        return tuple(outs), tuple(changes)

    return function(*values)


def _derivative_plan(plan: Plan, record: Record) -> tuple[Plan, Sequence[bool]] | None:
    """The jaxpr of a custom derivative with the cut carried through it."""
    equation = record.equation
    if not all(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in equation.invars):
        return None
    rule = equation.params["jvp_jaxpr_fun"]
    jaxpr, constants, zeros = rule.call_wrapped(*[False] * len(equation.invars))
    masks = [
        [kept_positions(plan, axis.dim) for axis in value.axes] for value in record.ins
    ]
    names = [str(i) for i in range(2 * len(masks))]
    return make_plan(jaxpr, constants, [*masks, *masks], names), zeros


def _scan(plan: Plan, record: Record, values: Sequence[Any]) -> Sequence[Any]:
    given = record.equation.params
    fixed, carried = _control.scan_counts(record.equation)
    run = _inner(plan, given["jaxpr"], record.inner[0])
    constant = values[:fixed]

    def body(carry: tuple, slices: tuple) -> tuple[tuple, tuple]:
        outs = run(*constant, *carry, *slices)
        return tuple(outs[:carried]), tuple(outs[carried:])

    carry, stacked = jax.lax.scan(
        body,
        tuple(values[fixed : fixed + carried]),
        tuple(values[fixed + carried :]),
        length=given["length"],
        reverse=given.get("reverse", False),
        unroll=given.get("unroll", 1),
    )
    return [*carry, *stacked]


def _while(plan: Plan, record: Record, values: Sequence[Any]) -> Sequence[Any]:
    given = record.equation.params
    for_test, for_body = int(given["cond_nconsts"]), int(given["body_nconsts"])
    test = _inner(plan, given["cond_jaxpr"], record.inner[0])
    body = _inner(plan, given["body_jaxpr"], record.inner[1])
    first, second = values[:for_test], values[for_test : for_test + for_body]
    return jax.lax.while_loop(
        lambda carry: test(*first, *carry)[0],
        lambda carry: tuple(body(*second, *carry)),
        tuple(values[for_test + for_body :]),
    )


def _cond(plan: Plan, record: Record, values: Sequence[Any]) -> Sequence[Any]:
    branches = record.equation.params["branches"]
    runs = [
        _inner(plan, branch, records)
        for branch, records in zip(branches, record.inner, strict=True)
    ]
    return jax.lax.switch(values[0], runs, *values[1:])


_NESTED: dict[str, Callable[[Plan, Record, Sequence[Any]], Sequence[Any]]] = {
    **dict.fromkeys(_control.CALLS, _call),
    **dict.fromkeys(("checkpoint", "remat", "remat2"), _remat),
    "custom_jvp_call": _custom_jvp,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
