"""Unusual functions: whatever groups are found, removing equals zeroing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structure_cases import conv, masked, normal, random_keep, row

from sparserec import structure

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("lenient_promotion")]

X = normal(99, 4, 3)
IMAGE = normal(98, 2, 4, 4, 2)


def two(inside, width=6, read=None):
    """tanh(x a), then `inside`, then a product with w."""
    params = {"a": normal(0, 3, width), "w": normal(1, read or width, 2)}
    return lambda p, x: inside(jnp.tanh(x @ p["a"])) @ p["w"], params, (X,)


def outer_with_itself():
    return two(lambda h: (h[:, :, None] * h[:, None]).reshape(4, 25), 5, 25)


def joined_with_itself():
    return two(lambda h: jnp.concatenate([h, -h], -1), 5, 10)


def product_of_halves():
    return two(lambda h: h[:, :4] * h[:, 4:], 8, 4)


def overlapping_slices():
    return two(lambda h: h[:, :5] * h[:, 3:], 8, 5)


def maxout():
    return two(lambda h: h.reshape(4, 4, 3).max(-1), 12, 4)


def unit_length():
    return two(lambda h: h / jnp.linalg.norm(h, axis=-1, keepdims=True))


def tiled():
    return two(lambda h: jnp.repeat(jnp.tile(h, (1, 3)), 2, axis=1), 4, 24)


def padded():
    return two(lambda h: jnp.tanh(jnp.pad(h, ((0, 0), (2, 3)))), 4, 9)


def segments():
    return two(lambda h: jax.ops.segment_sum(h, jnp.array([0, 2, 1, 1]), 3))


def shifted():
    return two(lambda h: jax.nn.sigmoid(h) + 1)


def parallel_scan():
    def combine(left, right):
        return left[0] * right[0], left[1] * right[0] + right[1]

    return two(lambda h: jax.lax.associative_scan(combine, (jnp.cos(h), h), axis=0)[1])


def normalized_reader():
    params = {"a": normal(0, 3, 6), "w": normal(1, 6, 2)}

    def function(p, x):
        norm = jnp.sqrt(jnp.square(p["w"]).sum(0, keepdims=True) + 1e-3)
        return jnp.tanh(x @ p["a"]) @ (p["w"] / norm)

    return function, params, (X,)


def regularized_loss():
    params = {"a": normal(0, 3, 6), "w": normal(1, 6, 5)}

    def function(p, x):
        penalty = sum(jnp.square(leaf).sum() for leaf in p.values())
        return (jnp.tanh(x @ p["a"]) @ p["w"]).sum() + 0.1 * penalty

    return function, params, (X,)


def cross_entropy():
    params = {"a": normal(0, 3, 6), "w": normal(1, 6, 5)}

    def function(p, x, y):
        logits = jax.nn.log_softmax(jnp.tanh(x @ p["a"]) @ p["w"])
        return -jnp.take_along_axis(logits, y[:, None], -1).mean()

    return function, params, (X, jnp.array([0, 1, 2, 4]))


def channel_shuffle():
    params = {
        "a": normal(0, 1, 1, 2, 8),
        "b": normal(1, 3, 3, 4, 8),
        "c": normal(2, 1, 1, 8, 2),
    }

    def function(p, x):
        h = jax.nn.relu(conv(x, p["a"]))
        h = h.reshape(*h.shape[:3], 2, 4).swapaxes(-1, -2).reshape(h.shape)
        return conv(jax.nn.relu(conv(h, p["b"], groups=2)), p["c"])

    return function, params, (IMAGE,)


def pixel_shuffle():
    params = {"a": normal(0, 1, 1, 2, 16), "c": normal(2, 1, 1, 4, 2)}

    def function(p, x):
        h = conv(x, p["a"]).reshape(2, 4, 4, 2, 2, 4)
        h = h.transpose(0, 1, 3, 2, 4, 5).reshape(2, 8, 8, 4)
        return conv(jax.nn.relu(h), p["c"])

    return function, params, (IMAGE,)


def u_net():
    params = {
        "a": normal(0, 3, 3, 2, 6),
        "b": normal(1, 3, 3, 6, 5),
        "c": normal(2, 3, 3, 11, 4),
        "o": normal(3, 1, 1, 4, 2),
    }

    def function(p, x):
        h = jax.nn.relu(conv(x, p["a"]))
        deep = jax.nn.relu(conv(h[:, ::2, ::2], p["b"]))
        deep = jax.image.resize(deep, (2, 4, 4, 5), "bilinear")
        h = jnp.concatenate([h, deep], -1)
        return conv(jax.nn.relu(conv(h, p["c"])), p["o"])

    return function, params, (IMAGE,)


def soft_experts():
    params = {
        "r": normal(0, 3, 4),
        "a": normal(1, 4, 3, 6),
        "b": normal(2, 4, 6, 2),
    }

    def function(p, x):
        gate = jax.nn.softmax(x @ p["r"])
        h = jax.nn.relu(jnp.einsum("nd,edh->neh", x, p["a"]))
        return jnp.einsum("ne,neh,eho->no", gate, h, p["b"])

    return function, params, (X,)


def chosen_experts():
    _, params, args = soft_experts()

    def function(p, x):
        gate, chosen = jax.lax.top_k(x @ p["r"], 2)
        h = jax.nn.relu(jnp.einsum("nd,nkdh->nkh", x, p["a"][chosen]))
        return jnp.einsum("nk,nkh,nkho->no", gate, h, p["b"][chosen])

    return function, params, args


def energy_gradient():
    params = {"a": normal(0, 3, 6), "w": normal(1, 6, 5), "v": normal(2, 5, 1)}

    def function(p, x):
        def energy(x):
            return (jnp.tanh(jax.nn.softplus(x @ p["a"]) @ p["w"]) @ p["v"]).sum()

        return jax.grad(energy)(x)

    return function, params, (X,)


def ensemble():
    params = {"a": normal(0, 7, 3, 6), "w": normal(1, 7, 6, 2)}

    def function(p, x):
        return jax.vmap(lambda q: jnp.tanh(x @ q["a"]) @ q["w"])(p).sum(0)

    return function, params, (X,)


def cached_attention():
    params = {n: normal(i, 3, 6) for i, n in enumerate("qkv")} | {"o": normal(5, 6, 2)}

    def function(p, x, step):
        k, v = (
            jax.lax.dynamic_update_slice(
                jnp.zeros((8, 6)), x @ p[n], (step, jnp.zeros_like(step))
            )
            for n in "kv"
        )
        seen = (jnp.arange(8) < step + 4)[None]
        logits = jnp.where(seen, (x @ p["q"]) @ k.T, -1e9)
        return jax.nn.softmax(logits) @ v @ p["o"]

    return function, params, (X, jnp.int32(2))


def interleaved_rotation():
    params = {n: normal(i, 3, 8) for i, n in enumerate("qkv")}
    params |= {"o": normal(5, 8, 2), "t": normal(6, 4, 4)}

    def function(p, x):
        def turned(h):
            even, odd = (h.reshape(4, 4, 2)[..., i] for i in range(2))
            parts = [even - odd * p["t"], odd + even * p["t"]]
            return jnp.stack(parts, -1).reshape(4, 8)

        logits = turned(x @ p["q"]) @ turned(x @ p["k"]).T
        return jax.nn.softmax(logits) @ (x @ p["v"]) @ p["o"]

    return function, params, (X,)


def token_mixer():
    params = {
        "a": normal(0, 4, 5),
        "b": normal(1, 5, 4),
        "c": normal(2, 3, 7),
        "d": normal(3, 7, 3),
    }

    def function(p, x):
        x = x + (jax.nn.gelu(x.T @ p["a"]) @ p["b"]).T
        return x + jax.nn.gelu(x @ p["c"]) @ p["d"]

    return function, params, (X,)


def generated_weights():
    params = {"h": normal(0, 3, 30), "w": normal(1, 5, 2)}

    def function(p, x):
        weights = jnp.tanh(x.mean(0, keepdims=True) @ p["h"]).reshape(6, 5)
        return jnp.tanh(jnp.ones((4, 6)) @ weights) @ p["w"]

    return function, params, (X,)


def counted_loop():
    params = {"a": normal(0, 3, 6), "w": normal(1, 6, 6), "o": normal(2, 6, 2)}

    def function(p, x, n):
        def body(_, h):
            return jnp.tanh(h @ p["w"]) + row(jnp.cos(h[0]), h) * h

        h = jax.lax.fori_loop(0, n, body, jnp.tanh(x @ p["a"]))
        return jax.lax.switch(n, [jnp.tanh, jnp.exp, lambda h: h + 1], h) @ p["o"]

    return function, params, (X, jnp.int32(2))


FUNCTIONS = [
    outer_with_itself,
    joined_with_itself,
    product_of_halves,
    overlapping_slices,
    maxout,
    unit_length,
    tiled,
    padded,
    segments,
    shifted,
    parallel_scan,
    normalized_reader,
    regularized_loss,
    cross_entropy,
    channel_shuffle,
    pixel_shuffle,
    u_net,
    soft_experts,
    chosen_experts,
    energy_gradient,
    ensemble,
    cached_attention,
    interleaved_rotation,
    token_mixer,
    generated_weights,
    counted_loop,
]


@pytest.mark.parametrize("make", FUNCTIONS, ids=lambda make: make.__name__)
def test_removing_equals_zeroing_and_closing_the_gate(make):
    function, params, args = make()
    groups = structure.groups(function, params, *args)
    assert groups.groups
    assert not groups.unknown
    for seed in range(2):
        keep = random_keep(groups.sizes, seed)
        structure.check(function, params, groups, keep, *args, tol=1e-11)
        gates = {name: jnp.asarray(kept, float) for name, kept in keep.items()}
        np.testing.assert_allclose(
            jax.jit(function)(structure.gate(params, groups, gates), *args),
            jax.jit(function)(
                masked(params, structure.mask(params, groups, keep)), *args
            ),
            rtol=1e-9,
            atol=1e-11,
        )
