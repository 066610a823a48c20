"""What does a product with the exact Hessian cost, next to a gradient?

Products by forward over reverse differentiation (`sparserec.quadratic.hessian`) and by
Gauss-Newton (`gauss_newton`), on a dense and on a convolutional network with random
weights, on whatever device JAX finds; nothing is downloaded.

    python -m benchmarks.hvp --json result.json

Prints medians of interleaved runs, and the ratios to a gradient last; exits 1 where a
ratio is above its target.
"""

import argparse
import os
import pathlib
import statistics
import sys
import time

for _name, _value in (
    ("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"),
    ("OPENBLAS_NUM_THREADS", "1"),
):
    os.environ.setdefault(_name, _value)

import flax.linen as nn  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from benchmarks._output import save  # noqa: E402
from sparserec import quadratic  # noqa: E402

TARGET = 2.1  # forward over reverse: about one more gradient, and its memory traffic
EXAMPLES, CLASSES = 256, 10


class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (512, 256):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(CLASSES)(x)


class Convolutional(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = x.reshape(-1, 28, 28, 1)
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            x = nn.relu(nn.Conv(width, (3, 3), strides=stride)(x))
        return nn.Dense(CLASSES)(jnp.mean(x, axis=(1, 2)))


def cases(network: nn.Module):
    """Gradient and both products as compiled functions of the params."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (EXAMPLES, 784))
    labels = jax.random.randint(keys[1], (EXAMPLES,), 0, CLASSES)
    params = network.init(keys[2], x)["params"]

    def predict(params, x):
        return network.apply({"params": params}, x)

    gauss_newton = quadratic.gauss_newton(predict, quadratic.softmax_cross_entropy)
    loss = gauss_newton.loss

    def product(build):
        def apply(params, direction, x, labels):
            return build(loss, params, (x, labels)).curvature.matvec(direction)

        return jax.jit(apply)

    data = (params, jax.tree.map(jnp.ones_like, params), x, labels)
    gradient = jax.jit(lambda params, _, x, labels: jax.grad(loss)(params, x, labels))
    return data, {
        "gradient": gradient,
        "Hessian": product(quadratic.Hessian(dense_limit=0)),
        "Gauss-Newton": product(gauss_newton),
    }


def measure(network: nn.Module, repeats: int) -> dict[str, float]:
    """Median milliseconds of each, interleaved."""
    data, functions = cases(network)
    for function in functions.values():
        jax.block_until_ready(function(*data))
    seconds = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*data))
            seconds[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(times) for name, times in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    print(f"device: {jax.devices()[0].device_kind}, jax {jax.__version__}")
    rows, met = [], True
    for name, network in {"dense": Dense(), "convolutional": Convolutional()}.items():
        times = measure(network, options.repeats)
        for kind, milliseconds in times.items():
            ratio = milliseconds / times["gradient"]
            rows.append([name, kind, round(milliseconds, 2), round(ratio, 2)])
            print(f"{name:14s} {kind:13s} {milliseconds:8.2f} ms  {ratio:5.2f} times")
            met = met and ratio <= TARGET
    print(f"target: at most {TARGET} times a gradient: {'met' if met else 'MISSED'}")
    save(options.json, ["network", "product", "ms", "gradients"], rows)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
