"""From a quadratic problem to a support that no exchange improves.

The search spends what a problem asks for. Where every exchange from the first local
optimum costs more than noise can explain, that is the end. Otherwise further descents
and a tabu search look for better supports.

Legend: n weights, s slots, t starts.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from sparserec._types import Scalar
from sparserec.budget import Budget
from sparserec.solvers import _starts
from sparserec.solvers._columns import Problem
from sparserec.solvers._escape import escape
from sparserec.solvers._members import Members, Slots, gather, objective
from sparserec.solvers._walk import Walk, walk

START_NAMES = ("htp", "screening", "forward", "random")

# In units of the noise: supports whose best exchange costs more than the second were
# right without exception on designs of all correlations, and wrong ones had less than
# 0.6 of it; between the two a short look is cheap.
_SAFE, _UNSURE = 1.4, 1.0
_SHORT = 64  # moves of the tabu search between the two
_PATIENCE, _LIMIT = 8, 24  # moves for every slot below them
_DESCENT = 20  # most moves of a descent for every slot
_RANDOM = 4  # random starts where a key is given
_KEPT_SHARE = 0.5  # of the members that a random start begins with


class Found(NamedTuple):
    """What a search over supports ends with.

    Attributes:
      members: the support, refitted.
      gain: by how much the best exchange, addition or removal would still lower the
        objective, shape `()`; not above rounding where the search ended by itself.
      moves: exchanges, additions and removals made, int32, shape `()`.
      unsure: whether a longer search may find a better one, shape `()`.
    """

    members: Members
    gain: Scalar
    moves: Int[Array, ""]
    unsure: Bool[Array, ""]


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class SearchOptions:
    """Static choices of a search; see `sparserec.l0cd`."""

    slots: int
    starts: tuple[str, ...] | None = None
    effort: float = 1.0
    whole: bool = True  # whether to go on beyond the first local optimum

    @property
    def max_descent(self) -> int:
        """Largest number of moves of one descent."""
        return _DESCENT * self.slots


def search(
    problem: Problem,
    budget: Budget,
    options: SearchOptions,
    key: Key[Array, ""] | None = None,
    warm: Callable[[Callable[[], Slots]], Slots] | None = None,
) -> Found:
    """Looks for the best support within a budget.

    Args:
      problem: what is minimised.
      budget: weights to keep; that of the problem.
      options: static choices.
      key: for random starts; `None` for none.
      warm: from the automatic start, to be called, to the one that is taken;
        `None` for the automatic one.

    Returns:
      The best support found, which no exchange, addition or removal improves unless
      the moves were used up.
    """
    starts = _supports(problem, budget, options, key, warm)
    start = starts[0]
    if len(starts) > 1:
        stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *starts)
        start = _best(problem, stacked, options)
    if options.whole and options.effort > 0:
        return _rounds(problem, options, start, key)
    end = _descent(problem, start, options)
    unsure = _plan(end.members, end.gain, options).limit > 0
    return Found(end.members, end.gain, end.moves, unsure)


def _descent(problem: Problem, start: Slots, options: SearchOptions) -> Walk:
    members = gather(problem, *start)
    return walk(problem, members, patience=0, max_moves=options.max_descent)


class _Plan(NamedTuple):
    hard: Bool[Array, ""]
    patience: Int[Array, ""]
    limit: Int[Array, ""]  # moves of all tabu searches


class _Round(NamedTuple):
    members: Members
    value: Scalar
    gain: Scalar  # of the best move still available
    moves: Int[Array, ""]
    spent: Int[Array, ""]  # moves of the tabu searches so far
    plan: _Plan
    first: Bool[Array, ""]
    going: Bool[Array, ""]


def _rounds(
    problem: Problem,
    options: SearchOptions,
    start: Slots,
    key: Key[Array, ""] | None,
) -> Found:
    """Descents on the whole problem, with an escape on a block between them."""

    def elsewhere(state: _Round) -> tuple[Slots, Array]:
        members = state.members
        prior = problem.group[members.index] < 0
        kept = prior[None]
        if key is not None:
            shape = (_RANDOM, options.slots)
            draw = jax.random.fold_in(key, 1 + state.spent)
            drawn = jax.random.bernoulli(draw, _KEPT_SHARE, shape)
            kept = jnp.concatenate([kept, drawn | prior[None]])
        return escape(
            problem,
            members,
            kept=kept,
            hard=state.plan.hard,
            patience=state.plan.patience,
            max_moves=state.plan.limit - state.spent,
            max_descent=options.max_descent,
        )

    def body(state: _Round) -> _Round:
        slots, spent = jax.lax.cond(
            state.first, lambda _: (start, jnp.int32(0)), elsewhere, state
        )
        old = Slots(state.members.index, state.members.filled)
        moved = state.first | ~_same(problem, slots, old)

        def descend() -> tuple[Members, Scalar, Scalar, Array]:
            end = _descent(problem, slots, options)
            value = objective(problem, end.members)
            return end.members, value, end.gain, end.moves

        members, value, gain, moves = jax.lax.cond(
            moved,
            descend,
            lambda: (state.members, state.value, state.gain, jnp.int32(0)),
        )
        # Rounding on the block must not trade a support for a worse one.
        better = state.first | (value < state.value)
        members, value, gain = jax.tree.map(
            lambda a, b: jnp.where(better, a, b),
            (members, value, gain),
            (state.members, state.value, state.gain),
        )
        plan = jax.tree.map(
            lambda a, b: jnp.where(state.first, a, b),
            _plan(members, gain, options),
            state.plan,
        )
        total = state.spent + spent
        return _Round(
            members=members,
            value=value,
            gain=gain,
            moves=state.moves + moves + spent,
            spent=total,
            plan=plan,
            first=jnp.bool_(False),
            going=moved & better & (total < plan.limit),
        )

    zero = jnp.int32(0)
    nothing = jnp.zeros((), problem.linear.dtype)
    blank = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype),
        jax.eval_shape(lambda: gather(problem, *start)),
    )
    state = _Round(
        members=blank,
        value=nothing,
        gain=nothing,
        moves=zero,
        spent=zero,
        plan=_Plan(jnp.bool_(False), zero, zero),
        first=jnp.bool_(True),
        going=jnp.bool_(True),
    )
    end = jax.lax.while_loop(lambda s: s.going, body, state)
    return Found(end.members, end.gain, end.moves, jnp.bool_(False))


def _same(problem: Problem, a: Slots, b: Slots) -> Bool[Array, ""]:
    none = jnp.zeros(problem.linear.shape, bool)
    left, right = (none.at[s.index].max(s.filled) for s in (a, b))
    return jnp.all(left == right)


def _supports(
    problem: Problem,
    budget: Budget,
    options: SearchOptions,
    key: Key[Array, ""] | None,
    warm: Callable[[Callable[[], Slots]], Slots] | None,
) -> list[Slots]:
    slots = options.slots

    def pursued() -> Slots:
        return _starts.thresholding_pursuit(problem, budget, slots)

    if options.starts is None:
        return [pursued() if warm is None else warm(pursued)]
    found = [] if warm is None else [warm(lambda: _starts.empty(problem, slots))]
    for name in options.starts:
        if name == "forward":
            found.append(_starts.empty(problem, slots))
        elif name == "screening":
            found.append(_starts.screening(problem, budget, slots))
        elif name == "htp":
            found.append(pursued())
        elif key is not None:
            keys = jax.random.split(key, _RANDOM)
            found += [_starts.random(problem, budget, slots, one) for one in keys]
    return found


def _best(problem: Problem, starts: Slots, options: SearchOptions) -> Slots:
    """The support with the lowest value after a descent from each start."""

    def run(start: Slots) -> tuple[Slots, Scalar]:
        end = _descent(problem, start, options)
        return end.best, end.value

    # One core gains nothing from lanes that wait for the slowest of them.
    found, values = jax.lax.platform_dependent(
        starts, cpu=lambda x: jax.lax.map(run, x), default=jax.vmap(run)
    )
    best = jnp.argmin(values)
    return jax.tree.map(lambda x: x[best], found)


def _plan(members: Members, gain: Scalar, options: SearchOptions) -> _Plan:
    """How long to search on; no moves where the support is safe.

    The mean of what one more entry would explain is the variance of the noise where
    the support is right, and more where it is not.
    """
    noise, searchable = _noise(members, gain)
    held = jnp.sum(members.filled, dtype=jnp.int32)

    def moves(for_each: float) -> Int[Array, ""]:
        scaled = options.effort * for_each * held.astype(noise.dtype)
        return jnp.ceil(scaled).astype(jnp.int32)

    hard = searchable & (-gain < _UNSURE * noise)
    unsure = searchable & (-gain < _SAFE * noise)
    short = jnp.where(unsure & (options.effort > 0), _SHORT, 0)
    return _Plan(
        hard=hard,
        patience=jnp.where(hard, moves(_PATIENCE), _SHORT),
        limit=jnp.where(hard, moves(_LIMIT), short).astype(jnp.int32),
    )


def is_safe(members: Members, gain: Scalar) -> Bool[Array, ""]:
    """Whether the best exchange would cost more than noise can explain."""
    noise, searchable = _noise(members, gain)
    return ~searchable | (-gain >= _SAFE * noise)


def _noise(members: Members, gain: Scalar) -> tuple[Scalar, Bool[Array, ""]]:
    """Estimated variance of the noise, and whether there is anything to search."""
    outside = ~members.inside
    explained = jnp.where(outside, jnp.square(members.slope) / members.bend, 0)
    count = jnp.maximum(jnp.sum(outside, dtype=jnp.int32), 1)
    noise = jnp.sum(explained) / count.astype(explained.dtype)
    held = jnp.sum(members.filled, dtype=jnp.int32)
    # Without a member or without an exchange there is nothing to search.
    return noise, (held > 0) & jnp.isfinite(gain)
