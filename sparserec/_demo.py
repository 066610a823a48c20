"""The demonstration: two small Flax networks pruned on handwritten digits.

A convolutional network in linen and a fully connected one in nnx go through the same
calls. This is the one module of the package that prints.
"""

import argparse
import collections
import importlib.metadata
import importlib.util
import itertools
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key

from sparserec import _tree, plot, select
from sparserec._types import Mask, Params
from sparserec.budget import keep, make_budget
from sparserec.quadratic import gauss_newton, softmax_cross_entropy
from sparserec.solvers.iht import iht
from sparserec.solvers.iobs import iobs
from sparserec.training import keep_mask

_BATCH = 128
_TEST = 500


class _Settings(NamedTuple):
    """How long everything takes; IHT and I-OBS get about the same time."""

    densities: tuple[float, ...] = (0.2, 0.1, 0.05, 0.02)
    train_steps: int = 300
    tune_steps: int = 100
    iht_steps: int = 100
    stages: int = 8  # of I-OBS, from all weights down to the budget
    refinements: int = 2  # refits of I-OBS at every stage
    cg_steps: int = 4


_QUICK = _Settings(
    densities=(0.1,),
    train_steps=60,
    tune_steps=10,
    iht_steps=3,
    stages=2,
    refinements=1,
    cg_steps=2,
)


class _Data(NamedTuple):
    train: tuple[Float[Array, "m 8 8 1"], Int[Array, " m"]]
    test: tuple[Float[Array, "m 8 8 1"], Int[Array, " m"]]


class _Network(NamedTuple):
    name: str
    params: Params
    predict: Callable[[Params, Array], Any]
    batch_size: int | None  # set where loops must run on the host: convolutions


class _Row(NamedTuple):
    network: str
    density: float
    method: str
    before: float
    after: float
    seconds: float


# --- the data and the two networks ---------------------------------------------------


