"""Quadratic models: curvatures against NumPy matrices, products against jax.hessian."""

import dataclasses
import functools
import os
import subprocess
import sys
import textwrap
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.tree_util import Partial

from sparserec import Status, _tree, quadratic
from sparserec._linsolve import matmul
from sparserec.quadratic import QuadraticModel
from sparserec.quadratic._explicit import GRAM_LIMIT

# Leaves of several shapes and of two dtypes: everything goes through the widest one.
CENTER = {
    "a": jnp.zeros((2, 3), jnp.float32),
    "b": jnp.zeros(3, jnp.float64),
    "c": jnp.zeros((), jnp.float32),
}
LAYOUT = _tree.layout(CENTER)
DIM = LAYOUT.size
SINGLE = 2e-6  # relative error of leaves that are float32


def tree(vector):
    return _tree.cast_like(LAYOUT.split(jnp.asarray(vector)), CENTER)


def split(vector):
    """The tree of a vector, in its own dtype."""
    return LAYOUT.split(jnp.asarray(vector))


def flat(params):
    return np.asarray(_tree.flatten(params), np.float64)


def vector(seed):
    """A vector that float32 holds exactly."""
    return np.random.default_rng(seed).normal(size=DIM).astype(np.float32).astype(float)


def assert_shaped_like_center(params):
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(
        lambda x: (x.shape, x.dtype), CENTER
    )


# --- the curvatures and the matrices that they mean ----------------------------------


def multiply(matrix, v):
    return _tree.cast_like(LAYOUT.split(matmul(matrix, _tree.flatten(v))), v)


def prepare(matrix):
    return functools.partial(multiply, matrix)


def dense_matrix(seed):
    rng = np.random.default_rng(seed)
    return oracles.random_positive(rng, DIM, 50.0)


def diagonal_matrix(seed):
    return np.diag(1 + vector(seed) ** 2)


def block_matrix(seed):
    matrix = dense_matrix(seed)
    for start in range(0, DIM, 4):  # the last of three blocks is padded
        matrix[start : start + 4, start + 4 :] = 0
        matrix[start + 4 :, start : start + 4] = 0
    return matrix


def rows(seed, count):
    return np.random.default_rng(seed).normal(size=(count, DIM))


def rows_matrix(seed, count):
    return rows(seed, count).T @ rows(seed, count) + 0.3 * np.eye(DIM)


def without_gram(curvature: Any) -> Any:
    return dataclasses.replace(curvature, gram=None)


def of_rows(seed, count, *, stored):
    model = quadratic.low_rank(jnp.asarray(rows(seed, count)), CENTER, ridge=0.3)
    return model.curvature if stored else without_gram(model.curvature)


def of_blocks(matrix):
    padded = np.zeros((12, 12))
    padded[:DIM, :DIM] = matrix
    blocks = jnp.stack([padded[i : i + 4, i : i + 4] for i in (0, 4, 8)])
    return quadratic.block_diagonal(blocks, CENTER).curvature


def matrix_free(matrix, preconditioner=None):
    return quadratic.MatrixFree(
        Partial(prepare, jnp.asarray(matrix)), CENTER, preconditioner, cg_tol=1e-12
    )


def of_matrix(name, matrix) -> Any:
    """The curvature of a name that holds a matrix."""
    if name == "diagonal":
        return quadratic.diagonal(split(np.diag(matrix)), CENTER).curvature
    if name == "block diagonal":
        return of_blocks(matrix)
    if name == "matrix free":
        return matrix_free(matrix)
    if name == "preconditioned":
        return matrix_free(matrix, split(np.abs(np.diag(matrix))))
    return quadratic.dense(jnp.asarray(matrix), CENTER).curvature


MATRICES = {
    "dense": dense_matrix,
    "diagonal": diagonal_matrix,
    "block diagonal": block_matrix,
    "low rank, few rows": functools.partial(rows_matrix, count=4),
    "low rank, many rows": functools.partial(rows_matrix, count=13),
    "stored low rank": functools.partial(rows_matrix, count=4),
    "matrix free": dense_matrix,
    "preconditioned": diagonal_matrix,
}
STORED = [name for name in MATRICES if name not in ("matrix free", "preconditioned")]


