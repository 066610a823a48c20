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

from sparserec import _linsolve
from sparserec._linsolve import matmul
from sparserec._types import Scalar
from sparserec.solvers._columns import Problem, columns, over_rows

# Below this share of its diagonal, what is left of a column is rounding.
_DEPENDENT_EXPONENT = 0.7


class Slots(NamedTuple):
    """A support as places.

    Attributes:
      index: entry in each slot, int32, shape `(s,)`; zero where not filled.
      filled: which slots are in use, shape `(s,)`.
    """

    index: Int[Array, "s"]
    filled: Bool[Array, "s"]


class Members(NamedTuple):
    r"""A support with everything that the scores of its neighbors are made of.

    Attributes:
      index: entry in each slot, int32, shape `(s,)`; meaningless where not filled.
      filled: which slots hold a member, shape `(s,)`.
      gram: rows $H_{Q\cdot}$, zeros in empty slots, shape `(s, n)`.
      inverse: $K$, zeros in empty slots, shape `(s, s)`.
      values: $v$, zeros in empty slots, shape `(s,)`.
      coupling: $C = K H_{Q\cdot}$, shape `(s, n)`.
      slope: $r$, the negative gradient, shape `(n,)`.
      bend: $d$, at least the floor below which a column counts as dependent on the
        members, shape `(n,)`.
      inside: members as a mask, shape `(n,)`.
    """

    index: Int[Array, "s"]
    filled: Bool[Array, "s"]
    gram: Float[Array, "s n"]
    inverse: Float[Array, "s s"]
    values: Float[Array, "s"]
    coupling: Float[Array, "s n"]
    slope: Float[Array, "n"]
    bend: Float[Array, "n"]
    inside: Bool[Array, "n"]


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


def floor_of(diagonal: Float[Array, "n"]) -> Float[Array, "n"]:
    """Least Schur complement at which a column is independent of the members."""
    share = jnp.finfo(diagonal.dtype).eps ** _DEPENDENT_EXPONENT
    return jnp.where(diagonal > 0, share * diagonal, 1)


def gather(
    problem: Problem, index: Int[Array, "s"], filled: Bool[Array, "s"]
) -> Members:
    """Members of a support with their columns, and zeros until a `refresh`."""
    gram = columns(problem, index)
    return Members(
        index,
        filled,
        gram,
        inverse=jnp.zeros_like(gram, shape=(index.size, index.size)),
        values=jnp.zeros_like(gram, shape=index.size),
        coupling=jnp.zeros_like(gram),
        slope=problem.linear,
        bend=problem.diagonal,
        inside=jnp.zeros(problem.linear.shape, bool),
    )


def factorise(problem: Problem, index: Array, filled: Array) -> Members:
    """Members of a support from scratch: `gather` and `refresh`."""
    return refresh(problem, gather(problem, index, filled))


def _inverse(
    inner: Float[Array, "s s"], filled: Bool[Array, "s"]
) -> tuple[Float[Array, "s s"], Bool[Array, ""]]:
    zero = jnp.zeros((), inner.dtype)
    inverse, sound = _linsolve.inverse_positive(_linsolve.restrict(inner, filled, zero))
    # A pivot below rounding may pass as positive; its inverse would be noise.
    largest = jnp.max(jnp.diagonal(inner) * jnp.diagonal(inverse), initial=1)
    sound &= largest * jnp.finfo(inner.dtype).eps ** _DEPENDENT_EXPONENT < 1
    return jnp.where(filled[:, None] & filled[None, :], inverse, 0), sound


def _assemble(
    problem: Problem,
    index: Int[Array, "s"],
    filled: Bool[Array, "s"],
    gram: Float[Array, "s n"],
    inverse: Float[Array, "s s"],
) -> Members:
    target = jnp.where(filled, problem.linear[index], 0)
    values = matmul(inverse, target)
    # One step of refinement restores the digits that the inverse has lost.
    values += matmul(inverse, target - matmul(values, gram)[index])
    values = jnp.where(filled, values, 0)
    coupling = matmul(inverse, gram)
    bend = over_rows(jnp.add, lambda c, h: -c * h, problem.diagonal, coupling, gram)
    inside = jnp.zeros(problem.linear.shape, bool)
    return Members(
        index=index,
        filled=filled,
        gram=gram,
        inverse=inverse,
        values=values,
        coupling=coupling,
        slope=problem.linear - matmul(values, gram),
        bend=jnp.maximum(bend, floor_of(problem.diagonal)),
        inside=inside.at[index].max(filled),
    )


def refresh(problem: Problem, members: Members) -> Members:
    """Everything from the stored columns, without a pass over the data.

    Where $H_{QQ}$ is not positive definite, only the entries that are never pruned
    stay; if those are dependent too, values are NaN.
    """
    index, gram = members.index, members.gram
    fixed = members.filled & (problem.group[index] < 0)

    def attempt(state: tuple[Array, Array, Array, Array]):
        # The first time with all of them, the second with those that must stay.
        chosen = jnp.where(state[0] == 0, members.filled, fixed)
        return state[0] + 1, chosen, *_inverse(gram[:, index], chosen)

    _, filled, inverse, _ = jax.lax.while_loop(
        lambda state: (state[0] < 2) & ~state[3],
        attempt,
        (jnp.int32(0), members.filled, members.inverse, jnp.bool_(False)),
    )
    gram = jnp.where(filled[:, None], gram, 0)
    return _assemble(problem, index, filled, gram, inverse)


def objective(problem: Problem, members: Members) -> Scalar:
    """Value of the problem at the refitted members, shape `()`."""
    explained = jnp.vdot(members.values, problem.linear[members.index])
    prunable = members.filled & (problem.group[members.index] >= 0)
    count = jnp.sum(prunable, dtype=jnp.int32).astype(explained.dtype)
    return problem.constant - explained / 2 + problem.penalty * count


def room(problem: Problem, members: Members) -> Int[Array, "g"]:
    """How many more entries each group may hold."""
    groups = jnp.arange(problem.capacity.shape[0], dtype=jnp.int32)
    owner = problem.group[members.index]
    held = (owner[:, None] == groups[None, :]) & members.filled[:, None]
    return problem.capacity - jnp.sum(held, axis=0, dtype=jnp.int32)


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


def slack_of(problem: Problem, members: Members) -> Scalar:
    """Gain below which a move is rounding: relative to the value and its terms."""
    terms = jnp.vdot(members.values, problem.linear[members.index])
    return slack_at(objective(problem, members), terms)


def slack_at(value: Scalar, terms: Scalar) -> Scalar:
    """The same, from the value and from what the members explain of it, twice."""
    eps = jnp.finfo(value.dtype).eps
    return 16 * eps * (jnp.abs(value) + eps**0.5 * jnp.abs(terms))
