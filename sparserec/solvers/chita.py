"""CHITA: pruning as least squares over rows of gradients, with a budget of weights."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import Partial
from jaxtyping import Array

from sparserec._run import Solver
from sparserec._solution import Solution
from sparserec._types import LossFn, Params, Prunable, Scalar, Status
from sparserec.budget import matrices
from sparserec.quadratic import CurvatureFn, Objective, QuadraticModel
from sparserec.quadratic._fisher import Fisher
from sparserec.solvers import _chita_stages, _descent, _front
from sparserec.solvers._chita_stages import SCHEDULES, Options, StageSchedule
from sparserec.solvers._chita_types import Limits
from sparserec.solvers._chita_variants import NEEDS, VARIANTS
from sparserec.solvers._descent import Descent

_FAILURES = Status.NONFINITE, Status.NOT_POSITIVE_DEFINITE
_HOST_CHUNK = 512  # examples at a time where the rows are built on the host

Ridge = Scalar | float | Sequence[float]


def chita_solver(objective: Objective, *, options: Options, limits: Limits) -> Solver:
    """CHITA as a `Solver`, for use with `run`; a step is a stage.

    Args:
      objective: what to minimise, from `sparserec.quadratic.make_objective`.
      options: static choices.
      limits: traced choices.

    Returns:
      The pair of init and step.
    """
    return Solver(
        init=Partial(_chita_stages.start, objective, options),
        step=Partial(_chita_stages.step, objective, options, limits),
    )


def chita(
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: int | Array | Mapping[str, int | Array],
    *,
    args: tuple = (),
    batches: Callable[[int], tuple] | tuple | None = None,
    curvature: CurvatureFn | None = None,
    variant: Literal[
        "best", "bso", "iht", "cd", "cyclic", "admm", "magnitude", "obs", "cbs"
    ] = "best",
    stages: int = 1,
    schedule: StageSchedule = "exp",
    start_density: float = 0.9,
    ridge: Ridge = 0.0,
    held_out: float | None = None,
    exchanges: int = 20,
    metric: Scalar | float = 1.0,
    refinements: int = 0,
    descent: Descent | None = None,
    prunable: Prunable = matrices,
    batch_size: int | None = None,
    tol: Scalar | float = 1e-3,
    max_steps: int = 50,
) -> Solution:
    r"""Prunes by a least-squares problem over rows of gradients, in one or more stages.

    Every stage models the loss around the weights $\bar w$ at hand and solves

    $$\min_\beta \langle g, \beta-\bar w\rangle + \tfrac12 \|X(\beta-\bar w)\|^2
      + \tfrac\rho2 \|\beta-\bar w\|^2 \quad\text{s.t.}\quad \|\beta\|_0 \le k_t$$

    with rows $X$ of gradients, $X^\top X$ the empirical Fisher matrix. Several stages
    with fresh examples and a shrinking $k_t$ are CHITA++. Weights that neither the
    gradient nor any row sees, such as those of units that are never active, are
    pruned first (not by the baselines, and not where `loss_fn` is a model).

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, a mean over the leading axis of
        `args`, or a `QuadraticModel`; static (pass the same function object again
        and nothing recompiles).
      params: trained weights, any pytree of floating arrays.
      k: prunable weights to keep in all, an integer, or a mapping from leaf path to
        count; traced.
      args: data handed to the loss; traced.
      batches: fresh data for every stage instead of `args`: a tuple of arrays with
        one more leading axis over stages, or a callable from the stage's index to
        such a tuple, called on the host.
      curvature: builds the local model; by default
        `sparserec.quadratic.fisher()`, a row for every example; static. With
        `blocks` (block-diagonal Fisher) and with `sparserec.quadratic.layerwise`
        only `"bso"`, `"best"` and `"admm"` apply, and the first two mean the same.
        Ignored where `loss_fn` is a model.
      variant: how a stage solves its problem; static. `"iht"`: active-set IHT.
        `"cd"`: one thresholded gradient step, then coordinate descent over exact
        blocks of 128; `"cyclic"`: over single coordinates. `"bso"`: the exact
        minimiser on the support of that step. `"best"`: the supports of that step
        and of IHT compete with exact minimisers, and exchanges polish the better.
        `"admm"`: the exact minimiser on the support that `max_steps` steps of ADMM
        end with, while the budget falls to k; for any curvature, and cheap where one
        factorisation serves all steps (`sparserec.quadratic.layerwise`).
        Baselines over the same rows: `"magnitude"` (values untouched), `"obs"`
        (WoodFisher with `blocks`, M-FAC without) and `"cbs"` (combinatorial brain
        surgeon), which take the gradient to be zero.
      stages: number of stages; static.
      schedule: how the budget falls over the stages: `"exp"`, `"poly"`, `"linear"`,
        `"const"`, `"mfac"` as published, `"geometric"` (a constant fraction goes at
        each stage, the last third refines), or a function from the stage's index
        (traced int32) to a count; static.
      start_density: share of the weights that the first stage of `"exp"`,
        `"poly"` and `"linear"` keeps; static.
      ridge: added to that of the curvature, in units of curvature; traced. Several
        numbers compete in every stage, judged by the loss on held-out examples.
      held_out: share of the examples that judge ridges and build nothing; by default
        0.1 where there are several ridges, else none. Static.
      exchanges: rounds of exchanges of weights in each stage of `"best"` and
        `"cbs"`; traced.
      metric: power p of the diagonal D of the curvature in the thresholded step, and
        in those of ADMM: weights compete by $D_i^{p/2}|v_i|$, with 1 by what their
        loss costs to second order, with 0 by magnitude as published. Traced.
      refinements: further steps on the support at the end of each stage, from fresh
        gradients of the loss under the curvature at hand; each is taken, in full or
        in part, where it lowers the loss on the held-out examples, or on all where
        none are held out. Static. Ignored where `loss_fn` is a model.
      descent: `sparserec.Descent(optimizer)` tunes the kept weights, and the leaves
        that are not prunable, by mini-batches of the loss's own gradients, after the
        solve of each stage and before its refinements; weights that are gone stay
        exactly zero. Its end, the mean of its second half and the point before it are
        judged. Static.
      prunable: which leaves may be pruned; see `sparserec.matrices`. Other leaves
        are refitted along with the support.
      batch_size: visit the data in chunks of this many examples, with loops on the
        host, when the loss is evaluated, and its gradient for `refinements` and
        `descent`. Where examples act on each other (batch normalisation in training
        mode) a chunk is the batch that they share. Static.
      tol: within a stage, gain of an IHT step or of a pass of coordinate descent
        relative to all gains before at which to stop; between stages, relative
        change. Traced.
      max_steps: largest number of IHT steps or passes in a stage, and the number of
        ADMM steps; traced.

    Returns:
      A `Solution` with at most k prunable weights; with `k=0` they are all zero and
      with all of them nothing is pruned and the weights are moved to the minimum of
      the model. Ties go to the lowest index. Its objective is the loss (on the
      held-out examples where there are any), or the value of the model with the
      ridge. `history.damping` holds the ridge taken at each stage. If a NaN appears
      on the way, the best finite iterate with status `NONFINITE`; status `MAX_STEPS`
      is the normal end of several stages.

    Raises:
      TypeError: `k`, `params`, `ridge` or `descent` of the wrong type.
      ValueError: `k` out of range, unknown paths or options, a negative ridge, a
        variant that the curvature cannot serve, rows with NaN, a loss that is not a
        finite mean over the examples, data of the wrong form, `descent` where
        `loss_fn` is a model.

    Source: Benbaki et al. (2023); Boza (2024) and Meng et al. (2024) for
    `"admm"`. Exact steps along conjugate directions, competing supports, exchanges,
    competing ridges and the descent are additions.
    """
    _check_choices(variant, stages, schedule, start_density, exchanges, max_steps)
    if not isinstance(refinements, int | np.integer) or refinements < 0:
        raise ValueError(
            f"`refinements` must be an integer of at least 0, got {refinements!r}."
        )
    _descent.check(descent)
    if descent is not None and isinstance(loss_fn, QuadraticModel):
        raise ValueError(
            "`descent` has no effect here: it takes mini-batches of a loss, and a "
            "model has no examples. Leave it out, or pass the loss."
        )
    ridges = check_ridges(ridge)
    if held_out is None:
        held_out = 0.1 if ridges.size > 1 else 0.0
    if not 0 <= held_out < 1:
        raise ValueError(f"`held_out` must lie in [0, 1), got {held_out!r}.")
    if callable(batches):
        batches = functools.lru_cache(maxsize=1)(batches)
    builder = Fisher() if curvature is None else curvature
    if batch_size is None and getattr(builder, "on_host", False):
        batch_size = _HOST_CHUNK
    options = Options(
        variant,
        stages,
        schedule,
        float(start_density),
        float(held_out),
        int(refinements),
        descent,
    )
    limits = Limits(
        ridges,
        _as_array(exchanges, jnp.int32),
        _as_array(tol, float),
        _as_array(max_steps, jnp.int32),
        _as_array(metric, float),
    )
    solution = _front.solve(
        lambda objective, _: chita_solver(objective, options=options, limits=limits),
        loss_fn,
        params,
        k,
        args=args,
        batches=batches,
        curvature=builder,
        needs=NEEDS.get(variant, ()),
        prunable=prunable,
        batch_size=batch_size,
        tol=tol,
        max_steps=stages,
    )
    if isinstance(loss_fn, QuadraticModel):
        _check_rows(loss_fn, solution)
    return solution


def _check_rows(model: QuadraticModel, solution: Solution) -> None:
    """Explains a failure by what is wrong with a given model; traced ones pass."""
    traced = any(isinstance(x, Tracer) for x in jax.tree.leaves((model, solution)))
    if traced or jnp.ndim(solution.status) or int(solution.status) not in _FAILURES:
        return
    if not all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(model)):
        raise ValueError(
            "the model holds NaN or infinity: look for them in its rows, its gradient "
            "and its center (`jax.tree.map(lambda x: bool(jnp.isfinite(x).all()), "
            "model)`)."
        )


def _as_array(value: Any, dtype: Any) -> Any:
    """An array of a dtype; what holds no JAX array stays one of NumPy's.

    That compiled functions take as it is: a conversion by JAX is a program of its own.
    """
    if any(isinstance(x, jax.Array) for x in jax.tree.leaves(value)):
        return jnp.asarray(value, dtype)
    return np.asarray(value, jnp.result_type(dtype))


def check_ridges(ridge: Ridge) -> Array:
    """The candidates as one vector, or an exception that says what is allowed."""
    ridges = _as_array(ridge, float)
    ridges = ridges[None] if ridges.ndim == 0 else ridges
    if ridges.ndim != 1 or ridges.size == 0:
        raise ValueError(
            "`ridge` must be one number or a sequence of them, got shape "
            f"{ridges.shape}."
        )
    if isinstance(ridges, Tracer):
        return ridges
    if not np.all((np.asarray(ridges) >= 0) & np.isfinite(np.asarray(ridges))):
        raise ValueError(f"`ridge` must be finite and at least 0, got {ridge!r}.")
    return ridges


def _check_choices(
    variant: str,
    stages: int,
    schedule: StageSchedule,
    start_density: float,
    exchanges: int,
    max_steps: int,
) -> None:
    if variant not in VARIANTS:
        raise ValueError(
            f"`variant` must be one of {sorted(VARIANTS)}, got {variant!r}."
        )
    _front.check_positive_int("stages", stages)
    _front.check_positive_int("max_steps", max_steps)
    if not (callable(schedule) or schedule in SCHEDULES):
        raise ValueError(
            f"`schedule` must be one of {list(SCHEDULES)} or a function from the "
            f"stage's index to the number of weights to keep; got {schedule!r}."
        )
    if not 0 < start_density <= 1:
        raise ValueError(
            f"`start_density` is the share of weights that the first stage keeps, in "
            f"(0, 1]; got {start_density!r}."
        )
    integral = isinstance(exchanges, int | np.integer) and not isinstance(
        exchanges, bool
    )
    if not isinstance(exchanges, jax.Array) and (not integral or exchanges < 0):
        raise ValueError(
            f"`exchanges` must be an integer of at least 0, got {exchanges!r}."
        )
