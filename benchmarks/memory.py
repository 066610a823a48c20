"""How much memory does pruning by rows of gradients take?

Rows, model and solve of `chita`, each case in a process of its own: the peak of the
resident memory above that after imports, loading, and the same run with a few rows,
which compiles what any run needs. MLPNet and ResNet20 come from the folder that
SPARSEREC_DATA names.

    python -m benchmarks.memory --json memory.json

Prints megabytes beside one copy of the rows in float32; exits 1 where a case takes more
than two such copies, or implicit rows more than 100 MB.
"""

import argparse
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
COLUMNS = ["case", "weights", "one float32 X, MB", "peak, MB", "copies", "target, MB"]


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


def resident() -> float:
    """Largest resident memory of this process so far, MB."""
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
    before = resident()
    prune(ROWS)
    print(
        json.dumps(
            {
                "weights": weights,
                "imported": imported,
                "before": before,
                "after": resident(),
            }
        )
    )


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
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
        found = details[case] = json.loads(output)
        single = ROWS * found["weights"] * 4 / MEGABYTE
        peak = found["after"] - found["before"]
        met &= peak <= most
        word = "met" if peak <= most else "MISSED"
        print(
            f"{case}: {peak:.0f} MB above {found['before']:.0f}, "
            f"{peak / single:.2f} copies of X, target {most}: {word}",
            flush=True,
        )
        row = [case, found["weights"], round(single), round(peak)]
        rows.append([*row, round(peak / single, 2), f"{most}: {word}"])
    save(options.json, COLUMNS, rows, cases=details)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
