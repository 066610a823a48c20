"""What is looked at before gradient rows are computed, and after."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array

from sparserec._types import LossFn, Params
from sparserec.quadratic import _chunked
from sparserec.quadratic._matrix_free import as_pytree

_KINDS = ("empirical", "sampled", "gauss_newton")
_TRIED = 32  # examples on which the form of the loss is checked
_TOLERANCE = 1e-3  # of that check: far above rounding, far below a real difference


def check_count(name: str, value: object) -> None:
    good = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if value is not None and not (good and value >= 1):  # type: ignore[operator]
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def check_options(kind, batch_size, predict_fn, output_loss_fn, implicit, blocks):
    if kind not in _KINDS:
        raise ValueError(f"`kind` must be one of {_KINDS}, got {kind!r}.")
    if kind != "empirical" and (predict_fn is None or output_loss_fn is None):
        raise ValueError(
            f"`kind={kind!r}` needs the outputs of the network: pass `predict_fn` and "
            "`output_loss_fn`, as for `gauss_newton`."
        )
    if kind == "gauss_newton" and (batch_size != 1 or implicit):
        raise ValueError(
            "`kind='gauss_newton'` has rows of single examples, written out: leave "
            "`batch_size` and `implicit` out, or use `kind='sampled'`."
        )
    if implicit and blocks is not None:
        raise ValueError(
            "`blocks` cut rows that are written out: give either `blocks` or "
            "`implicit`."
        )


def check_coupled(coupled: bool, batch_size: int, implicit: bool) -> None:
    if coupled and (batch_size == 1 or implicit):
        raise ValueError(
            "`coupled=True` has rows of mini-batches, written out: pass `batch_size` "
            "of at least 2, and leave `implicit` out."
        )


def hashable_key(key: Array) -> tuple[str, tuple]:
    """A PRNG key as words, so that builders can be static arguments."""
    if not isinstance(key, jax.Array) or isinstance(key, Tracer):
        raise TypeError(
            "`key` must be a concrete PRNG key such as `jax.random.key(0)`, got "
            f"{type(key).__name__}."
        )
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape:
        raise TypeError(f"`key` must be one PRNG key, got shape {key.shape}.")
    words = np.asarray(jax.random.key_data(key)).tolist()
    return str(jax.random.key_impl(key)), tuple(words)


def restored_key(key: tuple[str, tuple] | None) -> Array | None:
    if key is None:
        return None
    implementation, words = key
    return jax.random.wrap_key_data(jnp.asarray(words, jnp.uint32), impl=implementation)


def is_traced(tree: Any) -> bool:
    return any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(tree))


def outputs_per_example(predict_fn: Callable | None, params: Params, args: tuple):
    """Outputs of one example, from shapes alone."""
    if len(args) < 2:
        raise ValueError(
            f"exact Gauss-Newton rows need `args=(*inputs, targets)`, got {len(args)} "
            "argument(s)."
        )
    assert predict_fn is not None
    one = jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), args)
    out = jax.eval_shape(predict_fn, params, *one[:-1])
    if not hasattr(out, "shape"):
        raise ValueError("exact Gauss-Newton rows need a network with one output array")
    return math.prod(out.shape)


def number_of_units(rows: int | None, batch: int, per_unit: int, total: int) -> int:
    if rows is None:
        rows = total // batch * per_unit
    units, rest = divmod(rows, per_unit)
    if rest:
        raise ValueError(
            f"an example gives {per_unit} exact Gauss-Newton rows, one for each output;"
            f" `rows` must be a multiple of that, got {rows}."
        )
    needed = max(units, 1) * batch
    if needed > total:
        most = total // batch * per_unit
        raise ValueError(
            f"{max(rows, 1)} rows of {batch} example(s) each need {needed} examples, "
            f"but `args` holds {total}. Pass more data, or ask for `rows={most}`."
        )
    return units


@jax.jit
def _both_means(loss_fn, params, args):
    """The loss of all, the mean over single examples, and that of magnitudes."""
    singles = jax.vmap(
        lambda one: loss_fn(params, *jax.tree.map(lambda x: x[None], one))
    )(args)
    return loss_fn(params, *args), jnp.mean(singles), jnp.mean(jnp.abs(singles))


def check_mean(loss_fn: LossFn, params: Params, args: tuple) -> None:
    """Raises unless the loss of some examples is the mean of their single losses."""
    total = _chunked.leading_size(args)
    # Evenly spaced, at least two: the loss of one example says nothing.
    chosen = np.arange(min(total, _TRIED)) * total // min(total, _TRIED)
    some = jax.tree.map(lambda x: jnp.asarray(x)[chosen], args)
    cause = (
        "Rows need a loss that is the mean over the leading axis of every array in "
        "`args`. It may be a sum (divide by the number of examples), a mean over "
        "another axis than the first, a weighted mean, or a network whose batch "
        "statistics are in training mode (call it with the running ones, for example "
        "`use_running_average=True` or `model.eval()`, or, if that is meant, pass "
        "`coupled=True`)."
    )
    try:
        together, apart, size = _both_means(as_pytree(loss_fn), params, some)
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(
            f"the loss cannot be evaluated on single examples: {cause}"
        ) from error
    together, apart, size = float(together), float(apart), float(size)
    if not math.isfinite(together) or not math.isfinite(apart):
        raise ValueError(
            f"the loss of {len(chosen)} examples is {together}, the mean of their "
            f"single losses is {apart}. Look for NaN or infinity in `params` and "
            "`args`."
        )
    if abs(together - apart) > _TOLERANCE * max(abs(together), size):
        raise ValueError(
            f"the loss of {len(chosen)} examples is {together:.6g}, but the mean of "
            f"their single losses is {apart:.6g}. {cause}"
        )


def check_finite(rows: Any, count: int) -> None:
    finite = [bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(rows)]
    if not all(finite):
        raise ValueError(
            f"some of the {count} gradient rows hold NaN or infinity. Look for "
            "examples with a loss that has no derivative or overflows: "
            "`jax.vmap(jax.grad(loss_fn), (None, 0))` over slices of one."
        )
