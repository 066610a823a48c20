"""CHITA++ with descent between its stages, for the lossless images of ResNet20.

All of the network is tuned: the prunable weights on their support, and shortcuts,
scales and biases as they are. The loss is that of whole mini-batches with their own
batch statistics: cross-entropy, mixed with the divergence from what the dense network
says of the same images, by which few images teach more.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import sparserec
from benchmarks import _resnet20 as resnet
from sparserec import Solution
from sparserec.quadratic import softmax_cross_entropy
from sparserec.quadratic._fisher import Fisher, fisher
from sparserec.solvers.chita import chita


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("--images lossless, descent between the stages")
    group.add_argument("--growing-stages", type=int, default=4)
    group.add_argument("--examples", type=int, default=3200, help="in a stage")
    group.add_argument("--last", type=int, default=4, help="so many times at the end")
    group.add_argument("--stage-rows", type=int, default=32, help="rows in a stage")
    group.add_argument("--row-kind", choices=("loss", "sampled"), default="loss")
    group.add_argument("--stage-metric", type=float, default=0.0)
    group.add_argument("--stage-ridge", type=float, default=3e-3)
    group.add_argument("--stage-power", type=float, default=0.6)
    group.add_argument("--minibatch", type=int, default=32)
    group.add_argument("--rate", type=float, default=4e-3, help="of Adam")
    group.add_argument("--steady", type=float, default=0.5, help="steps at that rate")
    group.add_argument("--optimizer", choices=("adam", "sgd"), default="adam")
    group.add_argument("--temperature", type=float, default=4.0)
    group.add_argument("--labels", type=float, default=0.1, help="share of the labels")
    group.add_argument("--judges", type=float, default=0.02, help="share that judges")


def _logits(params: resnet.Weights, images: jax.Array) -> jax.Array:
    return resnet.apply(params, {}, images, train=True)[0]


def _distilled(temperature, share, params, images, dense, labels):
    """Cross-entropy with the labels, and divergence from the dense network."""
    logits: Any = _logits(params, images)
    wanted = jax.nn.softmax(dense / temperature)
    found = jax.nn.log_softmax(logits / temperature)
    divergence = -jnp.mean(jnp.sum(wanted * found, axis=1)) * temperature**2
    return share * softmax_cross_entropy(logits, labels) + (1 - share) * divergence


def _softened(temperature, params, images, dense):
    del dense
    return _logits(params, images) / temperature


_dense_logits = jax.jit(resnet.apply)


class Images(NamedTuple):
    """Where the examples of every stage come from."""

    params: resnet.Weights
    stats: resnet.Weights
    train: tuple[np.ndarray, np.ndarray]

    def draw(self, count: int, rng: np.random.Generator, size: int = 160) -> tuple:
        """Augmented images, logits of the dense network, labels; all visited evenly."""
        x, y = self.train
        rounds = math.ceil(count / len(x))
        chosen = np.concatenate([rng.permutation(len(x)) for _ in range(rounds)])
        chosen = chosen[:count]
        images = resnet.normalize(resnet.augment(x[chosen], rng))
        logits = [
            _dense_logits(self.params, self.stats, images[i : i + size])
            for i in range(0, count, size)
        ]
        return images, jnp.concatenate(logits), jnp.asarray(y[chosen])


def builder_of(case: argparse.Namespace) -> Fisher:
    kind: dict = {}
    if case.row_kind == "sampled":
        kind = {
            "kind": "sampled",
            "predict_fn": Partial(_softened, case.temperature),
            "output_loss_fn": softmax_cross_entropy,
            "key": jax.random.key(0),
        }
    return fisher(
        rows=case.stage_rows,
        batch_size=16,
        ridge=case.stage_ridge,
        first_order=False,
        blocks=500,
        on_host=True,
        coupled=True,
        **kind,
    )


def descent_of(case: argparse.Namespace) -> sparserec.Descent:
    """Steps at a steady rate, then at one that falls to zero."""
    built = case.examples - math.floor(case.examples * case.judges)
    last = case.last * case.examples
    last -= math.floor(last * case.judges)
    steps = (case.growing_stages - 1) * (built // case.minibatch)
    steps += last // case.minibatch
    steady = int(case.steady * steps)
    rate = optax.join_schedules(
        [
            optax.constant_schedule(case.rate),
            optax.linear_schedule(case.rate, 0.0, steps - steady),
        ],
        [steady],
    )
    optimizer = (
        optax.adam(rate, b2=0.99)
        if case.optimizer == "adam"
        else optax.sgd(rate, momentum=0.9, nesterov=True)
    )
    return sparserec.Descent(optimizer, case.minibatch, passes=1)


def pruned(
    images: Images,
    case: argparse.Namespace,
    density: float,
    rng,
    *,
    brief: bool = False,
) -> Solution:
    """One run of CHITA++ with descent."""
    total = sum(w.size for name, w in images.params.items() if resnet.prunable(name, w))
    stages = 2 if brief else case.growing_stages
    k = int(density * total)

    def draw(stage: int) -> tuple:
        last = stage == stages - 1 and not brief
        return images.draw(case.examples * (case.last if last else 1), rng)

    def schedule(stage: jax.Array) -> jax.Array:
        share = ((stage + 1) / stages) ** case.stage_power
        return jnp.where(stage >= stages - 1, k, total * density**share)

    return chita(
        Partial(_distilled, case.temperature, case.labels),
        images.params,
        k,
        batches=draw,
        curvature=builder_of(case),
        variant="bso",
        stages=stages,
        schedule=schedule,
        held_out=case.judges,
        metric=case.stage_metric,
        descent=descent_of(case),
        prunable=resnet.prunable,
        batch_size=case.minibatch,
    )


def measured(
    images: Images,
    case: argparse.Namespace,
    seed: int,
    judged: Callable[[resnet.Weights, np.random.Generator], tuple[float, float]],
):
    """Results for every density; the seconds are of everything but compilation."""
    rng = np.random.default_rng(seed)
    jax.block_until_ready(pruned(images, case, 0.5, rng, brief=True).params)
    for density in case.density:
        start = time.process_time()
        solution = jax.block_until_ready(pruned(images, case, density, rng))
        seconds = time.process_time() - start
        print(f"  losses of the stages {solution.history.objective}", flush=True)
        plain, fresh = judged(solution.params, rng)
        kept = sum(
            int(jnp.count_nonzero(w))
            for n, w in solution.params.items()
            if resnet.prunable(n, w)
        )
        yield {
            "method": name_of(case),
            "density": density,
            "seed": seed,
            "plain": plain,
            "recalibrated": fresh,
            "seconds": seconds,
            "kept": kept,
        }


def name_of(case: argparse.Namespace) -> str:
    return (
        f"{case.growing_stages} stages of {case.stage_rows} coupled rows of 16, descent"
    )
