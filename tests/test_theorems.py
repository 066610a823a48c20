"""The solvers held to the theorems' bounds, on problems whose constants are known.

Trials run as one batch under `jax.vmap`, so each test compiles once. Bounds and
reference steps come from `sparserec.theory` and from NumPy, not from the solvers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import sparserec
from sparserec import problems, quadratic, theory

SLACK = 1 + 1e-9


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
    counts: theory.Counts
    start: np.ndarray

    @property
    def error(self):
        return distances(self.start, self.problem.minimizer)


def draw_trials(dim, kept, k_star, conditions, scales, sizes, repeats):
    """Every combination of kept, conditions, scales and sizes, `repeats` times."""
    grid = np.meshgrid(kept, conditions, scales, sizes, np.arange(repeats))
    k, condition, scale, size, _ = (axis.ravel() for axis in grid)
    keys = jax.random.split(jax.random.key(dim), k.size)
    draw = jax.jit(jax.vmap(problems.log_cosh, (0, None, None, 0, 0)), static_argnums=1)
    problem = draw(keys, dim, k_star, jnp.asarray(condition), jnp.asarray(scale))
    counts = theory.Counts(dim, jnp.asarray(k), k_star)
    start = near_starts(problem.minimizer, k, size, seed=dim)
    return Trials(problem, counts, start)


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
    before, solution = step(start, trials.problem.args, trials.counts.k)
    # A solver returns its best iterate, which is the start where a step overshoots:
    # only the others show the map that the theorems speak about.
    moved = np.asarray(solution.history.objective[:, 0] < before)
    return np.asarray(solution.params), moved


@functools.cache
def exact_trials():
    sizes = np.array([0.02, 0.1, 0.5])
    return draw_trials(8, [3, 5, 8], 2, [10.0, 30.0], [5.0, 20.0], sizes, 4)


@functools.cache
def top_k_trials():
    sizes = np.array([1e-3, 0.01, 0.1, 0.3])
    return draw_trials(64, [6, 12, 24], 6, [10.0, 1e3], [5.0, 20.0], sizes, 4)


def test_ideal_step_obeys_theorem_1():
    trials = exact_trials()
    after, moved = step_of_iobs(trials, mask_rule="exact", values="obs")
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
    trials = exact_trials()
    after, moved = step_of_iobs(trials, mask_rule="exact", values="obs")
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
        expected = oracles.ideal_projection(hessian, point, int(trials.counts.k[trial]))
        np.testing.assert_allclose(after[trial], expected.params, rtol=0, atol=1e-9)


def test_top_k_step_obeys_lemma_3():
    trials = top_k_trials()
    after, moved = step_of_iobs(trials, values="top_k")
    assert np.mean(moved) >= 0.9
    error = distances(after, trials.problem.minimizer)
    constants = trials.problem.constants
    for printed in (False, True):
        rate = theory.topk_iobs_rate(constants, trials.counts, printed=printed)
        bound = np.asarray(rate) * trials.error**2
        assert np.all(error[moved] <= bound[moved] * SLACK)


def test_top_k_step_converges_quadratically():
    # Slope of log e_{t+1} against log e_t over three decades of e_t.
    trials = top_k_trials()
    after, moved = step_of_iobs(trials, values="top_k")
    error = distances(after, trials.problem.minimizer)
    shown = moved & (trials.error < 0.3)
    slope, _ = np.polyfit(np.log(trials.error[shown]), np.log(error[shown]), 1)
    assert 1.8 <= slope <= 2.2


@pytest.mark.parametrize(
    "options",
    [{"values": "top_k"}, {"mask_rule": "exact"}, {"mask_rule": "top_k"}],
    ids=["top_k", "exact", "obs"],
)
def test_newton_bound_is_nearly_attained(options):
    # Otherwise the inequalities above could hide a step that is merely short.
    errors = np.array([1e-4, 1e-3, 1e-2])
    keys = jax.random.split(jax.random.key(0), errors.size)
    draw = jax.vmap(problems.near_tight_log_cosh, (0, None, None, 0))
    problem, start = draw(keys, 10, 3, jnp.asarray(errors))
    counts = theory.Counts(10, jnp.full(errors.size, 3), 3)
    trials = Trials(problem, counts, np.asarray(start))
    after, moved = step_of_iobs(trials, **options)
    assert np.all(moved)
    error = distances(after, problem.minimizer)
    newton = np.asarray(theory.newton_rate(problem.constants)) * errors**2
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
        trials.counts.k[inside],
    )
    error = distances(solution.params, trials.problem.minimizer[inside])
    assert np.all(error <= tolerance)


# --- ill-conditioned problems (E3) ---------------------------------------------------


@functools.cache
def ill_conditioned_trials():
    keys = jax.random.split(jax.random.key(3), 20)
    draw = jax.jit(
        jax.vmap(problems.log_cosh, (0, None, None, None, None)), static_argnums=1
    )
    return draw(keys, 100, 10, 1e4, 100.0)


@pytest.mark.parametrize(
    "options",
    [
        {"damping": 0.0, "safeguard": False},
        {"damping": 0.0, "values": "top_k"},
        {},
    ],
    ids=["obs", "top_k", "defaults"],
)
def test_iobs_does_not_see_the_condition_number(options):
    problem = ill_conditioned_trials()

    @jax.jit
    @jax.vmap
    def solve(args):
        return sparserec.iobs(
            problems.log_cosh_loss,
            jnp.zeros(100),
            10,
            args=args,
            tol=0.0,
            max_steps=7,
            **options,
        )

    error = distances(solve(problem.args).params, problem.minimizer)
    assert np.all(error <= 1e-8)


def test_iht_fails_where_the_condition_number_is_large():
    problem = ill_conditioned_trials()

    @jax.jit
    @jax.vmap
    def solve(args, step_size):
        return sparserec.iht(
            problems.log_cosh_loss,
            jnp.zeros(100),
            10,
            args=args,
            step_size=step_size,
            tol=0.0,
            max_steps=2000,
        )

    step_size = 1 / jnp.asarray(problem.constants.smoothness)
    error = distances(solve(problem.args, step_size).params, problem.minimizer)
    assert np.mean(error <= 1e-8) <= 0.2


# --- step sizes (E4) -----------------------------------------------------------------


@pytest.mark.parametrize("kept", [5, 12])
def test_step_size_theorem(kept):
    step_sizes = jnp.asarray([0.05, 0.1, 0.3, 0.6, 1.4, 1.7])
    repeats, steps = 5, 260
    keys = jax.random.split(jax.random.key(4), repeats)
    draw = jax.vmap(problems.ill_conditioned_quadratic, (0, None, None, None))
    problem = draw(keys, 32, 5, 100.0)
    start = jnp.asarray(np.random.default_rng(4).normal(size=(repeats, 32)))

    def solve(start, args, step_size):
        solution = sparserec.iobs(
            problems.quadratic_loss,
            start,
            kept,
            args=args,
            values="top_k",
            damping=0.0,
            step_size=step_size,
            tol=0.0,
            max_steps=steps,
        )
        return solution.history.objective, solution.params

    sweep = jax.vmap(jax.vmap(solve, (0, 0, None)), (None, None, 0))
    objective, params = jax.jit(sweep)(start, problem.args, step_sizes)
    minimizer = np.asarray(problem.minimizer)
    nonzero = np.where(minimizer != 0, np.abs(minimizer), np.inf)
    magnitudes = (
        np.max(np.abs(start - minimizer), axis=1),
        np.max(np.abs(minimizer), axis=1),
        np.min(nonzero, axis=1),
    )
    for index, step_size in enumerate(step_sizes):
        assert np.all(distances(params[index], minimizer) <= 1e-5)
        for trial in range(repeats):
            numbers = (float(part[trial]) for part in magnitudes)
            rate = theory.step_size_theorem(step_size, *numbers)
            # Iterate t is entry t - 1. In the tail the error vector is multiplied
            # by 1 - eta, so the objective of any quadratic contracts by its square.
            tail = np.asarray(objective[index, trial, int(rate.steps) - 1 :])
            tail = tail[tail > 1e-12]
            assert tail.size >= 3
            ratios = np.sqrt(tail[1:] / tail[:-1])
            np.testing.assert_allclose(ratios, rate.contraction, rtol=1e-6)


def test_unit_step_solves_a_realizable_quadratic_at_once():
    keys = jax.random.split(jax.random.key(5), 10)
    draw = jax.vmap(problems.ill_conditioned_quadratic, (0, None, None, None))
    problem = draw(keys, 40, 6, 1e4)
    for options in ({"values": "top_k"}, {"mask_rule": "saliency"}, {}):

        @jax.jit
        @jax.vmap
        def solve(args, options=options):
            return sparserec.iobs(
                problems.quadratic_loss,
                jnp.zeros(40),
                6,
                args=args,
                damping=0.0,
                max_steps=1,
                **options,
            ).params

        error = distances(solve(problem.args), problem.minimizer)
        assert np.all(error <= 1e-9)


# --- fewer examples than weights -----------------------------------------------------


def recovered(designs, coefficients, k):
    @jax.jit
    @jax.vmap
    def solve(design, response):
        return sparserec.iobs(
            quadratic.least_squares(design, response),
            jnp.zeros(design.shape[1]),
            k,
            schedule="up",
        ).params

    params = np.asarray(solve(*designs))
    error = distances(params, coefficients)
    return error <= 1e-6 * np.linalg.norm(np.asarray(coefficients), axis=1)


@pytest.mark.parametrize(
    ("draw", "k", "rate"),
    [
        (lambda key: problems.gaussian_design(key, 80, 200, 24), 24, 0.90),
        (lambda key: problems.correlated_design(key, 100, 200, 16, 0.9), 16, 0.98),
    ],
    ids=["gaussian", "correlated"],
)
def test_growing_budget_recovers_from_few_examples(draw, k, rate):
    keys = jax.random.split(jax.random.key(6), 50)
    design, response, coefficients = jax.jit(jax.vmap(draw))(keys)
    assert np.mean(recovered((design, response), coefficients, k)) >= rate
