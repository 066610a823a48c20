"""`keep_mask`: pruned weights stay zero, kept ones train as without it."""

import functools
import warnings
from typing import Any

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparserec.training import KeepMaskState, keep_mask

# Optax itself promotes, e.g. the step counter of Adam.
pytestmark = pytest.mark.usefixtures("lenient_promotion")

OPTIMIZERS = {
    "sgd": optax.sgd(0.1),
    "momentum": optax.sgd(0.1, momentum=0.9, nesterov=True),
    "adamw": optax.adamw(0.05, weight_decay=0.3),
    "lion": optax.lion(0.01, weight_decay=0.3),
    "noise": optax.chain(optax.add_noise(0.1, 0.5, key=3), optax.sgd(0.1)),
}


def make_params(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "dense": {
            "kernel": jnp.asarray(rng.normal(size=(6, 5))),
            "bias": jnp.asarray(rng.normal(size=5)),
        },
        "scale": jnp.asarray(rng.normal(), float),
    }


def make_mask(seed=1):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.random(size=x.shape) < 0.4), make_params()
    )


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["dense"]["kernel"] + params["dense"]["bias"])
    return jnp.mean((params["scale"] * hidden.sum(axis=-1) - y) ** 2)


def make_data(seed=2):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=(20, 6))), jnp.asarray(rng.normal(size=20))


def train(transform, params, steps=30):
    state = transform.init(params)
    data = make_data()
    for _ in range(steps):
        gradient = jax.grad(loss)(params, *data)
        updates, state = transform.update(gradient, state, params)
        params = optax.apply_updates(params, updates)
    return params


def entries(tree, mask, kept):
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(mask), strict=True)
    return np.concatenate([np.asarray(x)[np.asarray(m) == kept] for x, m in pairs])


# --- what it is for ------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weights_off_the_mask_are_exactly_zero(name):
    # They start as anything but zero: the first step removes them, the others hold.
    mask = make_mask()
    params = train(optax.chain(OPTIMIZERS[name], keep_mask(mask)), make_params())
    pruned = entries(params, mask, kept=False)
    assert pruned.size > 5
    assert np.array_equal(pruned, np.zeros_like(pruned))
    assert not np.signbit(pruned).any()


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lion"])
def test_kept_weights_train_as_if_the_others_did_not_exist(name):
    # Independent meaning: a loss that multiplies the pruned weights by zero.
    mask = make_mask()
    floats = jax.tree.map(lambda m: m.astype(float), mask)

    def without(params, x, y):
        return loss(jax.tree.map(jnp.multiply, params, floats), x, y)

    data, alone = make_data(), make_params()
    state = OPTIMIZERS[name].init(alone)
    for _ in range(30):
        gradient = jax.grad(without)(alone, *data)
        updates, state = OPTIMIZERS[name].update(gradient, state, alone)
        alone = optax.apply_updates(alone, updates)
    start = jax.tree.map(jnp.multiply, make_params(), floats)
    params = train(optax.chain(OPTIMIZERS[name], keep_mask(mask)), start)
    np.testing.assert_allclose(
        entries(params, mask, kept=True), entries(alone, mask, kept=True), rtol=1e-12
    )


def test_a_mask_that_keeps_everything_changes_nothing():
    everything = jax.tree.map(lambda x: jnp.ones(x.shape, bool), make_params())
    plain = train(OPTIMIZERS["adamw"], make_params())
    kept = train(optax.chain(OPTIMIZERS["adamw"], keep_mask(everything)), make_params())
    jax.tree.map(np.testing.assert_array_equal, kept, plain)


@hypothesis.given(
    weight=st.floats(width=32, allow_nan=False, allow_infinity=False),
    change=st.floats(-1e3, 1e3),
    dtypes=st.tuples(
        *2 * [st.sampled_from(["float16", "bfloat16", "float32", "float64"])]
    ),
)
@hypothesis.example(1 / 3, 0.0, ("float32", "bfloat16"))
def test_the_update_cancels_the_weight_in_every_dtype(weight, change, dtypes):
    with warnings.catch_warnings():
        # NumPy's overflow of a large number cast to float16, which is then skipped.
        warnings.simplefilter("ignore", RuntimeWarning)
        params = jnp.asarray(weight).astype(dtypes[0])[None]
    hypothesis.assume(bool(jnp.isfinite(params).all()))
    transform = keep_mask(jnp.array([False]))
    updates, _ = transform.update(
        jnp.asarray([change]).astype(dtypes[1]), transform.init(params), params
    )
    after: Any = optax.apply_updates(params, updates)
    assert after.dtype == params.dtype
    assert float(after[0]) == 0


