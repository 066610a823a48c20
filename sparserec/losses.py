r"""Losses of generalised linear models, to build the loss that a solver minimises.

Each takes predictions on the linear scale (before any link) and targets, and returns
the mean over the examples, or with `weights` $\sum_i w_i \ell_i / \sum_i w_i$. The
loss of a solver is then a function of params and data such as
`losses.logistic(X @ params, y)`, defined once.

Legend: m examples.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparserec._types import Scalar

__all__ = ["cox", "huber", "logistic", "multinomial", "poisson", "squared"]


def squared(
    predictions: Float[Array, "m *dims"],
    targets: Float[Array, "m *dims"],
    weights: Float[Array, "m"] | None = None,
) -> Scalar:
    r"""Half the squared error, $\frac12\|\eta_i - y_i\|^2$.

    Args:
      predictions: $\eta$, shape `(m,)`, or `(m, ...)` for several responses.
      targets: $y$, as `predictions`.
      weights: of the examples, shape `(m,)`, at least 0; `None` for equal ones.

    Returns:
      The mean, shape `()`.

    Raises:
      ValueError: shapes differ.
    """
    _check_shapes("predictions", predictions.shape, "targets", targets.shape)
    error = jnp.square(predictions - targets.astype(predictions.dtype))
    return _mean(0.5 * _over_responses(error), weights)


def logistic(
    predictions: Float[Array, "m *dims"],
    labels: Array,
    weights: Float[Array, "m"] | None = None,
) -> Scalar:
    r"""Logistic loss of two classes, $\log(1 + e^{\eta_i}) - y_i \eta_i$.

    Args:
      predictions: log odds $\eta$, shape `(m,)`, or `(m, ...)` for several responses.
      labels: $y$, zeros and ones, or probabilities, of any dtype, as `predictions`.
      weights: of the examples, shape `(m,)`, at least 0; `None` for equal ones.

    Returns:
      The mean in nats, shape `()`.

    Raises:
      ValueError: shapes differ.
    """
    _check_shapes("predictions", predictions.shape, "labels", labels.shape)
    slope = labels.astype(predictions.dtype) * predictions
    return _mean(_over_responses(jax.nn.softplus(predictions) - slope), weights)


def poisson(
    predictions: Float[Array, "m *dims"],
    counts: Array,
    weights: Float[Array, "m"] | None = None,
) -> Scalar:
    r"""Poisson loss with the log link, $e^{\eta_i} - y_i \eta_i$.

    Args:
      predictions: logarithms $\eta$ of the means, shape `(m,)`, or `(m, ...)`; add the
        logarithm of an exposure here.
      counts: $y \ge 0$, of any dtype, as `predictions`.
      weights: of the examples, shape `(m,)`, at least 0; `None` for equal ones.

    Returns:
      The mean, shape `()`, without the constant $\log y_i!$.

    Raises:
      ValueError: shapes differ.
    """
    _check_shapes("predictions", predictions.shape, "counts", counts.shape)
    slope = counts.astype(predictions.dtype) * predictions
    return _mean(_over_responses(jnp.exp(predictions) - slope), weights)


def huber(
    predictions: Float[Array, "m *dims"],
    targets: Float[Array, "m *dims"],
    threshold: Scalar | float = 1.0,
    weights: Float[Array, "m"] | None = None,
) -> Scalar:
    r"""Squares of small errors, magnitudes of large ones: $\delta(|e_i| - \delta/2)$.

    Args:
      predictions: $\eta$, shape `(m,)`, or `(m, ...)` for several responses.
      targets: $y$, as `predictions`.
      threshold: $\delta > 0$, in units of the targets; errors below it count as in
        `squared`.
      weights: of the examples, shape `(m,)`, at least 0; `None` for equal ones.

    Returns:
      The mean, shape `()`.

    Raises:
      ValueError: shapes differ.

    Source: Huber (1964).
    """
    _check_shapes("predictions", predictions.shape, "targets", targets.shape)
    error = predictions - targets.astype(predictions.dtype)
    limit = jnp.asarray(threshold, error.dtype)
    inner = jnp.clip(error, -limit, limit)
    return _mean(_over_responses(inner * (error - 0.5 * inner)), weights)


def multinomial(
    predictions: Float[Array, "m classes"],
    labels: Int[Array, "m"],
    weights: Float[Array, "m"] | None = None,
) -> Scalar:
    r"""Cross entropy of several classes, $\log\sum_c e^{\eta_{ic}} - \eta_{i y_i}$.

    Args:
      predictions: $\eta$, unnormalised log probabilities, shape `(m, classes)`.
      labels: $y$, integers from 0, shape `(m,)`.
      weights: of the examples, shape `(m,)`, at least 0; `None` for equal ones.

    Returns:
      The mean in nats, shape `()`.

    Raises:
      ValueError: shapes do not fit.
      TypeError: labels that are no integers.
    """
    _check_shapes("predictions[:, 0]", predictions.shape[:-1], "labels", labels.shape)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"`labels` must be integers from 0, got dtype {labels.dtype}.")
    chosen = jnp.take_along_axis(predictions, labels[:, None], axis=1)[:, 0]
    return _mean(jax.nn.logsumexp(predictions, axis=1) - chosen, weights)


def cox(
    predictions: Float[Array, "m"],
    times: Float[Array, "m"],
    events: Array,
    weights: Float[Array, "m"] | None = None,
) -> Scalar:
    r"""Cox's partial likelihood of survival times, with Breslow's rule for ties.

    $$-\frac{1}{\sum_i w_i}\sum_{i:\ \text{event}} w_i\Bigl(\eta_i
      - \log\sum_{j:\ t_j \ge t_i} w_j e^{\eta_j}\Bigr)$$

    It is no sum over examples: do not visit the data in chunks.

    Args:
      predictions: logarithms $\eta$ of the relative hazards, shape `(m,)`; a constant
        has no effect, so give no intercept.
      times: $t$, of the event or of censoring, shape `(m,)`.
      events: one (or `True`) where the event was seen, zero where the time is censored,
        shape `(m,)`.
      weights: of the examples, shape `(m,)`, at least 0; `None` for equal ones.

    Returns:
      The loss over the sum of weights, shape `()`.

    Raises:
      ValueError: shapes differ.

    Source: Cox (1972, 1975); Breslow (1974).
    """
    _check_shapes("predictions", predictions.shape, "times", times.shape)
    _check_shapes("predictions", predictions.shape, "events", events.shape)
    wide = predictions.dtype
    largest = jax.lax.stop_gradient(jnp.max(predictions))
    hazards = jnp.exp(predictions - largest)
    if weights is not None:
        hazards = weights.astype(wide) * hazards
    order = jnp.argsort(-times)
    latest_first = -times[order]
    last = jnp.searchsorted(latest_first, -times, side="right") - 1
    total = jnp.maximum(jnp.cumsum(hazards[order])[last], jnp.finfo(wide).tiny)
    return _mean(
        events.astype(wide) * (jnp.log(total) + largest - predictions), weights
    )


def _check_shapes(first: str, shape: tuple, second: str, other: tuple) -> None:
    if shape != other:
        raise ValueError(
            f"`{first}` and `{second}` must have the same shape, got {shape} and "
            f"{other}; broadcasting would compare every example with every other."
        )


def _over_responses(losses: Float[Array, "m *dims"]) -> Float[Array, "m"]:
    return jnp.sum(losses.reshape(losses.shape[0], -1), axis=1)


def _mean(losses: Float[Array, "m"], weights: Float[Array, "m"] | None) -> Scalar:
    if weights is None:
        return jnp.mean(losses)
    _check_shapes("weights", weights.shape, "losses of the examples", losses.shape)
    share = weights.astype(losses.dtype)
    return jnp.vdot(share, losses) / jnp.sum(share)
