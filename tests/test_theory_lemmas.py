"""Lemmas 4 and 7: the stochastic step and the norm of the update, both corrected."""

import hypothesis
import hypothesis.strategies as st
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from sparserec import theory


def update_map(hessian, mask):
    """Matrix of u -> u - x for the OBS update x of u, column by column."""
    columns = np.eye(len(hessian))
    updated = [oracles.obs_constraint_form(hessian, column, mask) for column in columns]
    return columns - np.stack(updated, axis=1)


def test_oblique_projector_can_exceed_one():
    # The smallest counterexample to the printed lemma.
    hessian = np.array([[1.0, 0.9], [0.9, 1.0]])
    projector = update_map(hessian, np.array([False, True]))
    np.testing.assert_allclose(projector @ projector, projector, atol=1e-12)
    norm = np.linalg.norm(projector, 2)
    assert norm > 1.3
    assert norm <= theory.oblique_projection_bound(1.9 / 0.1)


@hypothesis.given(st.integers(2, 10), st.floats(0, 4), st.integers(0, 2**32 - 1))
def test_oblique_projection_bound_holds(dim, exponent, seed):
    rng = np.random.default_rng(seed)
    condition = 10**exponent
    hessian = oracles.random_positive(rng, dim, condition)
    mask = oracles.random_mask(rng, dim, int(rng.integers(1, dim)))
    projector = update_map(hessian, mask)
    bound = float(theory.oblique_projection_bound(condition))
    assert np.linalg.norm(projector, 2) <= bound * (1 + 1e-9)
    assert np.linalg.norm(np.eye(dim) - projector, 2) <= bound * (1 + 1e-9)
    # What the proof of Theorem 1 needs: at most 1 / mu, and mu = 1 here.
    step = projector @ np.linalg.inv(hessian)
    assert np.linalg.norm(step, 2) <= 1 + 1e-9


@pytest.mark.parametrize("condition", [1.0, 10.0, 1e4])
def test_oblique_projection_bound_is_attained(condition):
    # In the plane the norm is the largest over rotations of the eigenvectors.
    spectrum = np.diag([1.0, condition])
    norms = []
    for angle in np.linspace(0, np.pi / 2, 20_001):
        cos, sin = np.cos(angle), np.sin(angle)
        turn = np.array([[cos, -sin], [sin, cos]])
        hessian = turn @ spectrum @ turn.T
        # u - x = (1, H_21 / H_22)' u_1 when entry 1 is removed: norm of the column.
        norms.append(np.hypot(1.0, hessian[1, 0] / hessian[1, 1]))
    bound = float(theory.oblique_projection_bound(condition))
    np.testing.assert_allclose(max(norms), bound, rtol=1e-5)


@hypothesis.given(
    st.integers(1, 12),
    st.floats(0.1, 10.0),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_stochastic_step_minimizes_the_model(dim, smoothness, inside, seed):
    rng = np.random.default_rng(seed)
    gradient, params = rng.normal(size=(2, dim))
    mask = oracles.random_mask(rng, dim, int(rng.integers(0, dim + 1)))
    if inside:
        params = np.where(mask, params, 0)
    norm = np.linalg.norm(gradient)
    hessian = smoothness * np.eye(dim) + np.outer(gradient, gradient) / norm
    exact = oracles.obs_gradient_form(hessian, params, gradient, mask)
    arguments = jnp.asarray(gradient), jnp.asarray(params), jnp.asarray(mask)
    step = float(theory.stochastic_step_size(*arguments, smoothness))
    updated = np.where(mask, params - step * gradient, 0)
    np.testing.assert_allclose(updated, exact, rtol=1e-9, atol=1e-12)
    printed = float(theory.stochastic_step_size(*arguments, smoothness, printed=True))
    if inside:
        np.testing.assert_allclose(printed, step, rtol=1e-12)


def test_printed_stochastic_step_is_wrong_off_the_support():
    gradient, params = jnp.array([3.0, 4.0]), jnp.array([2.0, 1.0])
    mask = jnp.array([True, False])
    hessian = np.eye(2) + np.outer([3, 4], [3, 4]) / 5
    exact = oracles.obs_gradient_form(
        hessian, np.asarray(params), np.asarray(gradient), np.asarray(mask)
    )
    corrected = theory.stochastic_step_size(gradient, params, mask, 1.0)
    printed = theory.stochastic_step_size(gradient, params, mask, 1.0, printed=True)
    np.testing.assert_allclose(2.0 - 3.0 * corrected, exact[0], rtol=1e-12)
    assert abs(2.0 - 3.0 * printed - exact[0]) > 0.5
