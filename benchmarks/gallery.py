"""Does one call solve the problems on which skscope compares its solvers, and how fast?

Six losses written in JAX: linear and logistic regression, trend filtering, several
responses, an Ising model and nonlinear dependence, 600 examples each. See
`_gallery_problems.py` for the settings.

    PEER_PYTHON=python python -m benchmarks.gallery --seeds 10 --json gallery.json

Ours runs in single precision, conversion and transfer included. If `PEER_PYTHON` names
an interpreter with skscope, its own solver runs on the same draws in a process of its
own, in the same minutes. CPU seconds, one thread, medians of the calls after the first.
Printed last: the share of the right params found, beside skscope's and the best solver
of its published table, and the ratio of the times; exits 1 where a target is missed.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable

for _name, _value in (
    ("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"),
    ("OPENBLAS_NUM_THREADS", "1"),
    ("OMP_NUM_THREADS", "1"),
):
    os.environ.setdefault(_name, _value)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import sparserec as sr  # noqa: E402
from benchmarks._gallery_problems import EXAMPLES, PROBLEMS, Problem  # noqa: E402
from benchmarks._output import save  # noqa: E402

# The best of seven solvers in the README of skscope 0.1.8.
PUBLISHED = {
    "linear": 1.00,
    "logistic": 0.97,
    "trend filtering": 0.87,
    "multitask": 1.00,
    "Ising": 1.00,
    "nonlinear": 0.78,
}
NOISE = 0.015  # of published shares, which are those of other draws
SHARE = 0.1  # target: of the time of skscope
COLUMNS = [
    "problem",
    "call",
    "right, %",
    "skscope, %",
    "best published, %",
    "CPU s",
    "skscope CPU s",
    "ratio",
    "",
]
PEER_PYTHON = os.environ.get("PEER_PYTHON", "")
PEER = """
import json, sys, time, warnings
warnings.filterwarnings("ignore")
from benchmarks._gallery_problems import PROBLEMS, scope
found = []
for seed in range(int(sys.argv[2])):
    problem = PROBLEMS[sys.argv[1]](seed)
    start = time.process_time()
    params = scope(problem)
    found.append([time.process_time() - start, problem.share_found(params)])
print(json.dumps(found))
"""


def _start(problem: Problem) -> jax.Array:
    return jnp.zeros(problem.size)


def _data(problem: Problem) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(x, jnp.float32) for x in problem.data)


def solve_linear(problem: Problem) -> sr.Solution:
    model = sr.quadratic.least_squares(*_data(problem))
    return sr.l0cd(model, _start(problem), problem.k)


def solve_loss(problem: Problem) -> sr.Solution:
    return sr.l0cd(problem.loss, _start(problem), problem.k, args=_data(problem))


def solve_separable(problem: Problem) -> sr.Solution:
    """The classes can be separated: without a ridge the coefficients have no end."""
    return sr.l0cd(
        LOGISTIC.loss,
        _start(problem),
        problem.k,
        args=_data(problem),
        curvature=LOGISTIC,
        l2=1e-3 / EXAMPLES,
        effort=0,
    )


def solve_together(problem: Problem) -> sr.Solution:
    """Three responses, features kept or dropped for all of them."""
    standard = sr.recovery.regression(*_data(problem), intercept=False)
    model, groups = standard.model, standard.groups()
    return sr.splicing(model, model.center, problem.k, groups=groups)


def solve_coupled(problem: Problem) -> sr.Solution:
    return sr.htp(problem.loss, _start(problem), problem.k, args=_data(problem))


def solve_positive(problem: Problem) -> sr.Solution:
    """In the normal equations; weights that are not negative, in place of |w|."""
    gram, correlations, _ = _data(problem)
    model = sr.quadratic.dense(gram, _start(problem), -correlations)
    return sr.l0cd(model, _start(problem), problem.k, lower=0.0)


LOGISTIC = sr.quadratic.linear_predictor(sr.losses.logistic)
CALLS: dict[str, tuple[str, Callable[[Problem], sr.Solution]]] = {
    "linear": ("l0cd", solve_linear),
    "logistic": ("l0cd, l2, effort 0", solve_separable),
    "trend filtering": ("l0cd", solve_loss),
    "multitask": ("splicing, groups", solve_together),
    "Ising": ("htp", solve_coupled),
    "nonlinear": ("l0cd, lower", solve_positive),
}


def ours(name: str, seeds: int) -> list[tuple[float, float]]:
    """CPU seconds and the share found, for every seed."""
    found = []
    for seed in range(seeds):
        problem = PROBLEMS[name](seed)
        start = time.process_time()
        solution = jax.block_until_ready(CALLS[name][1](problem))
        seconds = time.process_time() - start
        found.append((seconds, problem.share_found(np.asarray(solution.params))))
    return found


def theirs(name: str, seeds: int) -> list[tuple[float, float]]:
    done = subprocess.run(
        [PEER_PYTHON, "-c", PEER, name, str(seeds)],
        capture_output=True,
        text=True,
        check=True,
        cwd=pathlib.Path(__file__).parent.parent,
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--problems", nargs="*", default=list(PROBLEMS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", type=pathlib.Path)
    case = parser.parse_args()
    good, rows, results = True, [], {}
    for name in case.problems:
        found = ours(name, case.seeds)
        peer = theirs(name, case.seeds) if PEER_PYTHON else []
        results[name] = {"ours": found, "skscope": peer}
        right = float(np.mean([share for _, share in found]))
        seconds = float(np.median([s for s, _ in found[1:]]))
        row = [name, CALLS[name][0], round(100 * right, 1)]
        if peer:
            right_peer = float(np.mean([share for _, share in peer]))
            seconds_peer = float(np.median([s for s, _ in peer[1:]]))
            ratio = seconds / seconds_peer
            met = right >= right_peer and right >= PUBLISHED[name] - NOISE
            met &= ratio <= SHARE
            good &= met
            row += [round(100 * right_peer, 1), round(100 * PUBLISHED[name])]
            row += [seconds, seconds_peer, ratio, "met" if met else "MISSED"]
        else:
            row += ["-", round(100 * PUBLISHED[name]), seconds, "-", "-", ""]
        rows.append(row)
        shown = [f"{x:.3g}" if isinstance(x, float) else str(x) for x in row]
        pairs = zip(COLUMNS, shown, strict=True)
        print("; ".join(f"{c}: {s}" if c else s for c, s in pairs), flush=True)
    save(case.json, COLUMNS, rows, results=results)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
