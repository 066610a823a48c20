"""From scores to supports: the only place that decides which weights are kept.

Every function takes a pytree of scores and returns a mask of the same structure
and shapes, `True` where an entry is kept. "Large" always means large in magnitude,
NaN counts as zero, infinities are the largest, and ties go to the lowest flat index
(leaves in the order of `jax.tree.leaves`, entries in row-major order).

Legend: g groups of leaves that share a budget.
"""

import functools
import math
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, PyTree

from sparserec import _tree
from sparserec._top_k import INFINITY, Leaves, count_dtype, magnitude_codes, support_of
from sparserec._within_cost import within_cost

__all__ = ["apply_mask", "blocks", "n_m", "support", "top_k", "within_cost"]

# Any: a float or a bool must reach our own message, not that of a type checker.
_Count: TypeAlias = Any


def top_k(scores: PyTree, k: _Count) -> PyTree:
    r"""Keep the k entries of largest magnitude over a whole pytree.

    $$\text{mask}_i = 1 \iff \#\{j : |s_j| > |s_i|\}
      + \#\{j < i : |s_j| = |s_i|\} < k$$

    Args:
      scores: pytree of float16, bfloat16, float32 or float64 arrays of any shapes;
        leaves of different dtypes are compared in one that holds them all.
      k: number of entries to keep, an integer or an integer scalar; may be traced
        or batched, a new value does not compile again.

    Returns:
      Mask with the structure and shapes of `scores`; exactly `k` entries are `True`.
      All `False` for a traced `k <= 0`, all `True` for `k` at or above the number of
      entries. Ties go to the lowest flat index, NaN counts as zero. Each leaf of the
      mask has the sharding of its scores (meshes with Auto axes).

    Raises:
      TypeError: `k` is not an integer, or a leaf is not one of the dtypes above.
      ValueError: `scores` has no leaf, or `k` is negative or not a scalar.
    """
    leaves, structure = _flatten(scores)
    count = _check_count(k, sum(leaf.size for leaf in leaves))
    masks = support_of(leaves, count, (0,) * len(leaves))
    return jax.tree.unflatten(structure, masks)


def support(scores: PyTree, counts: Int[Array, "g"], groups: tuple[int, ...]) -> PyTree:
    """Keep the largest magnitudes of every group of leaves: `top_k` per group.

    All groups are searched together, so many groups take no more passes than one.

    Args:
      scores: pytree of floating arrays, as for `top_k`.
      counts: entries to keep in each group, integers, shape `(g,)`; may be traced.
      groups: for every leaf, in tree order, the index of its group in `counts`, or
        -1 where the leaf is kept whole; static.

    Returns:
      Mask with the structure and shapes of `scores`, in every group as `top_k` gives
      it: exactly `counts[i]` entries, ties to the lowest flat index in the group.

    Raises:
      TypeError: `counts` are not integers, or a leaf has no supported dtype.
      ValueError: `scores` has no leaf, or `groups` does not fit the leaves or
        `counts`.
    """
    leaves, structure = _flatten(scores)
    counts = jnp.asarray(counts)
    if not jnp.issubdtype(counts.dtype, jnp.integer):
        raise TypeError(f"`counts` must be integers, got dtype {counts.dtype}.")
    if len(groups) != len(leaves):
        raise ValueError(
            f"`groups` must name one group for each of the {len(leaves)} leaves, "
            f"got {len(groups)} entries."
        )
    if counts.ndim != 1 or not all(-1 <= g < counts.size for g in groups):
        raise ValueError(
            "`counts` must have shape (number of groups,) and `groups` point into it "
            f"(or be -1), got shape {counts.shape} and groups {groups}."
        )
    return jax.tree.unflatten(structure, support_of(leaves, counts, tuple(groups)))


