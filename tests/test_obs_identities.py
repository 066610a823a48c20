"""The optimal-brain-surgeon update in its five forms, and the package's own.

For H > 0, a point theta with gradient g, u = theta - H^-1 g, and a set Q of kept
entries, the minimizer of (x-u)'H(x-u)/2 over x supported on Q has a form with the
inverse on the removed set (a), on the support (b), from the gradient (c), as a
restricted Newton step (d), and as one removal after another (e).
"""

from typing import NamedTuple

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

from sparserec import quadratic

RTOL = 1e-10


class Case(NamedTuple):
    hessian: np.ndarray
    params: np.ndarray
    gradient: np.ndarray
    mask: np.ndarray
    rng: np.random.Generator

    @property
    def point(self) -> np.ndarray:
        return oracles.newton_point(self.hessian, self.params, self.gradient)


@st.composite
def cases(draw) -> Case:
    dim = draw(st.integers(1, 20))
    kept = draw(st.integers(0, dim))
    condition = 10 ** draw(st.floats(0.0, 4.0))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    hessian = oracles.random_positive(rng, dim, condition, skewed=draw(st.booleans()))
    return Case(
        hessian=hessian,
        params=rng.normal(size=dim),
        gradient=rng.normal(size=dim) * 10 ** draw(st.floats(-3.0, 3.0)),
        mask=oracles.random_mask(rng, dim, kept),
        rng=rng,
    )


def assert_same(actual, expected, scale):
    """Agreement to 1e-10 of the longest vector that enters the computation."""
    error = np.linalg.norm(np.asarray(actual) - expected)
    assert error <= RTOL * max(np.linalg.norm(expected), np.linalg.norm(scale))


# --- the identities ------------------------------------------------------------------


@hypothesis.given(cases())
def test_forms_agree(case):
    point = case.point
    reference = oracles.obs_constraint_form(case.hessian, point, case.mask)
    assert_same(reference[~case.mask], 0, point)
    reference = np.where(case.mask, reference, 0)
    support = oracles.obs_support_form(case.hessian, point, case.mask)
    gradient = oracles.obs_gradient_form(
        case.hessian, case.params, case.gradient, case.mask
    )
    order = case.rng.permutation(np.flatnonzero(~case.mask)).tolist()
    sequential = oracles.obs_sequential(case.hessian, point, order)
    assert_same(support, reference, point)
    assert_same(gradient, reference, point)
    assert_same(sequential, reference, point)


@hypothesis.given(cases())
def test_restricted_newton_step_agrees_from_the_support(case):
    params = np.where(case.mask, case.params, 0)
    point = oracles.newton_point(case.hessian, params, case.gradient)
    expected = oracles.obs_constraint_form(case.hessian, point, case.mask)
    restricted = oracles.obs_restricted_newton(
        case.hessian, params, case.gradient, case.mask
    )
    assert_same(restricted, expected, point)


@hypothesis.given(cases())
def test_values_agree(case):
    point, kept = case.point, case.mask
    best = oracles.obs_support_form(case.hessian, point, kept)
    step = best - point
    attained = step @ case.hessian @ step / 2
    linear = case.hessian @ point
    whole = point @ linear / 2
    explained = linear @ oracles.minimize_on(case.hessian, linear, kept) / 2
    removed_form = oracles.projection_value(case.hessian, point, kept)
    np.testing.assert_allclose(removed_form, attained, rtol=0, atol=RTOL * whole)
    np.testing.assert_allclose(whole - explained, attained, rtol=0, atol=RTOL * whole)


@hypothesis.given(cases(), st.integers(0, 2**32 - 1))
def test_update_is_the_minimizer(case, seed):
    # Independent of any formula: no feasible neighbor is better.
    point = case.point
    best = oracles.obs_support_form(case.hessian, point, case.mask)
    noise = np.random.default_rng(seed).normal(size=best.size)
    other = best + np.where(case.mask, noise, 0)

    def value(x):
        return (x - point) @ case.hessian @ (x - point) / 2

    assert value(best) <= value(other) * (1 + RTOL)


@pytest.mark.parametrize("seed", range(5))
def test_searches_agree(seed):
    # argmin over S of u_S'([H^-1]_SS)^-1 u_S = argmax over Q of b_Q'H_QQ^-1 b_Q.
    rng = np.random.default_rng(seed)
    hessian = oracles.random_positive(rng, 8, 1e3)
    point = rng.normal(size=8)
    projected = oracles.ideal_projection(hessian, point, 3)
    minimized = oracles.best_support(hessian, hessian @ point, 3)
    np.testing.assert_array_equal(projected.mask, minimized.mask)
    np.testing.assert_allclose(projected.params, minimized.params, atol=1e-10)
    constant = point @ hessian @ point / 2
    np.testing.assert_allclose(projected.value, minimized.value + constant)
    greedy = oracles.backward_elimination(hessian, point, 3)
    assert greedy.value >= projected.value * (1 - RTOL)


# --- the package's refit is form (c) -------------------------------------------------


def refit(curvature, params, gradient, mask):
    product = np.asarray(curvature.matvec(jnp.asarray(params)))
    rhs = jnp.asarray(product - gradient)
    return curvature.solve_on(jnp.asarray(mask), rhs, jnp.zeros(())).value


