"""Gradient rows and the curvatures made of them, against slow NumPy oracles."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import sparserec
from sparserec import _tree, quadratic
from sparserec.quadratic import LowRank
from sparserec.quadratic._block_rows import BlockLowRank, block_layout
from sparserec.quadratic._fisher import fisher
from sparserec.quadratic._gradient_curvature import GradientRows
from sparserec.quadratic._layer_rows import OuterLeaf, StoredLeaf
from sparserec.quadratic._unit_factors import unit_factors

INPUTS, HIDDEN, CLASSES, EXAMPLES = 7, 6, 3, 24


def predict(params, x):
    hidden = jnp.tanh(x @ params["in"] + params["bias"][None])
    return jax.nn.relu(hidden @ params["out"].T)  # stored the other way round


def loss(params, x, labels):
    return quadratic.softmax_cross_entropy(predict(params, x), labels)


@functools.cache
def problem():
    rng = np.random.default_rng(0)
    params = {
        "in": jnp.asarray(rng.normal(size=(INPUTS, HIDDEN))),
        "bias": jnp.asarray(rng.normal(size=HIDDEN)),
        "out": jnp.asarray(rng.normal(size=(CLASSES, HIDDEN))),
    }
    x = jnp.asarray(rng.normal(size=(EXAMPLES, INPUTS)))
    return params, (x, jnp.asarray(rng.integers(CLASSES, size=EXAMPLES)))


@functools.cache
def gradients():
    """The gradient of every example, one after the other, shape (m, n)."""
    params, (x, y) = problem()
    gradient = jax.jit(jax.grad(loss))
    found = [
        _tree.flatten(gradient(params, x[i : i + 1], y[i : i + 1]))
        for i in range(EXAMPLES)
    ]
    return np.stack(found)


@jax.jit
def _matrix(curvature):
    layout = _tree.layout(problem()[0])

    def product(unit):
        return _tree.flatten(curvature.matvec(layout.split(unit)))

    return jax.vmap(product)(jnp.eye(layout.size))


def matrix(curvature):
    """The curvature as one matrix, from its products."""
    return np.asarray(_matrix(curvature))


def curvature_of(loss_fn, params, args, **options) -> Any:
    return fisher(**options)(loss_fn, params, args).curvature


LAYOUTS = {
    "rows": {},
    "implicit": {"implicit": True},
    "chunks": {"chunk_size": 5},
    "chunks on the host": {"chunk_size": 5, "on_host": True},
    "implicit, chunks": {"implicit": True, "chunk_size": 7},
    "implicit, chunks on the host": {
        "implicit": True,
        "chunk_size": 7,
        "on_host": True,
    },
}


# --- the model ------------------------------------------------------------------------


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("batch_size", [1, 4])
def test_model_is_that_of_rows_computed_one_by_one(options, batch_size):
    params, args = problem()
    rows = EXAMPLES // batch_size
    # Row i averages examples i, i + rows, i + 2 rows, ...
    expected = gradients().reshape(batch_size, rows, -1).mean(axis=0)
    hessian = batch_size / rows * expected.T @ expected + 0.25 * np.eye(_size())
    builder = fisher(batch_size=batch_size, ridge=0.25, **options)
    model: Any = builder(loss, params, args)
    np.testing.assert_allclose(model.value, loss(params, *args), rtol=1e-12)
    np.testing.assert_allclose(
        _tree.flatten(model.gradient), gradients().mean(axis=0), atol=1e-12
    )
    np.testing.assert_allclose(matrix(model.curvature), hessian, atol=1e-12)
    assert isinstance(
        model.curvature, GradientRows if "implicit" in options else LowRank
    )


def _size():
    return _tree.size(problem()[0])


def test_fewer_rows_than_examples_still_see_the_loss_of_all():
    params, args = problem()
    for on_host in (False, True):
        model: Any = fisher(rows=10, on_host=on_host)(loss, params, args)
        chosen = gradients()[np.arange(10) * EXAMPLES // 10]
        expected = chosen.T @ chosen / 10
        np.testing.assert_allclose(matrix(model.curvature), expected, atol=1e-12)
        np.testing.assert_allclose(model.value, loss(params, *args), rtol=1e-12)
        mean = gradients().mean(axis=0)
        np.testing.assert_allclose(_tree.flatten(model.gradient), mean, atol=1e-12)


def test_without_first_order_the_gradient_is_zero():
    params, args = problem()
    model: Any = fisher(first_order=False)(loss, params, args)
    assert not np.any(_tree.flatten(model.gradient))


def test_without_first_order_only_the_examples_of_rows_are_visited():
    params, args = problem()
    chosen = np.arange(10) * EXAMPLES // 10
    expected = loss(params, *(x[chosen] for x in args))
    for make in (fisher, functools.partial(sampled, 0)):
        for on_host in (False, True):
            builder = make(rows=10, first_order=False, on_host=on_host)
            model: Any = builder(loss, params, args)
            assert not np.any(_tree.flatten(model.gradient))
            np.testing.assert_allclose(model.value, expected, rtol=1e-12)


@pytest.mark.parametrize("options", [{}, {"implicit": True}])
def test_builds_inside_compiled_code(options):
    params, args = problem()
    builder = fisher(**options)
    eager = builder(loss, params, args)
    traced = jax.jit(lambda p, a: builder(loss, p, a))(params, args)
    np.testing.assert_allclose(matrix(traced.curvature), matrix(eager.curvature))


def test_half_precision_rows_are_close_and_stay_half():
    params, args = problem()
    for implicit in (False, True):
        builder = fisher(dtype=jnp.bfloat16, implicit=implicit)
        model: Any = builder(loss, params, args)
        leaves = jax.tree.leaves(model.curvature.leaves)
        assert {x.dtype for x in leaves} == {jnp.dtype(jnp.bfloat16)}
        exact = gradients().T @ gradients() / EXAMPLES
        error = np.abs(matrix(model.curvature) - exact).max() / np.abs(exact).max()
        assert error < 0.02
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
    rows = curvature_of(loss, half, (args[0].astype(jnp.float32), args[1])).rows
    assert rows.dtype == jnp.float32


# --- kinds ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output_loss", [quadratic.softmax_cross_entropy, quadratic.squared_error]
)
@pytest.mark.parametrize("known_root", [True, False])
def test_gauss_newton_rows_give_the_gauss_newton_matrix(output_loss, known_root):
    params, (x, y) = problem()
    if output_loss is quadratic.squared_error:
        y = jnp.ones((EXAMPLES, CLASSES))
    exact = quadratic.gauss_newton(predict, output_loss)
    expected = matrix(exact(exact.loss, params, (x, y)).curvature)
    target = output_loss if known_root else (lambda o, t: output_loss(o, t))
    builder = fisher(kind="gauss_newton", predict_fn=predict, output_loss_fn=target)
    model: Any = builder(builder.loss, params, (x, y))
    np.testing.assert_allclose(matrix(model.curvature), expected, atol=1e-10)
    np.testing.assert_allclose(
        model.value, output_loss(predict(params, x), y), rtol=1e-12
    )
    assert model.curvature.rows.shape[0] == EXAMPLES * CLASSES
    fewer = fisher(
        kind="gauss_newton", predict_fn=predict, output_loss_fn=target, rows=12
    )(builder.loss, params, (x, y))
    some = np.arange(4) * EXAMPLES // 4
    expected = matrix(exact(exact.loss, params, (x[some], y[some])).curvature)
    np.testing.assert_allclose(matrix(fewer.curvature), expected, atol=1e-10)


def sampled(seed, **options):
    return fisher(
        kind="sampled",
        predict_fn=predict,
        output_loss_fn=quadratic.softmax_cross_entropy,
        key=jax.random.key(seed),
        **options,
    )


def scores():
    """Gradients for every label that could be drawn, and its probability."""
    params, (x, _) = problem()
    labels = jnp.arange(CLASSES)

    def score(x, label):
        slope = jax.grad(loss)(params, x[None], label[None])
        return _tree.flatten(slope)

    found = jax.jit(jax.vmap(jax.vmap(score, (None, 0)), (0, None)))(x, labels)
    return np.asarray(found), np.asarray(jax.nn.softmax(predict(params, x)))


@pytest.mark.parametrize("batch_size", [1, 4])
def test_sampled_rows_have_the_fisher_matrix_as_expectation(batch_size):
    params, args = problem()
    slopes, chances = scores()
    share = chances / EXAMPLES
    expected = np.einsum("mc,mci,mcj->ij", share, slopes, slopes)
    # One call: the same examples many times over, with independent targets.
    copies = jax.tree.map(lambda x: jnp.concatenate([x] * 100), args)
    count = len(copies[0])
    model: Any = sampled(0, batch_size=batch_size)(loss, params, copies)
    found = matrix(model.curvature)
    # Standard error: that of products of averaged scores, and of single ones.
    squares = np.square(slopes)
    single = np.einsum("mc,mci,mcj->ij", share, squares, squares) / count
    sizes = np.diag(expected)
    averaged = (np.outer(sizes, sizes) + expected**2) * batch_size / count
    error = np.sqrt(single + averaged)
    assert np.all(np.abs(found - expected) < 6 * error)
    assert np.abs((found - expected) / error).max() > 0.5  # and they are random
    other = (copies[0], jnp.zeros_like(copies[1]))
    relabelled = sampled(0, batch_size=batch_size)(loss, params, other)
    np.testing.assert_allclose(matrix(relabelled.curvature), found)
    np.testing.assert_allclose(
        _tree.flatten(model.gradient), gradients().mean(axis=0), atol=1e-12
    )


def test_samples_depend_on_the_key_and_not_on_the_chunks():
    params, args = problem()

    def drawn(seed, **options) -> Any:
        model: Any = sampled(seed, **options)(loss, params, args)
        return model.curvature.rows

    rows = [
        drawn(seed, **options)
        for seed, options in [(0, {}), (0, {"chunk_size": 5}), (1, {})]
    ]
    np.testing.assert_allclose(rows[1], rows[0])
    assert not np.allclose(rows[2], rows[0])
    assert sampled(0).with_key(jax.random.key(1)) == sampled(1)
    assert sampled(0).with_key(jax.random.PRNGKey(1)) == sampled(1)


def test_own_output_losses_need_a_way_to_draw_targets():
    def poisson(outputs, counts):
        return jnp.mean(jnp.sum(jnp.exp(outputs) - counts * outputs, axis=1))

    given = {
        "kind": "sampled",
        "predict_fn": predict,
        "output_loss_fn": poisson,
        "key": jax.random.key(0),
    }
    with pytest.raises(ValueError, match="sample_fn"):
        fisher(**given)
    builder = fisher(
        **given,
        sample_fn=lambda key, outputs: jax.random.poisson(key, jnp.exp(outputs)),
    )
    params, (x, _) = problem()
    model: Any = builder(builder.loss, params, (x, jnp.ones((EXAMPLES, CLASSES))))
    assert np.isfinite(model.curvature.rows).all()


# --- factors --------------------------------------------------------------------------


def test_factors_are_found_where_matrices_meet_inputs_alone():
    params, (x, y) = problem()
    value, leaves = unit_factors(loss, params, (x[:2], y[:2]))
    kinds = dict(zip(sorted(params), map(type, leaves), strict=True))
    assert kinds == {"bias": StoredLeaf, "in": OuterLeaf, "out": StoredLeaf}
    np.testing.assert_allclose(value, loss(params, x[:2], y[:2]))


def awkward(params, x):
    """Shared, transposed, squared and compiled weights, and sequences."""
    x = jax.jit(lambda w, x: jnp.einsum("mti,io->mto", x, w))(params["a"], x)
    x = jnp.tanh(x) @ params["shared"]
    x = jnp.tanh(x) @ params["shared"]
    x = jnp.tanh(x) @ jnp.square(params["squared"])
    x = (params["first"] @ jnp.swapaxes(x, 1, 2)[0])[None]
    return jnp.mean(jnp.square(x)) + 0.1 * jnp.mean(jnp.sin(params["unused"]))


def test_factors_of_awkward_networks_are_their_gradients():
    rng = np.random.default_rng(1)
    shapes = {
        "a": (9, 8),
        "shared": (8, 8),
        "squared": (8, 5),
        "first": (30, 5),
        "unused": (2, 2),
    }
    params = {name: jnp.asarray(rng.normal(size=s)) for name, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(1, 2, 9)))
    value, leaves = unit_factors(awkward, params, (x,))
    expected_value, expected = jax.value_and_grad(awkward)(params, x)
    np.testing.assert_allclose(value, expected_value)
    kinds = {
        name: type(leaf) for name, leaf in zip(sorted(params), leaves, strict=True)
    }
    assert kinds["a"] is OuterLeaf
    assert kinds["first"] is OuterLeaf
    assert kinds["squared"] is StoredLeaf
    for leaf, wanted in zip(leaves, jax.tree.leaves(expected), strict=True):
        batched = jax.tree.map(lambda x: x[None], leaf)
        np.testing.assert_allclose(batched.written()[0], wanted.ravel(), atol=1e-12)


# --- the operations of the curvatures -------------------------------------------------


CURVATURES = {
    "rows": {},
    "implicit": {"implicit": True},
    "leaf": {"blocks": "leaf"},
    "blocks": {"blocks": 9, "rows": 8, "batch_size": 3},
}


@jax.jit
def operations(curvature, index, damping, v):
    return (
        _tree.flatten(curvature.diagonal()),
        curvature.columns(index),
        _tree.flatten(curvature.inverse_diagonal(damping)),
        curvature.effective_dimension(damping),
        curvature.quadratic_form(_tree.layout(problem()[0]).split(v)),
    )


@jax.jit
def solve(curvature, mask, rhs, damping):
    layout = _tree.layout(problem()[0])
    solved = curvature.solve_on(layout.split(mask), layout.split(rhs), damping)
    return _tree.flatten(solved.value), solved.status


@pytest.mark.parametrize("options", CURVATURES.values(), ids=CURVATURES)
def test_operations_agree_with_the_matrix(options):
    params, args = problem()
    curvature = curvature_of(loss, params, args, ridge=0.1, **options)
    hessian, damping = matrix(curvature), 0.05
    shifted = hessian + damping * np.eye(len(hessian))
    inverse = np.linalg.inv(shifted)
    index = jnp.asarray([3, 50, 0])
    v = np.random.default_rng(3).normal(size=len(hessian))
    found = operations(curvature, index, damping, jnp.asarray(v))
    np.testing.assert_allclose(found[0], np.diag(hessian), atol=1e-12)
    np.testing.assert_allclose(found[1], hessian[:, index], atol=1e-12)
    np.testing.assert_allclose(found[2], np.diag(inverse), rtol=1e-8)
    np.testing.assert_allclose(found[3], np.trace(inverse @ hessian), rtol=1e-8)
    np.testing.assert_allclose(found[4], v @ hessian @ v, rtol=1e-12)
    rng = np.random.default_rng(2)
    rhs = rng.normal(size=len(hessian))
    for density in (1.0, 0.3, 0.0):
        mask = rng.random(len(hessian)) < density
        value, status = solve(curvature, jnp.asarray(mask), jnp.asarray(rhs), damping)
        expected = np.zeros(len(hessian))
        expected[mask] = np.linalg.solve(shifted[np.ix_(mask, mask)], rhs[mask])
        np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-8)
        assert status == sparserec.Status.CONVERGED


@pytest.mark.parametrize("implicit", [True, False])
def test_rows_leaf_by_leaf_have_the_products_of_written_rows(implicit):
    params, args = problem()
    dtype = None if implicit else jnp.float16
    kept = curvature_of(loss, params, args, implicit=implicit, dtype=dtype)
    assert isinstance(kept, GradientRows)
    rows = np.asarray(kept.to_low_rank().rows)
    close = functools.partial(
        np.testing.assert_allclose, rtol=1e-5, atol=1e-12 if implicit else 1e-6
    )
    if implicit:
        np.testing.assert_allclose(rows, gradients() / EXAMPLES**0.5, atol=1e-12)
    rng = np.random.default_rng(0)
    v, u = rng.normal(size=rows.shape[1]), rng.normal(size=EXAMPLES)
    mask = rng.random(rows.shape[1]) < 0.4
    close(kept.times(jnp.asarray(v)), rows @ v)
    close(kept.transposed_times(jnp.asarray(u)), u @ rows)
    close(kept.kernel(), rows @ rows.T)
    live = rows * mask
    close(kept.kernel(jnp.asarray(mask)), live @ live.T)
    index = jnp.asarray([0, 44, rows.shape[1]])
    padded = np.concatenate([rows, np.zeros((EXAMPLES, 1))], axis=1)
    close(kept.row_columns(index), padded[:, index])


def test_leaves_wider_than_a_piece_are_visited_once(monkeypatch):
    monkeypatch.setattr("sparserec.quadratic._layer_rows.PIECE", 10)
    params, args = problem()
    kept = curvature_of(loss, params, args, implicit=True)
    rows = gradients() / EXAMPLES**0.5
    assert {leaf.step for leaf in kept.leaves} < {6, 10}
    ones = jnp.ones(_size(), bool)
    np.testing.assert_allclose(kept.kernel(ones), rows @ rows.T, atol=1e-12)
    np.testing.assert_allclose(
        _tree.flatten(kept.diagonal()), np.square(rows).sum(axis=0), atol=1e-12
    )


def test_several_terms_a_row_have_the_same_small_grams():
    params, args = problem()
    wide = {**params, "in": jnp.zeros((INPUTS, HIDDEN)) + 0.1}
    kept = curvature_of(loss, wide, args, implicit=True, batch_size=2)
    leaf = kept.leaves[1]
    assert isinstance(leaf, OuterLeaf)
    rows = np.asarray(leaf.written())
    np.testing.assert_allclose(
        OuterLeaf(leaf.left, leaf.right[..., :1]).written(),
        np.einsum("mqa,mqb->mab", leaf.left, leaf.right[..., :1]).reshape(12, -1),
        atol=1e-12,
    )
    kernel = kept.kernel(jnp.asarray(np.repeat([False, True, False], [6, 42, 18])))
    np.testing.assert_allclose(kernel, rows @ rows.T, atol=1e-12)


@pytest.mark.parametrize("options", [{"implicit": True}, {"blocks": 9}])
def test_ridge_can_be_exchanged(options):
    params, args = problem()
    curvature = curvature_of(loss, params, args, ridge=0.1, **options)
    expected = matrix(curvature) + 0.3 * np.eye(_size())
    np.testing.assert_allclose(matrix(curvature.with_ridge(0.4)), expected)


# --- blocks ---------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"chunk_size": 5, "on_host": True}])
@pytest.mark.parametrize("blocks", ["leaf", 8, 1000])
def test_blocks_keep_the_entries_of_the_matrix_within_them(blocks, options):
    params, args = problem()
    full = gradients().T @ gradients() / EXAMPLES
    builder = fisher(blocks=blocks, **options)
    curvature = builder(loss, params, args).curvature
    assert isinstance(curvature, BlockLowRank)
    within = np.zeros_like(full, bool)
    for index in curvature.blocks.index():
        for block in index:
            block = block[block < _size()]
            within[np.ix_(block, block)] = True
    np.testing.assert_allclose(matrix(curvature), np.where(within, full, 0), atol=1e-12)
    for number, rows in enumerate(curvature.rows):
        index = curvature.blocks.index()[number]
        padded = np.concatenate([gradients() / EXAMPLES**0.5, np.zeros((24, 1))], 1)
        expected = np.moveaxis(padded[:, index], 1, 0)
        np.testing.assert_allclose(rows, expected, atol=1e-12)


SHAPES = [(6,), (3, 2, 7), (0, 4), (25, 2), ()]


def test_blocks_hold_whole_outputs_or_even_parts_of_one():
    layout = block_layout(SHAPES, 13)
    places = np.split(np.arange(99), [6, 48, 48, 98])
    kernel, wide = places[1].reshape(3, 2, 7), places[3].reshape(25, 2)
    expected = [places[0], places[4]]
    # Two outputs of six weights fit 13, and seven outputs make four blocks.
    for outputs in ([0], [1, 2], [3, 4], [5, 6]):
        expected.append(kernel[..., outputs].transpose(2, 0, 1).reshape(-1))
    for output in (0, 1):
        expected += [wide[:12, output], wide[12:, output]]
    found = [block[block < 99] for index in layout.index() for block in index]
    assert sorted(map(tuple, found)) == sorted(map(tuple, expected))
    assert [len(batch) for batch in layout.batches] == [7, 2, 1]


def test_blocks_of_leaves_are_whole():
    layout = block_layout(SHAPES, None)
    lengths = [[length for _, length in batch] for batch in layout.batches]
    assert lengths == [[50, 42], [6], [1]]


@pytest.mark.parametrize("width", [None, 1, 7, 13, 100])
def test_blocks_are_joined_as_they_were_cut(width):
    layout = block_layout(SHAPES, width)
    flat = jnp.arange(99.0)
    np.testing.assert_array_equal(layout.join(layout.cut(flat)), flat)


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("blocks", ["leaf", 5])
def test_the_minimum_on_a_support_is_that_of_the_matrix(blocks, damping):
    params, args = problem()
    curvature = fisher(blocks=blocks, ridge=0.1)(loss, params, args).curvature
    assert isinstance(curvature, BlockLowRank)
    rng = np.random.default_rng(3)
    split = curvature.layout.split
    mask = rng.random(_size()) < 0.6
    slope, start = rng.standard_normal((2, _size()))
    bent = matrix(curvature) + damping * np.eye(_size())
    step = start.copy()
    step[mask] -= np.linalg.solve(
        bent[np.ix_(mask, mask)], (slope + bent @ start)[mask]
    )
    found = curvature.minimise_on(
        split(jnp.asarray(mask)),
        split(jnp.asarray(slope)),
        split(jnp.asarray(start)),
        damping,
    )
    np.testing.assert_allclose(
        np.concatenate([np.ravel(x) for x in jax.tree.leaves(found.step)]),
        step,
        atol=1e-9,
    )
    value = slope @ step + step @ bent @ step / 2
    np.testing.assert_allclose(found.value, value, rtol=1e-10)


# --- coupled examples -----------------------------------------------------------------


def normalised_loss(params, x, y):
    """The loss of a network with batch normalisation in training mode."""
    hidden = x @ jax.tree.leaves(params)[0]
    spread = jnp.sqrt(jnp.var(hidden, axis=0, keepdims=True) + 0.1)
    hidden = (hidden - jnp.mean(hidden, axis=0, keepdims=True)) / spread
    return jnp.mean(jnp.square(jnp.sum(jnp.tanh(hidden), axis=1) - y))


@pytest.mark.parametrize("on_host", [False, True])
def test_coupled_rows_are_gradients_of_whole_mini_batches(on_host):
    rng = np.random.default_rng(4)
    x, y = (jnp.asarray(rng.standard_normal(shape)) for shape in ((12, 5), (12,)))
    params = {"w": jnp.asarray(rng.standard_normal((5, 3)))}
    builder = fisher(rows=3, batch_size=4, coupled=True, on_host=on_host)
    model = builder(normalised_loss, params, (x, y))
    parts = [jnp.arange(12)[i::3] for i in range(3)]
    slopes = [
        np.ravel(jax.grad(normalised_loss)(params, x[part], y[part])["w"])
        for part in parts
    ]
    rows = np.stack(slopes)
    found = np.asarray(cast(Any, model.curvature).rows)
    np.testing.assert_allclose(found, (4 / 3) ** 0.5 * rows, atol=1e-12)
    np.testing.assert_allclose(np.ravel(model.gradient["w"]), rows.mean(0), atol=1e-12)
    with pytest.raises(ValueError, match="coupled=True"):
        fisher(rows=3, batch_size=4)(normalised_loss, params, (x, y))


# --- solvers --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"implicit": True}, {"blocks": "leaf"}])
def test_iobs_takes_the_curvature(options):
    sklearn = pytest.importorskip("sklearn.datasets")
    digits = sklearn.load_digits(n_class=3)
    x, y = jnp.asarray(digits.data / 16), jnp.asarray(digits.target)

    def softmax_loss(weights, x, y):
        logits = quadratic.softmax_cross_entropy(x @ weights, y)
        return logits + 1e-3 * jnp.sum(jnp.square(weights))

    step = jax.jit(lambda w: w - 0.5 * jax.grad(softmax_loss)(w, x, y))
    weights = jnp.zeros((64, 3))
    for _ in range(100):
        weights = step(weights)
    mask = sparserec.select.top_k(weights, 30)
    plain = softmax_loss(jnp.where(mask, weights, 0), x, y)
    solution = sparserec.iobs(
        softmax_loss,
        weights,
        30,
        args=(x[:300], y[:300]),
        curvature=fisher(rows=100, batch_size=3, ridge=1e-2, **options),
        max_steps=4,
    )
    assert int(solution.mask.sum()) == 30
    assert softmax_loss(solution.params, x, y) < 0.95 * plain


def test_iobs_on_many_weights_writes_no_matrix(monkeypatch):
    def refuse(_):
        raise AssertionError("an n by n matrix was formed")

    monkeypatch.setattr(quadratic.LowRank, "to_matrix", refuse)
    rng = np.random.default_rng(0)
    x, y = jnp.asarray(rng.normal(size=(12, 70))), jnp.asarray(rng.normal(size=12))

    def squares(weights, x, y):
        return jnp.mean(jnp.square(jnp.tanh(x @ weights) @ jnp.ones(30) - y))

    weights = jnp.asarray(rng.normal(size=(70, 30)) / 30)
    solution = sparserec.iobs(
        squares,
        weights,
        200,
        args=(x, y),
        curvature=fisher(ridge=1e-2),
        max_steps=1,
    )
    assert int(solution.mask.sum()) == 200


def test_iobs_refuses_chunks_of_data_for_rows():
    params, args = problem()
    with pytest.raises(ValueError, match="leave `batch_size` out"):
        sparserec.iobs(loss, params, 20, args=args, curvature=fisher(), batch_size=8)


def test_equal_builders_compile_a_solver_once():
    params, args = problem()
    traces = []

    def counted(params, x, y):
        traces.append(1)
        return loss(params, x, y)

    for k in (20, 30):
        sparserec.iobs(
            counted, params, k, args=args, curvature=fisher(ridge=0.1), max_steps=2
        )
        first = len(traces) if k == 20 else first
    assert len(traces) == first


# --- bad input ------------------------------------------------------------------------


def test_more_rows_than_the_data_give_are_refused():
    params, args = problem()
    with pytest.raises(ValueError, match=r"48 examples, but `args` holds 24.*rows=6"):
        fisher(rows=12, batch_size=4)(loss, params, args)
    with pytest.raises(ValueError, match="holds 24"):
        fisher(batch_size=25)(loss, params, args)
    with pytest.raises(ValueError, match="holds 24"):
        jax.jit(lambda p: fisher(rows=25)(loss, p, args))(params)
    given = {"predict_fn": predict, "output_loss_fn": quadratic.softmax_cross_entropy}
    with pytest.raises(ValueError, match="multiple"):
        fisher(kind="gauss_newton", rows=10, **given)(loss, params, args)
    with pytest.raises(ValueError, match=r"args=\(\*inputs, targets\)"):
        fisher(kind="gauss_newton", **given)(loss, params, args[:1])


def batch_normalised(params, x, y):
    x = x @ params["in"]
    x = (x - jnp.mean(x, axis=0, keepdims=True)) / jnp.sqrt(
        jnp.var(x, axis=0, keepdims=True) + 1e-5
    )
    return quadratic.softmax_cross_entropy(x @ params["out"].T, y)


WRONG = {
    "sum": lambda p, x, y: EXAMPLES * loss(p, x, y),
    "batch statistics": batch_normalised,
    "another axis": lambda p, x, y: jnp.mean(
        jnp.square(jnp.sum(x, axis=0) - y.astype(x.dtype)[0]) * jnp.sum(p["bias"])
    ),
    "a fixed size": lambda p, x, y: loss(p, x.reshape(EXAMPLES, INPUTS), y),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("options", [{}, {"implicit": True}])
def test_losses_that_are_no_mean_over_examples_are_refused(name, options):
    params, args = problem()
    wrong = WRONG[name]
    if name == "sum":
        wrong = lambda p, x, y: len(x) * loss(p, x, y)  # noqa: E731
    with pytest.raises(ValueError, match=r"single.*batch statistics"):
        fisher(**options)(wrong, params, args)


def test_arrays_that_do_not_share_the_examples_axis_are_refused():
    params, (x, y) = problem()
    with pytest.raises(ValueError, match="leading axis"):
        fisher()(lambda p, x, y: loss(p, x.T, y), params, (x.T, y))
    with pytest.raises(ValueError, match="leading axis"):
        fisher()(lambda p, x, y, rate: rate * loss(p, x, y), params, (x, y, 2.0))


def test_rows_with_nan_are_refused():
    params, (x, y) = problem()

    def kinked(params, x, y):
        return (
            loss(params, x, y)
            + jnp.mean(jnp.sqrt(jnp.abs(x[:, 0])) * 0)
            + (jnp.mean(jnp.sqrt(jnp.square(x[:, 0] * params["bias"][0]))))
        )

    with pytest.raises(ValueError, match="24 gradient rows hold NaN"):
        fisher()(kinked, params, (x.at[3].set(0.0), y))
    with pytest.raises(ValueError, match="Look for NaN"):
        fisher()(loss, params, (x.at[0, 0].set(jnp.nan), y))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "fisher"}, "empirical"),
        ({"kind": "sampled"}, "predict_fn"),
        ({"rows": 0}, "rows"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"chunk_size": -1}, "chunk_size"),
        ({"blocks": "layer"}, "blocks"),
        ({"ridge": -1.0}, "ridge"),
        ({"ridge": float("nan")}, "ridge"),
        ({"implicit": True, "blocks": 5}, "either"),
        ({"coupled": True}, "mini-batches"),
        ({"coupled": True, "batch_size": 2, "implicit": True}, "mini-batches"),
        ({"key": jax.random.key(0)}, "draws nothing"),
    ],
)
def test_bad_options_are_explained(options, words):
    with pytest.raises(ValueError, match=words):
        fisher(**options)


def test_sampling_needs_a_concrete_key():
    given = {"predict_fn": predict, "output_loss_fn": quadratic.softmax_cross_entropy}
    with pytest.raises(ValueError, match=r"jax\.random\.key"):
        fisher(kind="sampled", **given)
    with pytest.raises(TypeError, match="concrete PRNG key"):
        fisher(kind="sampled", key=3, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="written out"):
        fisher(kind="gauss_newton", batch_size=2, **given)
    with pytest.raises(ValueError, match="knows no loss"):
        fisher().loss({}, 1)


def test_partial_losses_carry_their_arrays():
    params, args = problem()
    scaled = Partial(lambda factor, p, x, y: factor * loss(p, x, y), jnp.asarray(2.0))
    model: Any = fisher(implicit=True)(scaled, params, args)
    expected = 4 * gradients().T @ gradients() / EXAMPLES
    np.testing.assert_allclose(matrix(model.curvature), expected, atol=1e-12)
