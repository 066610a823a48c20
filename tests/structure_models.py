"""Well-known networks, compactly, as plain functions of abstract parameters.

Parameters are created by asking for them: `Shapes` records the shape of every array
that a network wants, so a network is written once and never initialized.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from structure_cases import conv, row

Get = Callable[..., Any]


def abstract(network: Callable[..., Any], *args: Any, dtype: Any = jnp.float32):
    """The function `f(params, *args)` of a network and its abstract parameters."""
    shapes: dict[str, jax.ShapeDtypeStruct] = {}

    def wanted(name: str, *shape: int):
        shapes[name] = jax.ShapeDtypeStruct(shape, dtype)
        return jnp.zeros(shape, dtype)

    jax.eval_shape(lambda *args: network(wanted, *args), *args)

    def function(params, *args):
        return network(lambda name, *_: params[name], *args)

    return function, shapes


def images(size: int):
    return jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)


def norm(get: Get, name: str, x):
    scale, bias, mean, var = (
        row(get(f"{name}/{part}", x.shape[-1]), x)
        for part in ("scale", "bias", "mean", "var")
    )
    return (x - mean) * jax.lax.rsqrt(var + 1e-5) * scale + bias


def convolved(get: Get, name: str, x, width: int, size=1, stride=1, groups=1):
    kernel = get(f"{name}/kernel", size, size, x.shape[-1] // groups, width)
    return norm(get, f"{name}/norm", conv(x, kernel, groups, stride))


def pooled(x, size: int, stride: int):
    return jax.lax.reduce_window(
        x, -math.inf, jax.lax.max, (1, size, size, 1), (1, stride, stride, 1), "SAME"
    )


def dense(get: Get, name: str, x, width: int):
    y = x @ get(f"{name}/kernel", x.shape[-1], width)
    return y + row(get(f"{name}/bias", width), y)


def resnet50(get: Get, x):
    x = pooled(jax.nn.relu(convolved(get, "stem", x, 64, 7, 2)), 3, 2)
    for stage, (depth, width) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512))):
        for block in range(depth):
            name, stride = f"{stage}/{block}", 2 if stage and not block else 1
            h = jax.nn.relu(convolved(get, f"{name}/a", x, width))
            h = jax.nn.relu(convolved(get, f"{name}/b", h, width, 3, stride))
            h = convolved(get, f"{name}/c", h, 4 * width)
            if not block:
                x = convolved(get, f"{name}/d", x, 4 * width, 1, stride)
            x = jax.nn.relu(x + h)
    return dense(get, "head", x.mean((1, 2)), 1000)


def densenet121(get: Get, x):
    x = pooled(jax.nn.relu(convolved(get, "stem", x, 64, 7, 2)), 3, 2)
    for stage, depth in enumerate((6, 12, 24, 16)):
        for block in range(depth):
            name = f"{stage}/{block}"
            h = jax.nn.relu(norm(get, f"{name}/n", x))
            h = jax.nn.relu(convolved(get, f"{name}/a", h, 128))
            h = conv(h, get(f"{name}/b", 3, 3, 128, 32))
            x = jnp.concatenate([x, h], axis=-1)
        x = jax.nn.relu(norm(get, f"{stage}/n", x))
        if stage < 3:
            x = conv(x, get(f"{stage}/t", 1, 1, x.shape[-1], x.shape[-1] // 2))
            total = jax.lax.reduce_window(
                x, 0.0, jax.lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"
            )
            x = total / 4
    return dense(get, "head", x.mean((1, 2)), 1000)


def efficientnet_b0(get: Get, x):
    x = jax.nn.silu(convolved(get, "stem", x, 32, 3, 2))
    stages = (
        (1, 16, 1, 1, 3),
        (2, 24, 6, 2, 3),
        (2, 40, 6, 2, 5),
        (3, 80, 6, 2, 3),
        (3, 112, 6, 1, 5),
        (4, 192, 6, 2, 5),
        (1, 320, 6, 1, 3),
    )
    for stage, (depth, width, expand, stride, size) in enumerate(stages):
        for block in range(depth):
            name, h, inner = f"{stage}/{block}", x, expand * x.shape[-1]
            if expand > 1:
                h = jax.nn.silu(convolved(get, f"{name}/up", h, inner))
            step = 1 if block else stride
            h = convolved(get, f"{name}/deep", h, inner, size, step, groups=inner)
            h = jax.nn.silu(h)
            gate = h.mean((1, 2), keepdims=True)
            gate = jax.nn.silu(dense(get, f"{name}/less", gate, x.shape[-1] // 4))
            gate = jax.nn.sigmoid(dense(get, f"{name}/more", gate, inner))
            h = convolved(get, f"{name}/down", h * gate, width)
            x = x + h if block else h
    x = jax.nn.silu(convolved(get, "last", x, 1280))
    return dense(get, "head", x.mean((1, 2)), 1000)


def layer_norm(get: Get, name: str, x):
    mean = x.mean(-1, keepdims=True)
    var = jnp.square(x - mean).mean(-1, keepdims=True)
    scale, bias = (row(get(f"{name}/{part}", x.shape[-1]), x) for part in "sb")
    return (x - mean) * jax.lax.rsqrt(var + 1e-6) * scale + bias


def vit_b16(get: Get, x):
    kernel = get("patch/kernel", 16, 16, 3, 768)
    x = jax.lax.conv_general_dilated(
        x, kernel, (16, 16), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    x = x.reshape(x.shape[0], -1, 768)
    x = x + row(get("patch/bias", 768), x)
    token = jnp.broadcast_to(get("token", 1, 1, 768), (x.shape[0], 1, 768))
    x = jnp.concatenate([token, x], axis=1)
    x = x + get("position", 1, x.shape[1], 768)
    for layer in range(12):
        h = layer_norm(get, f"{layer}/n1", x)
        q, k, v = (
            dense(get, f"{layer}/{n}", h, 768).reshape(*h.shape[:2], 12, 64)
            for n in "qkv"
        )
        h = jax.nn.dot_product_attention(q, k, v)
        x = x + dense(get, f"{layer}/o", h.reshape(x.shape), 768)
        h = layer_norm(get, f"{layer}/n2", x)
        h = jax.nn.gelu(dense(get, f"{layer}/up", h, 3072))
        x = x + dense(get, f"{layer}/down", h, 768)
    return dense(get, "head", layer_norm(get, "norm", x)[:, 0], 1000)


def rms_norm(get: Get, name: str, x):
    scale = row(get(name, x.shape[-1]), x)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * scale


def turned(x):
    """Rotary position embedding, halves."""
    half = x.shape[-1] // 2
    speed = 1e6 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    steps = jnp.arange(x.shape[1], dtype=jnp.float32)
    angles = (steps[:, None] * speed[None])[None, :, None]
    low, high = x[..., :half], x[..., half:]
    cosine, sine = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate(
        [low * cosine - high * sine, high * cosine + low * sine], axis=-1
    )


def qwen3_decoder(get: Get, tokens, layers: int = 28):
    table = get("table", 151936, 1024)
    x = jnp.take(table, tokens, axis=0)
    for layer in range(layers):
        h = rms_norm(get, f"{layer}/n1", x)
        q, k, v = (
            (h @ get(f"{layer}/{n}", 1024, heads * 128)).reshape(
                *h.shape[:2], heads, 128
            )
            for n, heads in (("q", 16), ("k", 8), ("v", 8))
        )
        q, k = (
            turned(rms_norm(get, f"{layer}/{n}n", each)).astype(v.dtype)
            for n, each in (("q", q), ("k", k))
        )
        h = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + h.reshape(*h.shape[:2], -1) @ get(f"{layer}/o", 2048, 1024)
        h = rms_norm(get, f"{layer}/n2", x)
        gate = jax.nn.silu(h @ get(f"{layer}/gate", 1024, 3072))
        h = gate * (h @ get(f"{layer}/up", 1024, 3072))
        x = x + h @ get(f"{layer}/down", 3072, 1024)
    return rms_norm(get, "norm", x) @ table.T
