"""Curvature of linear predictions: against the Hessian of JAX, and in solvers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from sparserec import Status, l0cd, losses, quadratic, splicing

LOSSES = {
    "logistic": losses.logistic,
    "poisson": losses.poisson,
    "squared": losses.squared,
    "weighted": functools.partial(losses.logistic, weights=jnp.arange(1.0, 41.0)),
}


def data(seed=0, rows=40, size=6):
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(rows, size))
    labels = (inputs[:, 1] - inputs[:, 4] + rng.logistic(size=rows) > 0).astype(float)
    return jnp.asarray(inputs), jnp.asarray(labels)


@pytest.mark.parametrize("name", LOSSES)
def test_models_against_automatic_differentiation(name):
    inputs, labels = data()
    curvature = quadratic.linear_predictor(LOSSES[name])

    def loss(params):
        return LOSSES[name](inputs @ params, labels)

    params = jnp.asarray(np.random.default_rng(1).normal(size=6))
    model = curvature(curvature.loss, params, (inputs, labels))
    np.testing.assert_allclose(model.value, loss(params), rtol=1e-12)
    np.testing.assert_allclose(model.gradient, jax.grad(loss)(params), atol=1e-12)
    exact = jax.hessian(loss)(params)
    products = jax.vmap(model.curvature.matvec)(jnp.eye(6))
    np.testing.assert_allclose(products, exact, atol=1e-12)


def test_the_restricted_loss_is_the_loss_on_the_support():
    curvature = quadratic.linear_predictor(losses.logistic)
    inputs, labels = data()
    part = jnp.asarray([0.5, -2.0])
    whole = jnp.zeros(6).at[jnp.asarray([4, 1])].set(part)
    _, restricted = curvature.on_support(
        curvature.loss, whole, (inputs, labels), jnp.asarray([4, 1])
    )
    np.testing.assert_allclose(
        curvature.loss(part, *restricted), curvature.loss(whole, inputs, labels)
    )


@pytest.mark.parametrize("solver", [l0cd, splicing])
def test_the_best_support_of_all(solver):
    inputs, labels = data(2, rows=200)
    curvature = quadratic.linear_predictor(losses.logistic)
    found = solver(
        curvature.loss, jnp.zeros(6), 3, args=(inputs, labels), curvature=curvature
    )

    def value(kept):
        part, weights = np.asarray(inputs)[:, kept], np.zeros(len(kept))
        for _ in range(30):
            share = 1 / (1 + np.exp(-part @ weights))
            bend = (part.T * (share * (1 - share))) @ part
            weights -= np.linalg.solve(bend, part.T @ (share - labels))
        scores = part @ weights
        return np.mean(np.logaddexp(0, scores) - labels * scores)

    best = min(value(np.flatnonzero(mask)) for mask in oracles.all_masks(6, 3))
    assert found.status == Status.CONVERGED
    np.testing.assert_allclose(found.objective, best, rtol=1e-9)


def test_params_and_data_of_another_form():
    inputs, labels = data()
    curvature = quadratic.linear_predictor(losses.logistic)
    with pytest.raises(ValueError, match="one vector"):
        curvature(curvature.loss, {"w": jnp.zeros(6)}, (inputs, labels))
    with pytest.raises(ValueError, match=r"shape \(examples, 5\)"):
        curvature(curvature.loss, jnp.zeros(5), (inputs, labels))
