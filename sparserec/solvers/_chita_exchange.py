r"""Exchanges of weights, scored exactly by rank-one changes of the kept kernel.

With $M = (X_Q X_Q^\top + \rho I)^{-1}$ and $q_j = x_j^\top M x_j$, at the minimiser on
$Q$, taking i out and j in changes the refitted value by

$$\tfrac12 \frac{\rho\,\beta_i^2}{1 - q_i} - \tfrac12
  \frac{(s_j - c_{ji}\,\beta_i\,\rho/(1 - q_i))^2}
       {\rho\,(1 + q_j) + \rho\,c_{ji}^2/(1 - q_i)},
  \qquad c_{ji} = x_j^\top M x_i,$$

where $s$ is the gradient. Many pairs are exchanged at once, and fewer where together
they do not lower the value.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparserec import _linsolve
from sparserec._linsolve import matmul
from sparserec.budget import Budget
from sparserec.solvers._chita_backsolve import Split, backsolve, positive_ridge
from sparserec.solvers._chita_rows import (
    Point,
    RowProblem,
    gather_block,
    group_of_entries,
    kernel,
)

_SHORT = 512  # candidates on either side; all entries of smaller problems
_PAIRS = 64  # exchanged at once, at most


class _Pairs(NamedTuple):
    """Disjoint exchanges, the best first; a gain of zero marks an empty place."""

    out: Int[Array, "t"]
    into: Int[Array, "t"]
    change: Float[Array, "t"]


class _State(NamedTuple):
    point: Point
    gram: Array
    at_once: Int[Array, ""]
    rounds: Int[Array, ""]


def changes(
    problem: RowProblem,
    point: Point,
    gram: Float[Array, "m m"],
    out: Int[Array, "i"],
    into: Int[Array, "j"],
) -> Float[Array, "j i"]:
    """What every exchange of one entry for another does to the refitted value.

    Args:
      problem: the model.
      point: the minimiser on its support.
      gram: kernel of the support.
      out: flat indices of entries on the support; n where there is none.
      into: flat indices of entries off it; n where there is none.

    Returns:
      The changes, shape `(j, i)`; infinite where an index is n.
    """
    n = problem.rows.shape[1]
    ridge = positive_ridge(problem.ridge, gram)
    identity = jnp.eye(gram.shape[0], dtype=gram.dtype)
    inverse, _ = _linsolve.inverse_positive(gram + ridge * identity)
    leaving = gather_block(problem.rows, out)
    coming = gather_block(problem.rows, into)
    seen = matmul(inverse, leaving)
    tiny = jnp.finfo(gram.dtype).eps
    left = jnp.maximum(1 - jnp.sum(leaving * seen, axis=0), tiny)
    weight = jnp.sum(coming * matmul(inverse, coming), axis=0)
    coupling = matmul(coming.T, seen)
    slope = problem.slope(point.params - problem.center, point.product)
    slope = slope.at[into].get(mode="fill", fill_value=0)
    entries = point.params.at[out].get(mode="fill", fill_value=0)
    pulled = slope[:, None] - coupling * (ridge * entries / left)[None, :]
    bend = ridge * ((1 + weight)[:, None] + jnp.square(coupling) / left[None, :])
    half = jnp.asarray(0.5, gram.dtype)
    loss = ridge * jnp.square(entries) / left
    change = half * (loss[None, :] - jnp.square(pulled) / bend)
    real = (into < n)[:, None] & (out < n)[None, :]
    return jnp.where(real, change, jnp.inf)


def _short_lists(
    problem: RowProblem, point: Point, group: np.ndarray
) -> tuple[Array, Array]:
    """The entries whose loss would cost least, and those with the steepest slopes."""
    n = problem.rows.shape[1]
    size = min(_SHORT, n)
    slope = problem.slope(point.params - problem.center, point.product)
    prunable = jnp.asarray(group >= 0)

    def list_of(scores: Array, allowed: Array) -> Array:
        best, index = jax.lax.top_k(jnp.where(allowed, scores, -jnp.inf), size)
        return jnp.where(jnp.isfinite(best), index, n).astype(jnp.int32)

    out = list_of(-jnp.abs(point.params), prunable & point.mask)
    into = list_of(jnp.abs(slope), prunable & ~point.mask)
    return out, into


def _best_pairs(
    change: Float[Array, "j i"], out: Array, into: Array, group: np.ndarray
) -> _Pairs:
    """Disjoint exchanges within groups, greedily by their single changes."""
    number = min(_PAIRS, *change.shape)
    groups = jnp.asarray(group)
    same = (
        groups.at[into].get(mode="fill", fill_value=-1)[:, None]
        == groups.at[out].get(mode="fill", fill_value=-1)[None, :]
    )
    table = jnp.where(same & ~jnp.isnan(change), change, jnp.inf)

    def pick(table: Array, _: None) -> tuple[Array, tuple[Array, Array, Array]]:
        j, i = jnp.divmod(jnp.argmin(table), table.shape[1])
        found = table[j, i]
        table = table.at[j, :].set(jnp.inf).at[:, i].set(jnp.inf)
        return table, (out[i], into[j], found)

    _, found = jax.lax.scan(pick, table, None, length=number)
    return _Pairs(*found)


def polish(
    problem: RowProblem,
    budget: Budget,
    point: Point,
    split: Split,
    *,
    rounds: Int[Array, ""] | int,
) -> tuple[Point, Bool[Array, ""]]:
    """Exchanges weights until no exchange at hand lowers the refitted value.

    Args:
      problem: the model.
      budget: groups within which weights may be exchanged.
      point: the minimiser on its support, from `backsolve`.
      split: from `split_gradient`.
      rounds: largest number of rounds; every round refits once.

    Returns:
      The best point, and whether it ended because no single exchange among the
      candidates (the 512 smallest weights and the 512 steepest slopes) helps.
    """
    group = group_of_entries(budget, problem.layout)
    most = min(_PAIRS, _SHORT, problem.rows.shape[1])

    def one_round(state: _State) -> _State:
        point = state.point
        out, into = _short_lists(problem, point, group)
        change = changes(problem, point, state.gram, out, into)
        pairs = _best_pairs(change, out, into, group)
        noise = 4 * jnp.finfo(point.value.dtype).eps * jnp.abs(point.value)
        use = (jnp.arange(most, dtype=jnp.int32) < state.at_once) & (
            pairs.change < -noise
        )
        none = ~use[0]
        n = problem.rows.shape[1]
        away = jnp.where(use, pairs.out, n)
        new = jnp.where(use, pairs.into, n)
        mask = point.mask.at[away].set(False, mode="drop")
        mask = mask.at[new].set(True, mode="drop")
        gone, come = gather_block(problem.rows, away), gather_block(problem.rows, new)
        gram = state.gram + matmul(come, come.T) - matmul(gone, gone.T)
        found, status = backsolve(problem, mask, split, gram)
        lower = _linsolve.usable(status) & (found.value < point.value)
        fewer = jnp.where(state.at_once > 1, state.at_once // 4, 0)
        at_once = jnp.where(
            lower, jnp.minimum(state.at_once * 2, most), jnp.maximum(fewer, 0)
        )
        # From several that failed to one: its score is exact.
        at_once = jnp.where(
            ~lower & (state.at_once > 1), jnp.maximum(at_once, 1), at_once
        )
        return _State(
            point=jax.tree.map(lambda x, y: jnp.where(lower, x, y), found, point),
            gram=jnp.where(lower, gram, state.gram),
            at_once=jnp.where(none, 0, at_once).astype(jnp.int32),
            rounds=state.rounds + 1,
        )

    start = _State(
        point, kernel(problem.rows, point.mask), jnp.int32(most), jnp.int32(0)
    )
    end = jax.lax.while_loop(
        lambda state: (state.at_once > 0) & (state.rounds < rounds), one_round, start
    )
    return end.point, end.at_once == 0
