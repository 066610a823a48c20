"""Enumeration and lower bounds: one is exact, the other never above it."""

from typing import Any, cast

import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserec import Status, quadratic
from sparserec.recovery import exhaustive, lower_bound
from sparserec.recovery._bound import _bound

ROWS, SIZE = 30, 9


def compilations():
    return cast(Any, _bound)._cache_size()


def model_of(seed, correlation=0.6):
    rng = np.random.default_rng(seed)
    design = rng.normal(size=(ROWS, SIZE)) + correlation * rng.normal(size=(ROWS, 1))
    response = design[:, 2] - design[:, 6] + 0.5 * rng.normal(size=ROWS)
    model = quadratic.least_squares(jnp.asarray(design), jnp.asarray(response))
    return model, design, response


@pytest.mark.parametrize("k", [0, 1, 3, SIZE])
def test_enumeration_against_the_oracle(k):
    model, design, response = model_of(k)
    found = exhaustive(model, k)
    best = oracles.best_support(design.T @ design, design.T @ response, k)
    np.testing.assert_allclose(
        found.objective, best.value + response @ response / 2, rtol=1e-10
    )
    np.testing.assert_array_equal(found.mask, best.mask)
    np.testing.assert_allclose(found.params, best.params, atol=1e-10)
    assert found.status == Status.CONVERGED


def test_a_penalty_may_keep_fewer():
    model, design, response = model_of(1)
    found = exhaustive(model, 4, penalty=2.0, l2=0.5)
    matrix = design.T @ design + np.eye(SIZE)
    values = [
        oracles.best_support(matrix, design.T @ response, kept).value + 2.0 * kept
        for kept in range(5)
    ]
    expected = min(values) + response @ response / 2
    np.testing.assert_allclose(found.objective, expected, rtol=1e-10)
    assert found.mask.sum() == np.argmin(values)


def test_singular_supports_are_left_out():
    model = quadratic.dense(jnp.ones((3, 3)), jnp.zeros(3), -jnp.ones(3))
    assert exhaustive(model, 2).status == Status.NOT_POSITIVE_DEFINITE
    assert exhaustive(model, 1).status == Status.CONVERGED


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    k=st.integers(0, 5),
    l2=st.sampled_from([0.01, 0.3, 3.0, 30.0]),
    penalty=st.sampled_from([0.0, 0.4, 4.0]),
)
def test_the_bound_is_never_above_the_optimum(seed, k, l2, penalty):
    model, _, _ = model_of(seed)
    best = exhaustive(model, k, l2=l2, penalty=penalty)
    bound = lower_bound(model, k, l2=l2, penalty=penalty, objective=best.objective)
    assert float(bound.value) <= float(best.objective) * (1 + 1e-9)
    assert bound.gap >= -1e-9


def test_the_bound_is_tight_where_the_ridge_is_strong():
    model, _, _ = model_of(3)
    gaps = []
    for l2 in (0.1, 10.0, 1000.0):
        best = exhaustive(model, 1, l2=l2)
        gaps.append(float(lower_bound(model, 1, objective=best.objective, l2=l2).gap))
    assert gaps[0] > gaps[1] > gaps[2]
    assert gaps[2] < 1e-3


def test_the_bound_is_that_of_the_perspective_relaxation():
    optimize = pytest.importorskip("scipy.optimize")
    model, design, response = model_of(4)
    k, l2 = 3, 1.0

    def relaxed(shares):
        # min over w of the loss + l2 sum w_j^2 / z_j, in closed form over rows.
        inner = np.eye(ROWS) + (design * shares) @ design.T / (2 * l2)
        return response @ np.linalg.solve(inner, response) / 2

    result = optimize.minimize(
        relaxed,
        np.full(SIZE, k / SIZE),
        bounds=[(0, 1)] * SIZE,
        constraints={"type": "ineq", "fun": lambda z: k - z.sum()},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    bound = lower_bound(model, k, l2=l2, tol=1e-10)
    np.testing.assert_allclose(bound.value, result.fun, rtol=1e-5)


def test_a_ridge_of_the_model_counts():
    model, design, response = model_of(5)
    ridged = quadratic.least_squares(
        jnp.asarray(design), jnp.asarray(response), ridge=2.0
    )
    apart = lower_bound(model, 3, l2=1.0)
    within = lower_bound(ridged, 3, ridge=2.0)
    np.testing.assert_allclose(apart.value, within.value, rtol=1e-6)


def test_without_a_ridge_there_is_no_bound():
    bound = lower_bound(model_of(6)[0], 3)
    assert bound.value == -np.inf
    assert np.isnan(bound.gap)


def test_one_compilation_for_all_budgets():
    model, _, _ = model_of(7)
    lower_bound(model, 1, l2=1.0)
    before = compilations()
    for k in range(SIZE + 1):
        lower_bound(model, k, l2=0.1 * k, penalty=float(k))
    assert compilations() == before


def test_wrong_input():
    model, _, _ = model_of(8)
    wide = quadratic.dense(jnp.eye(26), jnp.zeros(26))
    with pytest.raises(ValueError, match="at most 25 weights, got 26"):
        exhaustive(wide, 2)
    with pytest.raises(TypeError, match="a Python integer, got"):
        exhaustive(model, 2.0)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"\[0, 9\]"):
        exhaustive(model, 10)
    with pytest.raises(ValueError, match=r"\[0, 9\]"):
        lower_bound(model, 10)
    with pytest.raises(ValueError, match="`max_steps`"):
        lower_bound(model, 2, max_steps=0)
