"""How much may stay: counts of weights to keep, and which leaves they govern."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from sparserec import _tree
from sparserec._types import Params, Prunable


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["counts"],
    meta_fields=["groups", "sizes"],
)
@dataclasses.dataclass(frozen=True)
class Budget:
    """Numbers of weights to keep, one for every group of leaves.

    Attributes:
      counts: weights to keep in each group, int32, shape `(number of groups,)`;
        traced, so that a sweep over budgets compiles once.
      groups: for every leaf, in tree order, the index of its group, or -1 where
        the leaf is never pruned; static.
      sizes: number of prunable weights in each group; static.
    """

    counts: Int[Array, "groups"]
    groups: tuple[int, ...]
    sizes: tuple[int, ...]


def matrices(path: str, leaf: Array) -> bool:  # noqa: ARG001
    """The default choice of what may be pruned: leaves with two or more axes.

    Kernels and embeddings qualify; biases, scales and batch statistics do not.
    Where no leaf of the params qualifies (a coefficient vector), every leaf does.

    Args:
      path: readable path of the leaf, such as `"Dense_0/kernel"`.
      leaf: the array.

    Returns:
      Whether the leaf has at least two axes.
    """
    return leaf.ndim >= 2


def prunable_leaves(params: Params, prunable: Prunable = matrices) -> tuple[bool, ...]:
    """Which leaves may be pruned, one bool for every leaf in tree order.

    Args:
      params: pytree of floating arrays.
      prunable: a predicate `(path, leaf) -> bool`, or a pytree of bools with the
        structure of `params`.

    Returns:
      A tuple of bools.

    Raises:
      ValueError: for an empty pytree, a tree of bools with another structure, or
        where nothing may be pruned; lists the paths there are.
      TypeError: for leaves that are not real floating arrays; names them.
    """
    leaves, structure = jax.tree.flatten(params)
    names = _tree.paths(params)
    if not leaves:
        raise ValueError(
            "`params` holds no array. Pass the pytree of weights, e.g. "
            "`variables['params']` (linen) or `nnx.state(model, nnx.Param)`."
        )
    for name, leaf in zip(names, leaves, strict=True):
        _check_leaf(name, leaf)
    if callable(prunable):
        chosen = [bool(prunable(n, x)) for n, x in zip(names, leaves, strict=True)]
        if prunable is matrices and not any(chosen):
            chosen = [True] * len(leaves)
    else:
        flags, flag_structure = jax.tree.flatten(prunable)
        if flag_structure != structure or not all(
            isinstance(flag, bool | np.bool_) for flag in flags
        ):
            raise ValueError(
                "`prunable` must be a predicate `(path, leaf) -> bool` or a pytree "
                f"of bools with the structure of the params, {structure}; got "
                f"{prunable!r}. Leaf paths: {names}."
            )
        chosen = [bool(flag) for flag in flags]
    if not any(chosen):
        raise ValueError(
            "`prunable` selects no leaf, so there is nothing to prune. "
            f"Leaf paths: {names}."
        )
    return tuple(chosen)


def _check_leaf(name: str, leaf: Any) -> None:
    shown = f"the leaf {name!r}" if name else "the array"
    if not hasattr(leaf, "dtype") or not hasattr(leaf, "shape"):
        raise TypeError(
            f"`params` must hold arrays, but {shown} is a {type(leaf).__name__}; "
            "wrap it with `jnp.asarray(..., float)`."
        )
    if not jnp.issubdtype(leaf.dtype, jnp.floating):
        raise TypeError(
            f"`params` must hold real floating arrays, but {shown} has dtype "
            f"{leaf.dtype}. Convert it (`x.astype(float)`), or keep counters and "
            "integer state out of `params` and close over them."
        )


def make_budget(
    k: int | Array | Mapping[str, int | Array],
    params: Params,
    prunable: Prunable = matrices,
) -> Budget:
    """Turns the user's `k` into counts per group, or explains what is wrong.

    Args:
      k: number of prunable weights to keep in all; or a mapping from leaf path to
        the number to keep in that leaf. Leaves that a mapping does not name are
        kept whole. May be traced.
      params: pytree of floating arrays.
      prunable: see `prunable_leaves`.

    Returns:
      A `Budget`. A traced count beyond the group's size keeps everything, one below
      zero nothing.

    Raises:
      TypeError: `k` is a float or a bool (of any container), naming the remedy.
      ValueError: `k` is negative or larger than the number of prunable weights, or
        a path is unknown or not prunable.
    """
    chosen = prunable_leaves(params, prunable)
    sizes = [x.size for x in jax.tree.leaves(params)]
    if not isinstance(k, Mapping):
        total = sum(s for s, c in zip(sizes, chosen, strict=True) if c)
        count = check_count(k, total, "k", f"{total} prunable weights")
        return Budget(count[None], tuple(0 if c else -1 for c in chosen), (total,))
    names = _tree.paths(params)
    known = [n for n, c in zip(names, chosen, strict=True) if c]
    unknown = [path for path in k if path not in known]
    if unknown or not k:
        raise ValueError(
            f"a per-leaf budget names {unknown or 'no leaf'}; the prunable leaves "
            f"are {known}. Write e.g. `k={{{known[0]!r}: 100}}`."
        )
    groups, counts, group_sizes = [], [], []
    for name, size in zip(names, sizes, strict=True):
        groups.append(len(counts) if name in k else -1)
        if name in k:
            counts.append(check_count(k[name], size, f"k[{name!r}]", f"leaf {name!r}"))
            group_sizes.append(size)
    return Budget(jnp.stack(counts), tuple(groups), tuple(group_sizes))


def check_count(k: Any, size: int, label: str, what: str) -> Array:
    """An int32 scalar, or an exception that says what to write instead."""
    dtype = getattr(k, "dtype", None)
    is_bool = isinstance(k, bool) or (
        dtype is not None and jnp.issubdtype(dtype, jnp.bool_)
    )
    if is_bool:
        raise TypeError(
            f"`{label}` is the number of weights to keep and must be an integer, "
            f"got the bool {k!r}."
        )
    if dtype is None:
        integral = isinstance(k, int)
    else:
        integral = jnp.issubdtype(dtype, jnp.integer)
    if not integral:
        raise TypeError(
            f"`{label}` is the number of weights to keep and must be an integer, "
            f"got {k!r}. For a fraction write "
            "`k=sparserec.keep(params, density=...)`."
        )
    if np.ndim(k) != 0:
        raise TypeError(
            f"`{label}` must be one integer, got shape {np.shape(k)}. For several "
            "budgets use `jax.vmap(lambda k: solver(..., k))(ks)`."
        )
    limit = min(size, jnp.iinfo(jnp.int32).max)
    if not isinstance(k, Tracer):
        if not 0 <= int(k) <= size:
            raise ValueError(
                f"`{label}` must lie in [0, {size}] ({what}), got {int(k)}."
            )
        return jnp.asarray(min(int(k), limit), jnp.int32)
    # A traced count cannot be refused; outside the range it means nothing or all.
    return jnp.clip(jnp.asarray(k, jnp.int32), 0, limit)


def keep(
    params: Params,
    *,
    density: float,
    prunable: Prunable = matrices,
    per_leaf: bool = False,
) -> int | dict[str, int]:
    r"""Number of weights that a density stands for: $\lfloor d\,n + \frac12 \rfloor$.

    Args:
      params: pytree of floating arrays; only shapes are looked at.
      density: fraction of the prunable weights to keep, in [0, 1].
      prunable: which leaves may be pruned; see `sparserec.matrices`.
      per_leaf: if true, a mapping from the path of every prunable leaf to its own
        count, so that every leaf has the same density.

    Returns:
      A Python int, or a dict of them: what solvers take as `k`.

    Raises:
      ValueError: density outside [0, 1], or nothing to prune.
      TypeError: leaves that are not floating arrays.
    """
    if isinstance(density, bool) or not 0 <= density <= 1:
        raise ValueError(
            f"`density` is the fraction of weights to keep, in [0, 1]; got {density!r}."
        )
    chosen = prunable_leaves(params, prunable)
    sizes = {
        name: leaf.size
        for name, leaf, c in zip(
            _tree.paths(params), jax.tree.leaves(params), chosen, strict=True
        )
        if c
    }
    if per_leaf:
        return {name: int(density * size + 0.5) for name, size in sizes.items()}
    return int(density * sum(sizes.values()) + 0.5)
