"""CHITA with descent of the kept weights between its stages."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import sparserec
from sparserec import Status, quadratic
from sparserec.quadratic._fisher import fisher
from sparserec.solvers import _descent
from sparserec.solvers._examples import divide
from sparserec.solvers.chita import chita

pytestmark = pytest.mark.usefixtures("lenient_promotion")

EXAMPLES, K = 160, 30
ADAM = sparserec.Descent(optax.adam(1e-2), minibatch=24, passes=3)
ROWS = fisher(batch_size=8, ridge=0.1)
COUPLED = fisher(
    rows=9, batch_size=16, ridge=0.1, coupled=True, blocks=16, first_order=False
)


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compiling is nearly all these tests do; what is compiled stays the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def problem() -> tuple[dict, tuple]:
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(EXAMPLES, 10))
    params = {
        "bias": np.zeros(6),
        "first": rng.normal(size=(10, 6)) / 3,
        "second": rng.normal(size=(6, 2)) / 2,
    }
    params = jax.tree.map(jnp.asarray, params)
    targets = jnp.tanh(inputs @ params["first"] + 0.3) @ params["second"]
    return params, (jnp.asarray(inputs), targets)


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["first"] + params["bias"][None])
    return jnp.mean(jnp.square(hidden @ params["second"] - y))


def normalised(params, x, y):
    hidden = x @ params["first"]
    hidden = hidden - jnp.mean(hidden, axis=0, keepdims=True)
    hidden = hidden / jnp.sqrt(jnp.mean(hidden**2, axis=0, keepdims=True) + 1e-5)
    hidden = jnp.tanh(hidden + params["bias"][None])
    return jnp.mean(jnp.square(hidden @ params["second"] - y))


def pruned(loss_fn=loss, k=K, **options) -> Any:
    params, args = problem()
    # On the host, where the tests share what is compiled.
    defaults = {"args": args, "curvature": ROWS, "variant": "bso", "metric": 0}
    defaults |= {"batch_size": EXAMPLES}
    return chita(loss_fn, params, k, **cast(Any, defaults | options))


@pytest.mark.parametrize(("loss_fn", "rows"), [(loss, ROWS), (normalised, COUPLED)])
def test_a_lower_loss_with_as_many_weights(loss_fn, rows):
    options = {"curvature": rows, "stages": 3, "schedule": "geometric"}
    bare = pruned(loss_fn, **options)
    tuned = pruned(loss_fn, descent=ADAM, **options)
    assert tuned.status == Status.MAX_STEPS
    args = problem()[1]
    assert loss_fn(tuned.params, *args) < 0.8 * loss_fn(bare.params, *args)
    np.testing.assert_allclose(tuned.objective, loss_fn(tuned.params, *args))
    kept = sum(int(jnp.count_nonzero(tuned.params[n])) for n in ("first", "second"))
    assert kept == K
    for name, mask in tuned.mask.items():
        assert np.all(np.asarray(tuned.params[name])[~np.asarray(mask)] == 0)
    # Leaves that are not prunable are tuned too.
    assert bool(jnp.all(tuned.params["bias"] != 0))


def test_one_stage_is_the_walk_of_a_plain_loop():
    """Against steps written out: order of the batches, mask, and who is chosen."""
    descent = sparserec.Descent(optax.sgd(0.05, momentum=0.9), minibatch=40, passes=2)
    start, solution = pruned(), pruned(descent=descent)
    data = problem()[1]
    order = _descent._order(EXAMPLES, descent)
    gradient = jax.jit(jax.grad(loss))
    for visited in order.reshape(2, EXAMPLES):
        np.testing.assert_array_equal(np.sort(visited), np.arange(EXAMPLES))
    params, velocity = start.params, jax.tree.map(jnp.zeros_like, start.params)
    walk = []
    for batch in order:
        slope = gradient(params, *(x[batch] for x in data))
        velocity = jax.tree.map(
            lambda v, g, m: 0.9 * v + jnp.where(m, g, 0), velocity, slope, start.mask
        )
        params = jax.tree.map(lambda w, v: w - 0.05 * v, params, velocity)
        walk.append(params)
    tail = jax.tree.map(lambda *xs: sum(xs) / len(xs), *walk[len(walk) // 2 :])
    best = min([start.params, params, tail], key=lambda p: float(loss(p, *data)))
    for name in best:
        np.testing.assert_allclose(solution.params[name], best[name], rtol=1e-9)


@pytest.mark.parametrize("held_out", [0.1, pytest.param(0.0, marks=pytest.mark.slow)])
def test_loops_on_the_host_and_in_a_program_agree(held_out):
    options = {
        "descent": ADAM,
        "stages": 2,
        "schedule": "geometric",
        "held_out": held_out,
    }
    compiled, host = pruned(batch_size=None, **options), pruned(**options)
    np.testing.assert_allclose(compiled.objective, host.objective, rtol=1e-9)
    for name in compiled.params:
        np.testing.assert_array_equal(compiled.mask[name], host.mask[name])
        np.testing.assert_allclose(
            compiled.params[name], host.params[name], rtol=1e-7, atol=1e-12
        )


def test_a_walk_that_explodes_loses_nothing():
    wild = sparserec.Descent(optax.sgd(1e30), minibatch=40)
    bare, kept = pruned(), pruned(descent=wild)
    assert kept.status == bare.status
    assert kept.objective <= bare.objective
    np.testing.assert_allclose(kept.params["first"], bare.params["first"])
    # The optimizer forgets such a walk: NaN in its moments would stay there.
    broken = sparserec.Descent(optax.chain(optax.trace(0.9), optax.scale(jnp.nan)))
    objective = quadratic.make_objective(loss)
    params, args = problem()
    mask = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    state = _descent.init(broken, params)
    chosen, after = _descent.descend(
        broken, objective, divide(args, 0.1), params, mask, state
    )
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), chosen, params))
    assert jax.tree.all(
        jax.tree.map(lambda x: bool(jnp.all(jnp.isfinite(x))), after.optimizer)
    )


def test_without_prunable_weights_the_others_are_tuned():
    empty, tuned = pruned(k=0), pruned(k=0, descent=ADAM)
    assert not jnp.any(tuned.params["first"])
    assert not jnp.any(tuned.params["second"])
    # Nothing reaches the output, so there is nothing to gain.
    np.testing.assert_allclose(tuned.objective, empty.objective)


def test_a_sweep_over_k_compiles_once():
    traced = []

    def watched(params, x, y):
        traced.append(1)
        return loss(params, x, y)

    pruned(watched, descent=ADAM)
    count = len(traced)
    for k in (10, 50):
        pruned(watched, k=k, descent=ADAM)
    assert len(traced) == count


def test_errors_name_the_remedy():
    with pytest.raises(TypeError, match=r"sparserec\.Descent\(optimizer\)"):
        pruned(descent=optax.adam(1e-2))
    with pytest.raises(TypeError, match="optax transformation"):
        sparserec.Descent(cast(Any, 0.1))
    for wrong in ({"minibatch": 0}, {"passes": 1.5}, {"passes": True}):
        with pytest.raises(ValueError, match="at least 1"):
            sparserec.Descent(optax.adam(1e-2), **cast(Any, wrong))
    params, args = problem()
    model = ROWS(loss, params, args)
    with pytest.raises(ValueError, match="a model has no examples"):
        chita(model, params, K, descent=ADAM)
    with pytest.raises(TypeError, match=r"sparserec\.Descent\(optimizer\)"):
        sparserec.iobs(loss, params, K, args=args, descent=cast(Any, optax.adam(1e-2)))
