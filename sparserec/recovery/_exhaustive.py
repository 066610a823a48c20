"""Best-subset selection by trying every support."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparserec import _linsolve, _tree
from sparserec._solution import History, Solution
from sparserec._types import Scalar, Status
from sparserec.budget import make_budget
from sparserec.quadratic import QuadraticModel
from sparserec.solvers._columns import Problem, block, make_problem

LIMIT = 25
"""Most weights that are searched: 5,200,300 supports of 12 among 25."""

_CHUNK = 4096  # supports factorised at a time


def exhaustive(
    model: QuadraticModel,
    k: int,
    *,
    penalty: Scalar | float = 0.0,
    l2: Scalar | float = 0.0,
) -> Solution:
    r"""The exact minimum of a quadratic model over k-sparse vectors, by enumeration.

    $$\min_{|Q| \le k} \; \min_{w_{\bar Q} = 0} q(w) + \lambda_0\|w\|_0
      + \lambda_2\|w\|_2^2$$

    Supports of exactly k weights are tried, and with a penalty all smaller ones too.
    An oracle for tests and small problems; supports grow as n choose k.

    Args:
      model: a quadratic model over at most 25 weights, all of which may be pruned.
      k: weights to keep, a Python integer in `[0, n]`.
      penalty: $\lambda_0 \ge 0$, in units of loss.
      l2: $\lambda_2 \ge 0$, in units of curvature.

    Returns:
      A `Solution` with status `CONVERGED`. Among equal values the support that comes
      first in lexicographic order. Supports whose curvature is not positive definite
      are left out; if there is no other, params are zero and the status is
      `NOT_POSITIVE_DEFINITE`.

    Raises:
      ValueError: more than 25 weights, or `k` out of range.
      TypeError: `k` is not a Python integer.
    """
    size = _tree.size(model.center)
    if size > LIMIT:
        raise ValueError(
            f"exhaustive search takes at most {LIMIT} weights, got {size}. Use "
            "`sparserec.l0cd`, and `sparserec.recovery.lower_bound` for a gap."
        )
    if isinstance(k, bool) or not isinstance(k, int | np.integer):
        raise TypeError(f"`k` must be a Python integer, got {k!r}.")
    budget = make_budget(int(k), model.center, lambda _path, _leaf: True)
    problem = make_problem(model, budget, penalty=penalty, l2=l2)
    penalised = not (isinstance(penalty, int | float) and penalty == 0)
    best = _Best(float(problem.constant), np.zeros(0, np.int32), np.zeros(0))
    found = k == 0 or penalised
    matrix = block(problem, jnp.arange(size))
    for kept in range(1, k + 1) if penalised else [int(k)] if k else []:
        here = _best_of_size(problem, matrix, kept)
        if np.isfinite(here.value) and (not found or here.value < best.value):
            best, found = here, True
    return _as_solution(model, best, found)


class _Best:
    """A support with its values and objective."""

    def __init__(self, value: float, index: np.ndarray, values: np.ndarray) -> None:
        self.value, self.index, self.values = value, index, values


def _best_of_size(problem: Problem, matrix: Float[Array, "n n"], kept: int) -> _Best:
    size = matrix.shape[0]
    supports = itertools.combinations(range(size), kept)
    best = _Best(math.inf, np.zeros(kept, np.int32), np.zeros(kept))
    while True:
        chunk = list(itertools.islice(supports, _CHUNK))
        if not chunk:
            return best
        index = np.zeros((_CHUNK, kept), np.int32)
        index[: len(chunk)] = chunk
        # The rest of the last chunk repeats its first support.
        index[len(chunk) :] = chunk[0]
        place, value, values = _scored(problem.linear, matrix, jnp.asarray(index))
        total = float(problem.constant + value + kept * problem.penalty)
        if total < best.value:
            best = _Best(total, index[int(place)], np.asarray(values))


@jax.jit
def _scored(
    linear: Float[Array, "n"], matrix: Float[Array, "n n"], index: Int[Array, "c k"]
) -> tuple[Int[Array, ""], Scalar, Float[Array, "k"]]:
    """Place, value and weights of the best support of a chunk."""

    def value(support: Int[Array, "k"]) -> tuple[Scalar, Float[Array, "k"]]:
        target = linear[support]
        inner = matrix[support][:, support]
        values, sound = _linsolve.solve_positive(inner, target)
        half = jnp.asarray(0.5, linear.dtype)
        return jnp.where(sound, -half * jnp.vdot(target, values), jnp.inf), values

    found, values = jax.lax.map(value, index)
    best = jnp.argmin(found)
    return best, found[best], values[best]


def _as_solution(model: QuadraticModel, best: _Best, found: bool) -> Solution:
    wide = _tree.dtype(model.center)
    size = _tree.size(model.center)
    flat = np.zeros(size)
    mask = np.zeros(size, bool)
    if found:
        flat[best.index] = best.values
        mask[best.index] = True
    layout = _tree.layout(model.center)
    status = Status.CONVERGED if found else Status.NOT_POSITIVE_DEFINITE
    objective = jnp.asarray(best.value, wide)
    row = objective[None]
    blank = jnp.full(1, jnp.nan, wide)
    kept = jnp.asarray(mask.sum(), wide)[None]
    return Solution(
        params=_tree.cast_like(layout.split(jnp.asarray(flat, wide)), model.center),
        mask=layout.split(jnp.asarray(mask)),
        objective=objective,
        iterations=jnp.int32(1),
        status=jnp.int32(status),
        history=History(row, blank, kept, blank),
    )
