"""Small functions in plain JAX and the groups that an expert would write down."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """A function, its arguments and its groups: (size, places) with (path, axis)."""

    function: Callable[..., Any]
    params: Any
    args: tuple
    groups: list[tuple[int, set[tuple[str, int]]]]


def normal(seed: int, *shape: int) -> jax.Array:
    fan = int(np.prod(shape[:-1])) if len(shape) > 1 else 1
    values = np.random.default_rng(seed).normal(size=shape) / np.sqrt(fan)
    return jnp.asarray(values, jnp.float64)


def conv(x, kernel, groups=1, stride=1):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )


def row(vector, like):
    return vector.reshape((1,) * (like.ndim - 1) + (-1,))


def mlp() -> Case:
    def function(p, x):
        h = jax.nn.relu(x @ p["a"] + row(p["b"], x))
        return jnp.tanh(h @ p["c"]) @ p["d"]

    params = {
        "a": normal(0, 6, 8),
        "b": normal(1, 8),
        "c": normal(2, 8, 10),
        "d": normal(3, 10, 3),
    }
    expected = [(8, {("a", 1), ("b", 0), ("c", 0)}), (10, {("c", 1), ("d", 0)})]
    return Case(function, params, (normal(4, 5, 6),), expected)


def attention(q, k, v):
    logits = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1])
    return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(logits), v)


def separate_attention() -> Case:
    def function(p, x):
        q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) for n in "qkv")
        return jnp.einsum("bthe,hed->btd", attention(q, k, v), p["o"])

    params = {n: normal(i, 5, 4, 6) for i, n in enumerate("qkv")}
    params["o"] = normal(3, 4, 6, 5)
    expected = [
        (4, {("q", 1), ("k", 1), ("v", 1), ("o", 0)}),
        (6, {("q", 2), ("k", 2)}),
        (6, {("v", 2), ("o", 1)}),
    ]
    return Case(function, params, (normal(4, 2, 3, 5),), expected)


def fused_split() -> Case:
    def function(p, x):
        parts = jnp.split(x @ p["qkv"] + row(p["b"], x), 3, axis=-1)
        q, k, v = (part.reshape(*part.shape[:2], 4, 6) for part in parts)
        out = attention(q, k, v)
        return out.reshape(*out.shape[:2], -1) @ p["o"]

    params = {
        "qkv": normal(0, 5, 72),
        "b": normal(1, 72),
        "o": normal(2, 24, 5),
    }
    expected = [
        (4, {("qkv", 1), ("b", 0), ("o", 0)}),
        (6, {("qkv", 1), ("b", 0)}),
        (6, {("qkv", 1), ("b", 0), ("o", 0)}),
    ]
    return Case(function, params, (normal(3, 2, 3, 5),), expected)


def fused_reshape() -> Case:
    def function(p, x):
        qkv = (x @ p["qkv"]).reshape(*x.shape[:2], 3, 4, 6)
        out = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        return out.reshape(*out.shape[:2], 24) @ p["o"]

    params = {"qkv": normal(0, 5, 72), "o": normal(1, 24, 5)}
    expected = [(4, {("qkv", 1), ("o", 0)}), (6, {("qkv", 1), ("o", 0)})]
    return Case(function, params, (normal(2, 2, 3, 5),), expected)


def grouped_query() -> Case:
    def function(p, x):
        q = (x @ p["q"]).reshape(*x.shape[:2], 2, 3, 6)
        k = (x @ p["k"]).reshape(*x.shape[:2], 2, 6)
        v = (x @ p["v"]).reshape(*x.shape[:2], 2, 6)
        logits = jnp.einsum("btgqd,bsgd->bgqts", q, k) / np.sqrt(6)
        out = jnp.einsum("bgqts,bsgd->btgqd", jax.nn.softmax(logits), v)
        return out.reshape(*x.shape[:2], 36) @ p["o"]

    params = {
        "q": normal(0, 5, 36),
        "k": normal(1, 5, 12),
        "v": normal(2, 5, 12),
        "o": normal(3, 36, 5),
    }
    expected = [
        (2, {("q", 1), ("k", 1), ("v", 1), ("o", 0)}),
        (3, {("q", 1), ("o", 0)}),
        (6, {("q", 1), ("k", 1)}),
        (6, {("v", 1), ("o", 0)}),
    ]
    return Case(function, params, (normal(4, 2, 3, 5),), expected)


def repeated_query() -> Case:
    def function(p, x):
        q, k, v = ((x @ p[n]).reshape(*x.shape[:2], -1, 6) for n in ("q", "k", "v"))
        k, v = (jnp.repeat(each, 3, axis=2) for each in (k, v))
        with jax.numpy_dtype_promotion("standard"):  # code of jax.nn, not ours
            out = jax.nn.dot_product_attention(q, k, v)
        return out.reshape(*x.shape[:2], -1) @ p["o"]

    return grouped_query()._replace(function=function)


def rotated(x, angles):
    low, high = jnp.split(x, 2, axis=-1)
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate(
        [low * cosine - high * sine, high * cosine + low * sine], axis=-1
    )


def rope() -> Case:
    def function(p, x):
        q, k, v = (jnp.einsum("btd,dhe->bthe", x, p[n]) for n in "qkv")
        steps = jnp.arange(x.shape[1], dtype=x.dtype)[None, :, None, None]
        speed = 10.0 ** -jnp.arange(3, dtype=x.dtype)[None, None, None, :]
        angles = jnp.broadcast_to(steps * jnp.ones_like(speed), (1, 3, 1, 3))
        angles = angles * jnp.broadcast_to(speed, angles.shape)
        angles = jnp.broadcast_to(angles, (*q.shape[:-1], 3))
        out = attention(rotated(q, angles), rotated(k, angles), v)
        return jnp.einsum("bthe,hed->btd", out, p["o"])

    case = separate_attention()
    expected = [case.groups[0], case.groups[2]]
    return case._replace(function=function, groups=expected)


def swiglu() -> Case:
    def function(p, x):
        both = x @ p["in"]
        return (jax.nn.silu(both[:, :8]) * both[:, 8:]) @ p["out"]

    params = {"in": normal(0, 5, 16), "out": normal(1, 8, 5)}
    return Case(function, params, (normal(2, 4, 5),), [(8, {("in", 1), ("out", 0)})])


def dense_concat() -> Case:
    def function(p, x):
        first = jax.nn.relu(conv(x, p["a"]))
        second = jax.nn.relu(conv(first, p["b"]) * row(p["s"], x))
        both = jnp.concatenate([first, second], axis=-1)
        third = jax.nn.relu(conv(both * row(p["t"], x), p["c"]))
        every = jnp.concatenate([both, third], axis=-1)
        return every.mean((1, 2)) @ p["head"]

    params = {
        "a": normal(0, 3, 3, 2, 4),
        "b": normal(1, 3, 3, 4, 5),
        "s": normal(2, 5),
        "t": normal(3, 9),
        "c": normal(4, 1, 1, 9, 6),
        "head": normal(5, 15, 3),
    }
    expected = [
        (4, {("a", 3), ("b", 2), ("t", 0), ("c", 2), ("head", 0)}),
        (5, {("b", 3), ("s", 0), ("t", 0), ("c", 2), ("head", 0)}),
        (6, {("c", 3), ("head", 0)}),
    ]
    return Case(function, params, (normal(6, 2, 6, 6, 2),), expected)


def depthwise_gate() -> Case:
    def function(p, x):
        h = jax.nn.silu(conv(x, p["up"]))
        h = jax.nn.silu(conv(h, p["deep"], groups=8))
        pooled = h.mean((1, 2), keepdims=True)
        scale = jax.nn.sigmoid(jax.nn.silu(pooled @ p["less"]) @ p["more"])
        h = h * jnp.broadcast_to(scale, h.shape)
        return conv(h, p["down"]).mean((1, 2))

    params = {
        "up": normal(0, 1, 1, 3, 8),
        "deep": normal(1, 3, 3, 1, 8),
        "less": normal(2, 8, 4),
        "more": normal(3, 4, 8),
        "down": normal(4, 1, 1, 8, 5),
    }
    expected = [
        (8, {("up", 3), ("deep", 3), ("less", 0), ("more", 1), ("down", 2)}),
        (4, {("less", 1), ("more", 0)}),
    ]
    return Case(function, params, (normal(5, 2, 6, 6, 3),), expected)


def grouped_conv() -> Case:
    def function(p, x):
        h = jax.nn.relu(conv(x, p["a"]))
        h = jax.nn.relu(conv(h, p["b"], groups=3))
        return conv(h, p["c"]).mean((1, 2))

    params = {
        "a": normal(0, 3, 3, 2, 12),
        "b": normal(1, 3, 3, 4, 15),
        "c": normal(2, 1, 1, 15, 3),
    }
    expected = [
        (3, {("a", 3), ("b", 3), ("c", 2)}),
        (4, {("a", 3), ("b", 2)}),
        (5, {("b", 3), ("c", 2)}),
    ]
    return Case(function, params, (normal(3, 2, 6, 6, 2),), expected)


def flattened() -> Case:
    def function(p, x):
        h = jax.nn.relu(conv(x, p["a"]) + row(p["b"], x))
        h = jax.lax.reduce_window(
            h, -np.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
        )
        h = jax.nn.relu(h.reshape(h.shape[0], -1) @ p["c"])
        return h @ p["d"]

    params = {
        "a": normal(0, 3, 3, 2, 4),
        "b": normal(1, 4),
        "c": normal(2, 36, 7),
        "d": normal(3, 7, 3),
    }
    expected = [
        (4, {("a", 3), ("b", 0), ("c", 0)}),
        (7, {("c", 1), ("d", 0)}),
    ]
    return Case(function, params, (normal(4, 2, 6, 6, 2),), expected)


def lstm() -> Case:
    def function(p, x):
        def step(state, now):
            h, c = state
            gates = now @ p["x"] + h @ p["h"] + row(p["b"], now)
            i, f, g, o = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((x.shape[1], 7), x.dtype)
        (h, _), all_h = jax.lax.scan(step, (zeros, zeros), x)
        return (h + all_h.sum(0)) @ p["out"]

    params = {
        "x": normal(0, 3, 28),
        "h": normal(1, 7, 28),
        "b": normal(2, 28),
        "out": normal(3, 7, 2),
    }
    expected = [(7, {("x", 1), ("h", 0), ("h", 1), ("b", 0), ("out", 0)})]
    return Case(function, params, (normal(4, 5, 2, 3),), expected)


def scanned() -> Case:
    def function(p, x):
        def layer(h, layer_params):
            a, b = layer_params
            return h + jnp.tanh(h @ a) @ b, None

        h, _ = jax.lax.scan(jax.checkpoint(layer), x @ p["in"], (p["a"], p["b"]))
        return h @ p["out"]

    params = {
        "in": normal(0, 3, 6),
        "a": normal(1, 4, 6, 9),
        "b": normal(2, 4, 9, 6),
        "out": normal(3, 6, 2),
    }
    expected = [
        (6, {("in", 1), ("a", 1), ("b", 2), ("out", 0)}),
        (9, {("a", 2), ("b", 1)}),
    ]
    return Case(function, params, (normal(4, 5, 3),), expected)


def loops() -> Case:
    def function(p, x):
        h = jax.nn.relu(x @ p["a"])

        def more(state):
            return state[0] < 3

        def body(state):
            return state[0] + 1, jnp.tanh(state[1] @ p["w"]) + h

        _, h = jax.lax.while_loop(more, body, (0, jnp.zeros_like(h)))
        h = jax.lax.cond(x.sum() > 0, lambda h: 2 * h, lambda h: h * h, h)
        h = h.at[0].set(jnp.ones_like(h[0]) * h[1])
        return h @ p["b"]

    params = {"a": normal(0, 3, 8), "w": normal(1, 8, 8), "b": normal(2, 8, 2)}
    expected = [(8, {("a", 1), ("w", 0), ("w", 1), ("b", 0)})]
    return Case(function, params, (normal(3, 4, 3),), expected)


def tied_embedding() -> Case:
    def function(p, tokens):
        h = jnp.take(p["table"], tokens, axis=0, mode="clip")
        h = h + jax.nn.gelu(h @ p["a"]) @ p["b"]
        return h @ p["table"].T

    params = {"table": normal(0, 11, 6), "a": normal(1, 6, 9), "b": normal(2, 9, 6)}
    expected = [
        (9, {("a", 1), ("b", 0)}),
        (6, {("table", 1), ("a", 0), ("b", 1)}),
    ]
    return Case(function, params, (jnp.array([[1, 3], [0, 10]]),), expected)


def group_norm() -> Case:
    def function(p, x):
        h = conv(x, p["a"])
        parts = h.reshape(*h.shape[:3], 4, 3)
        mean = parts.mean((1, 2, 4), keepdims=True)
        centered = parts - jnp.broadcast_to(mean, parts.shape)
        variance = jnp.square(centered).mean((1, 2, 4), keepdims=True)
        parts = centered * jax.lax.rsqrt(jnp.broadcast_to(variance, parts.shape) + 1e-5)
        h = jax.nn.relu(parts.reshape(h.shape) * row(p["s"], h))
        return conv(h, p["b"]).mean((1, 2))

    params = {
        "a": normal(0, 3, 3, 2, 12),
        "s": normal(1, 12),
        "b": normal(2, 1, 1, 12, 3),
    }
    expected = [(4, {("a", 3), ("s", 0), ("b", 2)})]
    return Case(function, params, (normal(3, 2, 6, 6, 2),), expected)


def straight_through() -> Case:
    @jax.custom_vjp
    def quantized(h):
        return jnp.round(4 * h) / 4

    quantized.defvjp(lambda h: (quantized(h), None), lambda _, g: (g,))

    def function(p, x):
        return quantized(jnp.tanh(x @ p["a"])) @ p["b"]

    params = {"a": normal(0, 3, 8), "b": normal(1, 8, 2)}
    return Case(function, params, (normal(2, 4, 3),), [(8, {("a", 1), ("b", 0)})])


def low_rank_adapter() -> Case:
    def function(p, x):
        weights = p["w"] + p["down"] @ p["up"]
        return jax.nn.relu(x @ weights) @ p["out"]

    params = {
        "w": normal(0, 4, 8),
        "down": normal(1, 4, 3),
        "up": normal(2, 3, 8),
        "out": normal(3, 8, 2),
    }
    expected = [
        (3, {("down", 1), ("up", 0)}),
        (8, {("w", 1), ("up", 1), ("out", 0)}),
    ]
    return Case(function, params, (normal(4, 5, 4),), expected)


CASES = {
    case.__name__: case
    for case in (
        mlp,
        separate_attention,
        fused_split,
        fused_reshape,
        grouped_query,
        repeated_query,
        rope,
        swiglu,
        dense_concat,
        depthwise_gate,
        grouped_conv,
        flattened,
        lstm,
        scanned,
        loops,
        tied_embedding,
        group_norm,
        straight_through,
        low_rank_adapter,
    )
}


def random_keep(sizes: dict[str, int], seed: int = 0) -> dict[str, np.ndarray]:
    """About half of the units of every group, at least one dropped and one kept."""
    rng, keep = np.random.default_rng(seed), {}
    for name, size in sizes.items():
        kept = np.zeros(size, bool)
        kept[rng.permutation(size)[: max(1, size // 2)]] = True
        keep[name] = kept
    return keep


def masked(params, mask):
    """Zeros where the mask is False; on the host, where nothing has to compile."""
    return jax.tree.map(
        lambda p, m: jnp.asarray(np.where(m, p, np.zeros_like(p))), params, mask
    )
