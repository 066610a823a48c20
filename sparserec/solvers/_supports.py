"""Mask rules of I-OBS: from a Newton point and a curvature to a support."""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparserec import _linsolve, _tree, select
from sparserec._linsolve import matmul
from sparserec._types import Mask, Params, Scalar
from sparserec.budget import Budget
from sparserec.quadratic import QuadraticModel
from sparserec.quadratic._model import MatrixCurvature, StoredCurvature
from sparserec.solvers._columns import group_of_entries

EXACT_LIMIT = 16
"""Most weights for the exhaustive rule: 65,536 supports."""

_CHUNK = 2048  # supports factorised at a time by the exhaustive rule

MaskRule = Callable[[Params, Any, Scalar, Budget], Mask]


def by_magnitude(
    point: Params, curvature: object, damping: Scalar, budget: Budget
) -> Mask:
    r"""The k largest $|u_i|$ (Topk-I-OBS)."""
    del curvature, damping
    return select.support(point, budget.counts, budget.groups)


def by_saliency(
    point: Params, curvature: StoredCurvature, damping: Scalar, budget: Budget
) -> Mask:
    r"""The k largest $u_i^2 / [(H+\lambda I)^{-1}]_{ii}$ (OBS saliency)."""
    scores = jax.tree.map(
        lambda u, v: jnp.square(u) / v, point, curvature.inverse_diagonal(damping)
    )
    return select.support(scores, budget.counts, budget.groups)


class Elimination(NamedTuple):
    """State of backward elimination.

    Attributes:
      values: weights after the removals so far, shape `(n,)`.
      inverse: inverse of the curvature on the weights alive, shape `(n, n)`.
      alive: shape `(n,)`.
      excess: removals left in each group, shape `(groups,)`.
    """

    values: Float[Array, "n"]
    inverse: Float[Array, "n n"]
    alive: Bool[Array, "n"]
    excess: Int[Array, "groups"]


def eliminate(
    values: Float[Array, "n"],
    inverse: Float[Array, "n n"],
    budget: Budget,
    layout: _tree.Layout,
) -> Elimination:
    r"""Removes one weight after another, each at the least cost, refitting the rest.

    Every round removes $p = \arg\min u_i^2/[K]_{ii}$ and updates
    $u \leftarrow u - K e_p u_p/K_{pp}$, $K \leftarrow K - K e_p e_p^\top K/K_{pp}$.

    Source: Hassibi & Stork (1993); Frantar & Alistarh (2022), OBC.
    """
    group_of = group_of_entries(budget, layout)
    start = Elimination(
        values=values,
        inverse=inverse,
        alive=jnp.ones(values.shape, bool),
        excess=jnp.maximum(jnp.asarray(budget.sizes, jnp.int32) - budget.counts, 0),
    )

    def remove_one(state: Elimination) -> Elimination:
        diagonal = jnp.diagonal(state.inverse)
        removable = state.alive & (group_of >= 0) & (state.excess[group_of] > 0)
        cost = jnp.square(state.values) / jnp.where(diagonal > 0, diagonal, 1)
        # The last of equal costs goes, so that ties leave the lowest indices.
        cost = jnp.where(removable, cost, jnp.inf)
        chosen = values.shape[0] - 1 - jnp.argmin(cost[::-1])
        column = state.inverse[:, chosen]
        pivot = jnp.where(column[chosen] > 0, column[chosen], 1)
        gone = jnp.arange(values.shape[0]) == chosen
        inverse = state.inverse - jnp.outer(column, column) / pivot
        inverse = jnp.where(gone[:, None] | gone[None, :], 0, inverse)
        left = state.values - column * (state.values[chosen] / pivot)
        return Elimination(
            values=jnp.where(gone | ~state.alive, 0, left),
            inverse=inverse,
            alive=state.alive & ~gone,
            excess=state.excess.at[group_of[chosen]].add(-1),
        )

    return jax.lax.while_loop(
        lambda state: jnp.any(state.excess > 0), remove_one, start
    )


def by_elimination(
    point: Params, curvature: MatrixCurvature, damping: Scalar, budget: Budget
) -> Mask:
    """The support that backward elimination (OBC) leaves; dense curvatures."""
    layout = _tree.layout(point)
    matrix = _damped(curvature, damping)
    inverse, _ = _linsolve.inverse_positive(matrix)
    return layout.split(eliminate(_tree.flatten(point), inverse, budget, layout).alive)


