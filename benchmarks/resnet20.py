"""How accurate is a pruned ResNet20, and how long does the pruning take?

The network (268,336 prunable weights) and CIFAR-10 come from the folder that
SPARSEREC_DATA names; see `_resnet20.py` for its two sets of images. One backsolve
beside magnitude pruning, each as it is and with batch statistics re-estimated
afterwards. On the JPEG images the curvature is by default that of the outputs of every
layer (`layerwise`) and ADMM chooses the support; `--curvature fisher`: gradient rows of
the network in evaluation mode, or with `--coupled` of whole mini-batches in training
mode.

    python -m benchmarks.resnet20 --seeds 3 --json result.json
    python -m benchmarks.resnet20 --coupled --rows 250 --stages 4 --json coupled.json
    python -m benchmarks.resnet20 --images lossless --seeds 3
    python -m benchmarks.resnet20 --images lossless --curvature layerwise --rows 40 \\
        --seeds 3

The first of these on the lossless images is CHITA++ with descent between its stages,
see `_resnet20_stages.py`; with `--curvature` or `--coupled` there is no descent.

Prints test accuracies, CPU seconds (one thread, compile aside) and the targets last;
exits 1 where a target is missed. On the JPEG images the seconds are those of the
solver, and on the lossless ones those of the whole run.
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
from benchmarks import _resnet20_stages  # noqa: E402
from benchmarks._output import save  # noqa: E402
from sparserec import quadratic  # noqa: E402
from sparserec._recalibrate import recalibrate  # noqa: E402
from sparserec.quadratic._fisher import Fisher, fisher  # noqa: E402
from sparserec.quadratic._layerwise import Layerwise, layerwise  # noqa: E402
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
JUDGING = 0.1  # share of a stage's examples that judge refinements
BATCH = 466  # images in a batch of statistics; divides the lossless set


class Target(NamedTuple):
    """Accuracy in percent without and with new statistics, and CPU seconds."""

    plain: float
    recalibrated: float
    seconds: float


JPEG = {  # density -> target of one backsolve
    0.5: Target(81.9, 82.3, 1.6),
    0.3: Target(73.4, 79.5, 0.8),
    0.2: Target(51.2, 75.0, 0.48),
    0.1: Target(21.9, 55.0, 0.28),
}
LOSSLESS = {0.2: Target(0, 87.0, 90), 0.1: Target(0, 75.0, 90)}


class Data(NamedTuple):
    params: resnet.Weights  # the prunable ones
    rest: resnet.Weights
    stats: resnet.Weights
    train: tuple[np.ndarray, np.ndarray]
    test: tuple[np.ndarray, np.ndarray]


def load(case: argparse.Namespace) -> Data:
    network = resnet.load(case.images)
    train, test = network.train, network.test
    if case.held_out:  # settings are chosen on training images
        count = case.held_out
        images, labels = train
        train = images[:-count], labels[:-count]
        test = images[-count:], labels[-count:]
    pruned = {n: w for n, w in network.params.items() if resnet.prunable(n, w)}
    return Data(
        params=pruned,
        rest={n: w for n, w in network.params.items() if n not in pruned},
        stats=resnet.estimate_stats(network.params, train[0][:10_000], case.seed0),
        train=train,
        test=test,
    )


def _loss(rest, stats, params, images, labels):
    logits: Any = resnet.apply({**rest, **params}, stats, images)
    return quadratic.softmax_cross_entropy(logits, labels)


def _loss_in_training(rest, params, images, labels):
    logits, _ = resnet.apply({**rest, **params}, {}, images, train=True)
    return quadratic.softmax_cross_entropy(logits, labels)


def loss_of(data: Data, case: argparse.Namespace) -> Partial:
    """The loss with its fixed arrays, by fixed statistics or those of every batch."""
    if case.coupled or case.curvature == "layerwise":
        return Partial(_loss_in_training, data.rest)
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


def in_convolution(path: str, leaf: jax.Array) -> bool:
    """Layers before a normalisation: the mean of their outputs does not matter."""
    del path
    return leaf.ndim == 4


def builder_of(case: argparse.Namespace) -> Fisher | Layerwise:
    if case.curvature == "layerwise":
        return layerwise(
            batch_size=case.rows_batch, centered=in_convolution, ridge=case.ridge
        )
    return fisher(
        rows=case.rows,
        batch_size=case.rows_batch,
        ridge=case.ridge,
        first_order=case.first_order,
        blocks=case.block or None,
        on_host=True,
        coupled=case.coupled,
    )


def choices(case: argparse.Namespace) -> dict[str, Any]:
    return {
        "variant": case.variant,
        "metric": case.metric,
        "max_steps": case.max_steps,
    }


def share_of(case: argparse.Namespace, density: float, stage: int) -> float:
    """Density after a stage: falling by powers, then that of the end."""
    growing = max(1, round(case.growing * case.stages))
    return density ** min(1.0, (stage + 1) / growing) ** case.power


def examples_of(data: Data, case: argparse.Namespace, rng: np.random.Generator):
    judging = JUDGING if case.refinements else 0.0
    count = case.rows * case.rows_batch / (1 - judging)
    return draw(data, math.ceil(count) + bool(judging), rng)


def solved(data: Data, case: argparse.Namespace, first, density: float, rng):
    """CHITA on models whose rows are given: params, and CPU seconds.

    Those of the solver, and on the lossless images those of the later rows too.
    """
    builder, loss, params = builder_of(case), loss_of(data, case), data.params
    total, seconds = sum(w.size for w in params.values()), 0.0
    for stage in range(case.stages):
        model, begin = first, time.process_time()
        if stage:
            model = builder(loss, params, examples_of(data, case, rng))
        jax.block_until_ready(model)
        start = begin if case.images == "lossless" else time.process_time()
        k = int(share_of(case, density, stage) * total)
        solution = chita(model, params, k, **choices(case))
        params = jax.block_until_ready(solution).params
        seconds += time.process_time() - start
    return params, seconds


def refined(data: Data, case: argparse.Namespace, density: float, rng, stages: int):
    """CHITA++ with refinements; params and CPU seconds of all of it."""
    builder, loss, params = builder_of(case), loss_of(data, case), data.params
    total, start = sum(w.size for w in params.values()), time.process_time()
    for stage in range(stages):
        params = chita(
            loss,
            params,
            int(share_of(case, density, stage) * total),
            args=examples_of(data, case, rng),
            curvature=builder,
            **choices(case),
            held_out=JUDGING,
            refinements=case.refinements,
            batch_size=case.rows_batch,
        ).params
    return params, time.process_time() - start


def measured(data: Data, case: argparse.Namespace, seed: int):
    """Results of magnitude pruning and of CHITA for every density."""
    rng = np.random.default_rng(seed)
    model, gathering = None, 0.0
    if case.refinements:
        refined(data, case, case.density[0], rng, 1)  # compiles
    else:
        given = loss_of(data, case), data.params, examples_of(data, case, rng)
        if case.images == "lossless":  # where rows count, compiling them does not
            builder_of(case)(*given)
        start = time.process_time()
        model = jax.block_until_ready(builder_of(case)(*given))
        gathering = time.process_time() - start
        print(f"seed {seed}: the model in {gathering:.1f} CPU s", flush=True)
        # Compiles.
        chita(model, data.params, 1, **choices(case))
    for density in case.density:
        k = int(density * sum(w.size for w in data.params.values()))
        mask = sparserec.select.top_k(data.params, k)
        points = {}
        if not case.coupled and seed == case.seed0:
            points["magnitude"] = sparserec.apply_mask(data.params, mask), 0.0
        if case.refinements:
            points[name_of(case)] = refined(data, case, density, rng, case.stages)
        else:
            params, seconds = solved(data, case, model, density, rng)
            whole = gathering if case.images == "lossless" else 0.0
            points[name_of(case)] = params, seconds + whole
        for method, (point, seconds) in points.items():
            stats = new_stats(data, point, case.statistics, rng)
            row = {
                "method": method,
                "density": density,
                "seed": seed,
                "plain": accuracy(data, point, data.stats),
                "recalibrated": accuracy(data, point, stats),
                "seconds": seconds,
            }
            print(
                f"density {density:g} {method}: {row['plain']:.2f} % as it is, "
                f"{row['recalibrated']:.2f} % with new statistics, "
                f"{seconds:.2f} CPU s",
                flush=True,
            )
            yield row


def tuned(data: Data, case: argparse.Namespace, seed: int):
    """Results of CHITA++ with descent, new statistics within its seconds."""
    images = _resnet20_stages.Images({**data.rest, **data.params}, data.train)

    def recalibrated(params, rng: np.random.Generator):
        return new_stats(data, params, case.statistics, rng)

    for row, params, stats in _resnet20_stages.measured(
        images, case, seed, recalibrated
    ):
        row["plain"] = accuracy(data, params, data.stats)
        row["recalibrated"] = accuracy(data, params, stats)
        print(
            f"seed {seed}, density {row['density']:g}: {row['recalibrated']:.2f} % "
            f"with new statistics, {row['seconds']:.1f} CPU s",
            flush=True,
        )
        yield row


def name_of(case: argparse.Namespace) -> str:
    if case.curvature == "layerwise":
        return f"{case.variant}, inputs of {case.rows * case.rows_batch} examples"
    rows = f"{case.rows} {'coupled ' if case.coupled else ''}rows of {case.rows_batch}"
    stages = f", {case.stages} stages" if case.stages > 1 else ""
    return f"{case.variant}, {rows}{stages}"


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
    parser.add_argument("--density", type=float, nargs="+")
    parser.add_argument("--coupled", action="store_true")
    parser.add_argument("--curvature", choices=("layerwise", "fisher"))
    parser.add_argument("--rows", type=int, help="or batches, in a stage")
    parser.add_argument("--rows-batch", type=int, help="examples in a row or batch")
    parser.add_argument("--block", type=int, default=500, help="0: no blocks")
    parser.add_argument("--ridge", type=float)
    parser.add_argument("--metric", type=float, default=0.0)
    parser.add_argument("--first-order", action="store_true")
    parser.add_argument("--stages", type=int, default=1)
    parser.add_argument("--growing", type=float, default=1.0, help="share of stages")
    parser.add_argument("--power", type=float, default=1.0, help="below 1: early")
    parser.add_argument("--variant")
    parser.add_argument("--max-steps", type=int, default=20, help="of ADMM")
    parser.add_argument("--refinements", type=int, default=0)
    parser.add_argument("--statistics", type=int, default=4660, help="images")
    parser.add_argument(
        "--held-out", type=int, default=0, help="training images in place of the tests"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--seed0", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    _resnet20_stages.add_arguments(parser)
    return with_defaults(parser.parse_args())


def with_defaults(case: argparse.Namespace) -> argparse.Namespace:
    """The settings that go with the images and the curvature, where none were given."""
    lossless = case.images == "lossless"
    case.tuned = lossless and not case.coupled and case.curvature is None
    if case.density is None:
        case.density = list(LOSSLESS if lossless else JPEG)
    if case.curvature is None:
        case.curvature = "fisher" if case.coupled or lossless else "layerwise"
    if case.curvature == "layerwise":
        chosen = {"rows": 20, "rows_batch": 100, "ridge": 1e-2, "variant": "admm"}
    else:
        batch = 16 if case.coupled else 1
        chosen = {"rows": 1000, "rows_batch": batch, "ridge": 3e-3, "variant": "bso"}
    for name, value in chosen.items():
        if getattr(case, name) is None:
            setattr(case, name, value)
    return case


def main() -> int:
    case = arguments()
    if not resnet.available():
        return 0
    print(f"device: {jax.devices()[0].device_kind}, jax {jax.__version__}")
    data = load(case)
    dense = accuracy(data, data.params, data.stats)
    print(f"{case.images}: dense {dense:.2f} %", flush=True)
    results = [
        row
        for seed in range(case.seed0, case.seed0 + case.seeds)
        for row in (tuned if case.tuned else measured)(data, case, seed)
    ]
    targets = LOSSLESS if case.images == "lossless" else JPEG
    met, rows = verdict(results, {} if case.held_out else targets)
    save(case.json, COLUMNS, rows, images=case.images, dense=dense, results=results)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