def drawn(seed, dim, kept, condition):
    rng = np.random.default_rng(seed)
    return Case(
        hessian=oracles.random_positive(rng, dim, condition),
        params=rng.normal(size=dim),
        gradient=rng.normal(size=dim),
        mask=oracles.random_mask(rng, dim, kept),
        rng=rng,
    )


def assert_refit_is_the_update(make_curvature, case, rtol=RTOL):
    curvature = make_curvature(case.hessian)
    expected = oracles.obs_constraint_form(case.hessian, case.point, case.mask)
    actual = np.asarray(refit(curvature, case.params, case.gradient, case.mask))
    error = np.linalg.norm(actual - expected)
    scale = max(np.linalg.norm(expected), np.linalg.norm(case.point))
    assert error <= rtol * scale
    assert not np.any(actual[~case.mask])


def low_rank(hessian):
    rows = np.linalg.cholesky(hessian).T
    return quadratic.LowRank(jnp.asarray(rows), jnp.zeros(()), None)


def low_rank_with_gram(hessian):
    rows = jnp.asarray(np.linalg.cholesky(hessian).T)
    return quadratic.low_rank(rows, jnp.zeros(rows.shape[1])).curvature


SHAPES = [(5, 0), (5, 5), (12, 4), (30, 11)]


@pytest.mark.parametrize(("dim", "kept"), SHAPES)
@pytest.mark.parametrize("condition", [1.0, 1e4])
@pytest.mark.parametrize(
    "make_curvature", [lambda h: quadratic.Dense(jnp.asarray(h)), low_rank_with_gram]
)
def test_direct_refit_is_the_update(make_curvature, dim, kept, condition):
    assert_refit_is_the_update(make_curvature, drawn(dim, dim, kept, condition))


@pytest.mark.parametrize(("dim", "kept"), SHAPES)
@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_low_rank_refit_is_the_update(dim, kept, condition):
    assert_refit_is_the_update(low_rank, drawn(dim, dim, kept, condition))


def test_diagonal_refit_is_the_update():
    for seed in range(5):
        case = drawn(seed, 9, 4, 1.0)
        entries = np.geomspace(1.0, 1e4, 9)
        case = case._replace(hessian=np.diag(entries))
        assert_refit_is_the_update(
            lambda h: quadratic.Diagonal(jnp.asarray(np.diag(h))), case
        )


@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_block_diagonal_refit_is_the_update(condition):
    rng = np.random.default_rng(0)
    blocks = np.stack([oracles.random_positive(rng, 4, condition) for _ in range(3)])
    hessian = np.zeros((12, 12))
    for index, block in enumerate(blocks):
        place = slice(4 * index, 4 * index + 4)
        hessian[place, place] = block
    # The last mask removes a whole block.
    for kept in (0, 5, 12, None):
        case = drawn(3, 12, kept or 0, 1.0)._replace(hessian=hessian)
        if kept is None:
            case = case._replace(mask=np.arange(12) < 8)
        assert_refit_is_the_update(
            lambda _: quadratic.BlockDiagonal(jnp.asarray(blocks)), case
        )


@pytest.mark.parametrize(("dim", "kept"), SHAPES)
@pytest.mark.parametrize("condition", [1.0, 1e4])
def test_matrix_free_refit_is_the_update(dim, kept, condition):
    case = drawn(dim, dim, kept, condition)

    def loss(params, matrix):
        return params @ matrix @ params / 2

    build = quadratic.Hessian(dense_limit=0, cg_steps=20 * dim, cg_tol=1e-13)
    model = build(loss, jnp.asarray(case.params), (jnp.asarray(case.hessian),))
    # Conjugate gradients stop at a residual; the error is up to condition times that.
    assert_refit_is_the_update(lambda _: model.curvature, case, rtol=1e-8)


def test_refit_by_sparse_rows_needs_no_damping():
    # H is singular, H_QQ is not: fewer examples than weights, support below both.
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(10, 25)) / np.sqrt(10)
    coefficients = np.where(oracles.random_mask(rng, 25, 4), 1.5, 0.0)
    mask = coefficients != 0
    model = quadratic.least_squares(jnp.asarray(rows), jnp.asarray(rows @ coefficients))
    zeros = np.zeros(25)
    actual = refit(model.curvature, zeros, np.asarray(model.gradient), mask)
    np.testing.assert_allclose(np.asarray(actual), coefficients, rtol=1e-10)


def test_damped_refit_solves_the_shifted_system():
    case = drawn(7, 14, 6, 1e3)
    damping = 0.3
    shifted = case.hessian + damping * np.eye(14)
    expected = oracles.minimize_on(shifted, case.gradient, case.mask)
    for make_curvature in (lambda h: quadratic.Dense(jnp.asarray(h)), low_rank):
        solve = jax.jit(make_curvature(case.hessian).solve_on)
        arguments = (case.mask, case.gradient, damping)
        actual = solve(*map(jnp.asarray, arguments)).value
        np.testing.assert_allclose(np.asarray(actual), expected, rtol=1e-9, atol=1e-12)