def by_enumeration(
    point: Params, curvature: MatrixCurvature, damping: Scalar, budget: Budget
) -> Mask:
    r"""The best of all supports: $\arg\max_Q b_Q^\top H_{QQ}^{-1} b_Q$, $b = Hu$.

    This is the exact sparse projection of the Newton point in the norm of the
    curvature, for at most 16 weights.

    Source: I-OBS (Wu et al., 2024), Option 2, in its support form.
    """
    layout = _tree.layout(point)
    matrix = _damped(curvature, damping)
    target = matmul(matrix, _tree.flatten(point))
    sizes = [math.prod(shape) for shape in layout.shapes]
    group_of = np.repeat(budget.groups, sizes)
    members = np.stack([group_of == g for g in range(len(budget.sizes))], axis=1)
    subsets = np.array(list(itertools.product([True, False], repeat=len(group_of))))
    always = subsets[:, group_of < 0].all(axis=1)
    counts = jnp.asarray(subsets @ members.astype(np.int32), jnp.int32)
    wanted = jnp.clip(budget.counts, 0, jnp.asarray(budget.sizes, jnp.int32))
    allowed = jnp.asarray(always) & jnp.all(counts == wanted[None, :], axis=1)

    def gain(support: Bool[Array, "n"]) -> Scalar:
        right = jnp.where(support, target, 0)
        value, succeeded = _linsolve.solve_positive(
            _linsolve.restrict(matrix, support, jnp.zeros((), matrix.dtype)), right
        )
        return jnp.where(succeeded, jnp.vdot(right, value), -jnp.inf)

    gains = jax.lax.map(gain, jnp.asarray(subsets), batch_size=_CHUNK)
    best = jnp.argmax(jnp.where(allowed, gains, -jnp.inf))
    return layout.split(jnp.asarray(subsets)[best])


def best_exchange(model: QuadraticModel, mask: Mask, budget: Budget) -> Mask:
    r"""The support after the best exchange of one weight, all scored with full refit.

    At a refitted point, with $K = H_{QQ}^{-1}$ and $C = H_{\cdot Q} K$, taking i out
    and j in changes the refitted loss by exactly

    $$\tfrac12 \frac{w_i^2}{K_{ii}} - \tfrac12
      \frac{(g_j - C_{ji} w_i / K_{ii})^2}{H_{jj} - C_{j\cdot} H_{Qj}
      + C_{ji}^2 / K_{ii}}.$$

    Args:
      model: local model around a point that is refitted on the mask.
      mask: its support $Q$.
      budget: groups within which weights may be exchanged.

    Returns:
      The best neighbour of the support, or the support itself if no exchange lowers
      the model.
    """
    layout = _tree.layout(mask)
    matrix = cast(MatrixCurvature, model.curvature).to_matrix()
    support = _tree.flatten(mask)
    weights = jnp.where(support, _tree.flatten(model.center), 0)
    gradient = _tree.flatten(model.gradient)
    group_of = group_of_entries(budget, layout)
    zero = jnp.zeros((), matrix.dtype)
    inverse, _ = _linsolve.inverse_positive(_linsolve.restrict(matrix, support, zero))
    inverse = jnp.where(support[:, None] & support[None, :], inverse, 0)
    coupling = matmul(matrix, inverse)
    pivots = jnp.where(support, jnp.diagonal(inverse), 1)
    loss = jnp.square(weights) / pivots
    slope = gradient[:, None] - coupling * (weights / pivots)[None, :]
    remaining = jnp.diagonal(matrix) - jnp.sum(coupling * matrix, axis=1)
    bend = remaining[:, None] + jnp.square(coupling) / pivots[None, :]
    tiny = jnp.finfo(matrix.dtype).eps * jnp.diagonal(matrix)[:, None]
    gain = jnp.where(
        bend > tiny, jnp.square(slope) / jnp.where(bend > tiny, bend, 1), 0
    )
    same_group = (group_of[:, None] == group_of[None, :]) & (group_of >= 0)[:, None]
    allowed = same_group & ~support[:, None] & support[None, :]
    change = jnp.where(allowed, loss[None, :] - gain, jnp.inf)
    incoming, outgoing = jnp.divmod(jnp.argmin(change), change.shape[1])
    better = jnp.min(change) < 0
    swapped = support.at[incoming].set(True).at[outgoing].set(False)
    return layout.split(jnp.where(better, swapped, support))


def _damped(curvature: MatrixCurvature, damping: Scalar) -> Float[Array, "n n"]:
    matrix = curvature.to_matrix()
    everything = jnp.ones(matrix.shape[0], bool)
    return _linsolve.restrict(matrix, everything, damping)


MASK_RULES: dict[str, MaskRule] = {
    "top_k": by_magnitude,
    "saliency": by_saliency,
    "backward": by_elimination,
    "exact": by_enumeration,
}

NEEDS: dict[str, tuple[str, ...]] = {
    "top_k": (),
    "saliency": ("inverse_diagonal",),
    "backward": ("to_matrix",),
    "exact": ("to_matrix",),
}
"""Operations beyond the basic ones that a rule needs of the curvature."""
