"""How good are the supports that `l0cd` finds, and how long does it take?

Least squares on correlated Gaussian designs, the sizes at which other solvers of best
subsets are compared. One CPU thread, single precision, conversion from NumPy's double
precision included; CPU seconds, medians over seeds after one call that compiles.

    python -m benchmarks.recovery --seeds 5 --json result.json
    python -m benchmarks.recovery --lines small

Prints, for every line, the objective relative to that of the true support (below one
is better than the truth on these data), exact recoveries, the share of seeds above the
truth, and milliseconds with their limit; exits 1 where a target is missed.
"""

import argparse
import json
import math
import os
import pathlib
import statistics
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
import numpy as np  # noqa: E402

from benchmarks.recovery_adapter import VARIANTS  # noqa: E402


class Line(NamedTuple):
    """A size, and the most milliseconds at low and at high correlation.

    The limits are the shares asked of the time of abess 0.4.11 on the machine of the
    published figures (docs/l0cd.md): 0.4, 0.9, 0.4, 0.6 and 0.5 times up to a
    correlation of 0.5, eight times at 0.9.
    """

    n: int
    p: int
    k: int
    snr: float
    limit: float
    limit_correlated: float
    group: str


LINES = (
    Line(500, 1000, 10, 5.0, 2.9, 59.0, "small"),
    Line(500, 1000, 50, 5.0, 9.5, 118.0, "small"),
    Line(1000, 5000, 50, 5.0, 47.0, 1040.0, "medium"),
    Line(1000, 5000, 50, math.inf, 47.0, 1040.0, "medium"),
    Line(2000, 10000, 100, 10.0, 371.0, 5600.0, "large"),
    Line(1000, 100000, 50, 10.0, 1585.0, math.inf, "wide"),
)
CORRELATIONS = (0.0, 0.5, 0.9)


def draw(line: Line, correlation: float, seed: int):
    """Rows of N(0, S) with S_ij = correlation^|i-j|, signs as coefficients."""
    rng = np.random.default_rng(
        [seed, line.n, line.p, line.k, round(1000 * correlation)]
    )
    columns = rng.standard_normal((line.p, line.n))
    if correlation:
        share = math.sqrt(1 - correlation * correlation)
        for j in range(1, line.p):
            columns[j] = correlation * columns[j - 1] + share * columns[j]
    design = np.ascontiguousarray(columns.T)
    support = np.sort(rng.choice(line.p, size=line.k, replace=False))
    signs = rng.choice([-1.0, 1.0], size=line.k)
    clean = design[:, support] @ signs
    sigma = 0.0 if math.isinf(line.snr) else math.sqrt(clean.var() / line.snr)
    return design, clean + sigma * rng.standard_normal(line.n), support


def refit(design, response, support) -> float:
    part = design[:, support]
    weights = np.linalg.lstsq(part, response, rcond=None)[0]
    return float(np.sum((response - part @ weights) ** 2) / 2)


def measure(line: Line, correlation: float, variant: str, seeds: int) -> dict:
    solve = VARIANTS[variant]
    ratios, exact, above, times = [], 0, 0, []
    cold = math.nan
    for seed in range(seeds):
        design, response, truth = draw(line, correlation, seed)
        start = time.process_time()
        solve(design, response, line.k, "linear")
        if seed == 0:
            cold = time.process_time() - start
        start = time.process_time()
        answer = solve(design, response, line.k, "linear")
        times.append(time.process_time() - start)
        found = np.flatnonzero(answer)
        exact += np.array_equal(found, truth)
        value, true = refit(design, response, found), refit(design, response, truth)
        scale = float(response @ response) / 2
        above += value > true + 1e-6 * (true + 1e-9 * scale)
        ratios.append((value + 1e-9 * scale) / (true + 1e-9 * scale))
    return {
        "line": f"{line.n} x {line.p}, k={line.k}, SNR {line.snr:g}",
        "correlation": correlation,
        "variant": variant,
        "ratio": statistics.median(ratios),
        "exact": exact,
        "above": above,
        "seeds": seeds,
        "milliseconds": 1e3 * statistics.median(times),
        "cold_seconds": cold,
    }


def verdict(result: dict, line: Line) -> bool:
    """Prints one line; whether it meets its targets."""
    correlated = result["correlation"] > 0.5
    limit = line.limit_correlated if correlated else line.limit
    met = result["milliseconds"] <= limit and result["above"] == 0
    if math.isinf(line.snr):
        met = met and result["exact"] == result["seeds"]
    print(
        f"{result['line']}, correlation {result['correlation']:g}: "
        f"{result['ratio']:.4f} of the truth, exact {result['exact']}/"
        f"{result['seeds']}, above the truth {result['above']}, "
        f"{result['milliseconds']:.1f} ms (limit {limit:g}), first call "
        f"{result['cold_seconds']:.1f} s: {'met' if met else 'MISSED'}",
        flush=True,
    )
    return met


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    groups = list(dict.fromkeys(line.group for line in LINES))
    parser.add_argument("--lines", nargs="*", choices=groups, default=groups)
    parser.add_argument("--correlations", nargs="*", type=float, default=CORRELATIONS)
    parser.add_argument("--variant", choices=list(VARIANTS), default="l0cd")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=pathlib.Path)
    return parser.parse_args()


def main() -> int:
    case = arguments()
    print(f"device: {jax.devices()[0].device_kind}, jax {jax.__version__}")
    met, results = [], []
    for line in LINES:
        if line.group not in case.lines:
            continue
        for correlation in case.correlations:
            if line.group == "wide" and correlation != 0.5:
                continue
            results.append(measure(line, correlation, case.variant, case.seeds))
            met.append(verdict(results[-1], line))
            if case.json:
                case.json.write_text(json.dumps(results, indent=2) + "\n")
    print(f"targets met: {sum(met)} of {len(met)}")
    return 0 if all(met) else 1


if __name__ == "__main__":
    sys.exit(main())