def curvature_of(name, seed) -> Any:
    if "low rank" in name:
        count = 13 if "many" in name else 4
        return of_rows(seed, count, stored=name == "stored low rank")
    return of_matrix(name, MATRICES[name](seed))


class Answers(NamedTuple):
    product: Any
    diagonal: Any
    mean: Any
    solution: Any
    status: Any
    inverse_diagonal: Any = None
    dimension: Any = None
    matrix: Any = None


@jax.jit
def ask(curvature, v, mask, damping):
    """All operations in one program, so that each curvature is compiled once."""
    solved = curvature.solve_on(mask, v, damping)
    answers = Answers(
        product=curvature.matvec(v),
        diagonal=curvature.diagonal(),
        mean=quadratic.mean_curvature(curvature),
        solution=solved.value,
        status=solved.status,
    )
    if hasattr(curvature, "inverse_diagonal"):
        answers = answers._replace(
            inverse_diagonal=curvature.inverse_diagonal(damping),
            dimension=curvature.effective_dimension(damping),
        )
    if hasattr(curvature, "to_matrix"):
        answers = answers._replace(matrix=curvature.to_matrix())
    return answers


def asked(name, seed, v=None, mask=None, damping=0.0):
    v = vector(0) if v is None else v
    mask = np.ones(DIM, bool) if mask is None else mask
    return ask(curvature_of(name, seed), tree(v), split(mask), damping)


# --- every curvature is its matrix ---------------------------------------------------


