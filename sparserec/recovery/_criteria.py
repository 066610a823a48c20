"""The choice of k from the data that were fitted."""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparserec._types import Scalar
from sparserec.recovery._record import Path

Kind = Literal["aic", "bic", "ebic", "gic"]
Likelihood = Literal["gaussian", "sum", "mean"]
KINDS = ("aic", "bic", "ebic", "gic")
LIKELIHOODS = ("gaussian", "sum", "mean")


class Criterion(NamedTuple):
    """A criterion along a path, and the k that it prefers.

    Attributes:
      values: the criterion at each k, smaller is better, shape `(K,)`; infinite
        where the path is not finite.
      k: budget with the smallest value, the smaller of two equal ones, int32, `()`.
      index: its place on the path, int32, shape `()`.
    """

    values: Float[Array, "K"]
    k: Int[Array, ""]
    index: Int[Array, ""]


def information_criterion(
    path: Path,
    examples: Scalar | float,
    kind: Kind = "ebic",
    *,
    likelihood: Likelihood = "gaussian",
    variance: Scalar | float | None = None,
    gamma: float = 1.0,
    width: Scalar | float = 1.0,
) -> Criterion:
    r"""Deviance plus a price for every weight kept.

    With m examples, p weights to choose from and s weights kept,

    - `"aic"`: $2 s$,
    - `"bic"`: $s \log m$,
    - `"ebic"`: $s \log m + 2\gamma \log\binom{p}{s}$,
    - `"gic"`: $s \log p \, \log\log m$

    is added to the deviance: $m \log(2f/m)$ for least squares
    $f = \frac12\|y - Xw\|^2$ with unknown variance of the noise, $2f/\sigma^2$ with
    known variance, and $2f$ or $2mf$ where f is a negative log-likelihood, summed or
    averaged over the examples. Weights that are never pruned cost the same at every k
    and are left out.

    Args:
      path: from `path`; its objective must be the loss alone (`l2` small or zero).
      examples: m, the number of examples, or the sum of their weights.
      kind: which criterion. AIC is for prediction; BIC for the true support where p
        is fixed; EBIC and GIC where there are many weights to choose from.
      likelihood: what the objective is: `"gaussian"` for half a sum of squares,
        `"sum"` or `"mean"` for a negative log-likelihood.
      variance: $\sigma^2$ of the noise, known; `None` estimates it anew at each k.
        Only for `"gaussian"`.
      gamma: of EBIC, in `[0, 1]`; 0 makes it BIC.
      width: weights in every group where the path counts groups, such as the number of
        responses that share their features; each of them is paid for, while EBIC and
        GIC count the groups to choose from. For several responses m counts their
        entries.

    Returns:
      A `Criterion`. A residual of zero counts as rounding, relative to the largest
      objective on the path, so that further weights on a perfect fit do not pay.

    Raises:
      ValueError: an unknown kind or likelihood, or a variance where it has no meaning.

    Source: Akaike (1974); Schwarz (1978); Chen & Chen (2008) for EBIC; Fan & Tang
    (2013) and Zhu et al. (2020) for GIC.
    """
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {list(KINDS)}, got {kind!r}.")
    if likelihood not in LIKELIHOODS:
        raise ValueError(
            f"`likelihood` must be one of {list(LIKELIHOODS)}, got {likelihood!r}."
        )
    if variance is not None and likelihood != "gaussian":
        raise ValueError(
            "`variance` is that of Gaussian noise; leave it out with "
            f"`likelihood={likelihood!r}`."
        )
    wide = path.objective.dtype
    rows = jnp.asarray(examples, wide)
    kept = path.kept.astype(wide)
    if likelihood == "gaussian":
        deviance = _gaussian(path.objective, rows, variance)
    else:
        deviance = 2 * path.objective * (rows if likelihood == "mean" else 1)
    each = jnp.asarray(width, wide)
    choices = _choices(path).astype(wide) / each
    values = deviance + _price(kind, kept, rows, choices, gamma, each)
    values = jnp.where(jnp.isfinite(path.objective), values, jnp.inf)
    index = jnp.argmin(values).astype(jnp.int32)
    return Criterion(values, path.ks[index], index)


def _gaussian(
    objective: Float[Array, "K"], rows: Scalar, variance: Scalar | float | None
) -> Float[Array, "K"]:
    if variance is not None:
        return 2 * objective / jnp.asarray(variance, objective.dtype)
    # A path in single precision knows its objective to a few units of rounding.
    floor = 64 * jnp.finfo(objective.dtype).eps * jnp.max(objective)
    tiny = jnp.finfo(objective.dtype).tiny
    return rows * jnp.log(2 * jnp.maximum(objective, jnp.maximum(floor, tiny)) / rows)


def _price(
    kind: Kind,
    kept: Float[Array, "K"],
    rows: Scalar,
    choices: Scalar,
    gamma: float,
    each: Scalar,
) -> Float[Array, "K"]:
    if kind == "aic":
        return 2 * each * kept
    if kind == "gic":
        # Below e examples the second logarithm is negative.
        inner = jnp.log(jnp.maximum(rows, jnp.e))
        return each * kept * jnp.log(choices) * jnp.log(inner)
    if kind == "bic":
        return each * kept * jnp.log(rows)
    lgamma = jax.lax.lgamma
    ways = lgamma(choices + 1) - lgamma(kept + 1) - lgamma(choices - kept + 1)
    return each * kept * jnp.log(rows) + 2 * jnp.asarray(gamma, kept.dtype) * ways


def _choices(path: Path) -> Int[Array, ""]:
    """How many weights could be chosen: those of leaves not kept whole at k = 1."""
    count = jnp.int32(0)
    for mask in jax.tree.leaves(path.mask):
        count += jnp.where(jnp.all(mask[0]), 0, mask[0].size)
    return jnp.maximum(count, 1).astype(jnp.int32)
