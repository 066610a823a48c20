r"""A support with everything that the scores of its neighbors are made of.

With Q the support: $K = H_{QQ}^{-1}$, the refitted values $v = K b_Q$,
$C = K H_{Q\cdot}$, $r = b - H_{\cdot Q} v$ and
$d_j = H_{jj} - C_{\cdot j}^\top H_{Qj}$; see `_swaps.py` for what they say.

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


def slack_of(problem: Problem, members: Members) -> Scalar:
    """Gain below which a move is rounding: relative to the value and its terms."""
    terms = jnp.vdot(members.values, problem.linear[members.index])
    return slack_at(objective(problem, members), terms)


def slack_at(value: Scalar, terms: Scalar) -> Scalar:
    """The same, from the value and from what the members explain of it, twice."""
    eps = jnp.finfo(value.dtype).eps
    return 16 * eps * (jnp.abs(value) + eps**0.5 * jnp.abs(terms))
