r"""The I-OBS step for curvatures known only by products: networks.

On a network the local model holds nearby only, and a step that suits the examples
which built it may not suit others. So every choice here is made by the loss on
examples that built nothing: the support, the damping, and whether to step at all.
One Krylov space gives the refits for a whole grid of dampings, so that choosing
costs forward passes only.
"""

import dataclasses
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec import _linsolve, _tree, select
from sparserec._linsolve import while_loop
from sparserec._run import Incumbent, State
from sparserec._types import Mask, Params, Scalar, Status
from sparserec.budget import Budget
from sparserec.quadratic import MatrixFree, Objective, QuadraticModel
from sparserec.solvers import _descent, _states
from sparserec.solvers._descent import Descent
from sparserec.solvers._examples import Examples, divide
from sparserec.solvers._schedule import Schedule, budget_at

FIRST_DAMPING = 15.0
"""Relative to the mean curvature, which on networks is far below the largest."""

_DAMPING_RANGE = 0.15, 150.0  # beyond the upper end the late stages freeze
_DAMPING_GRID = 0.25, 1.0, 4.0  # factors tried at every refit
_LENGTHS = 1.0, 0.5  # of refinement steps: half steps average the batches
_NO_STEP = 4.0  # factor on the damping where no step was best
_INERTIA = 0.5  # exponent with which the damping follows the best factor
_MOMENTUM = 0.9  # a refinement starts from this share of the last one
_PROBES, _PROBE_MEMORY = 2, 0.8  # of the running diagonal
_METRIC_FLOOR = 0.1  # of the diagonal, relative to its mean


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class ProductOptions:
    """The static choices of the step.

    Attributes:
      schedule, stages: how the budget moves; see `iobs`.
      held_out: share of the examples that judge.
      refinements: re-linearised steps on the support after each choice of it.
      descent: mini-batch descent before the refinements, or `None`.
    """

    schedule: Schedule
    stages: int
    held_out: float
    refinements: int
    descent: Descent | None


class Memory(NamedTuple):
    """What the step carries along.

    Attributes:
      damping: absolute, for the next solve.
      scale: mean curvature at the start.
      diagonal: running estimate of the diagonal of the curvature.
      displacement: of the last refinement.
      gradient_norm: largest so far, negative before the first step.
      descent: state of the optimizer between the stages.
    """

    damping: Scalar
    scale: Scalar
    diagonal: Params
    displacement: Params
    gradient_norm: Scalar
    descent: _descent.DescentState


def _curvature(objective: Objective, params: Params, args: tuple) -> MatrixFree:
    """The curvature of the local model; what else is in it is never computed."""
    return cast(MatrixFree, objective.model(params, args).curvature)


def init(
    objective: Objective,
    options: ProductOptions,
    params: Params,
    budget: Budget,
    args: tuple,
) -> tuple[State, Incumbent]:
    """The dense start, and its projection as the point to fall back to."""
    model = objective.model(params, args)
    curvature = _curvature(objective, params, args)
    diagonal = _tree.flatten(curvature.estimate_diagonal(jnp.int32(0)))
    scale = jnp.mean(diagonal)
    scale = jnp.where(jnp.isfinite(scale) & (scale > 0), scale, 1)
    mask = select.support(params, budget.counts, budget.groups)
    projection = _tree.keep(mask, params)
    one = jnp.ones((), model.value.dtype)
    zeros = _tree.zeros_like(params)
    memory = Memory(
        damping=FIRST_DAMPING * scale.astype(one.dtype),
        scale=scale.astype(one.dtype),
        diagonal=zeros,
        displacement=zeros,
        gradient_norm=-one,
        descent=_descent.init(options.descent, params),
    )
    state = _states.begin(params, _tree.ones_mask(params), model.value, memory)
    return state, Incumbent(projection, mask, objective.value(projection, args))