@pytest.mark.parametrize("name", MATRICES)
def test_product_and_diagonal(name):
    matrix, v = MATRICES[name](1), vector(1)
    answers = asked(name, 1, v)
    scale = np.abs(matrix @ v).max()
    np.testing.assert_allclose(
        flat(answers.product), matrix @ v, rtol=SINGLE, atol=SINGLE * scale
    )
    np.testing.assert_allclose(flat(answers.diagonal), np.diag(matrix), rtol=SINGLE)
    assert_shaped_like_center(answers.product)
    assert _tree.layout(answers.diagonal) == LAYOUT
    if answers.matrix is not None:
        np.testing.assert_allclose(answers.matrix, matrix, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", STORED)
def test_mean_curvature(name):
    expected = np.abs(np.diag(MATRICES[name](2))).mean()
    np.testing.assert_allclose(asked(name, 2).mean, expected, rtol=1e-12)


def test_mean_curvature_from_one_product():
    # Exact for a diagonal matrix; otherwise off by the entries beside the diagonal.
    expected = np.diag(diagonal_matrix(2)).mean()
    np.testing.assert_allclose(asked("preconditioned", 2).mean, expected, rtol=SINGLE)
    matrix = dense_matrix(2)
    error = abs(asked("matrix free", 2).mean - np.diag(matrix).mean())
    spread = np.sqrt(np.sum(np.triu(2 * matrix, 1) ** 2)) / DIM
    assert error < 3 * spread


@pytest.mark.parametrize("name", MATRICES)
@given(
    seed=st.integers(0, 2**32 - 1),
    kept=st.sampled_from([0, 1, 4, DIM - 1, DIM]),
    damping=st.sampled_from([0.0, 1e-4, 2.0]),
)
@settings(max_examples=15)
def test_solve_on_the_support(name, seed, kept, damping):
    matrix, rhs = MATRICES[name](seed), vector(seed)
    mask = oracles.random_mask(np.random.default_rng(seed), DIM, kept)
    # What is off the support must not matter.
    given_rhs = np.where(mask, rhs, np.nan)
    curvature = curvature_of(name, seed)
    answers = ask(curvature, tree(given_rhs), split(mask), damping)
    expected = oracles.minimize_on(matrix + damping * np.eye(DIM), rhs, mask)
    scale = np.abs(expected).max(initial=1.0)
    np.testing.assert_allclose(
        flat(answers.solution), expected, rtol=SINGLE, atol=SINGLE * scale
    )
    assert answers.status == Status.CONVERGED
    assert not np.any(flat(answers.solution)[~mask])
    assert_shaped_like_center(answers.solution)


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("damping", [0.0, 0.01, 5.0])
def test_inverse_diagonal_and_effective_dimension(name, damping):
    matrix = MATRICES[name](3)
    answers = asked(name, 3, damping=damping)
    inverse = np.linalg.inv(matrix + damping * np.eye(DIM))
    np.testing.assert_allclose(
        flat(answers.inverse_diagonal), np.diag(inverse), rtol=1e-9
    )
    np.testing.assert_allclose(answers.dimension, np.trace(inverse @ matrix), rtol=1e-9)
    assert _tree.layout(answers.inverse_diagonal) == LAYOUT


INDEFINITE = np.diag([*np.arange(1.0, DIM), -0.5])
SINGULAR = np.diag([*np.arange(1.0, DIM), 0.0])


@pytest.mark.parametrize("name", ["dense", "diagonal", "block diagonal", "matrix free"])
@pytest.mark.parametrize(
    "matrix", [INDEFINITE, SINGULAR], ids=["indefinite", "singular"]
)
def test_curvature_that_is_not_positive_is_reported(name, matrix):
    curvature = of_matrix(name, matrix)
    everything, without = np.ones(DIM, bool), np.arange(DIM) < DIM - 1
    rhs = tree(np.ones(DIM))
    answers = ask(curvature, rhs, split(everything), 0.0)
    assert answers.status == Status.NOT_POSITIVE_DEFINITE
    for mask, damping in [(without, 0.0), (everything, 1.0)]:
        answers = ask(curvature, rhs, split(mask), damping)
        shifted = matrix + damping * np.eye(DIM)
        expected = oracles.minimize_on(shifted, np.ones(DIM), mask)
        np.testing.assert_allclose(flat(answers.solution), expected, rtol=SINGLE)
        assert answers.status == Status.CONVERGED


@pytest.mark.parametrize("stored", [True, False])
def test_rows_that_miss_a_weight_are_reported(stored):
    missing = rows(4, 4)
    missing[:, 5] = 0
    curvature = quadratic.low_rank(jnp.asarray(missing), CENTER).curvature
    curvature = curvature if stored else without_gram(curvature)
    mask = np.isin(np.arange(DIM), [0, 5])
    answers = ask(curvature, tree(np.ones(DIM)), split(mask), 0.0)
    assert answers.status == Status.NOT_POSITIVE_DEFINITE
    answers = ask(curvature, tree(np.ones(DIM)), split(mask), 1e-3)
    np.testing.assert_allclose(flat(answers.solution)[5], 1e3, rtol=1e-5)
    assert answers.status == Status.CONVERGED


@pytest.mark.parametrize("name", MATRICES)
def test_nan_on_the_support_is_reported(name):
    answers = asked(name, 5, v=np.where(np.arange(DIM) == 2, np.nan, 1.0))
    assert answers.status == Status.NONFINITE


@jax.jit
def solve_on(curvature, v, mask, damping):
    return curvature.solve_on(mask, v, damping)


@pytest.mark.parametrize("name", ["dense", "low rank, few rows", "block diagonal"])
def test_vmap_of_solves_equals_the_loop(name):
    cases = [
        (
            curvature_of(name, seed),
            tree(vector(seed)),
            split(np.arange(DIM) % (seed + 2) == 0),
            damping,
        )
        for seed, damping in enumerate([0.0, 0.1, 1.0])
    ]
    batch = jax.vmap(solve_on)(*jax.tree.map(lambda *x: jnp.stack(x), *cases))
    for lane, case in enumerate(cases):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            jax.tree.map(lambda x: x[lane], batch),  # noqa: B023
            solve_on(*case),
        )


