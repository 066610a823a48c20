"""Batch statistics after pruning, re-estimated without gradients."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from sparserec import _tree

_STATS = "batch_stats"
_DIGITS = 6  # of a momentum; what float32 leaves of it beyond those is rounding


def recalibrate(
    apply_fn: Callable[[Any, Any], Any], variables: Any, batches: Iterable[Any]
) -> Any:
    r"""Re-estimates the running statistics of batch normalisation, layer by layer.

    Pruning changes what every layer sends to the next, but not the means and
    variances by which that is normalised; re-estimating them costs a few forward
    passes and often restores most of the accuracy lost. Every statistic becomes

    $$\bar s = \frac1T \sum_{t=1}^T s(\text{batch}_t),$$

    the mean over the batches, whatever the momentum of the layers: a running
    average $s \leftarrow \mu s + (1-\mu)\,s(\text{batch})$ is run from zero, and from
    one other value on the first batch, which gives $\mu$.

    With linen,

    ```python
    def apply_fn(variables, x):
        return network.apply(variables, x, train=True, mutable=["batch_stats"])

    variables = sparserec.training.recalibrate(apply_fn, variables, batches)
    ```

    and with nnx, where a module takes the place of the variables,

    ```python
    model = sparserec.training.recalibrate(lambda model, x: model(x), model, batches)
    ```

    Args:
      apply_fn: for linen, `apply_fn(variables, batch) -> (outputs, updates)` in
        training mode, where `updates["batch_stats"]` are the statistics after the
        batch. For nnx, `apply_fn(model, batch)`, which calls the model; its result
        is ignored. Pass the same function object again and nothing recompiles.
      variables: a mapping with a `"batch_stats"` collection, a pytree of floating
        arrays, beside `"params"`; or an `nnx.Module`, whose normalisations are put
        in training mode for this purpose (dropout is not).
      batches: inputs, one element per batch, each handed to `apply_fn` as it is:
        any iterable that ends. Use the preprocessing of training, augmentation
        included.

    Returns:
      The variables, or a module, with new statistics and everything else as it was;
      the input is not changed. Variances are means of the variances within batches,
      as in training.

    Raises:
      ValueError: no batches; no batch statistics; statistics that did not change,
        or that are no running averages; NaN or infinity among the new ones.
      TypeError: `apply_fn` did not return a pair with updates.
    """
    if not isinstance(variables, Mapping):
        return _recalibrate_module(apply_fn, variables, batches)
    if not jax.tree.leaves(variables.get(_STATS)):
        raise ValueError(
            f"`variables` has no statistics under {_STATS!r}, only "
            f"{sorted(map(str, variables))}: there is nothing to recalibrate."
        )
    rest = {name: value for name, value in variables.items() if name != _STATS}
    stats = _mean_over_batches(
        Partial(_updated_collection, Partial(apply_fn), rest),
        variables[_STATS],
        batches,
    )
    # Of the type it came in: linen's variables may be a `FrozenDict`.
    return type(variables)({**variables, _STATS: stats})  # type: ignore[call-arg]


def _updated_collection(apply_fn, rest, stats, batch):
    result = apply_fn({**rest, _STATS: stats}, batch)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(
            "`apply_fn(variables, batch)` must return `(outputs, updates)`; call the "
            f"model with `mutable=[{_STATS!r}]` and in training mode."
        )
    updates = result[1]
    if not isinstance(updates, Mapping) or _STATS not in updates:
        raise TypeError(
            f"the updates returned by `apply_fn` have no {_STATS!r}; call the model "
            f"with `mutable=[{_STATS!r}]`."
        )
    return updates[_STATS]


def _recalibrate_module(apply_fn: Callable, module: Any, batches: Iterable) -> Any:
    # Only this needs flax, and only whoever has an nnx module gets here.
    from flax import nnx

    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"`variables` must be a mapping with {_STATS!r} or an `nnx.Module`, got "
            f"{type(module).__name__}."
        )
    structure, stats, rest = nnx.split(module, nnx.BatchStat, ...)
    if not jax.tree.leaves(stats):
        raise ValueError("the module has no `nnx.BatchStat`: nothing to recalibrate.")
    step = Partial(
        functools.partial(_updated_module, structure), Partial(apply_fn), rest
    )
    # Merged with the structure as it was: in training or evaluation mode.
    return nnx.merge(structure, _mean_over_batches(step, stats, batches), rest)


def _updated_module(structure, apply_fn, rest, stats, batch):
    from flax import nnx

    module = nnx.merge(structure, stats, rest)
    module.set_attributes(use_running_average=False, raise_if_not_found=False)
    apply_fn(module, batch)
    return nnx.state(module, nnx.BatchStat)


@jax.jit
def _updated(step: Partial, stats: Any, batch: Any) -> Any:
    return step(stats, batch)


@jax.jit
def _accumulated(total: Any, updated: Any, weights: list) -> Any:
    """Adds the statistics of one batch; they are the update from zero, scaled."""
    leaves, structure = jax.tree.flatten(total)
    sums = [
        t + new.astype(t.dtype) / weight
        for t, new, weight in zip(
            leaves, jax.tree.leaves(updated), weights, strict=True
        )
    ]
    return jax.tree.unflatten(structure, sums)


def _mean_over_batches(step: Partial, stats: Any, batches: Iterable) -> Any:
    """The mean of the statistics of every batch, by a loop over one compiled step."""
    for leaf in jax.tree.leaves(stats):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise ValueError(f"statistics must be floating arrays, got {leaf.dtype}.")
    start, total = _tree.zeros_like(stats), _tree.zeros_like(stats)
    weights, count = [], 0
    for batch in batches:
        # From zero the update is the new term alone: no digits cancel.
        updated = _updated(step, start, batch)
        if not count:
            weights = _weights(step, stats, start, updated, batch)
        total = _accumulated(total, updated, weights)
        count += 1
    if not count:
        raise ValueError("`batches` is empty: pass at least one batch of inputs.")
    mean = _tree.scale(1 / count, total)
    if not bool(_tree.all_finite(mean)):
        raise ValueError(
            "the new statistics hold NaN or infinity. Look for NaN in the params and "
            "in `batches`."
        )
    return mean


def _weights(step: Partial, stats: Any, zero: Any, from_zero: Any, batch: Any) -> list:
    """The weight of the new value in every running average, from a second start."""
    sizes = [float(jnp.max(jnp.abs(x))) for x in jax.tree.leaves(from_zero)]
    leaves, structure = jax.tree.flatten(zero)
    # As large as the update itself, so that neither drowns the other.
    probes = [
        jnp.full_like(x, 2.0 ** np.ceil(np.log2(size)) if 0 < size < np.inf else 1.0)
        for x, size in zip(leaves, sizes, strict=True)
    ]
    updated = _updated(step, jax.tree.unflatten(structure, probes), batch)
    shares = [
        np.asarray((new - base) / probe, np.float64)
        for new, base, probe in zip(
            jax.tree.leaves(updated), jax.tree.leaves(from_zero), probes, strict=True
        )
    ]
    named = zip(
        _tree.paths(stats), shares, jax.tree.leaves(from_zero), leaves, strict=True
    )
    return [
        # Complemented here, where it is exact: float32 would leave 1 - 0.999 four
        # digits.
        jnp.asarray(1 - _momentum(path, share, base, leaf.dtype), leaf.dtype)
        for path, share, base, leaf in named
    ]


def _momentum(path: str, share: np.ndarray, base: jax.Array, dtype: Any) -> float:
    """The one weight of the old value in a leaf; explains what is none."""
    if not np.isfinite(share).all():
        return 0.0  # NaN in the statistics themselves, reported at the end
    momentum, noise = round(float(np.median(share)), _DIGITS), 64 * jnp.finfo(dtype).eps
    if momentum >= 1 - noise and not bool(jnp.any(base)):
        raise ValueError(
            f"the statistics {path!r} did not change: call the model in training mode, "
            "for example with `train=True` or `use_running_average=False`."
        )
    if not 0 <= momentum < 1 - noise or np.any(np.abs(share - momentum) > noise):
        raise ValueError(
            f"the statistics {path!r} are no running average of the batches, which is "
            "all that can be recalibrated."
        )
    return momentum
