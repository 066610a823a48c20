r"""Exact local search over supports: every neighbor scored with full refit.

Let Q be the support, $K = H_{QQ}^{-1}$, $v = K b_Q$ the refitted values,
$C = K H_{Q\cdot}$, $r = b - H_{\cdot Q} v$ and
$d_j = H_{jj} - C_{\cdot j}^\top H_{Qj}$. After a refit of all others, taking i out
costs $\tfrac12 v_i^2/K_{ii}$, putting j in gains $\tfrac12 r_j^2/d_j$, and doing both
gains

$$\tfrac12 \frac{(r_j + C_{ij} v_i / K_{ii})^2}{d_j + C_{ij}^2 / K_{ii}}
  - \tfrac12 \frac{v_i^2}{K_{ii}}.$$

All k(n - k) exchanges are scored from C and the columns $H_{Q\cdot}$; an accepted one
needs one new column, one pass over the data, and updates of rank two.

Legend: n weights, s slots (places for members of a support), g groups of a budget.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec._linsolve import matmul
from sparserec._types import Scalar
from sparserec.solvers._columns import Problem, columns, over_rows
from sparserec.solvers._members import Members, floor_of, room


class Move(NamedTuple):
    """A change of the support: an exchange, an addition or a removal.

    Attributes:
      gain: by how much the objective falls, shape `()`; minus infinity where there
        is no move.
      column: entry that comes in, int32, shape `()`.
      slot: slot that it takes, or that is emptied, int32, shape `()`.
      enters: whether an entry comes in, shape `()`.
      leaves: whether a member goes out, shape `()`.
    """

    gain: Scalar
    column: Int[Array, ""]
    slot: Int[Array, ""]
    enters: Bool[Array, ""]
    leaves: Bool[Array, ""]


class Barred(NamedTuple):
    """Moves that are not allowed for now.

    Attributes:
      entering: entries that may not come in, shape `(n,)`.
      leaving: entries that may not go out, shape `(n,)`.
    """

    entering: Bool[Array, "n"]
    leaving: Bool[Array, "n"]


def best_move(problem: Problem, members: Members, barred: Barred | None = None) -> Move:
    """The exchange, addition or removal that lowers the objective most.

    Args:
      problem: what is minimised.
      members: the support now.
      barred: moves that are not allowed; `None` for all allowed.

    Returns:
      The move; its gain is negative where every one raises the objective.
    """
    best = larger(
        best_exchange(problem, members, barred),
        best_addition(problem, members, barred),
    )
    return larger(best, best_removal(problem, members, barred))


def larger(a: Move, b: Move) -> Move:
    """The move with the larger gain; the first of two equal ones."""
    first = a.gain >= b.gain
    return Move(*(jnp.where(first, x, y) for x, y in zip(a, b, strict=True)))


def exchange_gains(
    problem: Problem, members: Members, barred: Barred | None = None
) -> Float[Array, "n"]:
    """For every entry, the gain of its best exchange with a member, shape `(n,)`.

    Minus infinity for members and for entries that may not come in.
    """
    cost, ratio, pivot = removal_terms(problem, members, barred)

    def gain(
        coupling: Array, cost: Scalar, ratio: Scalar, pivot: Scalar, owner: Array
    ) -> Array:
        top = jnp.square(members.slope + coupling * ratio)
        gains = top / (members.bend + jnp.square(coupling) * pivot) - cost
        if problem.capacity.shape[0] == 1:
            return gains
        return jnp.where(problem.group == owner, gains, -jnp.inf)

    owner = problem.group[members.index]
    nothing = jnp.full(members.slope.shape, -jnp.inf, members.slope.dtype)
    best = over_rows(
        jnp.maximum, gain, nothing, members.coupling, cost, ratio, pivot, owner
    )
    closed = members.inside | (problem.group < 0)
    if barred is not None:
        closed |= barred.entering
    return jnp.where(closed, -jnp.inf, best / 2)


def removal_terms(
    problem: Problem, members: Members, barred: Barred | None
) -> tuple[Array, Array, Array]:
    """Twice the cost of every removal, `v / K_ii` and `1 / K_ii`.

    The cost is infinite where a slot is empty or its member may not leave.
    """
    diagonal = jnp.diagonal(members.inverse)
    pivot = 1 / jnp.where(members.filled & (diagonal > 0), diagonal, 1)
    ratio = members.values * pivot
    free = members.filled & (problem.group[members.index] >= 0)
    if barred is not None:
        free &= ~barred.leaving[members.index]
    return jnp.where(free, members.values * ratio, jnp.inf), ratio, pivot


def best_exchange(
    problem: Problem, members: Members, barred: Barred | None = None
) -> Move:
    """The exchange that lowers the objective most; see `best_move`."""
    # The largest gain of each column first: a maximum along slots is cheap, a search
    # for its place among all pairs is not.
    best = exchange_gains(problem, members, barred)
    column = jnp.argmax(best).astype(jnp.int32)
    move = exchange_for(problem, members, column, barred)
    return move._replace(gain=entry_at(best, column))


def exchange_for(
    problem: Problem,
    members: Members,
    column: Int[Array, ""],
    barred: Barred | None = None,
) -> Move:
    """The exchange that makes most of an entry that comes in."""
    cost, ratio, pivot = removal_terms(problem, members, barred)
    coupling = entry_at(members.coupling.T, column)
    top = entry_at(members.slope, column) + coupling * ratio
    below = entry_at(members.bend, column) + jnp.square(coupling) * pivot
    gains = jnp.square(top) / below - cost
    if problem.capacity.shape[0] > 1:
        same = problem.group[members.index] == entry_at(problem.group, column)
        gains = jnp.where(same, gains, -jnp.inf)
    slot = jnp.argmax(gains).astype(jnp.int32)
    yes = jnp.bool_(True)
    return Move(entry_at(gains, slot) / 2, column, slot, yes, yes)


def best_addition(
    problem: Problem,
    members: Members,
    barred: Barred | None = None,
    *,
    full: Bool[Array, ""] | None = None,
) -> Move:
    """The addition that lowers the objective most; see `best_move`.

    `full` says that there is no room for another one, where that is known.
    """
    gain = jnp.square(members.slope) / members.bend / 2 - problem.penalty
    left = room(problem, members) > 0 if full is None else ~full
    if left.ndim and left.shape[0] > 1:
        left = left[problem.group]
    open_ = ~members.inside & (problem.group >= 0) & left
    # A column that the members span brings nothing but rounding.
    open_ &= members.bend > floor_of(problem.diagonal)
    if barred is not None:
        open_ &= ~barred.entering
    gain = jnp.where(open_, gain, -jnp.inf)
    column = jnp.argmax(gain).astype(jnp.int32)
    slot = jnp.argmin(members.filled).astype(jnp.int32)
    best = jnp.where(jnp.all(members.filled), -jnp.inf, entry_at(gain, column))
    return Move(best, column, slot, jnp.bool_(True), jnp.bool_(False))


def best_removal(
    problem: Problem, members: Members, barred: Barred | None = None
) -> Move:
    """The removal that raises the objective least; see `best_move`."""
    cost, _, _ = removal_terms(problem, members, barred)
    slot = jnp.argmin(cost).astype(jnp.int32)
    gain = problem.penalty - entry_at(cost, slot) / 2
    leaving, yes = entry_at(members.index, slot), jnp.bool_(True)
    return Move(gain, leaving, slot, ~yes, yes)


class _Change(NamedTuple):
    """What a move does to the members, as vectors.

    Attributes:
      leaving: column of $K$ of the member that goes out, zeros for none, shape `(s,)`.
      row: its row of the coupling, shape `(n,)`.
      out: one over its pivot, shape `()`; zero for none.
      at_column: coupling with the entry that comes in, after the removal, shape `(s,)`.
      column: column of that entry, zeros for none, shape `(n,)`.
      left: what the members leave of it, shape `(n,)`.
      into: one over its pivot, shape `()`; zero for none.
      slope: after the removal, shape `(n,)`.
      bend: after the removal, shape `(n,)`.
    """

    leaving: Float[Array, "s"]
    row: Float[Array, "n"]
    out: Scalar
    at_column: Float[Array, "s"]
    column: Float[Array, "n"]
    left: Float[Array, "n"]
    into: Scalar
    slope: Float[Array, "n"]
    bend: Float[Array, "n"]


def _change(problem: Problem, members: Members, move: Move) -> _Change:
    def removal() -> _Change:
        slot = move.slot
        leaving = entry_at(members.inverse, slot)
        row = entry_at(members.coupling, slot)
        pivot = entry_at(leaving, slot)
        out = jnp.where(
            move.leaves & (pivot > 0), 1 / jnp.where(pivot > 0, pivot, 1), 0
        )
        nothing = jnp.zeros_like(row)
        return _Change(
            leaving=leaving,
            row=row,
            out=out,
            at_column=jnp.zeros_like(leaving),
            column=nothing,
            left=nothing,
            into=jnp.zeros_like(out),
            slope=members.slope + row * (entry_at(members.values, slot) * out),
            bend=members.bend + jnp.square(row) * out,
        )

    def entry() -> _Change:
        change = removal()
        column = columns(problem, move.column[None])[0]
        crossing = entry_at(change.row, move.column) * change.out
        at_column = entry_at(members.coupling.T, move.column)
        at_column -= change.leaving * crossing
        here = jnp.arange(at_column.shape[0], dtype=jnp.int32) == move.slot
        at_column = jnp.where(here, 0, at_column)
        return change._replace(
            at_column=at_column,
            column=column,
            left=column - matmul(at_column, members.gram),
            into=1 / entry_at(change.bend, move.column),
        )

    # A removal needs no pass over the data. What a conditional returns is written
    # down: fused into the updates, it would read members while they are overwritten,
    # and XLA would copy all of them first.
    return jax.lax.cond(move.enters, entry, removal)


def apply_move(problem: Problem, members: Members, move: Move) -> Members:
    """The members after a move: one new column, and updates of rank two."""
    # Comparisons with positions in place of scattered writes: they melt into the
    # arithmetic around them, where a scatter is a loop of its own on CPU.
    slot, column = move.slot, move.column
    slots, size = members.index.shape[0], problem.linear.shape[0]
    here = jnp.arange(slots, dtype=jnp.int32) == slot
    entries = jnp.arange(size, dtype=jnp.int32)
    change = _change(problem, members, move)
    leaving, row, out, at_column, _, left, into, slope, bend = change
    value = entry_at(members.values, slot)
    new = entry_at(slope, column) * into

    inverse = members.inverse - leaving[:, None] * (leaving * out)[None, :]
    border = jnp.where(here, -1, at_column)
    inverse = jnp.where(here[:, None] | here[None, :], 0, inverse)
    inverse += border[:, None] * (border * into)[None, :]
    values = members.values - leaving * (value * out) - at_column * new
    coupling = (
        members.coupling
        - leaving[:, None] * (row * out)[None, :]
        - at_column[:, None] * (left * into)[None, :]
    )
    gone = move.leaves & (entries == entry_at(members.index, slot))
    come = move.enters & (entries == column)
    bend = bend - jnp.square(left) * into
    return Members(
        index=jnp.where(here, jnp.where(move.enters, column, 0), members.index),
        filled=jnp.where(here, move.enters, members.filled),
        gram=jax.lax.dynamic_update_slice(
            members.gram, change.column[None], (slot, jnp.int32(0))
        ),
        inverse=inverse,
        values=jnp.where(here, new, values),
        coupling=jnp.where(here[:, None], (left * into)[None, :], coupling),
        slope=slope - left * new,
        bend=jnp.maximum(bend, floor_of(problem.diagonal)),
        inside=(members.inside & ~gone) | come,
    )


def entry_at(x: Array, place: Int[Array, ""]) -> Array:
    """`x[place]` for a place known to lie inside."""
    return x.at[place].get(mode="promise_in_bounds", wrap_negative_indices=False)