def n_m(scores: PyTree, n: int, m: int, axis: int = -1) -> PyTree:
    """Keep the n largest magnitudes of every m consecutive entries along an axis.

    Args:
      scores: pytree of floating arrays, as for `top_k`; the length of each leaf
        along `axis` must be a multiple of `m`.
      n: entries kept in each run, `0 <= n <= m`; static.
      m: length of a run, at least 1; static.
      axis: axis along which the runs lie: for a kernel of shape `(inputs, outputs)`,
        hardware for 2:4 sparsity wants the inputs, axis 0.

    Returns:
      Mask with the structure and shapes of `scores`; exactly `n` of every `m`
      consecutive entries are `True`, ties to the lowest index, NaN counts as zero.

    Raises:
      TypeError: `n` or `m` is not an int, or a leaf has no supported dtype.
      ValueError: `scores` has no leaf, `n` or `m` is out of range, or a leaf has no
        such axis or one whose length is not a multiple of `m`; names the leaf.
    """
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in (n, m, axis)):
        raise TypeError(
            f"`n`, `m` and `axis` must be ints, got {n!r}, {m!r}, {axis!r}."
        )
    if not (m >= 1 and 0 <= n <= m):
        raise ValueError(f"n:m needs 0 <= n <= m and m >= 1, got n={n}, m={m}.")
    leaves, structure = _flatten(scores)
    for index, leaf in enumerate(leaves):
        if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] % m:
            raise ValueError(
                f"{_name(scores, index)} has shape {leaf.shape}; axis {axis} must "
                f"exist and its length be a multiple of m={m}. Choose another `axis` "
                "or `m`, or leave this leaf out of `scores`."
            )
    return jax.tree.unflatten(structure, _n_m(leaves, n, m, axis))


def blocks(scores: PyTree, k: _Count, shape: tuple[int, ...]) -> PyTree:
    r"""Keep whole blocks: those with the largest sums of magnitudes over the pytree.

    With $b$ entries in a block, $\lfloor k / b \rfloor$ blocks are kept, so at most
    `k` entries.

    Args:
      scores: pytree of floating arrays, as for `top_k`.
      k: number of entries (not blocks) to keep; may be traced or batched.
      shape: extent of a block over the last `len(shape)` axes; each must divide the
        axis it lies on; static. Leading axes are not grouped.

    Returns:
      Mask with the structure and shapes of `scores`, constant on every block. Sums
      are taken in float32 at least; a NaN adds nothing to its block. Ties go to the
      block that comes first, leaf by leaf, row-major.

    Raises:
      TypeError: `k` is not an integer, or a leaf has no supported dtype.
      ValueError: `scores` has no leaf, `k` is negative, or `shape` does not tile a
        leaf; names the leaf.
    """
    leaves, structure = _flatten(scores)
    count = _check_count(k, sum(leaf.size for leaf in leaves))
    shape = tuple(shape)
    if not shape or not all(isinstance(b, int) and b >= 1 for b in shape):
        raise ValueError(f"`shape` must hold positive ints, got {shape}.")
    for index, leaf in enumerate(leaves):
        axes = leaf.shape[leaf.ndim - len(shape) :]
        if leaf.ndim < len(shape) or any(map(int.__mod__, axes, shape)):
            raise ValueError(
                f"{_name(scores, index)} has shape {leaf.shape}, which blocks of "
                f"shape {shape} do not tile. Choose a block that divides the last "
                f"{len(shape)} axes, or leave this leaf out of `scores`."
            )
    return jax.tree.unflatten(structure, _blocks(leaves, count, shape))


def apply_mask(params: PyTree, mask: PyTree) -> PyTree:
    """Params where the mask is `True`, exact zeros elsewhere.

    Args:
      params: pytree of arrays.
      mask: booleans with the structure and shapes of `params`.

    Returns:
      Pytree like `params`, dtypes unchanged. Where the mask is `False` the entry is
      positive zero, whatever it was before (NaN, infinite, negative zero).

    Raises:
      ValueError: structure or shapes differ.
      TypeError: the mask is not boolean.
    """
    leaves, structure = jax.tree.flatten(params)
    flags, flag_structure = jax.tree.flatten(mask)
    if structure != flag_structure:
        raise ValueError(
            "`mask` must have the structure of `params`, got\n"
            f"  mask:   {flag_structure}\n  params: {structure}"
        )
    for index, (leaf, flag) in enumerate(zip(leaves, flags, strict=True)):
        if jnp.shape(leaf) != jnp.shape(flag):
            raise ValueError(
                f"{_name(params, index)} has shape {jnp.shape(leaf)}, "
                f"its mask {jnp.shape(flag)}; they must agree."
            )
        if _dtype(flag) != jnp.bool_:
            raise TypeError(
                f"the mask of {_name(params, index)} must be boolean, got dtype "
                f"{_dtype(flag)}; compare first, e.g. `mask != 0`."
            )
    return _apply_mask(params, mask)


# --- what the user gave --------------------------------------------------------------


def _name(tree: PyTree, index: int) -> str:
    """The leaf at `index` in words."""
    path = _tree.paths(tree)[index]
    return f"leaf {path!r}" if path else "the array"


