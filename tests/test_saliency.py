"""Scores of weights against brute-force Hessians and identities."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import saliency_nets as nets
from jax.flatten_util import ravel_pytree

from sparserec import quadratic, saliency


@pytest.fixture(scope="module", autouse=True)
def _quick_compiler():
    # Compiling is nearly all that these tests do.
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)])


@functools.cache
def brute(name):
    """Weights, gradient, Hessian and Gauss-Newton matrix, all by plain JAX."""
    builder, params, data = nets.NETS[name]()
    vector, unravel = ravel_pytree(params)

    def loss(v):
        return builder.loss(unravel(v), *data)

    outputs = jax.jit(lambda v: builder.predict_fn(unravel(v), data[0]))
    jacobian = np.asarray(jax.jit(jax.jacfwd(outputs))(vector))
    bend = jax.hessian(lambda o: quadratic.softmax_cross_entropy(o, data[1]))
    bend = np.asarray(bend(outputs(vector)))
    gauss_newton = np.einsum("nci,ncmd,mdj->ij", jacobian, bend, jacobian)
    gradient = np.asarray(jax.grad(loss)(vector))
    hessian = np.asarray(jax.jit(jax.jacfwd(jax.grad(loss)))(vector))
    return np.asarray(vector), gradient, hessian, gauss_newton


def assert_close(scores, expected, tol):
    expected = np.asarray(expected)
    gap = np.max(np.abs(flat(scores) - expected)) / np.max(np.abs(expected))
    assert gap <= tol, gap


# --- OBA -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", nets.NETS)
def test_oba_is_exact_against_the_whole_hessian(name):
    builder, params, data = nets.NETS[name]()
    w, g, hessian, gauss_newton = brute(name)
    matrices: dict[Any, np.ndarray] = {"hessian": hessian, "gauss_newton": gauss_newton}
    for curvature, matrix in matrices.items():
        score = functools.partial(
            saliency.oba, builder.loss, params, args=data, curvature=curvature
        )
        assert_close(score(), w * (matrix @ w), 1e-12)
        shares = score(first_order=True)
        assert_close(shares, -w * g + w * (matrix @ w) / 2, 1e-12)
        chex.assert_trees_all_equal_shapes_and_dtypes(shares, params)


@pytest.mark.parametrize("name", nets.NETS)
def test_scores_contain_what_layerwise_approximations_leave_out(name):
    """The curvature of the loss, and the blocks between layers, are not small."""
    _, params, _ = nets.NETS[name]()
    w, _, hessian, gauss_newton = brute(name)
    exact = w * (hessian @ w)
    ends = np.cumsum([x.size for x in jax.tree.leaves(params)])
    layer = np.searchsorted(ends, np.arange(w.size), side="right")
    inside = np.where(layer[:, None] == layer[None, :], hessian, 0)
    for part in (w * (gauss_newton @ w), w * ((hessian - inside) @ w)):
        assert np.linalg.norm(part) > 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize("name", nets.NETS)
def test_gauss_newton_part_and_functional_part_add_up(name):
    """The functional part by itself: the loss linearised at the outputs."""
    builder, params, data = nets.NETS[name]()
    outputs = jax.jit(builder.predict_fn)(params, data[0])
    slope = jax.jit(jax.grad(quadratic.softmax_cross_entropy))(outputs, data[1])

    def linearised(params, x):
        return jnp.vdot(builder.predict_fn(params, x), slope)

    functional = saliency.oba(linearised, params, args=data[:1])
    gauss_newton = saliency.oba(
        builder.loss, params, args=data, curvature="gauss_newton"
    )
    exact = saliency.oba(builder.loss, params, args=data)
    assert_close(exact, flat(gauss_newton) + flat(functional), 1e-10)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_on_a_chain_without_biases_the_functional_part_is_first_order(depth):
    builder, params, data = nets.problem(
        nets.chain, functools.partial(nets.chain_params, depth=depth), (6,)
    )
    exact = saliency.oba(builder.loss, params, args=data)
    part = saliency.oba(builder.loss, params, args=data, curvature="gauss_newton")
    first = saliency.taylor(builder.loss, params, args=data)  # -g theta
    functional = flat(exact) - flat(part)
    assert np.max(np.abs(functional)) > 1e-3
    assert_close(functional, -(depth - 1) * flat(first), 1e-10)


def test_shares_add_up_to_the_predicted_change():
    builder, params, data = nets.NETS["gelu cnn"]()
    w, g, hessian, _ = brute("gelu cnn")
    total = flat(saliency.oba(builder.loss, params, args=data, first_order=True)).sum()
    np.testing.assert_allclose(total, -g @ w + w @ hessian @ w / 2, rtol=1e-10)


# --- the data ------------------------------------------------------------------------

DATA_SCORES = {
    "taylor": saliency.taylor,
    "oba": functools.partial(saliency.oba, first_order=True),
    "oba, gauss_newton": functools.partial(saliency.oba, curvature="gauss_newton"),
    "obd": saliency.obd,
    "obd, fisher": functools.partial(saliency.obd, curvature="fisher"),
    "obd, probes": functools.partial(saliency.obd, probes=2, first_order=True),
}


CHAIN_PARAMS = functools.partial(nets.chain_params, depth=2)


def chain_problem():
    return nets.problem(nets.chain, CHAIN_PARAMS, (6,), examples=10)


@pytest.mark.parametrize("name", DATA_SCORES)
def test_pieces_and_batches_give_the_scores_of_the_whole(name):
    builder, params, data = chain_problem()
    score = functools.partial(DATA_SCORES[name], builder.loss, params)
    whole = flat(score(args=data))
    tol = 1e-12
    if name == "obd, probes":
        whole = flat(score(args=data, batch_size=10))
    assert_close(score(args=data, batch_size=4), whole, tol)
    uneven = [tuple(x[:7] for x in data), tuple(x[7:] for x in data)]
    assert_close(score(batches=iter(uneven), batch_size=5), whole, tol)


def test_averages_come_before_magnitudes():
    # Two halves of the data whose scores cancel.
    def loss(w, sign):
        return jnp.mean(sign) * jnp.sum(w**2)

    sign = jnp.array([1.0, -1.0])
    scores = saliency.oba(loss, jnp.ones(3), args=(sign,), batch_size=1)
    np.testing.assert_array_equal(scores, np.zeros(3))


def test_memory_is_that_of_one_batch():
    """The compiled step of a piece needs no more for many pieces than for one."""
    from sparserec.saliency._data import prepared
    from sparserec.saliency._oba import gradient_and_product

    step: Any = gradient_and_product
    builder, params, data = nets.problem(
        nets.chain, functools.partial(nets.chain_params, depth=3), (6,), examples=64
    )
    loss, _ = prepared(builder.loss, params)

    def temporaries(size):
        piece = jax.tree.map(lambda x: x[:size], data)
        hessian = quadratic.Hessian(dense_limit=0)
        compiled = step.lower(hessian, loss, params, piece).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8) < 0.25 * temporaries(64)
    before = step._cache_size()
    saliency.oba(builder.loss, params, args=data, batch_size=8)
    assert step._cache_size() == before + 1  # one program, 8 calls


# --- the classics --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cnn", "attention"])
def test_diagonal_scores_are_exact(name):
    builder, params, data = nets.NETS[name]()
    w, g, hessian, gauss_newton = brute(name)
    score = functools.partial(saliency.obd, builder.loss, params, args=data)
    assert_close(score(), w**2 * np.diag(hessian) / 2, 1e-12)
    assert_close(score(first_order=True), w**2 * np.diag(hessian) / 2 - w * g, 1e-12)
    assert_close(
        score(curvature="gauss_newton"), w**2 * np.diag(gauss_newton) / 2, 1e-12
    )


def test_fisher_is_the_mean_square_of_the_gradients_of_examples():
    builder, params, data = nets.NETS["cnn"]()
    gradient = jax.jit(jax.grad(builder.loss))
    rows = [
        flat(gradient(params, data[0][i : i + 1], data[1][i : i + 1]))
        for i in range(len(data[1]))
    ]
    expected = flat(params) ** 2 * np.mean(np.square(rows), axis=0) / 2
    scores = saliency.obd(builder.loss, params, args=data, curvature="fisher")
    assert_close(scores, expected, 1e-12)


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_estimated_diagonals_have_no_bias(curvature):
    builder, params, data = chain_problem()
    estimate = functools.partial(
        saliency.diagonal, builder.loss, params, args=data, curvature=curvature
    )
    exact, many = flat(estimate()), flat(estimate(probes=2000))
    few = flat(estimate(probes=20))
    error = np.linalg.norm(many - exact) / np.linalg.norm(exact)
    assert error < 0.1
    assert error < 0.3 * np.linalg.norm(few - exact) / np.linalg.norm(exact)


@pytest.mark.parametrize("kind", ["dense", "diagonal", "block_diagonal", "low_rank"])
def test_obs_is_the_cost_of_removal_with_refit_on_every_stored_curvature(kind):
    rng = np.random.default_rng(3)
    w, rows = rng.normal(size=6), rng.normal(size=(9, 6))
    matrix = rows.T @ rows
    center = jnp.asarray(w)
    if kind == "diagonal":
        matrix = np.diag(np.diag(matrix))
        model = quadratic.diagonal(jnp.diag(jnp.asarray(matrix)), center)
    elif kind == "block_diagonal":
        matrix = np.kron(np.eye(2), np.ones((3, 3))) * matrix
        blocks = jnp.stack([jnp.asarray(matrix[:3, :3]), jnp.asarray(matrix[3:, 3:])])
        model = quadratic.block_diagonal(blocks, center)
    elif kind == "low_rank":
        model = quadratic.low_rank(jnp.asarray(rows), center)
    else:
        model = quadratic.dense(jnp.asarray(matrix), center)
    scores = np.asarray(saliency.obs(model, center))
    for i in range(6):
        kept = np.arange(6) != i
        best = oracles.minimize_on(matrix, matrix @ w, kept)
        change = best - w
        np.testing.assert_allclose(scores[i], change @ matrix @ change / 2, rtol=1e-9)


def test_obs_takes_losses_and_damping_relative_to_the_mean_curvature():
    builder, params, data = chain_problem()
    w, _ = ravel_pytree(params)
    unravel = ravel_pytree(params)[1]
    hessian = jax.jit(jax.hessian(lambda v: builder.loss(unravel(v), *data)))
    matrix = np.asarray(hessian(w))
    shifted = matrix + 20.0 * np.mean(np.abs(np.diag(matrix))) * np.eye(len(matrix))
    score = functools.partial(saliency.obs, builder.loss, damping=20.0)
    scores = jax.jit(lambda data: score(params, args=data))(data)
    assert_close(scores, np.square(w) / (2 * np.diag(np.linalg.inv(shifted))), 1e-9)


def test_a_quadratic_model_is_a_loss():
    rng = np.random.default_rng(4)
    rows, w = rng.normal(size=(7, 5)), jnp.asarray(rng.normal(size=5))
    model = quadratic.least_squares(jnp.asarray(rows), jnp.asarray(rng.normal(size=7)))
    matrix, slope = rows.T @ rows, np.asarray(model.at(w).gradient)
    assert_close(saliency.taylor(model, w), -w * slope, 1e-12)
    assert_close(saliency.oba(model, w), w * (matrix @ w), 1e-12)
    assert_close(saliency.obd(model, w), w**2 * np.diag(matrix) / 2, 1e-12)
    assert_close(saliency.magnitude(w), w**2 / 2, 1e-15)


def test_half_precision_is_scored_in_single():
    params = {"w": jnp.array([300.0, -2.0], jnp.float16)}

    def loss(params):
        return jnp.sum(params["w"] ** 2) / 2

    for score in (saliency.magnitude(params), saliency.oba(loss, params)):
        assert score["w"].dtype == jnp.float32
        assert np.all(np.isfinite(score["w"]))


def test_scores_run_inside_jit():
    builder, params, data = chain_problem()

    def both(data):
        oba = saliency.oba(builder.loss, params, args=data)
        return oba, saliency.obd(builder.loss, params, args=data, curvature="fisher")

    for outer, eager in zip(jax.jit(both)(data), both(data), strict=True):
        assert_close(outer, flat(eager), 1e-12)


# --- bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"curvature": "newton"}, "'hessian', 'gauss_newton' or a builder"),
        ({"batches": []}, "`batches` is empty"),
        ({"batch_size": 0}, "`batch_size` must be an integer of at least 1"),
        ({"batches": [1], "args": ()}, "must be a tuple"),
        ({"batches": [()], "args": (jnp.ones(3),)}, "either `args` or `batches`"),
        ({"args": jnp.ones(3)}, "write `args=\\(x, y\\)`"),
    ],
)
def test_bad_data_and_choices_say_what_to_write(change, words):
    builder, params, _ = chain_problem()
    with pytest.raises((TypeError, ValueError), match=words):
        saliency.oba(builder.loss, params, **change)


def test_bad_curvatures_say_what_to_write():
    builder, params, data = chain_problem()

    def loss(params, x, labels):
        return builder.loss(params, x, labels)

    with pytest.raises(ValueError, match="know where the outputs are"):
        saliency.oba(loss, params, args=data, curvature="gauss_newton")
    with pytest.raises(ValueError, match="`probes` must be an integer"):
        saliency.obd(loss, params, args=data, probes=0)
    with pytest.raises(ValueError, match="known by products only"):
        saliency.obs(builder.loss, params, args=data, curvature=builder)
    with pytest.raises(ValueError, match="no positive definite inverse at `damping="):
        saliency.obs(lambda w: w @ jnp.diag(jnp.array([1.0, -1.0])) @ w, jnp.ones(2))
    with pytest.raises(ValueError, match="the model's center"):
        saliency.oba(quadratic.dense(jnp.eye(2), jnp.ones(2)), jnp.ones(3))
