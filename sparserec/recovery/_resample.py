"""The choice of k from data left out, and how stable a support is.

Legend: m examples, f folds, b subsamples, K budgets from 1 to K.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sparserec._types import LossFn, Params
from sparserec.quadratic._chunked import leading_size
from sparserec.quadratic._matrix_free import as_pytree
from sparserec.recovery._record import Path

Fit = Callable[..., Path]
"""`fit(*data) -> Path`, from the data of some examples."""


class CrossValidation(NamedTuple):
    """Held-out losses along a path, and the k that they speak for.

    Attributes:
      ks: budgets, int32, shape `(K,)`.
      losses: loss on the examples of each fold, left out of its fit, shape `(f, K)`.
      mean: over the folds, shape `(K,)`.
      standard_error: of the mean, shape `(K,)`.
      best: k with the lowest mean, int32, shape `()`.
      simplest: the smallest k whose mean is within one standard error of the lowest,
        int32, shape `()`.
    """

    ks: Int[Array, "K"]
    losses: Float[Array, "f K"]
    mean: Float[Array, "K"]
    standard_error: Float[Array, "K"]
    best: Int[Array, ""]
    simplest: Int[Array, ""]


class Stability(NamedTuple):
    """How often each weight is kept when half of the examples are drawn.

    Attributes:
      ks: budgets, int32, shape `(K,)`.
      frequencies: pytree like the params, leaves of shape `(K, ...)`, in `[0, 1]`.
    """

    ks: Int[Array, "K"]
    frequencies: Params


def cross_validate(
    fit: Fit,
    loss_fn: LossFn,
    data: tuple,
    *,
    folds: int = 5,
    key: Key[Array, ""],
) -> CrossValidation:
    r"""Loss on held-out examples for every k of a path.

    The examples are shuffled and split into folds of $\lfloor m/f \rfloor$; each
    fold is left out of one fit and judged by it. Up to $f - 1$ examples that no fold
    holds are part of every fit, so that all fits have one shape: one compilation,
    looped over the folds on CPU, in one batch on accelerators.

    Args:
      fit: `fit(*data) -> Path`, such as
        `lambda X, y: path(least_squares(X, y), jnp.zeros(p), 20)`; static (pass the
        same function object again and nothing recompiles). All that is learned from
        data, such as centering, belongs into it.
      loss_fn: `loss_fn(params, *data) -> scalar`, a mean over examples; static.
      data: tuple of arrays whose leading axis counts the examples.
      folds: number of folds, at least 2; static.
      key: typed PRNG key of the shuffle.

    Returns:
      A `CrossValidation`. A NaN on the held-out examples counts as infinite; ties go
      to the smaller k.

    Raises:
      ValueError: `folds` below 2 or above the number of examples.
      TypeError: `data` is no tuple.

    Source: one standard error as in Breiman, Friedman, Olshen & Stone (1984).
    """
    size = _examples(data)
    if isinstance(folds, bool) or not isinstance(folds, int) or not 2 <= folds <= size:
        raise ValueError(f"`folds` must be an integer in [2, {size}], got {folds!r}.")
    held = size // folds
    order = jax.random.permutation(key, size)
    # The fold comes first in its row; what follows is fitted.
    rows = jnp.stack([jnp.roll(order, -i * held) for i in range(folds)])
    ks, losses = _held_out(as_pytree(fit), as_pytree(loss_fn), data, rows, held=held)
    return summarize(ks, losses)


def stability(
    fit: Fit, data: tuple, *, subsamples: int = 50, key: Key[Array, ""]
) -> Stability:
    r"""Share of random halves of the data on which a path keeps each weight.

    Each subsample holds $\lfloor m/2 \rfloor$ examples, drawn without replacement.
    If weights count as found whose frequency at k is at least $\pi > 1/2$, the
    expected number V of wrong ones among them obeys

    $$\mathbb{E} V \le \frac{k^2}{(2\pi - 1)\,p}$$

    for p weights, if all wrong ones are equally likely to be kept and the fit is not
    worse than guessing.

    Args:
      fit: `fit(*data) -> Path`, as in `cross_validate`; static.
      data: tuple of arrays whose leading axis counts the examples.
      subsamples: how many halves are drawn; static.
      key: typed PRNG key.

    Returns:
      The frequencies at every k.

    Raises:
      ValueError: fewer than two examples, or `subsamples` below 1.
      TypeError: `data` is no tuple.

    Source: Meinshausen & Buehlmann (2010), theorem 1.
    """
    size = _examples(data)
    if isinstance(subsamples, bool) or not isinstance(subsamples, int):
        raise ValueError(f"`subsamples` must be an integer, got {subsamples!r}.")
    if subsamples < 1 or size < 2:
        raise ValueError(
            "stability needs at least one subsample and two examples, got "
            f"{subsamples} and {size}."
        )

    def half(key: Key[Array, ""]) -> Int[Array, "h"]:
        return jax.random.permutation(key, size)[: size // 2]

    rows = jax.vmap(half)(jax.random.split(key, subsamples))
    ks, frequencies = _frequencies(as_pytree(fit), data, rows)
    return Stability(ks, frequencies)


def summarize(ks: Int[Array, "K"], losses: Float[Array, "f K"]) -> CrossValidation:
    """Means, their errors, and the two choices that follow from held-out losses."""
    losses = jnp.where(jnp.isnan(losses), jnp.inf, losses)
    folds = losses.shape[0]
    mean = jnp.mean(losses, axis=0)
    spread = jnp.where(jnp.isfinite(mean)[None, :], losses - mean[None, :], 0)
    variance = jnp.sum(jnp.square(spread), axis=0) / (folds - 1)
    error = jnp.sqrt(variance / folds)
    best = jnp.argmin(mean)
    close = mean <= mean[best] + error[best]
    return CrossValidation(
        ks=ks,
        losses=losses,
        mean=mean,
        standard_error=error,
        best=ks[best],
        simplest=ks[jnp.argmax(close)],
    )


def over_fits(fit: Callable, batches: Params) -> Params:
    """A fit for every slice of the leading axis: a loop on CPU, a batch elsewhere."""
    return jax.lax.platform_dependent(
        batches, cpu=lambda x: jax.lax.map(fit, x), default=jax.vmap(fit)
    )


@functools.partial(jax.jit, static_argnames="held")
def _held_out(fit, loss_fn, data, rows, *, held: int):
    def one(row: Int[Array, "m"]) -> tuple[Array, Array]:
        found = fit(*_take(data, row[held:]))
        rest = _take(data, row[:held])
        losses = jax.lax.map(lambda params: loss_fn(params, *rest), found.params)
        return found.ks, losses

    ks, losses = over_fits(one, rows)
    return ks[0], losses


@jax.jit
def _frequencies(fit, data, rows):
    def one(row: Int[Array, "h"]) -> Path:
        return fit(*_take(data, row))

    found = over_fits(one, rows)
    wide = found.objective.dtype
    shares = jax.tree.map(lambda x: jnp.mean(x, axis=0, dtype=wide), found.mask)
    return found.ks[0], shares


def _take(data: tuple, rows: Int[Array, "r"]) -> tuple:
    return jax.tree.map(lambda x: x[rows], data)


def _examples(data: tuple) -> int:
    if not isinstance(data, tuple):
        raise TypeError(
            f"`data` must be a tuple, got {type(data).__name__}; write `(X, y)`."
        )
    return leading_size(data)
