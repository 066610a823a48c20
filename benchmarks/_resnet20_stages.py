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
from typing import NamedTuple

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
    group.add_argument("--examples", type=int, default=960, help="in a stage")
    group.add_argument("--last", type=int, default=8, help="so many times at the end")
    group.add_argument("--stage-rows", type=int, default=32, help="rows in a stage")
    group.add_argument("--row-kind", choices=("sampled", "loss"), default="sampled")
    group.add_argument("--stage-metric", type=float, default=0.0)
    group.add_argument("--stage-ridge", type=float, default=3e-3)
    group.add_argument("--stage-power", type=float, default=0.6)
    group.add_argument("--minibatch", type=int, default=32)
    group.add_argument("--rate", type=float, default=4e-3, help="of Adam")
    group.add_argument("--steady", type=float, default=0.5, help="steps at that rate")
    group.add_argument("--optimizer", choices=("adam", "sgd"), default="adam")
    group.add_argument("--temperature", type=float, default=4.0)
    group.add_argument("--labels", type=float, default=0.1, help="share of the labels")
    group.add_argument("--hidden", type=float, default=10.0, help="of hidden outputs")
    group.add_argument("--judges", type=float, default=1 / 30, help="share that judges")


def _distilled(
    temperature: float,
    labelled: float,
    hidden: float,
    dense: resnet.Weights,
    params: resnet.Weights,
    images: jax.Array,
    labels: jax.Array,
) -> jax.Array:
    """Cross-entropy with the labels, and distances from the dense network.

    Both networks see the same images with the statistics of this batch. Distances are
    those of softened outputs and of what comes out of every block.
    """
    logits, _, outputs = resnet.forward(params, {}, images, train=True)
    wanted = jax.lax.stop_gradient(resnet.forward(dense, {}, images, train=True))
    target = jax.nn.softmax(wanted[0] / temperature)
    found = jax.nn.log_softmax(logits / temperature)
    divergence = jnp.sum(jax.scipy.special.xlogy(target, target) - target * found)
    distances = [
        jnp.mean(jnp.square(ours - theirs)) / jnp.mean(jnp.square(theirs))
        for ours, theirs in zip(outputs, wanted[2], strict=True)
    ]
    return (
        labelled * softmax_cross_entropy(logits, labels)  # type: ignore[arg-type]
        + (1 - labelled) * temperature**2 * divergence / len(images)
        + hidden * sum(distances)
    )


def _softened(temperature, params, images):
    return resnet.forward(params, {}, images, train=True)[0] / temperature


class Images(NamedTuple):
    """Where the examples of every stage come from."""

    params: resnet.Weights
    train: tuple[np.ndarray, np.ndarray]

    def draw(self, count: int, rng: np.random.Generator) -> tuple:
        """Augmented images and labels; all of them are visited equally often."""
        x, y = self.train
        rounds = [rng.permutation(len(x)) for _ in range(math.ceil(count / len(x)))]
        chosen = np.concatenate(rounds)[:count]
        images = resnet.normalize(resnet.augment(x[chosen], rng))
        return images, jnp.asarray(y[chosen])


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
        last = stage == stages - 1
        if brief:
            return images.draw(20 * case.stage_rows + 10 * case.minibatch, rng)
        return images.draw(case.examples * (case.last if last else 1), rng)

    def schedule(stage: jax.Array) -> jax.Array:
        share = ((stage + 1) / stages) ** case.stage_power
        return jnp.where(stage >= stages - 1, k, total * density**share)

    return chita(
        Partial(_distilled, case.temperature, case.labels, case.hidden, images.params),
        images.params,
        k,
        batches=draw,
        curvature=builder_of(case),
        variant=case.variant,
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
    recalibrated: Callable[[resnet.Weights, np.random.Generator], resnet.Weights],
):
    """A row of results, params and statistics for every density.

    The seconds are those of everything, new statistics too, but compilation.
    """
    rng = np.random.default_rng(seed)
    if seed == case.seed0:  # compiles
        recalibrated(pruned(images, case, 0.5, rng, brief=True).params, rng)
    for density in case.density:
        start = time.process_time()
        params = pruned(images, case, density, rng).params
        stats = jax.block_until_ready(recalibrated(params, rng))
        row = {
            "method": name_of(case),
            "density": density,
            "seed": seed,
            "seconds": time.process_time() - start,
            "kept": sum(
                int(jnp.count_nonzero(weights))
                for name, weights in params.items()
                if resnet.prunable(name, weights)
            ),
        }
        yield row, params, stats


def name_of(case: argparse.Namespace) -> str:
    return (
        f"{case.growing_stages} stages of {case.stage_rows} coupled rows of 16, descent"
    )
