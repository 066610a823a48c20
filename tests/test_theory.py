"""The theorems' constants against numbers that do not come from them.

Searches, explicit constructions and one-step maps written in NumPy; the solvers are
held to the same bounds in test_theorems.py.
"""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from sparserec import problems, theory

SIZES = [(12, 3, 3), (12, 6, 3), (12, 8, 2), (10, 8, 4), (6, 6, 2), (7, 5, 5)]


def counts_of(sizes):
    return theory.Counts(*sizes)


@st.composite
def counts(draw) -> theory.Counts:
    dim = draw(st.integers(1, 40))
    k = draw(st.integers(1, dim))
    return theory.Counts(dim, k, draw(st.integers(1, k)))


# --- hard thresholding ---------------------------------------------------------------


def worst_thresholding(dim, k, k_star):
    """An instance that expands a squared error by nu, found by a search over sizes.

    Entries of x: `exchanged` ones that T_k drops, all others zero. T_k keeps `pool`
    entries of b off the support, all as large as those it drops. The best common size
    t of b on both groups maximizes (exchanged + pool t^2) / (exchanged (1-t)^2 +
    pool t^2).
    """
    exchanged = min(k_star, dim - k)
    pool = k - k_star + exchanged
    sizes = np.linspace(1e-3, 1.0, 200_001)
    lost = exchanged + pool * sizes**2
    had = exchanged * (1 - sizes) ** 2 + pool * sizes**2
    size = sizes[np.argmax(lost / had)]
    target, vector = np.zeros(dim), np.zeros(dim)
    target[:exchanged] = 1.0
    vector[:exchanged] = size
    vector[exchanged : exchanged + pool] = size * (1 + 1e-9)
    # The rest of the support is far from zero, exact in b, and stays.
    rest = k_star - exchanged
    target[dim - rest :] = vector[dim - rest :] = 9.0
    return vector, target


@pytest.mark.parametrize("sizes", [s for s in SIZES if s[1] < s[0]])
def test_hard_thresholding_constant_is_attained(sizes):
    dim, k, k_star = sizes
    vector, target = worst_thresholding(dim, k, k_star)
    assert np.count_nonzero(target) <= k_star
    cut = oracles.hard_threshold(vector, k)
    ratio = np.sum((cut - target) ** 2) / np.sum((vector - target) ** 2)
    expected = float(theory.hard_thresholding_constant(counts_of(sizes)))
    np.testing.assert_allclose(ratio, expected, rtol=1e-6)


@hypothesis.given(counts(), st.integers(0, 2**32 - 1), st.floats(0.0, 2.0))
def test_hard_thresholding_constant_bounds_every_instance(sizes, seed, noise):
    rng = np.random.default_rng(seed)
    dim, k, k_star = sizes
    target = np.where(oracles.random_mask(rng, dim, k_star), rng.normal(size=dim), 0)
    vector = target + noise * rng.normal(size=dim)
    cut = oracles.hard_threshold(vector, k)
    bound = float(theory.hard_thresholding_constant(sizes))
    lost = np.sum((cut - target) ** 2)
    assert lost <= bound * np.sum((vector - target) ** 2) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("sizes", "root"),
    [
        ((100, 5, 5), (1 + 5**0.5) / 2),
        ((100, 10, 5), 2**0.5),
        ((100, 20, 5), (1 + 17**0.5) / 4),
        ((9, 9, 9), 1.0),
        ((9, 9, 4), 1.0),
    ],
)
def test_hard_thresholding_constant_at_known_sizes(sizes, root):
    actual = theory.hard_thresholding_constant(counts_of(sizes))
    np.testing.assert_allclose(actual, root**2, rtol=1e-12)