class _Solver(NamedTuple):
    """Solves in the metric of the running diagonal, and judges."""

    objective: Objective
    data: Examples
    metric: Params  # square roots s of the inverse metric: solve for v / s

    def directions(
        self,
        curvature: MatrixFree,
        slope: Params,
        mask: Mask,
        dampings: Float[Array, "s"],
    ) -> Params:
        """Damped Newton directions on the support, one for every damping."""
        product = curvature.prepare()

        def scaled(v: Params) -> Params:
            inner = product(_tree.keep(mask, _times(self.metric, v)))
            return _times(self.metric, _tree.keep(mask, inner))

        solutions = _linsolve.shifted_solves(
            scaled,
            _times(self.metric, _tree.keep(mask, _tree.scale(-1, slope))),
            dampings,
            steps=curvature.cg_steps,
            on_host=self.objective.on_host,
        )
        return jax.tree.map(lambda s, u: s[None] * u, self.metric, solutions)

    def losses(self, stacked: Params) -> Float[Array, "s"]:
        """Held-out loss of stacked candidates; infinite where it is not finite."""
        return self.objective.values(stacked, self.data.judge)


def _times(a: Params, b: Params) -> Params:
    return jax.tree.map(jnp.multiply, a, b)


def _pick(stacked: Params, index) -> Params:
    return jax.tree.map(lambda x: x[index], stacked)


def _stack(*candidates: Params) -> Params:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *candidates)


def _join(*stacks: Params) -> Params:
    return jax.tree.map(lambda *xs: jnp.concatenate(xs), *stacks)


def _stepped(base: Params, directions: Params, length: float) -> Params:
    """Candidates `base + length * direction` for stacked directions."""
    return jax.tree.map(lambda w, d: w[None] + length * d, base, directions)


def _retuned(
    damping: Scalar, scale: Scalar, choice: Int[Array, ""], stepped: Bool[Array, ""]
) -> Scalar:
    """The damping moves towards the best one of its grid, and up without a step."""
    grid = jnp.asarray(_DAMPING_GRID, damping.dtype)
    factor = jnp.where(stepped, grid[choice % grid.size], _NO_STEP) ** _INERTIA
    low, high = _DAMPING_RANGE
    return jnp.clip(damping * factor, low * scale, high * scale)


def _update_diagonal(
    objective: Objective, state: State, data: Examples, index: Int[Array, ""]
) -> Params:
    """Running estimate of the diagonal of the curvature, from a few probes."""
    curvature = _curvature(objective, state.params, data.curvature_part(0))
    estimates = [
        curvature.estimate_diagonal(index * _PROBES + jnp.int32(number))
        for number in range(_PROBES)
    ]
    fresh = jax.tree.map(lambda *xs: sum(xs) / len(xs), *estimates)
    return jax.tree.map(
        lambda old, new: jnp.where(
            index == 0, new, _PROBE_MEMORY * old + (1 - _PROBE_MEMORY) * new
        ),
        state.memory.diagonal,
        fresh,
    )


def _floored(diagonal: Params) -> Params:
    """The diagonal, raised by a share of its mean so that it can be divided by."""
    mean = jnp.mean(_tree.flatten(diagonal))
    mean = jnp.where(mean > 0, mean, 1)
    return jax.tree.map(
        lambda d: d + jnp.asarray(_METRIC_FLOOR * mean, d.dtype), diagonal
    )


def _metric(floored: Params) -> Params:
    """Fourth roots of the inverse diagonal, of mean square one."""
    raw = jax.tree.map(lambda d: d**-0.25, floored)
    size = _tree.norm(raw) / jnp.sqrt(jnp.asarray(_tree.size(raw), _tree.dtype(raw)))
    return _tree.scale(1 / size, raw)


