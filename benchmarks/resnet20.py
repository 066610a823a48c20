"""How accurate is a pruned ResNet20, and how long does the pruning take?

The network (268,336 prunable weights) and CIFAR-10 come from the folder that
SPARSEREC_DATA names; see `_resnet20.py` for its two sets of images. One-shot: block
backsolve on gradient rows beside magnitude pruning, each as it is and with batch
statistics re-estimated afterwards. With `--stages`, CHITA++: fresh rows and fresh
statistics at every stage.

    python -m benchmarks.resnet20 --images jpeg --seeds 3 --json result.json
    python -m benchmarks.resnet20 --images lossless --stages 20 --density 0.2 0.1

Prints test accuracies, CPU seconds (one thread, compile aside) and the targets last;
exits 1 where a target is missed.
"""

import argparse
import math
import os
import pathlib
import sys
import time
from typing import Any, NamedTuple

for _name, _value in (
    ("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"),
    ("OPENBLAS_NUM_THREADS", "1"),
    ("OMP_NUM_THREADS", "1"),
):
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.tree_util import Partial  # noqa: E402

import sparserec  # noqa: E402
from benchmarks import _resnet20 as resnet  # noqa: E402
from benchmarks._output import save  # noqa: E402
from sparserec import quadratic  # noqa: E402
from sparserec._recalibrate import recalibrate  # noqa: E402
from sparserec.quadratic._fisher import Fisher, fisher  # noqa: E402
from sparserec.solvers.chita import chita  # noqa: E402

COLUMNS = [
    "density",
    "method",
    "accuracy",
    "with new statistics",
    "seeds",
    "CPU s",
    "target",
]
HELD_OUT = 0.1  # share of a stage's examples that judge refinements
BATCH = 466  # images in a batch of statistics; divides the lossless set


class Target(NamedTuple):
    """Accuracy in percent without and with new statistics, and solver CPU seconds."""

    plain: float
    recalibrated: float
    seconds: float


ONE_SHOT = {  # density -> target, on the JPEG images
    0.5: Target(81.9, 82.3, 1.6),
    0.3: Target(73.4, 79.5, 0.8),
    0.2: Target(51.2, 75.0, 0.48),
    0.1: Target(21.9, 55.0, 0.28),
}
# On the lossless images; the seconds are those of a whole run.
STAGED = {0.2: Target(0, 87.0, 90), 0.1: Target(0, 75.0, 90)}


class Data(NamedTuple):
    params: resnet.Weights  # the prunable ones
    rest: resnet.Weights
    stats: resnet.Weights
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def load(images: resnet.ImageSet, seed: int, test: int | None) -> Data:
    network = resnet.load(images)
    pruned = {n: w for n, w in network.params.items() if resnet.prunable(n, w)}
    return Data(
        params=pruned,
        rest={n: w for n, w in network.params.items() if n not in pruned},
        stats=resnet.estimate_stats(network.params, network.train[0][:10_000], seed),
        train=network.train,
        test=(network.test[0][:test], network.test[1][:test]),
    )


def _loss(rest, stats, params, images, labels):
    logits: Any = resnet.apply({**rest, **params}, stats, images)
    return quadratic.softmax_cross_entropy(logits, labels)


def loss_of(data: Data) -> Partial:
    """The loss with its fixed arrays, which may change without compiling again."""
    return Partial(_loss, data.rest, data.stats)


def draw(data: Data, count: int, rng: np.random.Generator):
    x, y = data.train
    chosen = rng.choice(len(x), count, replace=count > len(x))
    images = resnet.augment(x[chosen], rng)
    return resnet.normalize(images), jnp.asarray(y[chosen])


def _forward(variables, images):
    logits, seen = resnet.apply(variables["params"], {}, images, train=True)
    return logits, {"batch_stats": seen}