def test_an_infinite_update_off_the_mask_does_no_harm():
    mask = {"w": jnp.array([True, False])}
    params = {"w": jnp.array([1.0, 0.0])}
    transform = keep_mask(mask)
    updates: Any = transform.update(
        {"w": jnp.array([0.5, jnp.nan])}, transform.init(params), params
    )[0]
    np.testing.assert_array_equal(updates["w"], [0.5, 0.0])


# --- the mask as a part of the state -------------------------------------------------


def test_another_mask_does_not_compile_again():
    transform = optax.chain(OPTIMIZERS["adamw"], keep_mask(make_mask()))
    traces = []

    @jax.jit
    def step(params, state, x, y):
        traces.append(None)
        updates, state = transform.update(jax.grad(loss)(params, x, y), state, params)
        return optax.apply_updates(params, updates), state

    params = make_params()
    state = transform.init(params)
    for seed in (1, 5, 6):
        mask = make_mask(seed)
        state = optax.tree.set(state, mask=mask)
        params, state = step(params, state, *make_data())
        pruned = entries(params, mask, kept=False)
        assert np.array_equal(pruned, np.zeros_like(pruned))
    assert len(traces) == 1


def test_a_donated_state_does_not_take_the_mask_with_it():
    mask = {"w": jnp.array([True, False])}
    state = keep_mask(mask).init({"w": jnp.ones(2)})
    assert isinstance(state, KeepMaskState)
    jax.jit(lambda s: jax.tree.map(jnp.logical_not, s), donate_argnums=0)(state)
    np.testing.assert_array_equal(mask["w"], [True, False])


def test_under_vmap_every_lane_has_its_own_mask():
    params = jnp.arange(1.0, 7.0).reshape(2, 3)
    masks = jnp.array([[True, False, True], [False, False, True]])
    transform = keep_mask(masks[0])

    def step(mask, params):
        ones = jnp.ones_like(params)
        updates, _ = transform.update(ones, KeepMaskState(mask), params)
        return optax.apply_updates(params, updates)

    after: Any = jax.vmap(step)(masks, params)
    np.testing.assert_array_equal(after, np.where(masks, params + 1, 0))


def test_arguments_for_other_transformations_pass():
    transform = optax.chain(optax.sgd(0.1), keep_mask(jnp.array([True, False])))
    params = jnp.ones(2)
    updates: Any = transform.update(
        params, transform.init(params), params, value=jnp.float32(3)
    )[0]
    np.testing.assert_allclose(updates, [-0.1, -1.0])


# --- wrong calls ---------------------------------------------------------------------


def replace(mask, **parts):
    return {**mask, **parts}


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda m: {"scale": m["scale"]}, ValueError, r"without a mask.*dense/kernel"),
        (functools.partial(replace, more=jnp.array(True)), ValueError, r"\['more'\]"),
        (
            functools.partial(replace, scale=jnp.array([True])),
            ValueError,
            r"'scale' has shape \(\) but its mask has shape \(1,\)",
        ),
        (functools.partial(replace, scale=jnp.array(1.0)), TypeError, "compare first"),
    ],
    ids=["missing", "surplus", "shape", "dtype"],
)
def test_a_mask_that_does_not_fit_is_refused(change, error, words):
    with pytest.raises(error, match=words):
        keep_mask(change(make_mask())).init(make_params())


def test_a_mask_of_another_shape_for_a_single_array_is_refused():
    with pytest.raises(ValueError, match="the array has shape"):
        keep_mask(jnp.ones(3, bool)).init(jnp.ones(2))


def test_update_without_params_says_what_to_do():
    transform = keep_mask(make_mask())
    state = transform.init(make_params())
    with pytest.raises(ValueError, match=r"tx\.update\(gradients, opt_state, params\)"):
        transform.update(make_params(), state)
