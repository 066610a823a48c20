"""Linear solves against NumPy: values, verdicts, and what happens off the mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserec import Status, _linsolve, _tree

SHAPES = {"a": jnp.zeros((2, 3)), "b": (jnp.zeros(()), jnp.zeros(2))}
LAYOUT = _tree.layout(SHAPES)
DIM = LAYOUT.size


def tree(flat):
    return LAYOUT.split(jnp.asarray(flat))


def flat(params):
    return np.asarray(_tree.flatten(params))


def product_with(matrix):
    return lambda v: LAYOUT.split(_linsolve.matmul(matrix, _tree.flatten(v)))


def cg_of_arrays(matrix, rhs, mask, damping, tol, scaling, *, max_steps, on_host=False):
    """CG on the tree above, preconditioned by a diagonal."""
    return _linsolve.conjugate_gradients(
        product_with(matrix),
        rhs,
        mask,
        damping=damping,
        tol=tol,
        max_steps=max_steps,
        precondition=lambda r: jax.tree.map(jnp.multiply, LAYOUT.split(scaling), r),
        on_host=on_host,
    )


compiled_cg = jax.jit(cg_of_arrays, static_argnames=("max_steps", "on_host"))


def cg(matrix, rhs, mask=None, damping=0.0, tol=1e-12, scaling=None, max_steps=50):
    mask = np.ones(DIM, bool) if mask is None else mask
    scaling = np.ones(DIM) if scaling is None else scaling
    value, status = compiled_cg(
        matrix, tree(rhs), tree(mask), damping, tol, scaling, max_steps=max_steps
    )
    return flat(value), Status(int(status))


def positive(seed, condition=30.0):
    return oracles.random_positive(np.random.default_rng(seed), DIM, condition)


def vector(seed):
    return np.random.default_rng(seed).normal(size=DIM)


# --- conjugate gradients: values -----------------------------------------------------


@given(
    seed=st.integers(0, 2**32 - 1),
    kept=st.integers(0, DIM),
    damping=st.sampled_from([0.0, 1e-3, 10.0]),
)
@settings(max_examples=40)
def test_cg_solves_on_the_support(seed, kept, damping):
    rng = np.random.default_rng(seed)
    matrix, rhs = positive(seed), rng.normal(size=DIM)
    mask = oracles.random_mask(rng, DIM, kept)
    value, status = cg(matrix, rhs, mask, damping)
    expected = oracles.minimize_on(matrix + damping * np.eye(DIM), rhs, mask)
    np.testing.assert_allclose(value, expected, rtol=1e-9, atol=1e-9)
    assert status == Status.CONVERGED
    assert not np.any(value[~mask])


def test_cg_ignores_what_is_off_the_mask():
    mask = np.arange(DIM) % 2 == 0
    rhs = np.where(mask, vector(1), np.nan)
    value, status = cg(positive(1), rhs, mask)
    clean, _ = cg(positive(1), np.where(mask, rhs, 0.0), mask)
    np.testing.assert_array_equal(value, clean)
    assert status == Status.CONVERGED


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_few_steps_minimize_over_the_krylov_space(steps):
    matrix, rhs = positive(2, 1e3), vector(2)
    value, status = cg(matrix, rhs, max_steps=steps)
    powers = [np.linalg.matrix_power(matrix, i) @ rhs for i in range(steps)]
    basis, _ = np.linalg.qr(np.stack(powers, axis=1))
    inside = np.linalg.solve(basis.T @ matrix @ basis, basis.T @ rhs)
    np.testing.assert_allclose(value, basis @ inside, rtol=1e-6, atol=1e-8)
    assert status == Status.MAX_STEPS


@pytest.mark.parametrize("tol", [0.3, 1e-2, 1e-5])
def test_cg_stops_at_the_tolerance(tol):
    matrix, rhs = positive(3, 1e3), vector(3)
    value, status = cg(matrix, rhs, tol=tol)
    residual = np.linalg.norm(rhs - matrix @ value) / np.linalg.norm(rhs)
    assert status == Status.CONVERGED
    assert 1e-11 < residual <= tol * (1 + 1e-6)


def test_exact_preconditioner_needs_one_step():
    diagonal = np.geomspace(1, 1e8, DIM)
    mask = np.arange(DIM) > 2
    rhs = vector(4)
    value, status = cg(np.diag(diagonal), rhs, mask, scaling=1 / diagonal, max_steps=1)
    np.testing.assert_allclose(value, np.where(mask, rhs / diagonal, 0), rtol=1e-12)
    assert status == Status.CONVERGED


@pytest.mark.parametrize("scaling", [np.geomspace(1, 50, DIM), np.full(DIM, 1e-3)])
def test_any_positive_preconditioner_gives_the_same_answer(scaling):
    matrix, rhs = positive(5), vector(5)
    value, status = cg(matrix, rhs, scaling=scaling)
    np.testing.assert_allclose(value, np.linalg.solve(matrix, rhs), rtol=1e-9)
    assert status == Status.CONVERGED


@pytest.mark.parametrize("scale", [1e-60, 1e60])
def test_cg_does_not_depend_on_units(scale):
    matrix, rhs = positive(6), vector(6)
    value, status = cg(matrix, rhs * scale)
    np.testing.assert_allclose(value / scale, np.linalg.solve(matrix, rhs), rtol=1e-9)
    assert status == Status.CONVERGED


# --- conjugate gradients: verdicts ---------------------------------------------------


@pytest.mark.parametrize("mask", [np.ones(DIM, bool), np.zeros(DIM, bool)])
def test_zero_right_hand_side_is_solved_by_zero(mask):
    rhs = np.where(mask, 0.0, vector(7))
    value, status = cg(-positive(7), rhs, mask)  # no product is asked for
    np.testing.assert_array_equal(value, 0)
    assert status == Status.CONVERGED


def test_negative_curvature_at_once_leaves_zero():
    value, status = cg(-positive(8), vector(8))
    np.testing.assert_array_equal(value, 0)
    assert status == Status.NOT_POSITIVE_DEFINITE


def test_negative_curvature_later_keeps_the_iterate_before():
    rhs = np.ones(DIM)
    matrix = np.diag([-0.5, *np.arange(1.0, DIM)])
    value, status = cg(matrix, rhs)
    assert status == Status.NOT_POSITIVE_DEFINITE
    assert np.all(np.isfinite(value))
    assert oracles.quadratic_value(matrix, rhs, value) < 0  # below the start
    damped, status = cg(matrix, rhs, damping=1.0)
    np.testing.assert_allclose(damped, 1 / (np.diag(matrix) + 1), rtol=1e-9)
    assert status == Status.CONVERGED


def test_negative_curvature_off_the_mask_is_not_met():
    matrix = np.diag([-0.5, *np.arange(1.0, DIM)])
    _, status = cg(matrix, np.ones(DIM), np.arange(DIM) > 0)
    assert status == Status.CONVERGED


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", ["matrix", "rhs"])
def test_what_is_not_finite_is_reported(bad, where):
    matrix, rhs = positive(9), vector(9)
    if where == "matrix":
        matrix[3, 3] = bad
    else:
        rhs[3] = bad
    _, status = cg(matrix, rhs)
    assert status == Status.NONFINITE


# --- conjugate gradients: the same everywhere ----------------------------------------


def lanes():
    """Solves that end for different reasons after different numbers of steps."""
    matrices = np.stack([positive(10), np.eye(DIM), -np.eye(DIM), positive(11, 1e6)])
    rhs = np.stack([vector(i) for i in range(4)])
    masks = np.stack([np.arange(DIM) < n for n in (DIM, 4, 5, DIM)])
    return matrices, rhs, masks


def test_vmap_of_solves_equals_the_loop():
    def solve(matrix, rhs, mask):
        return cg_of_arrays(
            matrix,
            LAYOUT.split(rhs),
            LAYOUT.split(mask),
            0.0,
            1e-12,
            jnp.ones(DIM),
            max_steps=8,
        )

    values, statuses = jax.jit(jax.vmap(solve))(*lanes())
    expected = [cg(m, b, q, max_steps=8) for m, b, q in zip(*lanes(), strict=True)]
    for lane, (value, status) in enumerate(expected):
        got = flat(jax.tree.map(lambda x: x[lane], values))  # noqa: B023
        np.testing.assert_allclose(got, value, rtol=1e-9, atol=1e-12)
        assert statuses[lane] == status
    assert {int(s) for s in statuses} == {
        Status.CONVERGED,
        Status.NOT_POSITIVE_DEFINITE,
        Status.MAX_STEPS,
    }


@pytest.mark.parametrize("lane", [0, 2])
def test_loop_on_the_host_equals_the_compiled_one(lane):
    matrix, rhs, mask = (x[lane] for x in lanes())
    arguments = (matrix, tree(rhs), tree(mask), 0.1, 1e-12, jnp.ones(DIM))
    on_host = cg_of_arrays(*arguments, max_steps=50, on_host=True)
    compiled = compiled_cg(*arguments, max_steps=50)
    np.testing.assert_allclose(
        flat(on_host.value), flat(compiled.value), rtol=1e-9, atol=1e-12
    )
    assert on_host.status == compiled.status


def test_host_loop_may_look_at_its_state():
    def body(state):
        return state - (1.0 if float(state) > 2 else 0.5)  # refused under jit

    end = _linsolve.while_loop(lambda x: x > 0, body, jnp.asarray(4.0), on_host=True)
    assert end == 0


# --- factorisations ------------------------------------------------------------------


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_cholesky_solves_and_inverts(transform):
    matrix, rhs = positive(12), vector(12)
    value, succeeded = transform(_linsolve.solve_positive)(matrix, rhs)
    np.testing.assert_allclose(value, np.linalg.solve(matrix, rhs), rtol=1e-10)
    inverse, invertible = transform(_linsolve.inverse_positive)(matrix)
    np.testing.assert_allclose(inverse, np.linalg.inv(matrix), rtol=1e-9, atol=1e-12)
    assert succeeded
    assert invertible


NOT_POSITIVE = {
    "negative": np.diag([1.0, -1.0]),
    "singular": np.ones((2, 2)),
    "indefinite": np.array([[1.0, 2.0], [2.0, 1.0]]),
    "zero": np.zeros((2, 2)),
    "nan": np.array([[1.0, np.nan], [np.nan, 1.0]]),
}
jitted_solve = jax.jit(_linsolve.solve_positive)
jitted_inverse = jax.jit(_linsolve.inverse_positive)


@pytest.mark.parametrize("name", NOT_POSITIVE)
def test_failed_factorisations_say_so(name):
    value, succeeded = jitted_solve(NOT_POSITIVE[name], np.ones(2))
    assert not succeeded
    assert not np.any(np.isfinite(value))
    assert _linsolve.direct_status(succeeded, value) == Status.NOT_POSITIVE_DEFINITE
    _, invertible = jitted_inverse(NOT_POSITIVE[name])
    assert not invertible


def test_batch_of_factorisations_is_judged_lane_by_lane():
    matrices = np.stack([np.eye(2), *NOT_POSITIVE.values(), 4 * np.eye(2)])
    rhs = np.arange(2.0 * len(matrices)).reshape(-1, 2)
    solve = jax.jit(jax.vmap(jax.vmap(_linsolve.solve_positive, (0, None)), (None, 0)))
    values, succeeded = solve(matrices, rhs)
    np.testing.assert_array_equal(
        succeeded, [[True, *[False] * len(NOT_POSITIVE), True]] * len(rhs)
    )
    np.testing.assert_allclose(values[:, 0], rhs)
    np.testing.assert_allclose(values[:, -1], rhs / 4)


def test_solve_with_a_factor():
    matrix, rhs = positive(13), vector(13)
    factor = _linsolve.cholesky(matrix)
    np.testing.assert_allclose(factor, np.linalg.cholesky(matrix), rtol=1e-10)
    np.testing.assert_allclose(
        _linsolve.cholesky_solve(factor, jnp.asarray(rhs)),
        np.linalg.solve(matrix, rhs),
        rtol=1e-10,
    )


def test_solves_can_be_differentiated_forwards():
    matrix, rhs = positive(14), vector(14)
    change = np.random.default_rng(14).normal(size=DIM)
    _, (tangent, _) = jax.jvp(
        functools.partial(_linsolve.solve_positive, jnp.asarray(matrix)),
        (jnp.asarray(rhs),),
        (jnp.asarray(change),),
    )
    np.testing.assert_allclose(tangent, np.linalg.solve(matrix, change), rtol=1e-9)


@pytest.mark.parametrize(
    ("succeeded", "value", "status"),
    [
        (True, 1.0, Status.CONVERGED),
        (True, np.nan, Status.NONFINITE),
        (True, np.inf, Status.NONFINITE),
        (False, np.nan, Status.NOT_POSITIVE_DEFINITE),
    ],
)
def test_verdict_on_a_factorisation(succeeded, value, status):
    verdict = _linsolve.direct_status(jnp.asarray(succeeded), {"x": jnp.asarray(value)})
    assert verdict == status
    assert verdict.dtype == jnp.int32


def test_restriction_replaces_the_rest_by_the_identity():
    matrix = positive(15)
    mask = np.arange(DIM) % 3 != 1
    matrix[1, 4] = np.nan  # off the support, where nothing may be read
    expected = np.eye(DIM)
    expected[np.ix_(mask, mask)] = matrix[np.ix_(mask, mask)] + 0.5 * np.eye(mask.sum())
    restricted = jax.jit(_linsolve.restrict)(matrix, mask, 0.5)
    np.testing.assert_array_equal(restricted, expected)


@pytest.mark.parametrize(
    ("status", "usable"),
    [
        (Status.CONVERGED, True),
        (Status.MAX_STEPS, True),
        (Status.NONFINITE, False),
        (Status.NOT_POSITIVE_DEFINITE, False),
    ],
)
def test_which_answers_may_be_used(status, usable):
    assert _linsolve.usable(jnp.int32(status)) == usable


# --- one Krylov space, many dampings -------------------------------------------------

DAMPINGS = np.array([1e-3, 0.1, 10.0])


def shifted_of_arrays(matrix, rhs, dampings, *, steps, on_host=False):
    return _linsolve.shifted_solves(
        product_with(matrix), LAYOUT.split(rhs), dampings, steps=steps, on_host=on_host
    )


compiled_shifted = jax.jit(shifted_of_arrays, static_argnames=("steps", "on_host"))


def shifted(matrix, rhs, steps, dampings=DAMPINGS):
    """One row for every damping."""
    solutions = compiled_shifted(matrix, rhs, dampings, steps=steps)
    return jax.vmap(_tree.flatten)(solutions)


@pytest.mark.parametrize("seed", range(3))
def test_full_krylov_space_solves_for_every_damping(seed):
    matrix, rhs = positive(seed), vector(seed)
    expected = [np.linalg.solve(matrix + d * np.eye(DIM), rhs) for d in DAMPINGS]
    np.testing.assert_allclose(shifted(matrix, rhs, DIM), expected, rtol=1e-9)


def test_small_krylov_space_minimizes_in_it():
    matrix, rhs = positive(2, 1e3), vector(2)
    powers = np.stack([np.linalg.matrix_power(matrix, i) @ rhs for i in range(4)], 1)
    basis, _ = np.linalg.qr(powers)
    small = basis.T @ matrix @ basis
    expected = [
        basis @ np.linalg.solve(small + d * np.eye(4), basis.T @ rhs) for d in DAMPINGS
    ]
    np.testing.assert_allclose(shifted(matrix, rhs, 4), expected, rtol=1e-7)


@pytest.mark.parametrize("kind", ["identity", "few rows", "zero"])
def test_krylov_space_that_ends_early(kind):
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(2, DIM))
    matrix = {
        "identity": np.eye(DIM),
        "few rows": rows.T @ rows,
        "zero": 0 * rows.T @ rows,
    }
    rhs = vector(3)
    expected = [np.linalg.solve(matrix[kind] + d * np.eye(DIM), rhs) for d in DAMPINGS]
    np.testing.assert_allclose(
        shifted(matrix[kind], rhs, DIM), expected, rtol=1e-7, atol=1e-9
    )


def test_negative_curvature_counts_as_none():
    curvatures = np.array([-2.0, -1.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    rhs = vector(4)
    expected = rhs / (np.maximum(curvatures, 0) + DAMPINGS[:, None])
    np.testing.assert_allclose(
        shifted(np.diag(curvatures), rhs, DIM), expected, rtol=1e-8, atol=1e-10
    )


def test_no_right_hand_side_no_step():
    assert not np.any(shifted(positive(5), np.zeros(DIM), DIM))


def test_krylov_space_on_the_host_is_the_same():
    matrix, rhs = positive(6), vector(6)
    on_host = shifted_of_arrays(
        matrix, jnp.asarray(rhs), DAMPINGS, steps=4, on_host=True
    )
    np.testing.assert_allclose(
        jax.vmap(_tree.flatten)(on_host), shifted(matrix, rhs, 4), rtol=1e-9, atol=1e-12
    )
