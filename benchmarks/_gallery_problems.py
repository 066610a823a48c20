"""The six problems on which skscope compares its solvers, drawn anew.

Sizes, amplitudes and noise are those of its published comparison (600 examples each);
the draws are our own. Nothing here needs more than NumPy and JAX, so that a peer can
run the same losses in an environment of its own.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

EXAMPLES = 600
SPINS = 20
STEPS = 600


class Problem(NamedTuple):
    """What to minimise, and what should be found.

    Attributes:
      loss: `loss(params, *data) -> scalar`, params of shape `(size,)`.
      data: NumPy arrays in double precision.
      size: number of params.
      k: groups that matter.
      groups: group of every param, shape `(size,)`.
      truth: the params that matter, bool, shape `(size,)`.
    """

    loss: Callable
    data: tuple
    size: int
    k: int
    groups: np.ndarray
    truth: np.ndarray

    def share_found(self, params: np.ndarray) -> float:
        """Share of the params that matter among those kept."""
        kept = np.asarray(params).reshape(-1) != 0
        return float(np.sum(kept & self.truth) / np.sum(self.truth))


def _design(rng: np.random.Generator, columns: int, correlation: float) -> np.ndarray:
    """Neighboring columns of unit variance, correlated."""
    x = rng.standard_normal((columns, EXAMPLES))
    for j in range(1, columns):
        x[j] = correlation * x[j - 1] + np.sqrt(1 - correlation**2) * x[j]
    return x.T


def _signs(rng: np.random.Generator, size: int, k: int, scale: float) -> np.ndarray:
    found = np.zeros(size)
    found[rng.choice(size, k, replace=False)] = scale * rng.choice([-1, 1], k)
    return found


def squared(params, x, y):
    return jnp.sum(jnp.square(y - x @ params))


def linear(seed: int) -> Problem:
    rng = np.random.default_rng([seed, 0])
    x, truth = _design(rng, 500, 0.1), _signs(rng, 500, 50, 100.0)
    signal = x @ truth
    noise = np.std(signal) / np.sqrt(60) * rng.standard_normal(EXAMPLES)
    return Problem(squared, (x, signal + noise), 500, 50, np.arange(500), truth != 0)


def log_loss(params, x, y):
    eta = x @ params
    return jnp.sum(jnp.logaddexp(eta, 0) - y * eta)


def logistic(seed: int) -> Problem:
    rng = np.random.default_rng([seed, 1])
    truth = _signs(rng, 500, 50, 100.0)
    x = _design(rng, 500, 0.1) * 10 / np.sqrt(EXAMPLES)
    eta = np.clip(x @ truth, -30, 30)
    y = (rng.random(EXAMPLES) < 1 / (1 + np.exp(-eta))).astype(float)
    return Problem(log_loss, (x, y), 500, 50, np.arange(500), truth != 0)


def tracked(params, signal):
    return jnp.mean(jnp.square(signal - jnp.cumsum(params)))


def trend(seed: int) -> Problem:
    """A random walk with five jumps; least squares on the walk itself."""
    rng = np.random.default_rng([seed, 2])
    jumps = np.zeros(STEPS)
    jumps[STEPS // 6 * np.arange(1, 6)] = 1
    signal = np.cumsum(jumps + rng.standard_normal(STEPS) / np.sqrt(STEPS))
    return Problem(tracked, (signal,), STEPS, 5, np.arange(STEPS), jumps != 0)


def several(params, x, y):
    return jnp.sum(jnp.square(y - x @ params.reshape(x.shape[1], y.shape[1])))


def multitask(seed: int) -> Problem:
    """Three responses without noise that depend on the same columns."""
    rng = np.random.default_rng([seed, 3])
    x = rng.standard_normal((EXAMPLES, 500))
    truth = np.zeros((500, 3))
    chosen = rng.choice(500, 50, replace=False)
    truth[chosen] = 100 * rng.random((50, 3))
    groups = np.repeat(np.arange(500), 3)
    flat = truth.reshape(-1) != 0
    return Problem(several, (x, x @ truth), 1500, 50, groups, flat)


PAIRS = np.array(list(itertools.combinations(range(SPINS), 2)))


def pseudo_likelihood(couplings, spins):
    matrix = jnp.zeros((SPINS, SPINS), couplings.dtype)
    matrix = matrix.at[PAIRS[:, 0], PAIRS[:, 1]].set(couplings)
    field = spins @ (matrix + matrix.T)
    return jnp.sum(jnp.logaddexp(-2 * spins * field, 0))


def ising(seed: int) -> Problem:
    """Exact draws: all states of 20 spins have their probabilities computed."""
    rng = np.random.default_rng([seed, 4])
    truth = _signs(rng, len(PAIRS), 40, 0.5)
    bits = (np.arange(2**SPINS)[:, None] >> np.arange(SPINS)) & 1
    spins = (2 * bits - 1).astype(np.float32)
    matrix = np.zeros((SPINS, SPINS), np.float32)
    matrix[PAIRS[:, 0], PAIRS[:, 1]] = truth
    energy = np.einsum("si,si->s", spins @ matrix, spins).astype(float)
    share = np.exp(energy - energy.max())
    drawn = rng.multinomial(EXAMPLES, share / share.sum())
    data = (np.repeat(spins, drawn, axis=0).astype(float),)
    size = len(PAIRS)
    return Problem(pseudo_likelihood, data, size, 40, np.arange(size), truth != 0)


def _centered_kernel(x: np.ndarray, width: float) -> np.ndarray:
    kernel = np.exp(-width * np.square(x[:, None] - x[None, :]))
    return kernel - kernel.mean(0) - kernel.mean(1)[:, None] + kernel.mean()


def dependence(params, gram, correlations, energy):
    """Least squares over pairs of examples, in its normal equations."""
    weights = jnp.abs(params)
    return energy - 2 * correlations @ weights + weights @ gram @ weights


def nonlinear(seed: int) -> Problem:
    """Which variables a response depends on, by kernels of single variables.

    The regression of one centered kernel matrix on fifty, with weights of one sign;
    its 360,000 rows are summed here.
    """
    rng = np.random.default_rng([seed, 5])
    x = rng.standard_normal((EXAMPLES, 50))
    a, b, c, d, e = np.split(rng.choice(50, 10, replace=False), 5)
    y = np.sum(x[:, a] * np.exp(2 * x[:, b]) + np.square(x[:, c]), axis=1)
    y += np.sum((2 * x[:, d] - 1) * (2 * x[:, e] - 1), axis=1)
    y += rng.standard_normal(EXAMPLES)
    columns = np.stack([_centered_kernel(v, 0.7).reshape(-1) for v in x.T])
    response = _centered_kernel(y, 0.7).reshape(-1)
    data = columns @ columns.T, columns @ response, response @ response
    truth = np.zeros(50, bool)
    truth[np.concatenate([a, b, c, d, e])] = True
    return Problem(dependence, data, 50, 10, np.arange(50), truth)


PROBLEMS: dict[str, Callable[[int], Problem]] = {
    "linear": linear,
    "logistic": logistic,
    "trend filtering": trend,
    "multitask": multitask,
    "Ising": ising,
    "nonlinear": nonlinear,
}


def scope(problem: Problem) -> np.ndarray:
    """What skscope's own solver finds; needs skscope."""
    from skscope import ScopeSolver  # type: ignore[import-not-found]

    data = jax.tree.map(jnp.asarray, problem.data)
    solver = ScopeSolver(problem.size, problem.k, group=problem.groups.tolist())
    solver.solve(lambda params: problem.loss(params, *data), jit=True)
    return np.asarray(solver.get_estimated_params())
