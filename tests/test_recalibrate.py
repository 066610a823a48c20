"""Batch statistics: means over batches, whatever the momentum, for linen and nnx."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparserec._recalibrate import recalibrate

pytestmark = pytest.mark.usefixtures("lenient_promotion")

BATCHES = [
    np.random.default_rng(seed).normal(seed, 1 + seed, size=(size, 5))
    for seed, size in enumerate((8, 8, 6))
]


def network(momentum):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, train=False):
            norm = {"use_running_average": not train, "momentum": momentum}
            norm |= {"param_dtype": jnp.float64}
            x = nn.Dense(4, param_dtype=jnp.float64)(x)
            x = nn.relu(nn.BatchNorm(**norm)(x))
            x = nn.Dense(3, param_dtype=jnp.float64)(x)
            return nn.BatchNorm(**norm)(x)

    model = Net()
    variables = model.init(jax.random.key(0), jnp.asarray(BATCHES[0]))

    def apply_fn(variables, x):
        return model.apply(variables, x, train=True, mutable=["batch_stats"])

    return model, variables, apply_fn


def expected(kernels):
    """Means over batches of the mean and variance of every layer, in NumPy."""
    seen = []
    for x in BATCHES:
        found = []
        for number, (kernel, bias) in enumerate(kernels):
            x = x @ kernel + bias
            mean, variance = x.mean(axis=0), x.var(axis=0)
            found += [mean, variance]
            x = (x - mean) / np.sqrt(variance + 1e-5)
            x = np.maximum(x, 0) if number == 0 else x
        seen.append(found)
    return [np.mean(parts, axis=0) for parts in zip(*seen, strict=True)]


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 0.99, 0.999])
def test_linen_statistics_are_means_over_batches(momentum):
    _, variables, apply_fn = network(momentum)
    fresh = recalibrate(apply_fn, variables, (jnp.asarray(x) for x in BATCHES))
    params, stats = variables["params"], fresh["batch_stats"]
    wanted = expected(
        [
            [np.asarray(params[name][part]) for part in ("kernel", "bias")]
            for name in ("Dense_0", "Dense_1")
        ]
    )
    for layer in (0, 1):
        found = stats[f"BatchNorm_{layer}"]
        # Flax takes statistics in float32 at least, here in the float64 of its input.
        np.testing.assert_allclose(found["mean"], wanted[2 * layer], rtol=1e-5)
        np.testing.assert_allclose(found["var"], wanted[2 * layer + 1], rtol=1e-5)
    assert fresh["params"] is variables["params"]


class Module(nnx.Module):
    def __init__(self, momentum):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(5, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, momentum=momentum, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.second = nnx.Linear(4, 3, rngs=rngs)
        self.last = nnx.BatchNorm(3, momentum=momentum, rngs=rngs)

    def __call__(self, x):
        x = self.drop(nnx.relu(self.norm(self.first(x))))
        return self.last(self.second(x))


@pytest.mark.parametrize("momentum", [0.1, 0.99])
def test_nnx_statistics_are_means_over_batches(momentum):
    model = Module(momentum)
    model.eval()
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    fresh = recalibrate(
        lambda model, x: model(x), model, [jnp.asarray(x, jnp.float32) for x in BATCHES]
    )
    wanted = expected(
        [
            [np.asarray(x) for x in jax.tree.leaves(nnx.state(layer))][::-1]
            for layer in (model.first, model.second)
        ]
    )
    layers = (fresh.norm.mean, fresh.norm.var, fresh.last.mean, fresh.last.var)
    for found, value in zip(layers, wanted, strict=True):
        np.testing.assert_allclose(found[...], value, rtol=2e-4, atol=1e-5)
    after = nnx.state(model, nnx.BatchStat)
    jax.tree.map(np.testing.assert_array_equal, before, after)  # input unchanged
    assert fresh.norm.use_running_average  # and the mode of the model too
    jax.tree.map(
        np.testing.assert_array_equal,
        *(nnx.state(m, nnx.Param) for m in (model, fresh)),
    )


def test_a_second_call_with_the_same_function_compiles_nothing():
    traces = []
    _, variables, apply_fn = network(0.9)

    def counted(variables, x):
        traces.append(1)
        return apply_fn(variables, x)

    batches = [jnp.asarray(x) for x in BATCHES[:2]]
    recalibrate(counted, variables, batches)
    first = len(traces)
    recalibrate(counted, variables, batches)
    assert first == len(traces) == 1


def test_plain_functions_of_arrays_and_frozen_dicts_work():
    def apply_fn(variables, x):
        mean = variables["batch_stats"]["mean"]
        return x, {"batch_stats": {"mean": 0.75 * mean + 0.25 * jnp.mean(x, axis=0)}}

    from flax.core import freeze

    variables = freeze({"params": {}, "batch_stats": {"mean": jnp.ones(5)}})
    fresh = recalibrate(apply_fn, variables, [jnp.asarray(x) for x in BATCHES])
    means = np.mean([x.mean(axis=0) for x in BATCHES], axis=0)
    assert type(fresh) is type(variables)
    found = np.asarray(jax.tree.leaves(fresh)[0])
    np.testing.assert_allclose(found, means, rtol=1e-12)


def test_errors_say_what_to_do():
    model, variables, apply_fn = network(0.9)
    batches = [jnp.asarray(x) for x in BATCHES]
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate(apply_fn, variables, [])
    with pytest.raises(ValueError, match="nothing to recalibrate"):
        recalibrate(apply_fn, {"params": variables["params"]}, batches)
    with pytest.raises(TypeError, match="mutable"):
        recalibrate(lambda v, x: model.apply(v, x), variables, batches)
    with pytest.raises(ValueError, match="training mode"):
        recalibrate(
            lambda v, x: model.apply(v, x, mutable=["batch_stats"]), variables, batches
        )
    with pytest.raises(ValueError, match="NaN"):
        recalibrate(apply_fn, variables, [batches[0] * jnp.nan])
    with pytest.raises(TypeError, match=r"nnx\.Module"):
        recalibrate(apply_fn, 3, batches)

    def squares(variables, x):
        return x, {"batch_stats": jnp.square(variables["batch_stats"]) + 1}

    with pytest.raises(ValueError, match="no running average"):
        recalibrate(squares, {"batch_stats": jnp.ones(2)}, batches)