@pytest.mark.parametrize("sizes", [s for s in SIZES if s[1] < s[0]])
def test_truncation_ratio_is_attained(sizes):
    dim, k, k_star = sizes
    vector = np.ones(dim)
    target = np.where(np.arange(dim) < k_star, 1.0, 0.0)
    lost = np.sum((oracles.hard_threshold(vector, k) - vector) ** 2)
    ratio = lost / np.sum((vector - target) ** 2)
    expected = theory.truncation_ratio(counts_of(sizes))
    np.testing.assert_allclose(ratio, expected, rtol=1e-12)


@hypothesis.given(counts(), st.integers(0, 2**32 - 1))
def test_truncation_ratio_bounds_every_instance(sizes, seed):
    rng = np.random.default_rng(seed)
    dim, k, k_star = sizes
    vector = rng.normal(size=dim)
    support = oracles.random_mask(rng, dim, k_star)
    # The worst target on a support repeats the vector there.
    target = np.where(support, vector, 0)
    lost = np.sum((oracles.hard_threshold(vector, k) - vector) ** 2)
    bound = float(theory.truncation_ratio(sizes))
    assert lost <= bound * np.sum((vector - target) ** 2) * (1 + 1e-12)


# --- rates ---------------------------------------------------------------------------


@hypothesis.given(counts(), st.floats(1.0, 1e4), st.floats(0.01, 10.0))
def test_rates_are_ordered(sizes, condition, lipschitz):
    constants = theory.Constants(2.0, 2.0 * condition, lipschitz)
    newton = float(theory.newton_rate(constants))
    iobs = float(theory.iobs_rate(constants, sizes))
    top_k = float(theory.topk_iobs_rate(constants, sizes))
    slack = 1 + 1e-12
    assert newton <= iobs * slack
    assert iobs <= theory.iobs_rate(constants, sizes, printed=True) * slack
    assert iobs <= theory.iobs_rate_energy_norm(constants) * slack
    assert newton <= top_k * slack
    assert top_k <= theory.topk_iobs_rate(constants, sizes, printed=True) * slack
    damped = theory.damped_topk_rate(constants, sizes)
    assert damped.linear == 0
    np.testing.assert_allclose(damped.quadratic, top_k, rtol=1e-12)


def test_rates_of_a_dense_problem_are_those_of_newton():
    constants = theory.Constants(2.0, 50.0, 3.0)
    sizes = theory.Counts(7, 7, 3)
    assert theory.newton_rate(constants) == 0.75
    assert theory.iobs_rate(constants, sizes) == 0.75
    assert theory.topk_iobs_rate(constants, sizes) == 0.75
    assert np.isinf(theory.iobs_rate(constants, sizes, printed=True))


def test_rates_by_hand():
    # kappa = 4, d = 10, k = 4, k* = 1: ratios 6/9 and 9/6, M / 2 mu = 1/2.
    constants = theory.Constants(1.0, 4.0, 1.0)
    sizes = theory.Counts(10, 4, 1)
    corrected = theory.iobs_rate(constants, sizes)
    printed = theory.iobs_rate(constants, sizes, printed=True)
    np.testing.assert_allclose(corrected, (1 + (4 * 6 / 9) ** 0.5) / 2)
    np.testing.assert_allclose(printed, (1 + (4 * 9 / 6) ** 0.5) / 2)
    np.testing.assert_allclose(theory.iobs_rate_energy_norm(constants), 2.0)
    np.testing.assert_allclose(
        theory.topk_iobs_rate(constants, sizes, printed=True), 0.75
    )


def test_bounds_accept_arrays_of_counts():
    kept = jnp.arange(3, 13)
    sizes = theory.Counts(12, kept, 3)
    constants = theory.Constants(1.0, 10.0, 1.0)
    curve = jax.jit(theory.iobs_rate)(constants, sizes)
    points = [theory.iobs_rate(constants, theory.Counts(12, int(k), 3)) for k in kept]
    np.testing.assert_allclose(curve, np.stack(points), rtol=1e-12)
    assert jnp.all(curve[1:] < curve[:-1])