def step(
    objective: Objective,
    options: ProductOptions,
    state: State,
    budget: Budget,
    args: tuple,
    index: Int[Array, ""],
) -> State:
    """One outer step: metric, support, descent, refinements."""
    now = budget_at(options.schedule, budget, index, options.stages)
    data = divide(args, options.held_out)
    diagonal = _update_diagonal(objective, state, data, index)
    floored = _floored(diagonal)
    solver = _Solver(objective, data, _metric(floored))
    model = objective.model(state.params, data.build)
    params, mask, damping = _choose_support(solver, model, floored, state, now)
    params, tuned = _descent.descend(
        options.descent, objective, data, params, mask, state.memory.descent
    )
    params, displacement, damping = _refine(
        solver, options.refinements, params, mask, damping, state.memory
    )
    gradient_norm = _states.gradient_scale(
        state.memory.gradient_norm,
        model.gradient,
        state.memory.scale * _tree.norm(state.params),
    )
    live = _tree.norm(_tree.keep(mask, model.gradient))
    return State(
        params=params,
        mask=mask,
        objective=objective.value(params, args),
        change=_states.relative_change(params, state.params),
        stationarity=live / gradient_norm,
        damping=state.memory.damping,
        settled=jnp.all(now.counts == budget.counts),
        failure=jnp.int32(Status.RUNNING),
        memory=Memory(
            damping=damping,
            scale=state.memory.scale,
            diagonal=diagonal,
            displacement=displacement,
            gradient_norm=gradient_norm,
            descent=tuned,
        ),
    )


def _choose_support(
    solver: _Solver, model: QuadraticModel, floored: Params, state: State, now: Budget
) -> tuple[Params, Mask, Scalar]:
    """Supports of the Newton point and of the magnitudes, refitted; plain masking."""
    memory = state.memory
    params = state.params
    curvature = _curvature(solver.objective, params, solver.data.curvature_part(0))
    newton = _pick(
        _stepped(
            params,
            solver.directions(
                curvature,
                model.gradient,
                _tree.ones_mask(params),
                memory.damping[None],
            ),
            1.0,
        ),
        0,
    )
    # Importance of a weight at the Newton point: its share of w^T diag(H) w.
    scores = jax.tree.map(lambda d, w: jnp.sqrt(d) * w, floored, newton)
    supports = [
        select.support(scores, now.counts, now.groups),
        select.support(params, now.counts, now.groups),
    ]
    grid = memory.damping * jnp.asarray(_DAMPING_GRID, memory.damping.dtype)
    refits = []
    for support in supports:
        masked = _tree.keep(support, params)
        bend = curvature.matvec(_tree.sub(masked, params))
        slope = _tree.add(model.gradient, bend)
        directions = solver.directions(curvature, slope, support, grid)
        refits.append(_stepped(masked, directions, 1.0))
    plain = _stack(_tree.keep(supports[1], params))
    candidates = _join(*refits, plain)
    best = jnp.argmin(solver.losses(candidates))
    mask = _tree.where(best < grid.size, *supports)
    damping = _retuned(
        memory.damping, memory.scale, best, best < len(supports) * grid.size
    )
    return _pick(candidates, best), mask, damping


class _Refinement(NamedTuple):
    params: Params
    displacement: Params
    damping: Scalar
    number: Int[Array, ""]


def _refine(
    solver: _Solver,
    refinements: int,
    params: Params,
    mask: Mask,
    damping: Scalar,
    memory: Memory,
) -> tuple[Params, Params, Scalar]:
    """Re-linearised damped Newton steps on the support, each judged."""

    def body(now: _Refinement) -> _Refinement:
        number = now.number + 1
        gradient = solver.objective.model(now.params, solver.data.build).gradient
        part = solver.data.curvature_part(number)
        curvature = _curvature(solver.objective, now.params, part)
        carried = _tree.scale(_MOMENTUM, _tree.keep(mask, now.displacement))
        slope = _tree.add(gradient, curvature.matvec(carried))
        grid = now.damping * jnp.asarray(_DAMPING_GRID, now.damping.dtype)
        directions = solver.directions(curvature, slope, mask, grid)
        full = jax.tree.map(lambda c, d: c[None] + d, carried, directions)
        candidates = _join(
            *[_stepped(now.params, full, length) for length in _LENGTHS],
            _stack(now.params),
        )
        best = jnp.argmin(solver.losses(candidates))
        chosen = _pick(candidates, best)
        stepped = best < len(_LENGTHS) * grid.size
        return _Refinement(
            params=chosen,
            displacement=_tree.sub(chosen, now.params),
            damping=_retuned(now.damping, memory.scale, best, stepped),
            number=number,
        )

    end = while_loop(
        lambda now: now.number < refinements,
        body,
        _Refinement(params, memory.displacement, damping, jnp.int32(0)),
        on_host=solver.objective.on_host,
    )
    return end.params, end.displacement, end.damping
