"""What predicts the loss that goes with a unit, on trained networks.

pytest -m slow tests/test_gate_prediction.py -s      # prints the table
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from saliency_nets import conv, layer_norm, row
from scipy.stats import spearmanr

from sparserec import quadratic, saliency, structure
from sparserec.structure._gate_model import gate_model, gate_scores

CLASSES = 4


def normal(rng, *shape):
    fan = int(np.prod(shape[:-1]))
    return jnp.asarray(rng.normal(size=shape) * np.sqrt(2 / fan), jnp.float32)


# --- a residual network with batch normalization -------------------------------------


def resnet(variables, x, train=False):
    """Stem, two residual blocks, head; statistics of the batch where it trains."""
    p, seen = variables["params"], {}

    def norm(x, name):
        if train:
            seen[name] = jnp.stack([jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))])
        mean, var = seen[name] if train else variables["stats"][name]
        scaled = (x - row(mean, x)) / jnp.sqrt(row(var, x) + 1e-5)
        return scaled * row(p[f"{name}/scale"], x) + row(p[f"{name}/bias"], x)

    x = jax.nn.relu(norm(conv(x, p["stem"]), "n0"))
    for i in (1, 2):
        h = jax.nn.relu(norm(conv(x, p[f"a{i}"]), f"na{i}"))
        x = jax.nn.relu(x + norm(conv(h, p[f"b{i}"]), f"nb{i}"))
    logits = jnp.mean(x, axis=(1, 2)) @ p["head"]
    return (logits, seen) if train else logits


def resnet_params(rng, width=12):
    params = {"stem": normal(rng, 3, 3, 3, width), "head": normal(rng, width, CLASSES)}
    for name in ("a1", "b1", "a2", "b2"):
        params[name] = normal(rng, 3, 3, width, width)
    for name in ("n0", "na1", "nb1", "na2", "nb2"):
        params[f"{name}/scale"] = jnp.ones(width, jnp.float32)
        params[f"{name}/bias"] = jnp.zeros(width, jnp.float32)
    return params


# --- a transformer --------------------------------------------------------------------


def transformer(variables, x, train=False):
    p = variables["params"]
    x = x.reshape(x.shape[0], 12, 16) @ p["embed"]
    for i in (0, 1):
        h = layer_norm(x)
        q, k, v = (jnp.einsum("btd,dhe->bthe", h, p[f"{n}{i}"]) for n in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k) / 2.0, axis=-1)
        x = x + jnp.einsum("bhts,bshe,hed->btd", weights, v, p[f"o{i}"])
        x = x + jax.nn.gelu(layer_norm(x) @ p[f"up{i}"]) @ p[f"down{i}"]
    logits = jnp.mean(layer_norm(x), axis=1) @ p["head"]
    return (logits, {}) if train else logits


def transformer_params(rng, width=16):
    params = {"embed": normal(rng, 16, width), "head": normal(rng, width, CLASSES)}
    for i in (0, 1):
        for name in "qkv":
            params[f"{name}{i}"] = normal(rng, width, 32).reshape(width, 4, 8) * 0.7
        params[f"o{i}"] = normal(rng, 32, width).reshape(4, 8, width) * 0.7
        params[f"up{i}"] = normal(rng, width, 32)
        params[f"down{i}"] = normal(rng, 32, width) * 0.7
    return params


NETS = {
    "resnet": (resnet, resnet_params),
    "transformer": (transformer, transformer_params),
}


def draw(rng, examples=384):
    """Noisy pictures of four classes, two templates each."""
    templates = rng.normal(size=(CLASSES, 2, 8, 8, 3))
    labels = rng.integers(0, CLASSES, examples)
    x = templates[labels, rng.integers(0, 2, examples)] * rng.normal(
        1, 0.3, (examples, 1, 1, 1)
    )
    x = x + rng.normal(scale=1.5, size=x.shape)
    return jnp.asarray(x, jnp.float32), jnp.asarray(labels)


def trained(name, seed, steps=60):
    network, make = NETS[name]
    rng = np.random.default_rng(seed)
    params, data = make(rng), draw(rng)
    optimizer = optax.adam(3e-3)

    def loss(params, x, labels):
        logits, _ = network({"params": params, "stats": {}}, x, train=True)
        return quadratic.softmax_cross_entropy(logits, labels)

    @jax.jit
    def step(params, state, x, labels):
        updates, state = optimizer.update(jax.grad(loss)(params, x, labels), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        chosen = rng.choice(len(data[1]), 64, replace=False)
        params, state = step(params, state, data[0][chosen], data[1][chosen])
    _, stats = jax.jit(functools.partial(network, train=True))(
        {"params": params, "stats": {}}, data[0]
    )
    return {"params": params, "stats": stats}, data


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)])


def correlations(name, seed):
    network, _ = NETS[name]
    variables, data = trained(name, seed)
    builder = quadratic.gauss_newton(network, quadratic.softmax_cross_entropy)
    groups = structure.groups(network, variables, data[0])

    @jax.jit
    def without(units):
        gates = structure.ones(groups)
        sizes = [gates[n].size for n in sorted(gates)]
        parts = jnp.split(units, np.cumsum(sizes)[:-1])
        gates = dict(zip(sorted(gates), parts, strict=True))
        return builder.loss(structure.gate(variables, groups, gates), *data)

    count = sum(groups.sizes.values())
    open_gates = np.ones((count + 1, count), np.float32)
    open_gates[np.arange(count), np.arange(count)] = 0
    losses = np.array([float(without(jnp.asarray(m))) for m in open_gates])
    true = losses[:-1] - losses[-1]

    def summed(scores):
        zeros = jax.tree.map(jnp.zeros_like, variables["stats"])
        tree = {"params": scores["params"], "stats": zeros}
        return np.abs(flat(structure.unit_scores(groups, tree)))

    model = gate_model(
        builder.loss, variables, groups, args=data, curvature=builder, batch_size=128
    )
    scores = {
        "gates": flat(gate_scores(model)),
        "OBA": summed(saliency.oba(builder.loss, variables, args=data)),
        "Taylor": summed(saliency.taylor(builder.loss, variables, args=data)),
        "magnitude": summed(saliency.magnitude(variables)),
    }
    row = {n: float(spearmanr(s, true).statistic) for n, s in scores.items()}  # pyright: ignore
    print(f"{name} seed {seed}, loss {losses[-1]:.3f}, {count} units", row)
    return row


@pytest.mark.slow
@pytest.mark.usefixtures("lenient_promotion")
@pytest.mark.parametrize("name", NETS)
def test_the_gate_model_predicts_what_a_removal_costs(name):
    rows = [correlations(name, seed) for seed in range(3)]
    means = {method: np.mean([row[method] for row in rows]) for method in rows[0]}
    assert means["gates"] >= 0.95
    assert means["gates"] == max(means.values())
