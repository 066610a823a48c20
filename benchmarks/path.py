"""How long does a whole path over k take, beside abess, and is it as good?

    PEER_PYTHON=python python -m benchmarks.path --json path.json

Least squares with 500 rows and 1000 correlated columns, k = 1..50, one CPU thread, CPU
seconds. Ours runs in single precision, conversion from NumPy's double precision and
transfer included; abess, if `PEER_PYTHON` names an interpreter that has it, runs on the
same data in a process of its own, between our runs. Printed are the first call
(compilation included), medians of the others, and objectives after a refit in double
precision at several k; last the ratio of the times. The exit status is 1 where a
target is missed.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

for _name, _value in (
    ("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"),
    ("OPENBLAS_NUM_THREADS", "1"),
    ("OMP_NUM_THREADS", "1"),
):
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks._output import save  # noqa: E402
from benchmarks.recovery import Line, draw, refit  # noqa: E402
from benchmarks.recovery_adapter import model_of  # noqa: E402
from sparserec.recovery import path  # noqa: E402

ROWS, COLUMNS, LARGEST = 500, 1000, 50
SHOWN = (1, 5, 10, 20, 35, 50)
PEER_PYTHON = os.environ.get("PEER_PYTHON", "")
RATIO_LIMIT, COLD_LIMIT = 0.5, 3.0  # of the time of abess; CPU seconds

PEER = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
import numpy as np
from abess import LinearRegression
data = np.load(sys.argv[1])
def fit(support):
    model = LinearRegression(support_size=support, thread=1, fit_intercept=False)
    return model.fit(data["x"], data["y"], is_normal=False)
fit(range(1, 3))
start = time.process_time()
fit(range(1, int(sys.argv[2]) + 1))
seconds = time.process_time() - start
shown = json.loads(sys.argv[3])
# Its path keeps one model; every k alone is at least as good.
kept = {k: np.flatnonzero(fit(k).coef_).tolist() for k in shown}
print(json.dumps([seconds, kept]))
"""


def ours(design, response):
    model = model_of(design, response)
    return jax.block_until_ready(path(model, model.center, LARGEST))


def theirs(python: str, file: pathlib.Path):
    done = subprocess.run(
        [python, "-c", PEER, str(file), str(LARGEST), json.dumps(SHOWN)],
        capture_output=True,
        text=True,
        check=True,
    )
    seconds, kept = json.loads(done.stdout)
    return seconds, {int(k): support for k, support in kept.items()}


def clocked(call):
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def measure(correlation: float, case, folder: pathlib.Path) -> dict:
    line = Line(ROWS, COLUMNS, LARGEST, 5.0, 0.0, 0.0, "")
    design, response, _ = draw(line, correlation, case.seed)
    file = folder / "path_problem.npz"
    np.savez(file, x=design, y=response)
    cold, found = clocked(lambda: ours(design, response))
    times, peer_times, kept = [], [], {}
    for _ in range(case.repeats):
        times.append(clocked(lambda: ours(design, response))[0])
        if PEER_PYTHON:
            seconds, kept = theirs(PEER_PYTHON, file)
            peer_times.append(seconds)
    masks = np.asarray(found.mask)
    return {
        "correlation": correlation,
        "cold_seconds": cold,
        "seconds": float(np.median(times)),
        "peer_seconds": float(np.median(peer_times)) if peer_times else None,
        "objective": {
            k: refit(design, response, np.flatnonzero(masks[k - 1])) for k in SHOWN
        },
        "peer_objective": {k: refit(design, response, kept[k]) for k in kept},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--correlations", nargs="*", type=float, default=[0, 0.5, 0.9])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=pathlib.Path)
    case = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        results = [measure(r, case, pathlib.Path(folder)) for r in case.correlations]
    good = results[0]["cold_seconds"] <= COLD_LIMIT
    print(f"{ROWS} x {COLUMNS}, k = 1..{LARGEST}, jax {jax.__version__}, CPU seconds")
    print(f"first call {results[0]['cold_seconds']:.2f} s (limit {COLD_LIMIT:g})")
    rows = []
    for result in results:
        peer, time_ = result["peer_seconds"], result["seconds"]
        ratio = time_ / peer if peer else None
        peers = result["peer_objective"]
        worst = max((result["objective"][k] / v for k, v in peers.items()), default=0)
        rows.append(
            [
                result["correlation"],
                round(1e3 * time_, 1),
                round(1e3 * peer, 1) if peer else "-",
                round(worst, 6) if worst else "-",
                round(ratio, 2) if ratio else "-",
            ]
        )
        if ratio and worst:
            good &= ratio <= RATIO_LIMIT and worst <= 1 + 1e-6
        print(
            "correlation {}: {} ms, abess {} ms, largest objective ratio {}, "
            "time ratio {}".format(*rows[-1])
            + f" (limit {RATIO_LIMIT:g})"
        )
    save(
        case.json,
        ["correlation", "ms", "abess ms", "largest objective ratio", "time ratio"],
        rows,
        results=results,
        first_call_seconds=results[0]["cold_seconds"],
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
