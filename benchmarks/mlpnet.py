"""How accurate is a pruned MLPNet, and how long does the pruning take?

The network (784-40-20-10, 32,360 weights, dense accuracy 93.97 %) and MNIST come from
the folder that SPARSEREC_DATA names. Every stage sees fresh training examples, or,
with `--fixed`, all stages see the same ones.

    python -m benchmarks.mlpnet --method iobs --density 0.02 --examples 16000 \
        --stages 16 --seeds 3 --seed0 0 --json result.json

Prints test accuracy per seed, CPU seconds (one thread, compile aside) and the target
last; exits 1 where the target is missed. `--grid` runs every cell of examples x stages
x CG steps at one density and holds each against 90 %.
"""

import argparse
import functools
import itertools
import math
import os
import pathlib
import sys
import time
from typing import NamedTuple

for _name, _value in (
    ("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"),
    ("OPENBLAS_NUM_THREADS", "1"),
    ("OMP_NUM_THREADS", "1"),
):
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402

import sparserec  # noqa: E402
from benchmarks import _mlpnet_chita  # noqa: E402
from benchmarks._output import save  # noqa: E402

LAYERS = ("fc1.weight", "fc2.weight", "fc3.weight")
TRAINING_EXAMPLES = 60_000
MINIBATCH = 64
LEAST_STEPS = 4_000  # of descent: small data are visited more often, but twice at least
RATE, STEADY = 4e-3, 0.7  # of Adam, and the share of the steps before it falls
SECOND_MOMENT = 0.99  # its decay: weights come and go, so old scales soon mislead


class Target(NamedTuple):
    """Least mean accuracy (percent), most CPU seconds of a run, and how far below
    the least mean a single seed may end."""

    accuracy: float
    seconds: float
    spread: float = 1.0


# (density, fresh examples in all or fixed examples, fixed) -> target
TARGETS = {
    (0.05, 256_000, False): Target(96.3, 9.0),
    (0.02, 256_000, False): Target(93.0, 9.0),
    (0.02, 64_000, False): Target(91.0, 3.0),
    (0.05, 1_000, True): Target(88.0, np.inf),
    (0.02, 1_000, True): Target(82.0, np.inf),
    (0.05, 5_000, True): Target(92.0, np.inf),
    (0.02, 5_000, True): Target(88.0, np.inf),
}
GRID_EXAMPLES = (2_000, 4_000, 8_000, 16_000)
GRID_STAGES = (16, 32, 64)
GRID_CG_STEPS = (3, 5, 10, 20)
GRID_FLOOR = Target(90.0, np.inf)
COLUMNS = [
    "density",
    "data",
    "CG steps",
    "mean accuracy",
    "lowest",
    "CPU s",
    "target",
]


class Data(NamedTuple):
    params: dict[str, jax.Array]
    train: tuple[jax.Array, jax.Array]
    test: tuple[jax.Array, jax.Array]


def load() -> Data:
    folder = os.environ.get("SPARSEREC_DATA")
    if not folder:
        print("Skipped: this benchmark needs data; set SPARSEREC_DATA to its folder.")
        sys.exit(0)
    weights = np.load(pathlib.Path(folder) / "mlpnet_mnist.npz")
    digits = np.load(pathlib.Path(folder) / "mnist.npz")

    def part(name: str) -> tuple[jax.Array, jax.Array]:
        scaled = (digits[f"x_{name}"].astype(np.float32) / 255 - 0.1307) / 0.3081
        labels = digits[f"y_{name}"].astype(np.int32)
        return jnp.asarray(scaled.reshape(len(scaled), -1)), jnp.asarray(labels)

    return Data(
        params={name: jnp.asarray(weights[name]) for name in LAYERS},
        train=part("train"),
        test=part("test"),
    )


@jax.jit
def take(train: tuple, chosen: np.ndarray) -> tuple[jax.Array, jax.Array]:
    return jax.tree.map(lambda x: x[chosen], train)


