"""I-OBS on curvatures known by products: networks, fresh data, descent, chunks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparserec
from sparserec import _run, quadratic

INPUTS, HIDDEN, CLASSES = 12, 10, 4


def predict(params, x):
    return jax.nn.relu(x @ params["in"] + params["bias"][None]) @ params["out"]


CURVATURE = quadratic.gauss_newton(predict, quadratic.softmax_cross_entropy, cg_steps=4)


@functools.cache
def trained():
    """A trained network, and functions that draw examples with learnable labels."""
    rng = np.random.default_rng(0)
    centers = 2 * rng.normal(size=(CLASSES, INPUTS))
    centers[:, INPUTS // 2 :] = 0  # half of the inputs say nothing

    def draw(seed, count=400):
        fresh = np.random.default_rng(seed)
        labels = fresh.integers(CLASSES, size=count)
        x = centers[labels] + fresh.normal(size=(count, INPUTS))
        return jnp.asarray(x), jnp.asarray(labels, jnp.int32)

    params = {
        "in": jnp.asarray(rng.normal(size=(INPUTS, HIDDEN)) / 3),
        "bias": jnp.zeros(HIDDEN),
        "out": jnp.asarray(rng.normal(size=(HIDDEN, CLASSES)) / 3),
    }
    gradient = jax.jit(jax.grad(CURVATURE.loss))
    for step in range(200):
        slope = gradient(params, *draw(1000 + step, 100))
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, slope)
    return params, draw


def prune(k=24, **options):
    params, draw = trained()
    data = {} if "batches" in options else {"args": draw(1)}
    settings = {"schedule": "down", "stages": 5, "max_steps": 6, "refinements": 2}
    return sparserec.iobs(
        CURVATURE.loss,
        params,
        k,
        curvature=CURVATURE,
        **data,
        **(settings | options),
    )


def accuracy(params):
    x, labels = trained()[1](2, 2000)
    guesses = jnp.argmax(predict(params, x), axis=1).astype(labels.dtype)
    return float(jnp.mean(guesses == labels))


def test_beats_magnitude_pruning_at_the_same_count():
    params, _ = trained()
    solution = prune()
    matrices = {name: params[name] for name in ("in", "out")}
    mask = sparserec.select.top_k(matrices, 24)
    magnitude = {**params, **sparserec.apply_mask(matrices, mask)}
    assert int(solution.mask["in"].sum() + solution.mask["out"].sum()) == 24
    assert accuracy(solution.params) > accuracy(magnitude) + 0.02
    assert accuracy(solution.params) > 0.9 * accuracy(params)


@pytest.mark.slow
def test_fresh_batches_from_a_callable_and_from_a_stack_agree():
    _, draw = trained()
    batches = [draw(10 + step) for step in range(6)]
    stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *batches)
    called = prune(batches=lambda step: batches[step])
    compiled = prune(batches=stacked)
    np.testing.assert_array_equal(called.mask["in"], compiled.mask["in"])
    np.testing.assert_allclose(called.params["out"], compiled.params["out"], rtol=1e-6)


def test_every_batch_is_drawn_once():
    _, draw = trained()
    drawn = []

    def batches(step):
        drawn.append(int(step))
        return draw(10 + step)

    prune(batches=batches)
    assert drawn == list(range(6))


@pytest.mark.slow
def test_visiting_the_data_in_chunks_prunes_as_well():
    # Not the same numbers: the probes of the diagonal are taken chunk by chunk.
    settings = {"max_steps": 2, "stages": 2, "refinements": 1}
    whole, chunked = prune(**settings), prune(**settings, batch_size=150)
    assert int(chunked.mask["in"].sum() + chunked.mask["out"].sum()) == 24
    assert chunked.objective < 1.3 * whole.objective
    draw = trained()[1]
    expected = CURVATURE.loss(chunked.params, *draw(1))
    np.testing.assert_allclose(chunked.objective, expected, rtol=1e-12)


@pytest.mark.usefixtures("lenient_promotion")
@pytest.mark.parametrize(
    "batch_size", [None, pytest.param(150, marks=pytest.mark.slow)]
)
def test_descent_keeps_zeros_exact(batch_size):
    descent = sparserec.Descent(optax.adamw(1e-2, weight_decay=0.1), minibatch=100)
    solution = prune(
        descent=descent, held_out=0.1, batch_size=batch_size, max_steps=3, stages=2
    )
    assert int(jnp.count_nonzero(solution.params["in"])) <= 24
    for name in ("in", "out"):
        off = ~solution.mask[name]
        assert np.all(np.asarray(solution.params[name])[np.asarray(off)] == 0)
    assert accuracy(solution.params) > 0.8 * accuracy(trained()[0])


def test_a_loss_that_explodes_away_from_the_start_loses_nothing():
    params, draw = trained()
    start = params["in"]

    def fragile(weights, x, labels):
        value = CURVATURE.loss(weights, x, labels)
        moved = jnp.sum(jnp.square(weights["in"] - start)) > 1e-9
        return jnp.where(moved, jnp.nan, value)

    solution = sparserec.iobs(
        fragile, params, 24, args=draw(1), curvature=CURVATURE, max_steps=3
    )
    assert solution.status == sparserec.Status.NONFINITE
    assert all(bool(jnp.all(jnp.isfinite(w))) for w in solution.params.values())
    assert int(solution.mask["in"].sum() + solution.mask["out"].sum()) == 24


def cached_programs():
    return _run._run_compiled._cache_size()  # type: ignore[attr-defined]


def test_the_settings_of_a_sweep_share_one_compilation():
    _, draw = trained()
    prune(k=30)
    before = cached_programs()
    for k in (12, 24, 40):
        prune(k=k)
    params, _ = trained()
    sparserec.iobs(
        CURVATURE.loss,
        params,
        20,
        curvature=CURVATURE,
        args=draw(77),
        schedule="down",
        stages=5,
        max_steps=6,
        refinements=2,
    )
    assert cached_programs() == before
