"""The only iteration loop of the package: `run` drives every solver."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from sparserec import _tree
from sparserec._linsolve import while_loop
from sparserec._solution import History, Solution
from sparserec._types import Count, Mask, Params, Scalar, Status, first_status
from sparserec.budget import Budget


class State(NamedTuple):
    """What every solver says after a step.

    Attributes:
      params: the iterate, zero off the mask.
      mask: its support.
      objective: loss at the iterate, shape `()`.
      change: norm of the last change relative to that of the params, shape `()`.
      stationarity: norm of the gradient on the support relative to the full
        gradient at the start, shape `()`; zero for solvers that do not measure it.
      damping: absolute damping of the step, NaN if the solver has none.
      settled: whether the iterate obeys the final budget, shape `()`.
      failure: `RUNNING` while all is well, else the status to stop with.
      memory: whatever the solver carries along; any pytree.
      attempt: number of times the solver has started over, shape `()`; a support that
        comes back in another attempt is no cycle.
    """

    params: Params
    mask: Mask
    objective: Scalar
    change: Scalar
    stationarity: Scalar
    damping: Scalar
    settled: Bool[Array, ""]
    failure: Int[Array, ""]
    memory: Any = ()
    attempt: Count | int = 0


class Incumbent(NamedTuple):
    """The best feasible point so far.

    Attributes:
      params: zero off the mask.
      mask: its support.
      objective: loss there, shape `()`; infinite where anything else is better.
    """

    params: Params
    mask: Mask
    objective: Scalar


class Solver(NamedTuple):
    """An algorithm as two pure functions, each a pytree (`jax.tree_util.Partial`).

    Attributes:
      init: `(params, budget, args) -> (State, Incumbent)`: where the iteration
        starts, and a feasible point to return if nothing better is found.
      step: `(state, budget, args, index) -> State`; `index` counts from zero.
    """

    init: Callable[[Params, Budget, tuple], tuple[State, Incumbent]]
    step: Callable[[State, Budget, tuple, Int[Array, ""]], State]


class _Progress(NamedTuple):
    state: State
    incumbent: Incumbent
    iterations: Int[Array, ""]
    status: Int[Array, ""]
    history: History
    signatures: Array  # uint32, one hash of the support for every step


def _signature(mask: Mask) -> Array:
    """A 32-bit hash of a support."""
    total, offset = jnp.zeros((), jnp.uint32), 0
    for leaf in jax.tree.leaves(mask):
        index = jnp.arange(offset, offset + leaf.size, dtype=jnp.uint32)
        mixed = (index + jnp.uint32(1)) * jnp.uint32(2654435769)
        mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(2246822519)
        chosen = jnp.where(leaf.reshape(-1), mixed ^ (mixed >> 13), jnp.uint32(0))
        total = total + jnp.sum(chosen, dtype=jnp.uint32)
        offset += leaf.size
    return total


def kept(mask: Mask, groups: tuple[int, ...]) -> Int[Array, ""]:
    """Number of `True` entries among the prunable leaves."""
    counts = [
        jnp.sum(leaf, dtype=jnp.int32)
        for leaf, group in zip(jax.tree.leaves(mask), groups, strict=True)
        if group >= 0
    ]
    return functools.reduce(jnp.add, counts)


def _start(
    solver: Solver, params: Params, budget: Budget, args: tuple, max_steps: int
) -> _Progress:
    state, incumbent = solver.init(params, budget, args)
    blank = jnp.full(max_steps, jnp.nan, state.objective.dtype)
    return _Progress(
        state=state,
        incumbent=incumbent,
        iterations=jnp.zeros((), jnp.int32),
        status=first_status((~jnp.isfinite(state.objective), Status.NONFINITE)),
        history=History(blank, blank, blank, blank),
        signatures=jnp.zeros(max_steps, jnp.uint32),
    )


def _advance(
    solver: Solver,
    progress: _Progress,
    budget: Budget,
    args: tuple,
    tol: Scalar,
    *,
    max_steps: int,
    comparable: bool,
) -> _Progress:
    """One step, and the verdict on it.

    `comparable` is false where every step sees other data: objectives of different
    steps then mean different things, so the latest point is the best.
    """
    index = progress.iterations
    state = solver.step(progress.state, budget, args, index)
    finite = jnp.isfinite(state.objective) & _tree.all_finite(state.params)
    best = progress.incumbent
    improved = state.objective < best.objective if comparable else jnp.bool_(True)
    improved |= ~jnp.isfinite(best.objective)
    better = finite & state.settled & improved
    attempt = jnp.asarray(state.attempt).astype(jnp.uint32)
    signature = _signature(state.mask) + attempt * jnp.uint32(2654435769)
    converged = (
        state.settled & (state.change <= tol) & (state.stationarity <= jnp.sqrt(tol))
    )
    status = first_status(
        (state.failure != Status.RUNNING, state.failure),
        (~finite, Status.NONFINITE),
        (converged, Status.CONVERGED),
        (comparable & _cycled(progress, state, signature), Status.CYCLED),
        (index + 1 >= max_steps, Status.MAX_STEPS),
    )
    return _Progress(
        state=state,
        incumbent=Incumbent(
            params=_tree.where(better, state.params, best.params),
            mask=_tree.where(better, state.mask, best.mask),
            objective=jnp.where(better, state.objective, best.objective),
        ),
        iterations=index + 1,
        status=status,
        history=_recorded(progress.history, index, state, budget),
        signatures=progress.signatures.at[index].set(signature),
    )


def _cycled(progress: _Progress, state: State, signature: Array) -> Bool[Array, ""]:
    """Whether an earlier support is back, and the objective was no higher then."""
    index, history = progress.iterations, progress.history
    steps = jnp.arange(progress.signatures.shape[0], dtype=jnp.int32)
    returned = (steps < index - 1) & (progress.signatures == signature)
    last = jnp.maximum(index - 1, 0)
    return (
        state.settled
        & (signature != progress.signatures[last])
        & jnp.any(returned & (history.objective <= state.objective))
    )


def _recorded(
    history: History, index: Int[Array, ""], state: State, budget: Budget
) -> History:
    """The history with what this step brought."""
    dtype = history.objective.dtype
    entries = History(
        objective=state.objective,
        change=state.change,
        kept=kept(state.mask, budget.groups),
        damping=state.damping,
    )
    return jax.tree.map(
        lambda past, entry: past.at[index].set(entry.astype(dtype)), history, entries
    )


def _finish(progress: _Progress) -> Solution:
    best = progress.incumbent
    return Solution(
        params=best.params,
        mask=best.mask,
        objective=best.objective,
        iterations=progress.iterations,
        status=progress.status,
        history=progress.history,
    )


@functools.partial(jax.jit, static_argnames=("max_steps", "stacked"))
def _run_compiled(solver, params, budget, args, tol, *, max_steps, stacked):
    def data(index: Array) -> tuple:
        return jax.tree.map(lambda x: x[index], args) if stacked else args

    def body(progress: _Progress) -> _Progress:
        return _advance(
            solver,
            progress,
            budget,
            data(progress.iterations),
            tol,
            max_steps=max_steps,
            comparable=not stacked,
        )

    start = _start(solver, params, budget, data(jnp.int32(0)), max_steps)
    end = while_loop(
        lambda progress: progress.status == Status.RUNNING, body, start, on_host=False
    )
    return _finish(end)


_start_compiled = jax.jit(_start, static_argnames="max_steps")
_advance_compiled = jax.jit(_advance, static_argnames=("max_steps", "comparable"))


def run(
    solver: Solver,
    params: Params,
    budget: Budget,
    args: tuple = (),
    *,
    tol: Scalar | float,
    max_steps: int,
    batches: Callable[[int], tuple] | tuple | None = None,
    on_host: bool = False,
) -> Solution:
    """Iterates a solver until it converges, fails, or has used up its steps.

    Args:
      solver: `init` and `step` of the algorithm.
      params: where to start, any pytree of floating arrays.
      budget: weights to keep.
      args: data given to every step.
      tol: relative change at which to stop; the stationarity measure must also be
        below its square root. Shape `()`, traced.
      max_steps: largest number of steps, at least 1; static.
      batches: fresh data for every step: a tuple like `args` with one more leading
        axis over the steps, or a callable from the step's index to such a tuple,
        which is called on the host between compiled steps.
      on_host: run eager Python loops around steps that cannot be compiled whole.

    Returns:
      The best feasible finite iterate as a `Solution`. With `batches`, losses of
      different steps are not comparable and the last feasible iterate is returned.
    """
    tol = jnp.asarray(tol, _tree.dtype(params))
    if not on_host and not callable(batches):
        everything, stacked = (args, False) if batches is None else (batches, True)
        return _run_compiled(
            solver,
            params,
            budget,
            everything,
            tol,
            max_steps=max_steps,
            stacked=stacked,
        )

    def data(index: int) -> tuple:
        if batches is None:
            return args
        if callable(batches):
            return batches(index)
        return jax.tree.map(lambda x: x[index], batches)

    start, advance = (
        (_start, _advance) if on_host else (_start_compiled, _advance_compiled)
    )
    first = data(0)
    progress = start(solver, params, budget, first, max_steps=max_steps)
    for index in range(max_steps):
        if progress.status != Status.RUNNING:
            break
        progress = advance(
            solver,
            progress,
            budget,
            first if index == 0 else data(index),
            tol,
            max_steps=max_steps,
            comparable=batches is None,
        )
    return _finish(progress)