def predict(params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    for name in LAYERS[:-1]:
        x = jax.nn.relu(x @ params[name].T)
    return x @ params[LAYERS[-1]].T


@jax.jit
def accuracy(params, x, labels):
    return 100 * jnp.mean(jnp.argmax(predict(params, x), axis=1) == labels)


@functools.cache
def curvature(cg_steps: int) -> sparserec.quadratic.GaussNewton:
    # One object for all runs: a new one would compile everything again.
    return sparserec.quadratic.gauss_newton(
        predict, sparserec.quadratic.softmax_cross_entropy, cg_steps=cg_steps
    )


@functools.cache
def descent(examples: int, stages: int) -> sparserec.Descent:
    """Adam between the stages, its rate falling to zero over the last of them."""
    built = examples - examples // 10
    once = (built // MINIBATCH) * stages
    passes = max(2, math.ceil(LEAST_STEPS / once))
    steps = passes * once
    rate = optax.join_schedules(
        [
            optax.constant_schedule(RATE),
            optax.linear_schedule(RATE, 0.0, steps - int(STEADY * steps)),
        ],
        [int(STEADY * steps)],
    )
    return sparserec.Descent(optax.adam(rate, b2=SECOND_MOMENT), MINIBATCH, passes)


def prune(data: Data, case: argparse.Namespace, seed: int) -> sparserec.Solution:
    rng = np.random.default_rng(seed)

    def draw(stage: int = 0) -> tuple[jax.Array, jax.Array]:
        del stage
        chosen = rng.choice(TRAINING_EXAMPLES, case.examples, replace=False)
        return take(data.train, chosen)

    if case.method == "chita":
        return _mlpnet_chita.prune(
            predict, data.params, draw, case, descent(case.examples, case.stages)
        )
    k = sparserec.keep(data.params, density=case.density)
    fresh = {"args": draw(), "held_out": 0.1} if case.fixed else {"batches": draw}
    model = curvature(case.cg_steps)
    return sparserec.iobs(
        model.loss,
        data.params,
        k,
        curvature=model,
        schedule="down",
        # The last stages refine at the final budget.
        stages=max(1, int(0.85 * case.stages)),
        max_steps=case.stages,
        refinements=1 if case.descent else 6,
        descent=descent(case.examples, case.stages) if case.descent else None,
        **fresh,
    )


def magnitude(data: Data, case: argparse.Namespace):
    k = sparserec.keep(data.params, density=case.density)
    return sparserec.apply_mask(data.params, sparserec.select.top_k(data.params, k))


def measure(data: Data, case: argparse.Namespace, *, compiles: bool = True) -> dict:
    """Accuracy and CPU seconds of every seed, if need be after one that compiles."""
    seeds = range(case.seed0, case.seed0 + case.seeds)
    results = {"density": case.density, "examples": case.examples}
    results |= {"stages": case.stages, "cg_steps": case.cg_steps, "fixed": case.fixed}
    kind = "fixed" if case.fixed else "fresh"
    results["data"] = f"{case.stages} stages x {case.examples:,} {kind}"
    results["how"] = case.cg_steps
    if case.method == "chita":
        results["how"] = _mlpnet_chita.describe(case)
    if case.method == "magnitude":
        results |= {"data": "none", "how": "magnitude"}
        value = float(accuracy(magnitude(data, case), *data.test))
        return results | {"accuracies": [value], "seconds": [0.0]}
    if compiles:
        jax.block_until_ready(prune(data, case, seeds[0] + 10_000))
    accuracies, seconds = [], []
    for seed in seeds:
        start = time.process_time()
        solution = jax.block_until_ready(prune(data, case, seed))
        seconds.append(time.process_time() - start)
        kept = sum(int(jnp.count_nonzero(w)) for w in solution.params.values())
        assert kept <= sparserec.keep(data.params, density=case.density)
        accuracies.append(float(accuracy(solution.params, *data.test)))
        print(
            f"seed {seed}: accuracy {accuracies[-1]:.2f} %, {kept} weights, "
            f"{seconds[-1]:.1f} CPU s",
            flush=True,
        )
    return results | {"accuracies": accuracies, "seconds": seconds}


def verdict(result: dict, target: Target | None) -> tuple[bool, list]:
    """Prints the mean beside the target; whether it is met, and the row to save."""
    mean = float(np.mean(result["accuracies"]))
    worst = min(result["accuracies"])
    slowest = float(np.median(result["seconds"]))
    print(
        f"density {100 * result['density']:g} %, {result['data']}, {result['how']}: "
        f"mean {mean:.2f} %, lowest {worst:.2f} %, {slowest:.1f} CPU s"
    )
    row = [
        f"{100 * result['density']:g} %",
        result["data"],
        result["how"],
        round(mean, 2),
        round(worst, 2),
        round(slowest, 1),
    ]
    if target is None:
        return True, [*row, ""]
    met = mean >= target.accuracy and slowest <= target.seconds
    met = met and worst >= target.accuracy - target.spread
    limit = f" in {target.seconds:g} CPU s" if np.isfinite(target.seconds) else ""
    text = f"{target.accuracy:g} %{limit}: {'met' if met else 'MISSED'}"
    print(f"target: {text}")
    return met, [*row, text]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--method", choices=("iobs", "chita", "magnitude"), default="iobs"
    )
    parser.add_argument("--density", type=float, nargs="+", default=[0.02])
    parser.add_argument("--examples", type=int, default=16_000, help="in each stage")
    parser.add_argument("--stages", type=int, default=16)
    parser.add_argument("--cg-steps", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed0", type=int, default=0)
    parser.add_argument("--fixed", action="store_true", help="one set of examples")
    parser.add_argument(
        "--no-descent", dest="descent", action="store_false", help="refinements only"
    )
    _mlpnet_chita.add_arguments(parser)
    parser.add_argument("--grid", action="store_true", help="look for a collapse")
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args()


def main() -> int:
    case, data = arguments(), load()
    print(f"device: {jax.devices()[0].device_kind}, jax {jax.__version__}")
    sizes = [(case.examples, case.stages, case.cg_steps)]
    if case.grid:
        sizes = list(itertools.product(GRID_EXAMPLES, GRID_STAGES, GRID_CG_STEPS))
    variants = case.variant if case.method == "chita" else [None]
    cells = [
        argparse.Namespace(
            **vars(case)
            | {"density": d, "examples": n, "stages": s, "cg_steps": c, "variant": v}
        )
        for (n, s, c), v, d in itertools.product(sizes, variants, case.density)
    ]
    columns = [
        "solver" if head == "CG steps" and case.method != "iobs" else head
        for head in COLUMNS
    ]
    met, results, rows = [], [], []
    for number, cell in enumerate(cells):
        # One program serves all densities.
        compiles = number % len(case.density) == 0
        results.append(measure(data, cell, compiles=compiles))
        budget = cell.examples * (1 if cell.fixed else cell.stages)
        target = TARGETS.get((cell.density, budget, cell.fixed))
        if cell.method == "magnitude":
            target = None
        if cell.method == "chita":
            found = _mlpnet_chita.target(cell)
            target = None if found is None else Target(*found, np.inf)
        good, row = verdict(results[-1], GRID_FLOOR if case.grid else target)
        met.append(good)
        rows.append(row)
        save(case.json, columns, rows, results=results)
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