# Batched LAPACK calls in compiled loops wait for each other for ever in jaxlib where
# there are few cores, so this runs where it can be stopped.
SOLVES_IN_A_LOOP = """
    import jax, jax.numpy as jnp
    from sparserec import _linsolve, quadratic

    batch, width = 64, 96
    matrices = jnp.broadcast_to(2 * jnp.eye(width), (batch, width, width))
    blocks = quadratic.BlockDiagonal(matrices)
    rhs = jnp.ones((batch, width))
    everywhere = jnp.ones(batch * width, bool)

    @jax.jit
    def loop(rhs):
        def body(_, x):
            x = jax.vmap(_linsolve.solve_positive)(matrices, x)[0]
            inverse = jax.vmap(_linsolve.inverse_positive)(matrices)[0]
            x = jnp.einsum("bij,bj->bi", inverse, x)
            solved = blocks.solve_on(everywhere, x.reshape(-1), 0.0)
            return 8 * solved.value.reshape(x.shape)

        return jax.lax.fori_loop(0, 20, body, rhs)

    assert jnp.allclose(loop(rhs), rhs, rtol=1e-3)
"""


def test_batches_of_solves_in_a_compiled_loop_come_to_an_end():
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SOLVES_IN_A_LOOP)],
        timeout=60,
        check=True,
        # One thread for BLAS: its own threads are another matter.
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )


# --- precision -----------------------------------------------------------------------

WIDE = 40


@functools.partial(jax.jit, static_argnames="stored")
def solve_rows(live_rows, rhs, mask, damping, *, stored):
    curvature = quadratic.low_rank(
        live_rows, jnp.zeros(WIDE, live_rows.dtype)
    ).curvature
    curvature = curvature if stored else without_gram(curvature)
    return curvature.solve_on(mask, rhs, damping)