def _dtype(x: Any) -> Any:
    """Dtype of an array or of what would become one."""
    return x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype


def _flatten(scores: PyTree) -> tuple[Leaves, Any]:
    """Leaves and structure of the scores, or an error that names the wrong leaf."""
    leaves, structure = jax.tree.flatten(scores)
    if not leaves:
        raise ValueError(
            "`scores` holds no array. Pass a pytree with at least one floating array, "
            "shaped like the params."
        )
    for index, leaf in enumerate(leaves):
        dtype = _dtype(leaf)
        if dtype not in INFINITY:
            raise TypeError(
                f"{_name(scores, index)} has dtype {dtype}; scores must be float16, "
                "bfloat16, float32 or float64. Take the magnitude of complex "
                "scores, cast others with `.astype(jnp.float32)`, or leave the leaf "
                "out."
            )
    return tuple(jnp.asarray(leaf) for leaf in leaves), structure


def _check_count(k: _Count, size: int) -> Array | np.integer:
    """`k` as an integer scalar, or what is wrong with it."""
    dtype = _dtype(k)
    if not jnp.issubdtype(dtype, jnp.integer):
        what = f"dtype {dtype}" if isinstance(k, jax.Array) else repr(k)
        raise TypeError(
            f"`k` is the number of entries to keep, an integer, got {what}. "
            "For a fraction use `k=sparserec.keep(params, density=...)`."
        )
    if np.ndim(k) != 0:
        raise ValueError(
            f"`k` must be a scalar, got shape {np.shape(k)}; use `jax.vmap` for many."
        )
    if isinstance(k, jax.Array):
        return k
    if k < 0:
        raise ValueError(f"`k` must be at least 0, got {k}.")
    # A NumPy scalar of one dtype, so that no Python int becomes a second cache entry.
    return count_dtype(size).type(min(int(k), size))


# --- runs, blocks, masks -------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("n", "m", "axis"))
def _n_m(leaves: Leaves, n: int, m: int, axis: int) -> Leaves:
    """Masks for `n_m`: an entry is kept where fewer than n of its run come before."""
    masks = []
    for leaf in lax.stop_gradient(leaves):
        at = axis % leaf.ndim
        runs = (*leaf.shape[:at], leaf.shape[at] // m, m, *leaf.shape[at + 1 :])
        codes = magnitude_codes(leaf, leaf.dtype).reshape(runs)
        index = lax.broadcasted_iota(jnp.int32, runs, at + 1)
        rank = jnp.zeros(runs, jnp.int32)
        for j in range(m):
            other = lax.slice_in_dim(codes, j, j + 1, axis=at + 1)
            before = (other > codes) | ((other == codes) & (index > j))
            rank = rank + before.astype(jnp.int32)
        masks.append((rank < n).reshape(leaf.shape))
    return tuple(masks)


def _tiles(shape: tuple[int, ...], block: tuple[int, ...]) -> tuple[int, ...]:
    """Shape with every tiled axis split into (number of blocks, extent of a block)."""
    lead = len(shape) - len(block)
    pairs = ((d // b, b) for d, b in zip(shape[lead:], block, strict=True))
    return (*shape[:lead], *(extent for pair in pairs for extent in pair))


@functools.partial(jax.jit, static_argnames=("block",))
def _blocks(leaves: Leaves, k: Array | np.integer, block: tuple[int, ...]) -> Leaves:
    """Masks for `blocks`."""
    sums, extents = [], []
    for leaf in lax.stop_gradient(leaves):
        split = _tiles(leaf.shape, block)
        inner = tuple(range(len(split) - 2 * len(block) + 1, len(split), 2))
        wide = leaf if leaf.dtype.itemsize >= 4 else leaf.astype(jnp.float32)
        magnitudes = jnp.where(jnp.isnan(wide), 0, jnp.abs(wide)).reshape(split)
        sums.append(jnp.sum(magnitudes, axis=inner, keepdims=True))
        extents.append(split)
    kept = support_of(tuple(sums), k // math.prod(block), (0,) * len(sums))
    return tuple(
        jnp.broadcast_to(mask, split).reshape(leaf.shape)
        for leaf, mask, split in zip(leaves, kept, extents, strict=True)
    )


@jax.jit
def _apply_mask(params: PyTree, mask: PyTree) -> PyTree:
    return jax.tree.map(
        lambda flag, leaf: jnp.where(flag, leaf, jnp.zeros((), leaf.dtype)),
        mask,
        jax.tree.map(jnp.asarray, params),
    )