def top_k_step(problem, params, k, *, damping=0.0, step_size=1.0):
    """T_k of a damped Newton step on the log-cosh loss, derivatives by hand."""
    matrix, minimizer, scale = (np.asarray(part) for part in problem.args)
    tilt = np.arctanh(1 / np.sqrt(3))
    error = params - minimizer
    gradient = matrix @ error + scale * (np.tanh(error + tilt) - np.tanh(tilt))
    hessian = matrix + scale * np.diag(1 / np.cosh(error + tilt) ** 2)
    shifted = hessian + damping * np.eye(params.size)
    moved = params - step_size * np.linalg.solve(shifted, gradient)
    return oracles.hard_threshold(moved, k)


@pytest.mark.parametrize("damping", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("step_size", [0.3, 1.0, 1.5])
def test_damped_rate_bounds_one_step(damping, step_size):
    rng = np.random.default_rng(0)
    ratios = []
    for seed in range(20):
        problem = problems.log_cosh(jax.random.key(seed), 30, 4, 20.0, 10.0)
        minimizer = np.asarray(problem.minimizer)
        for k in (4, 8, 16):
            sizes = theory.Counts(30, k, 4)
            rate = theory.damped_topk_rate(
                problem.constants, sizes, damping=damping, step_size=step_size
            )
            noise = rng.normal(size=30) * 10 ** rng.uniform(-3, 0)
            start = oracles.hard_threshold(minimizer + noise, k)
            after = top_k_step(problem, start, k, damping=damping, step_size=step_size)
            error = np.linalg.norm(start - minimizer)
            bound = float(rate.linear * error + rate.quadratic * error**2)
            ratios.append(np.linalg.norm(after - minimizer) / bound)
    assert max(ratios) <= 1 + 1e-9


def test_damping_below_the_limit_contracts_in_the_worst_direction():
    # On A = mu I the damped step shrinks the error by exactly lambda / (lambda + mu).
    rng = np.random.default_rng(1)
    minimizer = np.where(np.arange(12) < 3, rng.uniform(1, 2, 12), 0)
    mu, damping = 2.0, 1.5
    start = oracles.hard_threshold(minimizer + 0.1 * (np.arange(12) == 0), 3)
    moved = start - mu * (start - minimizer) / (mu + damping)
    after = oracles.hard_threshold(moved, 3)
    sizes = theory.Counts(12, 3, 3)
    rate = theory.damped_topk_rate(
        theory.Constants(mu, mu, 0.0), sizes, damping=damping
    )
    expansion = theory.hard_thresholding_constant(sizes) ** 0.5
    factor = np.linalg.norm(after - minimizer) / np.linalg.norm(start - minimizer)
    np.testing.assert_allclose(factor * expansion, rate.linear, rtol=1e-9)
    # The sentence on the limit lambda < mu / (sqrt(nu) - 1) = 1.618 mu at k = k*.
    limit = mu / (float(expansion) - 1)
    for damping, contracts in ((0.99 * limit, True), (1.01 * limit, False)):
        rate = theory.damped_topk_rate(
            theory.Constants(mu, 9.0, 0.0), sizes, damping=damping
        )
        assert (rate.linear < 1) == contracts


@pytest.mark.parametrize("error", [1e-4, 1e-3, 1e-2])
def test_newton_rate_is_nearly_attained(error):
    problem, start = problems.near_tight_log_cosh(jax.random.key(3), 16, 4, error)
    minimizer = np.asarray(problem.minimizer)
    after = top_k_step(problem, np.asarray(start), 4)
    bound = float(theory.newton_rate(problem.constants)) * error**2
    ratio = np.linalg.norm(after - minimizer) / bound
    assert 0.98 <= ratio <= 1 + 1e-9


def test_quadratic_convergence_steps_suffice():
    # The worst sequence of a rate is e_{t+1} = C e_t^2 from its radius 1 / (2 C).
    for rate in (1e-3, 0.7, 40.0):
        for tolerance in (1e-2, 1e-5, 1e-12):
            steps = theory.quadratic_convergence_steps(rate, tolerance)
            error, taken = 1 / (2 * rate), 0
            while error > tolerance:
                error, taken = rate * error**2, taken + 1
            assert taken == steps


# --- step sizes, noise, IHT ----------------------------------------------------------


@pytest.mark.parametrize("step_size", [0.05, 0.3, 0.9, 1.0, 1.4, 1.9])
def test_step_size_theorem_from_any_start(step_size):
    # For any Hessian the proposal is (1 - eta) theta + eta theta*.
    rng = np.random.default_rng(7)
    for _ in range(50):
        dim = int(rng.integers(4, 20))
        k_star = int(rng.integers(1, dim // 2 + 1))
        k = int(rng.integers(k_star, dim + 1))
        support = oracles.random_mask(rng, dim, k_star)
        minimizer = np.where(support, rng.normal(size=dim), 0)
        params = rng.normal(size=dim) * 10 ** rng.uniform(-1, 1)
        rate = theory.step_size_theorem(
            step_size,
            np.max(np.abs(params - minimizer)),
            np.max(np.abs(minimizer)),
            np.min(np.abs(minimizer[support])),
        )
        for step in range(int(rate.steps) + 20):
            if step >= rate.steps:
                assert np.all(params[support] != 0)
            proposal = (1 - step_size) * params + step_size * minimizer
            after = oracles.hard_threshold(proposal, k)
            if step >= rate.steps:
                np.testing.assert_allclose(
                    np.linalg.norm(after - minimizer),
                    rate.contraction * np.linalg.norm(params - minimizer),
                    rtol=1e-6,
                    atol=1e-13,
                )
            params = after


def test_step_size_theorem_at_the_edges():
    exact = theory.step_size_theorem(1.0, 5.0, 2.0, 0.5)
    assert (exact.contraction, exact.steps) == (0, 1)
    for step_size in (0.0, 2.0, 2.5):
        assert np.isinf(theory.step_size_theorem(step_size, 5.0, 2.0, 0.5).steps)


def test_noise_floor_is_the_limit_of_the_worst_sequence():
    rate, residual = 0.8, 0.2
    floor = float(theory.noise_floor(rate, residual))
    error = 0.99 * (1 + np.sqrt(1 - 4 * rate * residual)) / (2 * rate)
    for _ in range(500):
        error = rate * error**2 + residual
    np.testing.assert_allclose(error, floor, rtol=1e-9)
    assert theory.noise_floor(0.0, residual) == residual
    assert np.isnan(theory.noise_floor(2.0, 0.2))


@pytest.mark.parametrize("condition", [1.5, 3.0, 10.0])
def test_iht_contraction_bounds_one_step(condition):
    rng = np.random.default_rng(11)
    for k_star, k in ((3, 3), (3, 8)):
        bound = float(theory.iht_contraction(condition, theory.Counts(24, k, k_star)))
        for _ in range(30):
            hessian = oracles.random_positive(rng, 24, condition)
            support = oracles.random_mask(rng, 24, k_star)
            minimizer = np.where(support, rng.normal(size=24), 0)
            start = oracles.hard_threshold(minimizer + rng.normal(size=24), k)
            moved = start - hessian @ (start - minimizer) / condition
            after = oracles.hard_threshold(moved, k)
            error = np.linalg.norm(after - minimizer)
            assert error <= bound * np.linalg.norm(start - minimizer) * (1 + 1e-12)


@pytest.mark.parametrize("condition", [2.7, 5.0, 40.0])
def test_iht_contraction_needs_kappa_squared_over_four_times_the_weights(condition):
    least = 2 * (condition * (condition - 1) / (2 * condition - 1)) ** 2
    below = theory.Counts(100_000, least * 0.999, 2)
    above = theory.Counts(100_000, least * 1.001, 2)
    assert theory.iht_contraction(condition, below) > 1
    assert theory.iht_contraction(condition, above) < 1
