"""Small networks whose whole Hessian fits, and a chain that is homogeneous."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from sparserec import quadratic


def normal(rng, *shape, scale=1.0):
    return jnp.asarray(scale * rng.normal(size=shape) / np.sqrt(shape[0] or 1))


def conv(x, kernel):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def row(v, x):
    return v.reshape((1,) * (x.ndim - 1) + (-1,))


def cnn(activation):
    def predict(params, x):
        h = conv(x, params["conv1"])
        h = activation(h * row(params["scale"], h) + row(params["shift"], h))
        h = activation(conv(h, params["conv2"]))
        return jnp.mean(h, axis=(1, 2)) @ params["head"] + params["bias"][None]

    return predict


def cnn_params(rng):
    return {
        "conv1": normal(rng, 3, 3, 2, 4),
        "scale": 1 + normal(rng, 4),
        "shift": normal(rng, 4),
        "conv2": normal(rng, 3, 3, 4, 5, scale=0.5),
        "head": normal(rng, 5, 3, scale=3.0),
        "bias": normal(rng, 3),
    }


def layer_norm(x):
    centered = x - jnp.mean(x, axis=-1, keepdims=True)
    return centered / jnp.sqrt(
        jnp.mean(jnp.square(centered), axis=-1, keepdims=True) + 1e-5
    )


def attention(params, x):
    """Two heads, a residual stream, layer normalization, a softmax."""
    h = layer_norm(x)
    q, k, v = (jnp.einsum("btd,dhe->bthe", h, params[name]) for name in "qkv")
    weights = jax.nn.softmax(jnp.einsum("bthe,bshe->bhts", q, k) / 2.0, axis=-1)
    x = x + jnp.einsum("bhts,bshe,hed->btd", weights, v, params["o"])
    h = jax.nn.gelu(layer_norm(x) @ params["up"])
    x = x + h @ params["down"]
    return jnp.mean(x, axis=1) @ params["head"]


def attention_params(rng):
    return {
        **{name: normal(rng, 4, 2, 3, scale=1.5) for name in "qkv"},
        "o": normal(rng, 2, 3, 4),
        "up": normal(rng, 4, 6),
        "down": normal(rng, 6, 4),
        "head": normal(rng, 4, 3, scale=3.0),
    }


def chain(params, x):
    """A ReLU network without biases."""
    for kernel in params[:-1]:
        x = jax.nn.relu(x @ kernel)
    return x @ params[-1]


def chain_params(rng, depth):
    widths = [6, *[7] * (depth - 1), 3]
    return [normal(rng, a, b, scale=1.5) for a, b in itertools.pairwise(widths)]


@functools.cache
def problem(predict, params, shape, seed=0, examples=12):
    """The builder of the curvature, the params and the data."""
    rng = np.random.default_rng(seed)
    builder = quadratic.gauss_newton(predict, quadratic.softmax_cross_entropy)
    data = (
        jnp.asarray(rng.normal(size=(examples, *shape))),
        jnp.asarray(rng.integers(0, 3, examples)),
    )
    return builder, params(rng), data


CNN, GELU_CNN = cnn(jax.nn.relu), cnn(jax.nn.gelu)
NETS = {
    "cnn": lambda: problem(CNN, cnn_params, (5, 5, 2)),
    "gelu cnn": lambda: problem(GELU_CNN, cnn_params, (5, 5, 2)),
    "attention": lambda: problem(attention, attention_params, (5, 4)),
}