@pytest.mark.parametrize("kept", [3, 20, WIDE])
@pytest.mark.parametrize("damping", [1e-8, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("kind", ["gradient", "any"])
def test_push_through_keeps_its_digits_in_single_precision(kept, damping, kind):
    rng = np.random.default_rng(kept)
    x = rng.normal(size=(10, WIDE)).astype(np.float32)
    mask = oracles.random_mask(rng, WIDE, kept)
    residual, noise = rng.normal(size=10), rng.normal(size=WIDE)
    rhs = (residual @ x if kind == "gradient" else noise).astype(np.float32)
    live, wide_rhs = np.where(mask, x, 0).astype(float), rhs.astype(float)
    matrix = live.T @ live + float(np.float32(damping)) * np.eye(WIDE)
    exact = oracles.minimize_on(matrix, wide_rhs, mask)
    solved = solve_rows(x, rhs, mask, damping, stored=False)
    value = np.asarray(solved.value, float)
    assert solved.status == Status.CONVERGED
    # The condition is up to 1e10, so not every entry can be right; the minimum is.
    least = oracles.quadratic_value(matrix, wide_rhs, exact)
    assert oracles.quadratic_value(matrix, wide_rhs, value) < least * (1 - 1e-4)
    if kind == "gradient":
        np.testing.assert_allclose(live @ value, live @ exact, rtol=1e-3, atol=1e-4)
    else:
        assert np.linalg.norm(value - exact) < 2e-3 * np.linalg.norm(exact)


@pytest.mark.parametrize("damping", [1e-9, 1e-6, 1e-2])
def test_push_through_in_double_precision(damping):
    rng = np.random.default_rng(0)
    x, rhs = rng.normal(size=(10, WIDE)), rng.normal(size=WIDE)
    mask = oracles.random_mask(rng, WIDE, 25)
    solved = solve_rows(x, rhs, mask, damping, stored=False)
    exact = oracles.minimize_on(x.T @ x + damping * np.eye(WIDE), rhs, mask)
    error = np.linalg.norm(np.asarray(solved.value) - exact) / np.linalg.norm(exact)
    assert error < 1e-5


# --- models --------------------------------------------------------------------------


def model_of(name, seed) -> tuple[QuadraticModel, Any]:
    """A model of a curvature, and its value as a NumPy function."""
    center, slope = vector(seed), vector(seed + 1)
    model = QuadraticModel(
        tree(center), jnp.asarray(0.7), tree(slope), curvature_of(name, seed)
    )
    matrix = MATRICES[name](seed)

    def value(w):
        step = w - center
        return 0.7 + slope @ step + step @ matrix @ step / 2

    return model, value


@jax.jit
def value_and_slope(model, params):
    return jax.value_and_grad(model)(params)


@pytest.mark.parametrize("name", ["dense", "diagonal", "low rank, few rows"])
def test_model_is_a_loss_and_moves_its_center(name):
    model, value = model_of(name, 6)
    here, there = vector(8), vector(9)
    moved = model.at(tree(there))
    for candidate in (model, moved):
        got, slope = value_and_slope(candidate, tree(here))
        np.testing.assert_allclose(got, value(here), rtol=1e-5)
        shift = MATRICES[name](6) @ (here - vector(6)) + vector(7)
        np.testing.assert_allclose(flat(slope), shift, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moved.value, value(there), rtol=1e-5)
    np.testing.assert_array_equal(flat(moved.center), there)
    assert_shaped_like_center(moved.gradient)


def test_missing_gradient_is_zero():
    model = quadratic.dense(jnp.asarray(dense_matrix(0)), CENTER, value=3.0)
    assert model(CENTER) == 3.0
    assert not np.any(flat(model.gradient))


def test_least_squares_is_the_usual_loss():
    rng = np.random.default_rng(0)
    x, y, w = rng.normal(size=(6, 4)), rng.normal(size=6), rng.normal(size=4)
    model = quadratic.least_squares(jnp.asarray(x), jnp.asarray(y), ridge=0.3)
    expected = np.sum((y - x @ w) ** 2) / 2 + 0.15 * w @ w
    np.testing.assert_allclose(model(jnp.asarray(w)), expected, rtol=1e-12)
    np.testing.assert_array_equal(model.center, np.zeros(4))


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_models_of_half_precision_are_raised_to_single(dtype):
    # 300 squared is beyond float16, and no half precision can be factorised.
    big = jnp.full((2, 2), 300, dtype) + 100 * jnp.eye(2, dtype=dtype)
    zero = jnp.zeros(2, dtype)
    blocks = jnp.zeros((1, 2, 2), dtype)
    models = [
        quadratic.least_squares(big, zero),
        quadratic.low_rank(big, zero),
        quadratic.dense(big, zero, zero),
        quadratic.diagonal(zero, zero),
        quadratic.block_diagonal(blocks, zero, zero),
    ]
    for model in models:
        assert {x.dtype for x in jax.tree.leaves(model)} == {jnp.dtype(jnp.float32)}
        assert _tree.all_finite(model)


@pytest.mark.parametrize("width", [GRAM_LIMIT + d for d in (0, 1)])
def test_wide_rows_store_no_gram_matrix(width):
    model = jax.eval_shape(quadratic.low_rank, jnp.zeros((1, width)), jnp.zeros(width))
    assert (model.curvature.gram is None) == (width > GRAM_LIMIT)


ONES = jnp.ones


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: quadratic.dense(ONES((2, 3)), ONES(3)), ValueError, "square"),
        (lambda: quadratic.dense(ONES(3), ONES(3)), ValueError, r"shape \(3,\)"),
        (lambda: quadratic.dense(ONES((3, 3)), ONES(4)), ValueError, "the 4 entries"),
        (lambda: quadratic.low_rank(ONES(3), ONES(3)), ValueError, "a matrix"),
        (lambda: quadratic.low_rank(ONES((2, 3)), ONES(4)), ValueError, "got 3"),
        (lambda: quadratic.diagonal(ONES(3), ONES(4)), ValueError, "`entries` must"),
        (lambda: quadratic.diagonal([ONES(3)], ONES(3)), ValueError, "`entries` must"),
        (
            lambda: quadratic.block_diagonal(ONES((2, 3)), ONES(6)),
            ValueError,
            r"\(b, w, w\)",
        ),
        (
            lambda: quadratic.block_diagonal(ONES((2, 3, 2)), ONES(6)),
            ValueError,
            r"\(b, w, w\)",
        ),
        (
            lambda: quadratic.block_diagonal(ONES((3, 3, 3)), ONES(6)),
            ValueError,
            r"ceil\(6 / 3\)",
        ),
        (
            lambda: quadratic.block_diagonal(ONES((1, 3, 3)), ONES(6)),
            ValueError,
            "just cover",
        ),
        (lambda: quadratic.least_squares(ONES(3), ONES(3)), ValueError, "`design`"),
        (lambda: quadratic.least_squares(ONES((3, 2)), ONES(2)), ValueError, "`resp"),
        (
            lambda: quadratic.least_squares(ONES((3, 2), int), ONES(3)),
            TypeError,
            "`design` has dtype int64",
        ),
        (
            lambda: quadratic.least_squares(ONES((3, 2)), ONES(3, int)),
            TypeError,
            "`response` has dtype int64",
        ),
    ],
)
def test_wrong_arrays_are_explained(build, error, words):
    with pytest.raises(error, match=words):
        build()