def _digits(key: Key[Array, ""]) -> _Data:
    """Scikit-learn's 8 x 8 digits in random order, split into train and test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = jax.random.permutation(key, len(labels))
    x = jnp.asarray(images.reshape(-1, 8, 8, 1) / 16, jnp.float32)[order]
    y = jnp.asarray(labels, jnp.int32)[order]
    return _Data((x[_TEST:], y[_TEST:]), (x[:_TEST], y[:_TEST]))


def _convolutional(key: Key[Array, ""], data: _Data) -> _Network:
    """A linen network; its params are a plain dict."""
    import flax.linen as nn

    net = nn.Sequential(
        [
            nn.Conv(8, (3, 3), strides=2),
            nn.relu,
            nn.Conv(16, (3, 3)),
            nn.relu,
            lambda x: x.reshape(x.shape[0], -1),
            nn.Dense(32),
            nn.relu,
            nn.Dense(10),
        ]
    )
    images = data.train[0]
    params = jax.jit(net.init)(key, images[:1])["params"]

    def predict(params: Params, x: Array) -> Any:
        return net.apply({"params": params}, x)

    return _Network("CNN (linen)", params, predict, batch_size=len(images))


def _fully_connected(key: Key[Array, ""]) -> _Network:
    """An nnx network; its params are an nnx `State`."""
    from flax import nnx

    rngs = nnx.Rngs(key)
    model = nnx.Sequential(
        lambda x: x.reshape(x.shape[0], -1),
        nnx.Linear(64, 128, rngs=rngs),
        nnx.relu,
        nnx.Linear(128, 64, rngs=rngs),
        nnx.relu,
        nnx.Linear(64, 10, rngs=rngs),
    )
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    return _Network(
        "MLP (nnx)",
        params,
        lambda params, x: nnx.merge(graphdef, params, rest)(x),
        batch_size=None,
    )


# --- training, pruning, measuring ----------------------------------------------------


def _make_trainer(
    network: _Network, data: _Data
) -> Callable[[Params, Mask, int, Key[Array, ""]], Params]:
    """`train(params, mask, steps, key)`: AdamW that leaves pruned weights at zero."""
    everything = _tree.ones_mask(network.params)
    transform = optax.chain(optax.adamw(2e-3), keep_mask(everything))

    @jax.jit
    def step(params, opt_state, images, labels, batch):
        def loss(params: Params) -> Array:
            logits = network.predict(params, images[batch])
            return softmax_cross_entropy(logits, labels[batch])

        gradient = jax.grad(loss)(params)
        updates, opt_state = transform.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    def train(params: Params, mask: Mask, steps: int, key: Key[Array, ""]) -> Params:
        # The mask is part of the state: another one does not compile again.
        opt_state = optax.tree.set(transform.init(params), mask=mask)
        size = len(data.train[1])
        for batch in jax.random.randint(key, (steps, _BATCH), 0, size):
            params, opt_state = step(params, opt_state, *data.train, batch)
        return params

    return train


def _make_pruners(
    network: _Network, data: _Data, settings: _Settings
) -> dict[str, Callable[[Params, Any], tuple[Params, Mask]]]:
    """`prune(params, k)` for every method; all see the same training data."""
    curvature = gauss_newton(
        network.predict, softmax_cross_entropy, cg_steps=settings.cg_steps
    )
    common = {
        "args": data.train,
        "curvature": curvature,
        "batch_size": network.batch_size,
    }

    def by_magnitude(params: Params, k: Any) -> tuple[Params, Mask]:
        budget = make_budget(k, params)
        mask = select.support(params, budget.counts, budget.groups)
        return select.apply_mask(params, mask), mask

    def by_iht(params: Params, k: Any) -> tuple[Params, Mask]:
        solution = iht(
            curvature.loss, params, k, max_steps=settings.iht_steps, **common
        )
        return solution.params, solution.mask

    def by_iobs(params: Params, k: Any) -> tuple[Params, Mask]:
        solution = iobs(
            curvature.loss,
            params,
            k,
            schedule="down",
            stages=settings.stages,
            max_steps=settings.stages,
            refinements=settings.refinements,
            **common,
        )
        return solution.params, solution.mask

    return {"magnitude": by_magnitude, "IHT": by_iht, "I-OBS": by_iobs}


def _make_accuracy(network: _Network, data: _Data) -> Callable[[Params], float]:
    """`accuracy(params)` on the test images, in percent."""

    @jax.jit
    def hits(params: Params, images: Array, labels: Array) -> Array:
        return network.predict(params, images).argmax(-1) == labels

    return lambda params: 100 * float(jnp.mean(hits(params, *data.test)))


def _run(
    network: _Network, data: _Data, settings: _Settings, key: Key[Array, ""]
) -> list[_Row]:
    """Trains one network, prunes it in every way, and prints a row for each."""
    train_key, tune_key = jax.random.split(key)
    train = _make_trainer(network, data)
    accuracy = _make_accuracy(network, data)
    label = f"{network.name:11} {100:6} %  "
    _say(f"{label}{'dense':10} ")
    start = time.perf_counter()
    everything = _tree.ones_mask(network.params)
    params = train(network.params, everything, settings.train_steps, train_key)
    rows = [_Row(network.name, 1.0, "dense", accuracy(params), math.nan, 0.0)]
    _say(f"{rows[0].before:6.1f} {'':11} {time.perf_counter() - start:8.1f}\n")
    pruners = _make_pruners(network, data, settings)
    for density, (method, prune) in itertools.product(
        settings.densities, pruners.items()
    ):
        _say(f"{network.name:11} {100 * density:6g} %  {method:10} ")
        start = time.perf_counter()
        pruned, mask = jax.block_until_ready(
            prune(params, keep(params, density=density))
        )
        seconds = time.perf_counter() - start
        tuned = train(pruned, mask, settings.tune_steps, tune_key)
        row = _Row(
            network.name, density, method, accuracy(pruned), accuracy(tuned), seconds
        )
        _say(f"{row.before:6.1f} {row.after:11.1f} {row.seconds:8.1f}\n")
        rows.append(row)
    return rows


# --- what is shown -------------------------------------------------------------------


def _say(text: str) -> None:
    """Prints at once, so that the table grows while the work goes on."""
    print(text, end="", flush=True)


def _summary(rows: Sequence[_Row]) -> str:
    """How often every method comes first before fine-tuning, ties included."""
    cases = collections.defaultdict(dict)
    for row in rows:
        if row.density < 1:
            cases[row.network, row.density][row.method] = row.before
    methods = next(iter(cases.values()))
    firsts = {
        method: sum(case[method] == max(case.values()) for case in cases.values())
        for method in methods
    }
    counts = ", ".join(f"{method} {count}" for method, count in firsts.items())
    return f"Best before fine-tuning, of {len(cases)} cases (ties count): {counts}."


def _draw(rows: Sequence[_Row], path: pathlib.Path) -> None:
    """One panel per network: solid as pruned, dashed after fine-tuning."""
    from matplotlib.figure import Figure

    networks = list(dict.fromkeys(row.network for row in rows))
    figure = Figure(figsize=(5.2 * len(networks), 4.2), layout="constrained")
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for network, ax in zip(networks, panels, strict=True):
        before, after = collections.defaultdict(list), collections.defaultdict(list)
        own = [row for row in rows if row.network == network]
        for row in own[1:]:
            before[row.method].append((row.density, row.before))
            after[row.method].append((row.density, row.after))
        plot.tradeoff(
            before, after=after, dense=own[0].before, label="test accuracy, %", ax=ax
        )
        ax.set_title(network)
    figure.savefig(path, dpi=150)


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m sparserec",
        description="Prunes two small Flax networks by magnitude, IHT and I-OBS.",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path("sparserec_demo.png"),
        help="where to write the picture (default: %(default)s)",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few steps: does it run at all?"
    )
    arguments = parser.parse_args(given)
    if not arguments.out.resolve().parent.is_dir():
        parser.error(f"--out: there is no folder {arguments.out.resolve().parent}")
    missing = [
        package
        for package, module in (
            ("matplotlib", "matplotlib"),
            ("scikit-learn", "sklearn"),
        )
        if importlib.util.find_spec(module) is None
    ]
    if missing:
        parser.error(
            f"the demonstration needs {' and '.join(missing)}: "
            "pip install 'sparserec[demo]'"
        )
    return arguments


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the demonstration: a table on the screen, a picture in a file.

    Args:
      arguments: command line without the program's name; that of the process if
        `None`.

    Returns:
      The exit status, 0.

    Raises:
      SystemExit: wrong arguments, or a package that the demonstration needs is
        missing.
    """
    given = _arguments(arguments)
    settings = _QUICK if given.quick else _Settings()
    start = time.perf_counter()
    data_key, *keys = jax.random.split(jax.random.key(0), 5)
    data = _digits(data_key)
    counts = [len(data.train[1]), len(data.test[1])]
    _say(
        f"sparserec {importlib.metadata.version('sparserec')}: two networks, pruned on "
        f"handwritten digits\n({sum(counts):,} images: {counts[0]:,} to train and "
        f"prune, {counts[1]:,} to test; all methods are fine-tuned\nfor the same "
        f"{settings.tune_steps} steps)\n\n"
    )
    _say(f"{'':34}test accuracy, %\n")
    _say(
        "network     density  method     pruned  fine-tuned  seconds\n"
        + "-" * 59
        + "\n"
    )
    rows = _run(_convolutional(keys[0], data), data, settings, keys[1])
    rows += _run(_fully_connected(keys[2]), data, settings, keys[3])
    _draw(rows, given.out)
    noise = 100 * math.sqrt(0.05 * 0.95 / counts[1])
    _say(
        f"\n{_summary(rows)}\nSeconds are those of pruning (of training for the dense "
        "networks), compilation included.\nWith so few test images, differences "
        f"below about {2 * noise:.0f} points are noise.\n"
        f"Picture: {given.out}   ({time.perf_counter() - start:.0f} s in all)\n"
    )
    return 0
