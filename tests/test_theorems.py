"""The solvers held to the theorems' bounds, on problems whose constants are known.

Trials run as one compiled batch. Bounds and reference steps come from
`sparserec.theory` and from NumPy, not from the solvers.
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


def over_trials(solve):
    """Compiles `solve` for one trial and runs it on every row of its arguments.

    One after another: under `vmap` every trial takes as many steps as the slowest, and
    jaxlib 0.10 on two cores can deadlock where a program holds many batches of
    factorizations of this size.
    """
    return jax.jit(lambda *trials: jax.lax.map(lambda trial: solve(*trial), trials))


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


# --- ill-conditioned problems (E3) ---------------------------------------------------


@functools.cache
def ill_conditioned_trials():
    @jax.jit
    @jax.vmap
    def draw(key):
        return problems.log_cosh(key, 100, 10, 1e4, 100.0)

    return draw(jax.random.split(jax.random.key(3), 20))


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

    @over_trials
    def solve(*args):
        return sparserec.iobs(
            problems.log_cosh_loss,
            jnp.zeros(100),
            10,
            args=args,
            tol=0.0,
            max_steps=7,
            **options,
        ).params

    error = distances(solve(*problem.args), problem.minimizer)
    assert np.all(error <= 1e-8)


def test_iht_fails_where_the_condition_number_is_large():
    problem = ill_conditioned_trials()

    @over_trials
    def solve(step_size, *args):
        return sparserec.iht(
            problems.log_cosh_loss,
            jnp.zeros(100),
            10,
            args=args,
            step_size=step_size,
            tol=0.0,
            max_steps=2000,
        ).params

    step_size = 1 / jnp.asarray(problem.constants.smoothness)
    error = distances(solve(step_size, *problem.args), problem.minimizer)
    assert np.mean(error <= 1e-8) <= 0.2


# --- step sizes (E4) -----------------------------------------------------------------


def draw_quadratics(seed, repeats, dim, k, condition):
    @jax.jit
    @jax.vmap
    def draw(key):
        return problems.ill_conditioned_quadratic(key, dim, k, condition)

    return draw(jax.random.split(jax.random.key(seed), repeats))


def test_step_size_theorem():
    step_sizes = np.array([0.05, 0.1, 0.3, 0.6, 1.0, 1.4, 1.7])
    kept = np.array([5, 12])
    repeats, steps = 4, 260
    problem = draw_quadratics(4, repeats, 32, 5, 100.0)
    start = jnp.asarray(np.random.default_rng(4).normal(size=(repeats, 32)))

    def solve(start, args, k, step_size):
        solution = sparserec.iobs(
            problems.quadratic_loss,
            start,
            k,
            args=args,
            values="top_k",
            damping=0.0,
            step_size=step_size,
            tol=0.0,
            max_steps=steps,
        )
        return solution.history.objective, solution.params

    over_problems = jax.vmap(solve, (0, 0, None, None))
    over_budgets = jax.vmap(over_problems, (None, None, 0, None))
    sweep = jax.jit(jax.vmap(over_budgets, (None, None, None, 0)))
    objective, params = jax.tree.map(
        np.asarray,
        sweep(start, problem.args, jnp.asarray(kept), jnp.asarray(step_sizes)),
    )
    minimizer = np.asarray(problem.minimizer)
    start_error = np.max(np.abs(np.asarray(start) - minimizer), axis=1)
    largest = np.max(np.abs(minimizer), axis=1)
    smallest = np.min(np.where(minimizer == 0, np.inf, np.abs(minimizer)), axis=1)
    for setting in np.ndindex(step_sizes.size, kept.size, repeats):
        step_size, trial = step_sizes[setting[0]], setting[2]
        numbers = start_error[trial], largest[trial], smallest[trial]
        rate = theory.step_size_theorem(step_size, *numbers)
        since = int(rate.steps)
        error = np.linalg.norm(params[setting] - minimizer[trial])
        bound = np.sqrt(32) * max(numbers[:2]) * rate.contraction ** (steps - since)
        assert error <= bound + 1e-12
        # Iterate t is entry t - 1. In the tail the error vector is multiplied by
        # 1 - eta, so the objective of any quadratic contracts by its square.
        tail = objective[setting][since - 1 :]
        tail = tail[tail > 1e-12]
        assert step_size == 1 or tail.size >= 3
        ratios = np.sqrt(tail[1:] / tail[:-1])
        np.testing.assert_allclose(ratios, rate.contraction, rtol=1e-6)


@pytest.mark.parametrize("mask_rule", ["top_k", "saliency"])
def test_undamped_step_solves_a_realizable_quadratic_at_once(mask_rule):
    problem = draw_quadratics(5, 10, 40, 6, 1e4)

    @jax.jit
    @jax.vmap
    def solve(args):
        return sparserec.iobs(
            problems.quadratic_loss,
            jnp.zeros(40),
            6,
            args=args,
            mask_rule=mask_rule,
            damping=0.0,
            max_steps=1,
        ).params

    error = distances(solve(problem.args), problem.minimizer)
    assert np.all(error <= 1e-9)


# --- fewer examples than weights -----------------------------------------------------


def recovered(designs, coefficients, k):
    @over_trials
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


@pytest.mark.slow
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