# --- products by differentiation -----------------------------------------------------

NETWORK = {"hidden": jnp.zeros((2, 3)), "bias": jnp.zeros(3), "out": jnp.zeros((3, 2))}
RAVEL = jax.flatten_util.ravel_pytree(NETWORK)[1]
EXAMPLES = 17


def predict(params, inputs):
    return jnp.tanh(inputs @ params["hidden"] + params["bias"][None]) @ params["out"]


def network_data(seed):
    rng = np.random.default_rng(seed)
    params = RAVEL(jnp.asarray(rng.normal(size=15)))
    inputs = jnp.asarray(rng.normal(size=(EXAMPLES, 2)))
    return params, inputs, jnp.asarray(rng.integers(0, 2, EXAMPLES))


def targets_for(output_loss, labels):
    regression = output_loss is quadratic.squared_error
    return jnp.eye(2)[labels] if regression else labels


OUTPUT_LOSSES = [quadratic.squared_error, quadratic.softmax_cross_entropy]
both_losses = pytest.mark.parametrize(
    "output_loss", OUTPUT_LOSSES, ids=lambda f: f.__name__
)


@functools.partial(jax.jit, static_argnames="builder")
def build(builder, loss, params, args):
    """A builder's value, gradient, and its curvature as a matrix, column by column."""
    model = builder(loss, params, args)
    columns = jax.vmap(
        lambda e: jax.flatten_util.ravel_pytree(model.curvature.matvec(RAVEL(e)))[0]
    )(jnp.eye(15))
    return model.value, jax.flatten_util.ravel_pytree(model.gradient)[0], columns