def new_stats(data: Data, params, count: int, rng: np.random.Generator):
    """Statistics of the pruned network over `count` augmented training images."""
    variables = {"params": {**data.rest, **params}, "batch_stats": data.stats}
    size = min(BATCH, count)
    batches = (draw(data, size, rng)[0] for _ in range(count // size))
    return recalibrate(_forward, variables, batches)["batch_stats"]


def accuracy(data: Data, params, stats) -> float:
    return resnet.accuracy({**data.rest, **params}, stats, *data.test)


def builder_of(case: argparse.Namespace) -> Fisher:
    return fisher(
        rows=case.rows,
        batch_size=case.rows_batch,
        ridge=case.ridge,
        first_order=case.first_order,
        blocks=case.block or None,
        on_host=True,
    )


def timed(function, *args, **options):
    start = time.process_time()
    result = jax.block_until_ready(function(*args, **options))
    return result, time.process_time() - start


def keep_of(data: Data, density: float) -> int:
    return int(density * sum(w.size for w in data.params.values()))


def one_shot(data: Data, case: argparse.Namespace, seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    examples = draw(data, case.rows * case.rows_batch, rng)
    model, gathering = timed(builder_of(case), loss_of(data), data.params, examples)
    print(f"seed {seed}: {case.rows} rows in {gathering:.1f} CPU s", flush=True)
    chita(model, data.params, keep_of(data, 0.9), variant="bso")  # compiles
    results = []
    for density in case.density:
        k = keep_of(data, density)
        solution, seconds = timed(chita, model, data.params, k, variant="bso")
        mask = sparserec.select.top_k(data.params, k)
        magnitude = sparserec.apply_mask(data.params, mask)
        for method, params in (("magnitude", magnitude), ("bso", solution.params)):
            stats = new_stats(data, params, case.statistics, rng)
            row = {
                "method": method,
                "density": density,
                "seed": seed,
                "plain": accuracy(data, params, data.stats),
                "recalibrated": accuracy(data, params, stats),
                "seconds": seconds if method == "bso" else 0.0,
            }
            print(
                f"density {density:g} {method}: {row['plain']:.2f} % as it is, "
                f"{row['recalibrated']:.2f} % with new statistics, "
                f"{row['seconds']:.2f} CPU s",
                flush=True,
            )
            results.append(row)
    return results


def staged(data: Data, case: argparse.Namespace, density: float, seed: int) -> dict:
    """CHITA++ with new batch statistics at every stage."""
    rng = np.random.default_rng(seed)
    builder, params, now = builder_of(case), data.params, data
    total = sum(w.size for w in params.values())
    growing = max(1, int(case.growing * case.stages))
    held_out = HELD_OUT if case.refinements else 0.0
    wanted = case.rows * case.rows_batch / (1 - held_out) + 1
    start = time.process_time()
    for stage in range(case.stages):
        share = density ** min(1.0, (stage + 1) / growing)
        examples = draw(now, math.ceil(wanted), rng)
        solution = chita(
            loss_of(now),
            params,
            int(share * total),
            args=examples,
            curvature=builder,
            variant=case.variant,
            held_out=held_out,
            refinements=case.refinements,
        )
        params = solution.params
        now = now._replace(stats=new_stats(now, params, case.statistics, rng))
    seconds = time.process_time() - start
    row = {
        "method": f"chita++ {case.variant}",
        "density": density,
        "seed": seed,
        "plain": accuracy(data, params, data.stats),
        "recalibrated": accuracy(data, params, now.stats),
        "seconds": seconds,
    }
    print(
        f"density {density:g} {row['method']}, {case.stages} stages: "
        f"{row['recalibrated']:.2f} %, {seconds:.0f} CPU s, seed {seed}",
        flush=True,
    )
    return row


def verdict(
    results: list[dict], targets: dict[float, Target]
) -> tuple[bool, list[list]]:
    """Prints means over seeds beside the targets; whether all are met, and a table."""
    met, table = True, []
    print("density  method  accuracy  with new statistics  CPU s")
    for method, density in sorted({(r["method"], r["density"]) for r in results}):
        rows = [r for r in results if (r["method"], r["density"]) == (method, density)]
        plain, fresh = (
            float(np.mean([r[name] for r in rows]))
            for name in ("plain", "recalibrated")
        )
        seconds = float(np.median([r["seconds"] for r in rows]))
        print(f"{density:g}  {method}  {plain:.2f}  {fresh:.2f}  {seconds:.2f}")
        row = [f"{100 * density:g} %", method, round(plain, 2), round(fresh, 2)]
        table.append([*row, len(rows), round(seconds, 2), ""])
        target = targets.get(density)
        if method == "magnitude" or target is None:
            continue
        good = plain >= target.plain and fresh >= target.recalibrated
        good &= seconds <= target.seconds
        word = "met" if good else "MISSED"
        print(f"    target {target}: {word}")
        floors = f"{target.plain:g} / {target.recalibrated:g} %"
        table[-1][-1] = f"{floors} in {target.seconds:g} CPU s: {word}"
        met &= good
    return met, table


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", choices=("jpeg", "lossless"), default="jpeg")
    parser.add_argument(
        "--density", type=float, nargs="+", default=[0.5, 0.3, 0.2, 0.1]
    )
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--rows-batch", type=int, default=1)
    parser.add_argument("--block", type=int, default=500, help="0: no blocks")
    parser.add_argument("--ridge", type=float, default=1e-3)
    parser.add_argument("--first-order", action="store_true")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--growing", type=float, default=0.7, help="share of stages")
    parser.add_argument("--variant", default="bso")
    parser.add_argument("--refinements", type=int, default=0)
    parser.add_argument("--statistics", type=int, default=4660, help="images")
    parser.add_argument("--test", type=int, help="test images; default all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed0", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args()


def main() -> int:
    case = arguments()
    if not resnet.available():
        return 0
    print(f"device: {jax.devices()[0].device_kind}, jax {jax.__version__}")
    data = load(case.images, case.seed0, case.test)
    dense = accuracy(data, data.params, data.stats)
    print(f"{case.images}: dense {dense:.2f} %", flush=True)
    results = []
    for seed in range(case.seed0, case.seed0 + case.seeds):
        if case.stages == 1:
            results += one_shot(data, case, seed)
        else:
            results += [staged(data, case, d, seed) for d in case.density]
    targets = ONE_SHOT if case.stages == 1 else STAGED
    comparable = case.images == ("jpeg" if case.stages == 1 else "lossless")
    met, rows = verdict(results, targets if comparable else {})
    save(case.json, COLUMNS, rows, images=case.images, dense=dense, results=results)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
