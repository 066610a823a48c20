"""One step of I-OBS held to the rates of Theorem 1 and Lemma 3.

The losses have known constants, the bounds come from `sparserec.theory`, the exact
projection from a search in NumPy. Trials run as one compiled batch.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import sparserec
from sparserec import problems, theory

SLACK = 1 + 1e-9

pytestmark = pytest.mark.usefixtures("optimized")


def distances(params, minimizers):
    return np.linalg.norm(np.asarray(params) - np.asarray(minimizers), axis=1)


def near_starts(minimizers, counts, sizes, seed):
    """T_k(theta* + size N) for every trial."""
    noise = np.random.default_rng(seed).normal(size=np.shape(minimizers))
    moved = np.asarray(minimizers) + sizes[:, None] * noise
    pairs = zip(moved, np.asarray(counts), strict=True)
    return np.stack([oracles.hard_threshold(row, int(k)) for row, k in pairs])


# --- one step (Theorem 1 and Lemma 3) ------------------------------------------------


class Trials(NamedTuple):
    problem: problems.LogCoshProblem  # every array with a leading axis of trials
    start: np.ndarray
    k: jax.Array
    k_star: int

    @property
    def counts(self) -> theory.Counts:
        return theory.Counts(self.start.shape[1], self.k, self.k_star)

    @property
    def error(self) -> np.ndarray:
        return distances(self.start, self.problem.minimizer)


def draw_trials(dim, kept, k_star, conditions, scales, sizes, repeats):
    """Every combination of kept, conditions, scales and sizes, `repeats` times."""
    grid = np.meshgrid(kept, conditions, scales, sizes, np.arange(repeats))
    k, condition, scale, size, _ = (axis.ravel() for axis in grid)
    keys = jax.random.split(jax.random.key(dim), k.size)

    @jax.jit
    @jax.vmap
    def draw(key, condition, scale):
        return problems.log_cosh(key, dim, k_star, condition, scale)

    problem = draw(keys, jnp.asarray(condition), jnp.asarray(scale))
    start = near_starts(problem.minimizer, k, size, seed=dim)
    return Trials(problem, start, jnp.asarray(k), k_star)


def step_of_iobs(trials, **options):
    """The objective before, and the params and objective after one undamped step."""

    @jax.jit
    @jax.vmap
    def step(start, args, k):
        before = problems.log_cosh_loss(start, *args)
        solution = sparserec.iobs(
            problems.log_cosh_loss,
            start,
            k,
            args=args,
            damping=0.0,
            safeguard=False,
            max_steps=1,
            **options,
        )
        return before, solution

    start = jnp.asarray(trials.start)
    before, solution = step(start, trials.problem.args, trials.k)
    # A solver returns its best iterate, which is the start where a step overshoots:
    # only the others show the map that the theorems speak about.
    moved = np.asarray(solution.history.objective[:, 0] < before)
    return np.asarray(solution.params), moved


def exact_trials():
    sizes = np.array([0.02, 0.1, 0.5])
    return draw_trials(8, [3, 5, 8], 2, [10.0, 30.0], [5.0, 20.0], sizes, 4)


@functools.cache
def top_k_trials():
    sizes = np.array([1e-3, 0.01, 0.1, 0.3])
    return draw_trials(64, [6, 12, 24], 6, [10.0, 1e3], [5.0, 20.0], sizes, 4)


@functools.cache
def ideal_step():
    trials = exact_trials()
    return trials, *step_of_iobs(trials, mask_rule="exact", values="obs")


@functools.cache
def top_k_step():
    trials = top_k_trials()
    return trials, *step_of_iobs(trials, values="top_k")


def test_ideal_step_obeys_theorem_1():
    trials, after, moved = ideal_step()
    assert np.mean(moved) >= 0.9
    error = distances(after, trials.problem.minimizer)
    constants = trials.problem.constants
    for rate in (
        theory.iobs_rate(constants, trials.counts),
        theory.iobs_rate(constants, trials.counts, printed=True),
        theory.iobs_rate_energy_norm(constants),
    ):
        bound = np.asarray(rate) * trials.error**2
        assert np.all(error[moved] <= bound[moved] * SLACK)


def test_ideal_step_is_the_exact_projection():
    trials, after, moved = ideal_step()
    start = jnp.asarray(trials.start)
    gradients, hessians = (
        jax.jit(jax.vmap(differentiate(problems.log_cosh_loss)))(
            start, *trials.problem.args
        )
        for differentiate in (jax.grad, jax.hessian)
    )
    for trial in np.flatnonzero(moved)[::7]:
        hessian = np.asarray(hessians[trial])
        point = oracles.newton_point(
            hessian, trials.start[trial], np.asarray(gradients[trial])
        )
        expected = oracles.ideal_projection(hessian, point, int(trials.k[trial]))
        np.testing.assert_allclose(after[trial], expected.params, rtol=0, atol=1e-9)


def test_top_k_step_obeys_lemma_3():
    trials, after, moved = top_k_step()
    assert np.mean(moved) >= 0.9
    error = distances(after, trials.problem.minimizer)
    constants = trials.problem.constants
    for printed in (False, True):
        rate = theory.topk_iobs_rate(constants, trials.counts, printed=printed)
        bound = np.asarray(rate) * trials.error**2
        assert np.all(error[moved] <= bound[moved] * SLACK)


def test_top_k_step_converges_quadratically():
    # Slope of log e_{t+1} against log e_t over three decades of e_t.
    trials, after, moved = top_k_step()
    error = distances(after, trials.problem.minimizer)
    shown = moved & (trials.error < 0.3)
    slope, _ = np.polyfit(np.log(trials.error[shown]), np.log(error[shown]), 1)
    assert 1.8 <= slope <= 2.2


@functools.cache
def near_tight_trials():
    @jax.jit
    @jax.vmap
    def draw(key, error):
        return problems.near_tight_log_cosh(key, 8, 3, error)

    keys = jax.random.split(jax.random.key(0), 3)
    problem, start = draw(keys, jnp.asarray([1e-4, 1e-3, 1e-2]))
    return Trials(problem, np.asarray(start), jnp.full(3, 3), 3)


@pytest.mark.parametrize(
    "options", [{"values": "top_k"}, {"mask_rule": "exact"}], ids=["top_k", "exact"]
)
def test_newton_bound_is_nearly_attained(options):
    # Otherwise the inequalities above could hide a step that is merely short.
    trials = near_tight_trials()
    after, moved = step_of_iobs(trials, **options)
    assert np.all(moved)
    error = distances(after, trials.problem.minimizer)
    newton = np.asarray(theory.newton_rate(trials.problem.constants)) * trials.error**2
    assert np.all((0.98 * newton <= error) & (error <= newton * SLACK))


def test_steps_within_the_radius_are_doubly_logarithmic():
    trials = top_k_trials()
    rate = np.asarray(theory.topk_iobs_rate(trials.problem.constants, trials.counts))
    inside = np.flatnonzero(rate * trials.error <= 0.5)
    assert inside.size >= 20
    tolerance = 1e-9
    steps = theory.quadratic_convergence_steps(rate[inside], tolerance)
    most = int(np.max(np.asarray(steps)))
    assert most <= 6

    @jax.jit
    @jax.vmap
    def solve(start, args, k):
        return sparserec.iobs(
            problems.log_cosh_loss,
            start,
            k,
            args=args,
            values="top_k",
            damping=0.0,
            tol=0.0,
            max_steps=most,
        )

    pick = functools.partial(jax.tree.map, lambda leaf: leaf[inside])
    solution = solve(
        jnp.asarray(trials.start[inside]),
        pick(trials.problem.args),
        trials.k[inside],
    )
    error = distances(solution.params, trials.problem.minimizer[inside])
    assert np.all(error <= tolerance)