def test_hessian_products_are_those_of_jax_hessian():
    params, inputs, targets = network_data(0)
    loss = quadratic.gauss_newton(predict, quadratic.softmax_cross_entropy).loss
    center = jax.flatten_util.ravel_pytree(params)[0]
    expected = jax.jit(jax.hessian(lambda w: loss(RAVEL(w), inputs, targets)))(center)
    for limit in (512, 0):
        builder = quadratic.Hessian(dense_limit=limit)
        value, slope, matrix = build(builder, Partial(loss), params, (inputs, targets))
        np.testing.assert_allclose(matrix, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(value, loss(params, inputs, targets), rtol=1e-12)
    difference = jax.grad(lambda w: loss(RAVEL(w), inputs, targets))(center)
    np.testing.assert_allclose(slope, difference, rtol=1e-9, atol=1e-12)


def test_hessian_is_stored_up_to_its_limit():
    kinds = {}
    for limit in (15, 14):
        model = jax.eval_shape(
            quadratic.Hessian(dense_limit=limit),
            Partial(lambda p: _tree.dot(p, p)),
            NETWORK,
            (),
        )
        kinds[limit] = type(model.curvature)
    assert kinds == {15: quadratic.Dense, 14: quadratic.MatrixFree}


@both_losses
def test_gauss_newton_matrix_is_written_out(output_loss):
    params, inputs, labels = network_data(1)
    targets = targets_for(output_loss, labels)
    builder = quadratic.gauss_newton(predict, output_loss)
    _, _, matrix = build(builder, Partial(builder.loss), params, (inputs, targets))
    center = jax.flatten_util.ravel_pytree(params)[0]
    jacobian = np.asarray(
        jax.jit(jax.jacobian(lambda w: predict(RAVEL(w), inputs)))(center)
    )
    outputs = np.asarray(predict(params, inputs))
    if output_loss is quadratic.squared_error:
        bends = np.broadcast_to(np.eye(2), (EXAMPLES, 2, 2))
    else:
        p = np.exp(outputs) / np.exp(outputs).sum(1, keepdims=True)
        bends = np.stack([np.diag(row) - np.outer(row, row) for row in p])
    expected = np.einsum("mip,mij,mjq->pq", jacobian, bends, jacobian) / EXAMPLES
    np.testing.assert_allclose(matrix, expected, rtol=1e-9, atol=1e-12)


@both_losses
def test_loss_of_gauss_newton(output_loss):
    params, inputs, labels = network_data(2)
    targets = targets_for(output_loss, labels)
    got = quadratic.gauss_newton(predict, output_loss).loss(params, inputs, targets)
    outputs = np.asarray(predict(params, inputs))
    if output_loss is quadratic.squared_error:
        each = np.sum((outputs - np.asarray(targets)) ** 2, axis=1) / 2
    else:
        chosen = outputs[np.arange(EXAMPLES), np.asarray(labels)]
        each = np.log(np.exp(outputs).sum(1)) - chosen
    np.testing.assert_allclose(got, each.mean(), rtol=1e-12)


def test_gauss_newton_takes_inputs_and_outputs_of_any_form():
    def forked(params, left, right):
        return {"sum": left @ params + right @ params, "left": left @ params}

    def output_loss(outputs, targets):
        error = outputs["sum"] - targets
        return jnp.mean(error**2) / 2 + jnp.mean(outputs["left"] ** 2) / 2

    rng = np.random.default_rng(3)
    left, right = rng.normal(size=(2, 5, 3))
    builder = quadratic.gauss_newton(forked, output_loss)
    args = (jnp.asarray(left), jnp.asarray(right), jnp.zeros(5))
    model = builder(Partial(builder.loss), jnp.zeros(3), args)
    matrix = ((left + right).T @ (left + right) + left.T @ left) / 5
    v = rng.normal(size=3)
    np.testing.assert_allclose(model.curvature.matvec(jnp.asarray(v)), matrix @ v)


def test_gauss_newton_needs_inputs_and_targets():
    builder = quadratic.gauss_newton(predict, quadratic.squared_error)
    with pytest.raises(ValueError, match=r"args=\(\*inputs, targets\).*got 1"):
        builder(builder.loss, NETWORK, (jnp.zeros((3, 2)),))


# --- data in chunks ------------------------------------------------------------------

BUILDERS = {
    "hessian": None,
    "gauss newton": quadratic.gauss_newton(
        predict, quadratic.squared_error, cg_steps=40, cg_tol=1e-12
    ),
}
chunked_loss = quadratic.gauss_newton(predict, quadratic.squared_error).loss


@pytest.mark.parametrize("name", BUILDERS)
def test_chunks_add_up_to_the_whole(name):
    params, inputs, labels = network_data(4)
    args = (inputs, jnp.eye(2)[labels])
    whole = quadratic.make_objective(chunked_loss, BUILDERS[name])
    chunked = quadratic.make_objective(chunked_loss, BUILDERS[name], batch_size=7)
    assert chunked.on_host  # 7 + 7 + 3 examples
    np.testing.assert_allclose(
        chunked.value(params, args), whole.value(params, args), rtol=1e-12
    )
    near = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-9)
    expected, got = (jax.jit(whole.model)(params, args), chunked.model(params, args))
    near(got.value, expected.value)
    jax.tree.map(near, got.gradient, expected.gradient)
    v = RAVEL(jnp.asarray(np.random.default_rng(5).normal(size=15)))
    mask = RAVEL(jnp.arange(15.0))
    mask = jax.tree.map(lambda x: x % 3 != 1, mask)

    def answers(curvature):
        return (
            curvature.matvec(v),
            curvature.diagonal(),
            curvature.solve_on(mask, v, 2.0).value,
        )

    jax.tree.map(near, answers(got.curvature), jax.jit(answers)(expected.curvature))
    assert quadratic.mean_curvature(got.curvature) > 0


