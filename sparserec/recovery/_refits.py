"""Exact refits on a support, in double precision with NumPy.

Legend: m examples, s columns of a support, t outputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from sparserec.recovery._likelihoods import LOGISTIC, POISSON, Family

_NEWTON_STEPS = 100
_NEWTON_TOL = 1e-14  # relative decrease


def _sigmoid(eta: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -eta))


# NumPy's own functions: JAX may be in single precision.
_EXACT = {
    LOGISTIC: Family(
        lambda eta: np.logaddexp(0, eta),
        _sigmoid,
        lambda eta: _sigmoid(eta) * _sigmoid(-eta),
    ),
    POISSON: Family(np.exp, np.exp, np.exp),
}


class Limits(NamedTuple):
    """Bounds of the coefficients on a support, each of shape `(s,)`."""

    lower: np.ndarray
    upper: np.ndarray


class Start(NamedTuple):
    """Coefficients `(s,)` or `(s, t)` and intercepts from the search."""

    coefficients: np.ndarray
    intercept: np.ndarray | float


def refit_least_squares(
    part: np.ndarray,
    response: np.ndarray,
    weights: np.ndarray,
    ridge: np.ndarray,
    intercept: bool,
    limits: Limits | None,
) -> tuple[np.ndarray, Any]:
    """Coefficients and intercept of one response, shape `(m,)`, or several, `(m, t)`.

    Args:
      part: columns of the support, shape `(m, s)`.
      response: as said.
      weights: of the examples, shape `(m,)`.
      ridge: curvature added to each coefficient, shape `(s,)`.
      intercept: whether there is one.
      limits: bounds of the coefficients.

    Returns:
      Coefficients of shape `(s,)` or `(s, t)`, and the intercept or intercepts.
    """
    total = weights.sum()
    mean = weights @ part / total if intercept else np.zeros(part.shape[1])
    offset = weights @ response / total if intercept else np.zeros(response.shape[1:])
    root = np.sqrt(weights)
    rows = root[:, None] * (part - mean)
    target = root.reshape(-1, *(1,) * (response.ndim - 1)) * (response - offset)
    if np.any(ridge):
        rows = np.vstack([rows, np.diag(np.sqrt(ridge))])
        blank = np.zeros((part.shape[1], *response.shape[1:]))
        target = np.concatenate([target, blank])
    if limits is None:
        coefficients = np.linalg.lstsq(rows, target, rcond=None)[0]
    else:
        columns = target.reshape(target.shape[0], -1).T
        found = [_bounded_least_squares(rows, one, limits) for one in columns]
        coefficients = np.stack(found, 1).reshape(part.shape[1], *response.shape[1:])
    return coefficients, offset - mean @ coefficients


def refit_likelihood(
    part: np.ndarray,
    response: np.ndarray,
    weights: np.ndarray,
    start: Start,
    ridge: np.ndarray,
    family: Family,
    intercept: bool,
    limits: Limits | None,
) -> tuple[np.ndarray, Any]:
    """The same for a likelihood, from a start."""
    exact: Any = _EXACT[family]
    rows = _with_ones(part, intercept)
    ridge = np.concatenate([ridge, np.zeros(rows.shape[1] - ridge.size)])
    level = np.full(int(intercept), start.intercept)
    point = np.concatenate([start.coefficients, level])

    def value(point: np.ndarray) -> float:
        eta = rows @ point
        terms = exact.cumulant(eta) - response * eta
        return float(weights @ terms + ridge @ point**2 / 2)

    def model(point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        eta = rows @ point
        residual = weights * (exact.mean(eta) - response)
        bend = weights * exact.variance(eta)
        return residual @ rows + ridge * point, (rows * bend[:, None]).T @ rows + (
            np.diag(ridge)
        )

    point = _newton(value, model, point, _padded(limits, point.size))
    return point[: part.shape[1]], float(point[-1]) if intercept else 0.0


def refit_classes(
    part: np.ndarray,
    response: np.ndarray,
    weights: np.ndarray,
    start: Start,
    ridge: np.ndarray,
    intercept: bool,
    limits: Limits | None,
) -> tuple[np.ndarray, Any]:
    """The same for classes, given as rows of ones and zeros, shape `(m, t)`."""
    rows = _with_ones(part, intercept)
    width, outputs = rows.shape[1], response.shape[1]
    added = np.repeat(np.concatenate([ridge, np.zeros(width - ridge.size)]), outputs)
    level = np.broadcast_to(start.intercept, (int(intercept), outputs))
    point = np.concatenate([start.coefficients, level]).reshape(-1)

    def chances_of(point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        eta = rows @ point.reshape(width, outputs)
        largest = eta.max(axis=1, keepdims=True)
        sums = np.exp(eta - largest).sum(axis=1, keepdims=True)
        logs = eta - largest - np.log(sums)
        return np.exp(logs), logs

    def value(point: np.ndarray) -> float:
        _, logs = chances_of(point)
        terms = -np.sum(response * logs, axis=1)
        return float(weights @ terms + added @ point**2 / 2)

    def model(point: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        chances, _ = chances_of(point)
        share = weights[:, None] * chances
        slope = rows.T @ (share - weights[:, None] * response)
        bend = np.zeros((width, outputs, width, outputs))
        for c in range(outputs):
            for d in range(outputs):
                both = share[:, c] * ((c == d) - chances[:, d])
                bend[:, c, :, d] = (rows * both[:, None]).T @ rows
        matrix = bend.reshape(point.size, point.size) + np.diag(added)
        return slope.reshape(-1) + added * point, matrix

    limits = limits and Limits(*(np.repeat(x, outputs) for x in limits))
    point = _newton(value, model, point, _padded(limits, point.size))
    matrix = point.reshape(width, outputs)
    if limits is None:
        # A constant added to all classes changes nothing.
        matrix = matrix - matrix.mean(axis=1, keepdims=True)
    slopes = matrix[: part.shape[1]]
    return slopes, matrix[-1] if intercept else np.zeros(outputs)


def _with_ones(part: np.ndarray, intercept: bool) -> np.ndarray:
    return np.hstack([part, np.ones((part.shape[0], 1 if intercept else 0))])


def _padded(limits: Limits | None, size: int) -> Limits | None:
    """No bounds for what comes after the coefficients."""
    if limits is None:
        return None
    rest = size - limits.lower.size
    return Limits(
        np.concatenate([limits.lower, np.full(rest, -np.inf)]),
        np.concatenate([limits.upper, np.full(rest, np.inf)]),
    )


def _newton(
    value: Callable[[np.ndarray], float],
    model: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    point: np.ndarray,
    limits: Limits | None,
) -> np.ndarray:
    """Newton steps within bounds, each halved until the loss falls."""
    if limits is not None:
        point = np.clip(point, *limits)
    best = value(point)
    for _ in range(_NEWTON_STEPS):
        step = _step(*model(point), point, limits)
        length = 1.0
        while value(point - length * step) > best and length > 1e-8:
            length /= 2
        point = point - length * step
        before, best = best, min(best, value(point))
        if before - best <= _NEWTON_TOL * max(abs(before), 1e-300):
            break
    return point if limits is None else np.clip(point, *limits)


def _step(
    gradient: np.ndarray, matrix: np.ndarray, point: np.ndarray, limits: Limits | None
) -> np.ndarray:
    """From the minimiser of the local model, within the bounds, to the point."""
    if limits is None:
        return np.linalg.lstsq(matrix, gradient, rcond=None)[0]
    values, vectors = np.linalg.eigh(matrix)
    root = np.sqrt(np.maximum(values, np.finfo(float).eps * values.max()))
    rows = root[:, None] * vectors.T
    target = rows @ point - (vectors.T @ gradient) / root
    return point - _bounded_least_squares(rows, target, limits)


def _bounded_least_squares(
    rows: np.ndarray, target: np.ndarray, limits: Limits
) -> np.ndarray:
    from scipy.optimize import lsq_linear

    # SciPy wants room between bounds that are equal.
    upper = np.maximum(limits.upper, np.nextafter(limits.lower, np.inf))
    found = lsq_linear(rows, target, (limits.lower, upper), method="bvls")
    return np.clip(found.x, *limits)
