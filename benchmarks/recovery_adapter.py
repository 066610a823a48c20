"""Our side of the comparison of sparse-regression solvers, one call a problem.

The harness imports this file in an environment with sparserec and calls
`VARIANTS[name](x, y, k, loss)` with NumPy arrays in double precision; the answer is
the coefficient vector. Everything is inside the timed call: the conversion to single
precision, the transfer, the search. Name it to the harness by a JSON file in
`$EXTRA_PEERS`:

    {"sparserec": {
        "python": ".venv/bin/python",
        "module": "benchmarks.recovery_adapter",
        "path": ".",
        "variants": {"l0cd": ["linear", "logistic"], "l0cd_quick": ["linear"]}
    }}
"""

import jax
import jax.numpy as jnp
import numpy as np

from sparserec import _tree, losses, quadratic
from sparserec.solvers.l0cd import l0cd

LAST: dict[str, int] = {}
LOGISTIC = quadratic.linear_predictor(losses.logistic)


def model_of(x: np.ndarray, y: np.ndarray) -> quadratic.QuadraticModel:
    """Least squares from rows alone: a Gram matrix would cost more than the search."""
    # Converted by NumPy: there is nothing to compile.
    design, response = (jnp.asarray(np.asarray(v, np.float32)) for v in (x, y))
    center, slope, energy, ridge = _correlations(design, response)
    curvature = quadratic.LowRank(design, ridge, None, _tree.layout(center))
    return quadratic.QuadraticModel(center, energy, slope, curvature)


@jax.jit
def _correlations(design, response):
    slope, energy = -(response @ design), jnp.vdot(response, response) / 2
    return jnp.zeros_like(slope), slope, energy, jnp.zeros_like(energy)


def _solve(x, y, k: int, loss: str, effort: float) -> np.ndarray:
    if loss == "logistic":
        data = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)
        start = jnp.zeros(x.shape[1], jnp.float32)
        solution = l0cd(LOGISTIC.loss, start, k, args=data, curvature=LOGISTIC)
    else:
        model = model_of(x, y)
        solution = l0cd(model, model.center, k, effort=effort)
    LAST["status"] = int(solution.status)
    return np.asarray(solution.params, np.float64)


def search(x, y, k, loss):
    """The defaults: as much search as the problem asks for."""
    return _solve(x, y, k, loss, 1.0)


def quick(x, y, k, loss):
    """One pursuit and exchanges until none improves."""
    return _solve(x, y, k, loss, 0.0)


VARIANTS = {"l0cd": search, "l0cd_quick": quick}
LOSSES: dict[str, set[str]] = {}