@pytest.mark.parametrize(
    "args",
    [
        (),
        (jnp.zeros((4, 2)), jnp.zeros((5, 2))),
        (jnp.zeros((4, 2)), jnp.zeros(())),
    ],
)
def test_chunks_need_a_common_leading_axis(args):
    objective = quadratic.make_objective(chunked_loss, batch_size=2)
    with pytest.raises(ValueError, match="share their leading axis"):
        objective.value(NETWORK, args)


# --- objectives ----------------------------------------------------------------------


def test_objective_of_a_model_is_the_model():
    model, value = model_of("dense", 10)
    objective = quadratic.make_objective(model)
    assert objective.is_quadratic
    np.testing.assert_allclose(
        objective.value(tree(vector(1)), ()), value(vector(1)), rtol=1e-5
    )
    local = objective.model(tree(vector(1)), ())
    np.testing.assert_allclose(local.value, value(vector(1)), rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_value_has_the_dtype_of_the_params(dtype):
    # A loss computed in half precision, or on data of double precision.
    def loss(params):
        return jnp.sum(params**2).astype(dtype)

    params = jnp.ones(3, jnp.float32)
    objective = quadratic.make_objective(loss)
    model = objective.model(params, ())
    assert objective.value(params, ()).dtype == model.value.dtype == jnp.float32
    np.testing.assert_array_equal(model.gradient, [2, 2, 2])


def test_objective_is_a_pytree_that_traces_the_arrays_of_its_loss():
    traces = []

    def loss(scale, params):
        return scale * jnp.sum(params**2)

    @jax.jit
    def value(objective, params):
        traces.append(None)
        return objective.value(params, ())

    for scale in (1.0, 2.0):
        objective = quadratic.make_objective(Partial(loss, jnp.asarray(scale)))
        assert value(objective, jnp.ones(3)) == 3 * scale
    assert len(traces) == 1


def test_a_loss_of_a_few_entries_is_the_loss_with_the_others_zero():
    def loss(params, scale):
        return scale * jnp.sum(jnp.exp(params["a"])) + jnp.sum(params["b"] ** 4)

    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(3)}
    index, part = jnp.asarray([5, 1, 0]), jnp.asarray([2.0, -1.0, 0.5])
    objective = quadratic.make_objective(loss)
    own = objective.on_support(params, (2.0,), index)
    assert own is not None
    restricted, args = own
    whole = {
        "a": jnp.asarray([[0.5, -1.0], [0.0, 0.0]]),
        "b": jnp.asarray([0.0, 2.0, 0.0]),
    }
    np.testing.assert_allclose(restricted.value(part, args), loss(whole, 2.0))
    exact = jax.hessian(lambda w: loss(w, 2.0))(whole)
    curvature: Any = restricted.model(part, args).curvature
    np.testing.assert_allclose(curvature.matrix[0, 0], exact["b"]["b"][1, 1])
    np.testing.assert_allclose(curvature.matrix[2, 2], exact["a"]["a"][0, 0, 0, 0])
    # Known by products only, or a model already: nothing to restrict.
    few = quadratic.make_objective(loss, quadratic.Hessian(dense_limit=2))
    assert few.on_support(params, (2.0,), index) is None


def test_products_one_by_one_are_the_same_hessian():
    rng = np.random.default_rng(0)
    inputs = jnp.asarray(rng.normal(size=(200, 10)), jnp.float32)

    def loss(w, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ w.reshape(10, 40))))

    w = jnp.asarray(0.1 * rng.normal(size=400), jnp.float32)

    @jax.jit
    def build(w, x):
        curvature: Any = quadratic.hessian(loss, w, (x,)).curvature
        return curvature.matrix

    assert "while" in build.lower(w, inputs).as_text()  # 400 products of 32 kB
    np.testing.assert_allclose(
        build(w, inputs), jax.hessian(loss)(w, inputs), atol=2e-6
    )
