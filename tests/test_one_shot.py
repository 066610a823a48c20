"""The one-shot classics against slow NumPy versions of their papers' recipes."""

import jax.numpy as jnp
import numpy as np
import pytest

import sparserec
from sparserec import quadratic


def random_problem(seed, size=12):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(2 * size, size))
    return factor.T @ factor, rng.normal(size=size)


@pytest.mark.parametrize("k", [0, 3, 11, 12])
def test_obd_keeps_the_largest_saliencies_untouched(k):
    hessian, weights = random_problem(0)
    model = quadratic.dense(jnp.asarray(hessian), jnp.asarray(weights))
    solution = sparserec.obd(model, jnp.asarray(weights), k)
    saliency = np.diag(hessian) * weights**2
    expected = np.argsort(-saliency, kind="stable")[:k]
    assert sorted(np.flatnonzero(solution.mask)) == sorted(expected)
    kept = np.zeros(weights.size)
    kept[expected] = weights[expected]
    np.testing.assert_array_equal(solution.params, kept)
    error = kept - weights
    np.testing.assert_allclose(solution.objective, 0.5 * error @ hessian @ error)
    assert sparserec.check(solution) is solution


@pytest.mark.parametrize("k", [0, 4, 11, 12])
def test_obs_removes_one_by_one_and_refits_exactly(k):
    hessian, weights = random_problem(1)
    model = quadratic.dense(jnp.asarray(hessian), jnp.asarray(weights))
    solution = sparserec.obs(model, jnp.asarray(weights), k)

    # Slow: solve the full constrained problem again for every candidate removal.
    def refit(alive):
        values = np.zeros(weights.size)
        if alive:
            right = hessian[alive] @ weights
            values[alive] = np.linalg.solve(hessian[np.ix_(alive, alive)], right)
        error = values - weights
        return values, 0.5 * error @ hessian @ error

    alive = list(range(weights.size))
    while len(alive) > k:
        options = [[i for i in alive if i != gone] for gone in alive]
        alive = min(options, key=lambda option: refit(option)[1])
    values, loss = refit(alive)
    assert list(np.flatnonzero(solution.mask)) == alive
    np.testing.assert_allclose(solution.params, values, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(solution.objective, loss, rtol=1e-9, atol=1e-12)


def test_obs_respects_budgets_of_leaves():
    hessian, weights = random_problem(2)
    params = {"a": jnp.asarray(weights[:8]), "b": jnp.asarray(weights[8:])}
    model = quadratic.dense(jnp.asarray(hessian), params)
    solution = sparserec.obs(model, params, {"a": 2})
    assert int(solution.mask["a"].sum()) == 2
    assert bool(solution.mask["b"].all())


def test_obs_says_that_an_indefinite_curvature_needs_damping():
    indefinite = jnp.diag(jnp.array([1.0, -1.0, 2.0]))
    weights = jnp.array([3.0, 2.0, 1.0])
    model = quadratic.dense(indefinite, weights)
    solution = sparserec.obs(model, weights, 2)
    assert solution.status == sparserec.Status.NOT_POSITIVE_DEFINITE
    np.testing.assert_array_equal(solution.params, [3.0, 2.0, 0.0])
    with pytest.raises(sparserec.SolveError, match="damping"):
        sparserec.check(solution)


def test_obs_needs_a_stored_curvature():
    curvature = quadratic.Hessian(dense_limit=0)
    with pytest.raises(ValueError, match="to_matrix"):
        sparserec.obs(lambda w: jnp.sum(w**2), jnp.ones(3), 1, curvature=curvature)
