"""How much memory does pruning by rows of gradients take?

Rows, model and solve of `chita`, each case in a process of its own, by the peak of the
resident memory. "Peak": of a run whose programs are compiled, above what is resident
before it: imports, data, programs. "First": of the first run, compilation included,
above that of the same run with a few rows. What the compiler takes depends on what it
finds free, and varies by 100 MB. MLPNet and ResNet20 come from the folder that
SPARSEREC_DATA names.

    python -m benchmarks.memory --json memory.json

Prints megabytes beside one copy of the rows in float32; exits 1 where the peak of a
case is above two such copies, or that of implicit rows above 100 MB. Where the system
cannot forget a peak (it is not Linux), "first" stands for both.
"""

import argparse
import ctypes
import gc
import json
import os
import pathlib
import resource
import subprocess
import sys
from typing import Any

for _name, _value in (
    ("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"),
    ("OPENBLAS_NUM_THREADS", "1"),
    ("OMP_NUM_THREADS", "1"),
):
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
from jax.tree_util import Partial  # noqa: E402

from benchmarks import _resnet20 as resnet  # noqa: E402
from benchmarks import mlpnet  # noqa: E402
from benchmarks._output import save  # noqa: E402
from sparserec import chita, quadratic  # noqa: E402

ROWS, FEW = 1000, 50
MEGABYTE = 1e6
CASES = {  # name -> network, options of the rows, most megabytes
    "ResNet20, blocks of 500": ("resnet20", {"blocks": 500, "on_host": True}, 2147),
    "ResNet20": ("resnet20", {"on_host": True}, 2147),
    "MLPNet": ("mlpnet", {}, 259),
    "MLPNet, implicit": ("mlpnet", {"implicit": True}, 100),
}
COLUMNS = [
    "case",
    "weights",
    "one float32 X, MB",
    "peak, MB",
    "copies",
    "first, MB",
    "target, MB",
]
PEAKS = pathlib.Path("/proc/self/clear_refs")


def _resnet_loss(rest, stats, params, images, labels):
    logits: Any = resnet.apply({**rest, **params}, stats, images)
    return quadratic.softmax_cross_entropy(logits, labels)


def _mlpnet_loss(params, images, labels):
    return quadratic.softmax_cross_entropy(mlpnet.predict(params, images), labels)


def network(name: str):
    """Loss, weights and examples."""
    if name == "mlpnet":
        data = mlpnet.load()
        return _mlpnet_loss, data.params, tuple(x[:ROWS] for x in data.train)
    loaded = resnet.load("lossless")
    params = {k: w for k, w in loaded.params.items() if resnet.prunable(k, w)}
    rest = {k: w for k, w in loaded.params.items() if k not in params}
    images, labels = (x[:ROWS] for x in loaded.train)
    loss = Partial(_resnet_loss, rest, loaded.stats)
    return loss, params, (resnet.normalize(images), labels)


def forget() -> bool:
    """Starts a new peak from what is in use now; whether that is possible here."""
    gc.collect()
    if not PEAKS.exists():
        return False
    ctypes.CDLL(None).malloc_trim(0)  # what is free goes back first
    PEAKS.write_text("5")
    return True


def resident() -> float:
    """Largest resident memory of this process since the peak was forgotten, MB."""
    status = pathlib.Path("/proc/self/status")
    if status.exists():
        lines = (x.split() for x in status.read_text().splitlines())
        return next(float(x[1]) for x in lines if x[0] == "VmHWM:") * 1024 / MEGABYTE
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / MEGABYTE


def run(case: str) -> None:
    """One case; prints what it took as JSON."""
    name, options, _ = CASES[case]
    imported = resident()
    loss, params, examples = network(name)
    loss = jax.tree_util.Partial(loss)
    weights = sum(w.size for w in params.values())

    def prune(rows: int) -> None:
        builder = quadratic.fisher(rows=rows, ridge=1e-2, **options)
        model = builder(loss, params, tuple(x[:rows] for x in examples))
        jax.block_until_ready(chita(model, params, weights // 5, variant="bso"))

    prune(FEW)
    few = resident()
    prune(ROWS)
    found = {"weights": weights, "imported": imported, "few": few, "first": resident()}
    found |= {"before": few, "after": found["first"]}
    if forget():
        found["before"] = resident()
        prune(ROWS)
        found["after"] = resident()
    print(json.dumps(found))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", choices=CASES, help="in this process, as JSON")
    parser.add_argument("--json", type=pathlib.Path)
    options = parser.parse_args()
    if not resnet.available():
        return 0
    if options.case:
        run(options.case)
        return 0
    rows, details, met = [], {}, True
    for case, (_, _, most) in CASES.items():
        command = [sys.executable, "-m", "benchmarks.memory", "--case", case]
        # One heap, so that what the compiler gave back is used again.
        environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
        output = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, env=environment
        ).stdout
        found = details[case] = json.loads(output)
        single = ROWS * found["weights"] * 4 / MEGABYTE
        peak, first = (
            found["after"] - found["before"],
            found["first"] - found["few"],
        )
        met &= peak <= most
        word = "met" if peak <= most else "MISSED"
        print(
            f"{case}: {peak:.0f} MB above {found['before']:.0f}, "
            f"{peak / single:.2f} copies of X (first {first:.0f}), target {most}: "
            f"{word}",
            flush=True,
        )
        row = [case, found["weights"], round(single), round(peak)]
        rows.append([*row, round(peak / single, 2), round(first), f"{most}: {word}"])
    save(options.json, COLUMNS, rows, cases=details)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
