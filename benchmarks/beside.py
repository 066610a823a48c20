"""How does `l0cd` compare with other packages, on the same problems in the same run?

Reads what a harness has written: one JSON object a line for every solve, with the
problem (`n`, `p`, `k`, `rho`, `snr`, `coef`, `loss`, `seed`), the solver (`peer`,
`variant`), CPU seconds (`cpu`, and `warm_cpu` where the call was repeated), the
objective after a refit in double precision on the support found (`obj_refit`) and on
the true one (`obj_true_support`). `recovery_adapter.py` is our side of it.

    python -m benchmarks.beside results.jsonl --json recovery.json

Prints, for every problem, warm CPU milliseconds and the objectives of the others over
ours, medians over seeds; last the ratios of the times to those of abess, and whether an
objective is anywhere above another's. Exits 1 where a target is missed.
"""

import argparse
import json
import pathlib
import statistics
import sys
from collections import defaultdict

from benchmarks._output import save

OURS = "sparserec.l0cd"
PEERS = {  # solver in the results -> name in the table
    "abess.default": "abess",
    "skscope.scope": "SCOPE",
    "sklearn.omp": "OMP",
    "skglm.mcp": "MCP",
}
ABESS = "abess.default"
# size -> most time, as a share of that of abess, up to a correlation of 0.5
SHARES = {
    ("linear", 500, 1000, 10): 0.4,
    ("linear", 500, 1000, 50): 0.9,
    ("linear", 1000, 5000, 50): 0.4,
    ("linear", 2000, 10000, 100): 0.6,
    ("linear", 1000, 100000, 50): 0.5,
    ("logistic", 1000, 5000, 25): 1.0,
}
CORRELATED_SHARE = 8.0  # above a correlation of 0.5
CORRELATED_GAIN = 0.03  # below the objective of abess there, from k = 50 on
SLACK = 1e-6  # relative excess of an objective that counts as none


def solves(files: list[pathlib.Path]) -> dict:
    """Problem -> solver -> seed -> its line, where the solver gave an answer."""
    found: dict = defaultdict(lambda: defaultdict(dict))
    for file in files:
        for line in file.read_text("utf-8").splitlines():
            row = json.loads(line)
            if row["event"] != "result":
                continue
            size = row["loss"], row["n"], row["p"], row["k"]
            problem = *size, row["rho"], float(row["snr"]), row["coef"]
            found[problem][f"{row['peer']}.{row['variant']}"][row["seed"]] = row
    return found


def seconds(rows: dict) -> float:
    """Warm CPU seconds: of the repeated call where there is one."""
    return statistics.median(
        row["cpu"] if row["warm_cpu"] is None else row["warm_cpu"]
        for row in rows.values()
    )


def ratios(theirs: dict, ours: dict) -> list[float]:
    """Objectives over ours, seed by seed; rounding of exact answers counts as none."""
    pairs = [(theirs[seed], ours[seed]) for seed in sorted(theirs.keys() & ours.keys())]
    return [(a["obj_refit"] + 1e-6) / (b["obj_refit"] + 1e-6) for a, b in pairs]


def _quality(theirs: dict | None, objectives: list[float] | None, noisy: bool) -> str:
    """Their objective over ours; without noise how often they find the support."""
    if not theirs or not objectives:
        return "-"
    if noisy:
        return f"{statistics.median(objectives):.4f}"
    return f"exact {sum(row['exact'] for row in theirs.values())}/{len(theirs)}"


def judged(problem: tuple, found: dict) -> tuple[list[str], list]:
    """What is missed on a problem, and its row of the table."""
    *size, rho, snr, coef = problem
    ours, missed = found[OURS], []
    share = seconds(ours) / seconds(found[ABESS])
    most = CORRELATED_SHARE
    if rho <= 0.5 and coef == "pm1":
        most = SHARES.get(tuple(size), float("inf"))
    if share > most:
        missed.append(f"time {share:.2f} of abess, target {most:g}")
    by_peer = {name: ratios(found[name], ours) for name in PEERS if name in found}
    for name, objectives in by_peer.items():
        if objectives and min(objectives) < 1 - SLACK:
            missed.append(f"objective above {name}: {min(objectives):.7f}")
    noisy = snr < float("inf")
    if not noisy and not all(row["exact"] for row in ours.values()):
        missed.append("not exact without noise")
    if rho > 0.5 and size[-1] >= 50 and noisy:
        gain = 1 - 1 / statistics.median(by_peer[ABESS])
        if gain < CORRELATED_GAIN:
            missed.append(f"{gain:.3f} below abess, target {CORRELATED_GAIN:g}")
    loss, n, p, k = size
    name = f"{n} x {p}, k={k}"
    name = name if loss == "linear" else f"{loss}, {name}"
    notes = [] if noisy else ["no noise"]
    notes += ["decaying coefficients"] if coef != "pm1" else []
    row = [", ".join([name, *notes]), rho, len(ours), round(1e3 * seconds(ours), 2)]
    row += [
        round(1e3 * seconds(found[peer]), 2) if peer in found else "-" for peer in PEERS
    ]
    row += [_quality(found.get(peer), by_peer.get(peer), noisy) for peer in PEERS]
    return missed, [*row, round(share, 2)]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("results", type=pathlib.Path, nargs="*")
    parser.add_argument("--json", type=pathlib.Path)
    case = parser.parse_args()
    if not case.results:
        print("Skipped: name the files that a harness has written.")
        return 0
    columns = ["problem", "correlation", "seeds", "l0cd ms"]
    columns += [f"{name} ms" for name in PEERS.values()]
    columns += [f"{name} objective" for name in PEERS.values()]
    columns += ["time over abess"]
    print(" | ".join(columns))
    rows, missed = [], 0
    for problem, found in solves(case.results).items():
        if OURS not in found or ABESS not in found:
            continue
        reasons, row = judged(problem, found)
        rows.append(row)
        missed += bool(reasons)
        print(*row, sep=" | ")
        for reason in reasons:
            print(f"    MISSED: {reason}")
    print(f"targets met on {len(rows) - missed} of {len(rows)} problems")
    save(case.json, columns, rows)
    return 1 if missed or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
