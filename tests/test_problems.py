"""The problems have the answers and constants that they claim."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparserec import problems, theory

KEY = jax.random.key(0)


def keys(count):
    return jax.random.split(KEY, count)


@pytest.mark.parametrize("k", [0, 3, 20])
def test_answers_are_k_sparse_and_far_from_zero(k):
    @jax.jit
    @jax.vmap
    def draw(key):
        return problems.gaussian_design(key, 4, 20, k).coefficients

    values = np.asarray(draw(keys(50)))
    assert np.all(np.count_nonzero(values, axis=1) == k)
    assert np.all(np.abs(values[values != 0]) >= 0.5)
    if k == 3:
        # Every place and both signs occur among 150 draws.
        assert np.all(np.any(values != 0, axis=0))
        assert np.min(values) < 0 < np.max(values)


def test_designs_have_the_promised_covariance():
    @jax.jit
    @jax.vmap
    def draw(key):
        return problems.correlated_design(key, 50, 6, 2, 0.7).design

    designs = np.asarray(draw(keys(400)))
    measured = np.einsum("tni,tnj->ij", designs, designs) / len(designs)
    places = np.arange(6)
    expected = 0.7 ** np.abs(places[:, None] - places[None, :])
    # 20,000 rows: standard error of an entry at most sqrt(2 / 20,000) = 0.01.
    np.testing.assert_allclose(measured, expected, atol=0.05)
    independent = np.asarray(problems.gaussian_design(KEY, 3000, 5, 2).design)
    np.testing.assert_allclose(independent.T @ independent, np.eye(5), atol=0.15)


def test_noise_is_per_example_before_scaling():
    draw = problems.gaussian_design(KEY, 4000, 3, 1, noise=0.5)
    residual = draw.response - draw.design @ draw.coefficients
    np.testing.assert_allclose(np.linalg.norm(residual), 0.5, rtol=0.05)
    exact = problems.correlated_design(KEY, 30, 8, 4, 0.9)
    np.testing.assert_allclose(
        exact.response, exact.design @ exact.coefficients, atol=1e-14
    )


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_spectrum_is_geometric(condition):
    problem = problems.ill_conditioned_quadratic(KEY, 9, 3, condition)
    spectrum = np.linalg.eigvalsh(np.asarray(problem.matrix))
    np.testing.assert_allclose(spectrum, np.geomspace(1, condition, 9), rtol=1e-9)
    assert problems.quadratic_loss(problem.minimizer, *problem.args) == 0


def reference_log_cosh(params, problem):
    """The formula of the docstring in extended precision."""
    matrix, minimizer, scale = (np.asarray(x, np.longdouble) for x in problem.args)
    tilt = np.arctanh(1 / np.sqrt(np.longdouble(3)))
    error = np.asarray(params, np.longdouble) - minimizer
    terms = np.log(np.cosh(error + tilt) / np.cosh(tilt)) - error * np.tanh(tilt)
    return error @ matrix @ error / 2 + scale * np.sum(terms)


@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 30.0])
def test_log_cosh_loss_is_its_formula(size):
    problem = problems.log_cosh(KEY, 6, 2, 10.0, 5.0)
    direction = jax.random.normal(jax.random.key(1), (6,))
    params = problem.minimizer + size * direction
    actual = problems.log_cosh_loss(params, *problem.args)
    expected = float(reference_log_cosh(params, problem))
    np.testing.assert_allclose(actual, expected, rtol=1e-6 if size < 1e-3 else 1e-12)


def test_log_cosh_derivatives_are_those_of_the_loss():
    problem = problems.log_cosh(KEY, 6, 2, 10.0, 5.0)
    direction = jax.random.normal(jax.random.key(1), (6,))

    def along(t):
        return problems.log_cosh_loss(problem.minimizer + t * direction, *problem.args)

    for place in (-2.0, 0.0, 1e-3, 0.7):
        step = 1e-3
        exact = [
            reference_log_cosh(problem.minimizer + t * direction, problem)
            for t in (place - step, place, place + step)
        ]
        slope = (exact[2] - exact[0]) / (2 * step)
        bend = (exact[2] - 2 * exact[1] + exact[0]) / step**2
        scale = 1 + abs(float(slope))
        np.testing.assert_allclose(
            jax.grad(along)(place), float(slope), atol=1e-4 * scale
        )
        np.testing.assert_allclose(
            jax.grad(jax.grad(along))(place), float(bend), rtol=1e-4
        )


def test_log_cosh_constants_hold_everywhere():
    problem = problems.log_cosh(KEY, 5, 2, 30.0, 20.0)
    strong_convexity, smoothness, lipschitz = map(float, problem.constants)
    assert isinstance(problem.constants, theory.Constants)
    gradient = jax.grad(problems.log_cosh_loss)(problem.minimizer, *problem.args)
    np.testing.assert_allclose(gradient, 0, atol=0)
    hessian = jax.jit(jax.hessian(problems.log_cosh_loss))
    rng = np.random.default_rng(0)
    steepest = 0.0
    for scale in (0.01, 0.3, 3.0):
        for _ in range(20):
            first = problem.minimizer + scale * rng.normal(size=5)
            # One coordinate at a time: that is where the constant is attained.
            move = np.eye(5)[rng.integers(5)] * scale * rng.normal()
            one, two = (
                np.asarray(hessian(p, *problem.args)) for p in (first, first + move)
            )
            spectrum = np.linalg.eigvalsh(one)
            assert strong_convexity - 1e-9 <= spectrum[0]
            assert spectrum[-1] <= smoothness + 1e-9
            slope = np.linalg.norm(one - two, 2) / np.linalg.norm(move)
            assert slope <= lipschitz * (1 + 1e-9)
            steepest = max(steepest, slope)
    # The constant is not merely safe: it is attained at the minimizer.
    assert steepest >= 0.95 * lipschitz


def test_near_tight_start_differs_on_the_support():
    problem, start = problems.near_tight_log_cosh(KEY, 10, 3, 1e-3)
    difference = np.asarray(start - problem.minimizer)
    (place,) = np.flatnonzero(difference)
    np.testing.assert_allclose(difference[place], 1e-3, rtol=1e-9)
    assert problem.minimizer[place] != 0
    np.testing.assert_allclose(problem.matrix, np.eye(10), atol=1e-12)


def test_problems_can_be_drawn_in_batches_and_compiled():
    def draw(key, k):
        return problems.log_cosh(key, 8, k, 10.0, 1.0).minimizer

    counts = jnp.array([1, 4, 8])
    batch = jax.jit(jax.vmap(draw))(keys(3), counts)
    np.testing.assert_array_equal(jnp.count_nonzero(batch, axis=1), counts)
    single = draw(keys(3)[1], 4)
    np.testing.assert_allclose(batch[1], single, rtol=1e-12)


def test_losses_are_shared_by_instances():
    # A solver compiles once per loss function; the data are arguments.
    traces = []

    @jax.jit
    def counted(params, args):
        traces.append(None)
        return problems.log_cosh_loss(params, *args)

    for seed in range(3):
        problem = problems.log_cosh(jax.random.key(seed), 4, 2, 10.0, seed + 1.0)
        counted(problem.minimizer, problem.args)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: problems.gaussian_design(jnp.zeros(2), 3, 4, 2),
            TypeError,
            "jax.random.key",
        ),
        (lambda: problems.log_cosh(jnp.zeros(2), 4, 2, 1, 1), TypeError, "typed"),
        (lambda: problems.gaussian_design(KEY, 3, 4, 5), ValueError, r"\[0, 4\]"),
        (
            lambda: problems.ill_conditioned_quadratic(KEY, 4, -1, 2.0),
            ValueError,
            "4 weights",
        ),
    ],
)
def test_bad_input_says_what_to_do(call, error, words):
    with pytest.raises(error, match=words):
        call()
