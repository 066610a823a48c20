"""Rules for primitives that contain jaxprs: calls, scans, loops and branches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparserec.structure._dims import freeze, unify
from sparserec.structure._values import Axis, Notes, Value, Walk, fresh, merged

CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "call",
    "composite",
    "core_call",
    "core_closed_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "custom_vjp_call_jaxpr",
    "custom_lin",
    "checkpoint",
    "remat",
    "remat2",
)


def body_of(inner: Any) -> tuple[Any, Sequence[Any]]:
    """The open jaxpr and its constants, whether `inner` is closed or not."""
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


def called(equation: Any) -> Any:
    """The jaxpr that a call runs."""
    for key in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        if key in equation.params:
            return equation.params[key]
    raise KeyError("no jaxpr among the parameters of the call")


def scan_counts(equation: Any) -> tuple[int, int]:
    """How many operands of a scan are constants and how many are carried."""
    given = equation.params
    if "num_consts" in given:
        return int(given["num_consts"]), int(given["num_carry"])
    constants, carry, _ = given["ft_in"].unpack()  # jax 0.12
    return len(constants), len(carry)


def _tie(first: Sequence[Value], second: Sequence[Value], why: str) -> list[Value]:
    """Unify two lists of values axis by axis and keep what holds for both."""
    for left, right in zip(first, second, strict=True):
        for one, other in zip(left.axes, right.axes, strict=True):
            unify(one.dim, other.dim, why)
    return [merged(left, right) for left, right in zip(first, second, strict=True)]


def _facts(values: Sequence[Value]) -> list[tuple]:
    """What can change from one pass over a loop body to the next."""
    return [
        (tuple(a.zero for a in v.axes), v.recent, v.param, v.number) for v in values
    ]


def _call(walk: Walk, notes: Notes, equation: Any, ins: Sequence[Value]) -> tuple:
    del notes
    jaxpr, constants = body_of(called(equation))
    outs, records = walk(jaxpr, constants, ins)
    return outs, (records,)


def _scan(walk: Walk, notes: Notes, equation: Any, ins: Sequence[Value]) -> tuple:
    del notes
    given = equation.params
    jaxpr, constants = body_of(given["jaxpr"])
    fixed, carried = scan_counts(equation)
    constant, carry = list(ins[:fixed]), list(ins[fixed : fixed + carried])
    slices = []
    for value in ins[fixed + carried :]:
        freeze(value.axes[0].dim, "the axis of a scan")
        number = value.number
        slices.append(Value(value.axes[1:], value.recent, value.param, number))
    while True:
        outs, records = walk(jaxpr, constants, [*constant, *carry, *slices])
        after = _tie(carry, outs[:carried], "the carry of a scan")
        if _facts(after) == _facts(carry):
            break
        carry = after
    (steps,) = fresh([given["length"]], "the axis of a scan")
    stacked = [Value((steps, *v.axes), v.recent) for v in outs[carried:]]
    return [*after, *stacked], (records,)


def _while(walk: Walk, notes: Notes, equation: Any, ins: Sequence[Value]) -> tuple:
    del notes
    given = equation.params
    split = int(given["cond_nconsts"]), int(given["body_nconsts"])
    test, body = body_of(given["cond_jaxpr"]), body_of(given["body_jaxpr"])
    for_test, rest = list(ins[: split[0]]), list(ins[split[0] :])
    for_body, carry = rest[: split[1]], rest[split[1] :]
    while True:
        outs, records = walk(*body, [*for_body, *carry])
        after = _tie(carry, outs, "the carry of a while loop")
        if _facts(after) == _facts(carry):
            break
        carry = after
    _, tested = walk(*test, [*for_test, *after])
    return after, (tested, records)


def _cond(walk: Walk, notes: Notes, equation: Any, ins: Sequence[Value]) -> tuple:
    del notes
    results = [walk(*body_of(b), ins[1:]) for b in equation.params["branches"]]
    outs = results[0][0]
    for other, _ in results[1:]:
        outs = _tie(outs, other, "the branches of a conditional")
    outs = [
        value._replace(axes=tuple(Axis(a.dim, a.zero) for a in value.axes), param=False)
        for value in outs
    ]
    return outs, tuple(records for _, records in results)


RULES = {
    **dict.fromkeys(CALLS, _call),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
