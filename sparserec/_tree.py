"""Pytree algebra: the few operations on which the solvers are written."""

import functools
import itertools
import math
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Shaped

from sparserec._types import PRECISION, Mask, Params, Scalar


def add(a: Params, b: Params) -> Params:
    """Leafwise `a + b`."""
    return jax.tree.map(operator.add, a, b)


def sub(a: Params, b: Params) -> Params:
    """Leafwise `a - b`."""
    return jax.tree.map(operator.sub, a, b)


def scale(factor: Scalar | float, a: Params) -> Params:
    """Leafwise `factor * a` in the dtype of `a`."""
    return jax.tree.map(lambda x: jnp.asarray(factor, x.dtype) * x, a)


def add_scaled(a: Params, factor: Scalar | float, b: Params) -> Params:
    """Leafwise `a + factor * b` in the dtype of `a`."""
    return jax.tree.map(lambda x, y: x + jnp.asarray(factor, x.dtype) * y, a, b)


def where(condition: Mask | Scalar, a: Params, b: Params) -> Params:
    """Leafwise `where(condition, a, b)`; the condition is a mask or one boolean."""
    if isinstance(condition, jax.Array) and condition.ndim == 0:
        return jax.tree.map(lambda x, y: jnp.where(condition, x, y), a, b)
    return jax.tree.map(jnp.where, condition, a, b)


def keep(mask: Mask, a: Params) -> Params:
    """`a` where the mask is `True`, exact zeros elsewhere."""
    return jax.tree.map(lambda m, x: jnp.where(m, x, jnp.zeros((), x.dtype)), mask, a)


def dtype(a: Params) -> jnp.dtype:
    """Widest dtype among the leaves."""
    # Not `jnp.result_type`: it refuses mixed leaves under strict promotion.
    return max((x.dtype for x in jax.tree.leaves(a)), key=lambda d: d.itemsize)


def dot(a: Params, b: Params) -> Scalar:
    """Inner product over all leaves, in the widest dtype among them."""
    wide = dtype(a)
    terms = jax.tree.map(
        lambda x, y: jnp.vdot(x, y, precision=PRECISION).astype(wide), a, b
    )
    return functools.reduce(operator.add, jax.tree.leaves(terms))


def norm(a: Params) -> Scalar:
    """Euclidean norm over all leaves."""
    return jnp.sqrt(dot(a, a))


def size(a: Params) -> int:
    """Number of entries over all leaves."""
    return sum(x.size for x in jax.tree.leaves(a))


def count(mask: Mask) -> Array:
    """Number of `True` entries over all leaves, int32."""
    counts = [jnp.sum(x, dtype=jnp.int32) for x in jax.tree.leaves(mask)]
    return functools.reduce(operator.add, counts)


def all_finite(a: Params) -> Bool[Array, ""]:
    """Whether every entry of every leaf is finite."""
    flags = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(a)]
    return functools.reduce(operator.and_, flags)


def zeros_like(a: Params) -> Params:
    """Zeros of the shapes and dtypes of `a`."""
    return jax.tree.map(jnp.zeros_like, a)


def ones_mask(a: Params) -> Mask:
    """A mask that keeps everything."""
    return jax.tree.map(lambda x: jnp.ones(x.shape, bool), a)


class Layout(NamedTuple):
    """Where the entries of a flat vector belong in a pytree; hashable, static.

    Attributes:
      structure: tree structure.
      shapes: shape of every leaf, in tree order.
    """

    structure: Any  # a PyTreeDef
    shapes: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Number of entries in all."""
        return sum(math.prod(shape) for shape in self.shapes)

    def split(self, flat: Array) -> Params:
        """The pytree whose leaves, in order, hold the entries of `flat`."""
        ends = list(itertools.accumulate(math.prod(shape) for shape in self.shapes))
        parts = [
            flat[begin:end].reshape(shape)
            for begin, end, shape in zip([0, *ends], ends, self.shapes, strict=False)
        ]
        return jax.tree.unflatten(self.structure, parts)


def layout(a: Params) -> Layout:
    """The layout of a pytree of arrays."""
    leaves, structure = jax.tree.flatten(a)
    return Layout(structure, tuple(x.shape for x in leaves))


def flatten(a: Params) -> Shaped[Array, "n"]:
    """All entries as one vector, in leaf order, in the widest dtype among them."""
    wide = dtype(a)
    return jnp.concatenate([x.astype(wide).reshape(-1) for x in jax.tree.leaves(a)])


def with_entries(a: Params, index: Array, values: Array) -> Params:
    """`a` with values added at places of its flat vector, in the dtypes of `a`."""
    flat = flatten(a)
    flat = flat.at[index].add(values.astype(flat.dtype))
    return cast_like(layout(a).split(flat), a)


def paths(a: Params) -> list[str]:
    """Readable path of every leaf: `"Dense_0/kernel"` for linen and nnx alike.

    The path of a leaf in an nnx `State` ends in the attribute `value` of its
    `Variable`; that ending is dropped, so one predicate serves both libraries. A
    single array has the path `""`.
    """
    names = []
    for keys, _ in jax.tree_util.tree_leaves_with_path(a):
        last_is_value = len(keys) > 1 and keys[-1] == jax.tree_util.GetAttrKey("value")
        kept = keys[:-1] if last_is_value else keys
        names.append(jax.tree_util.keystr(kept, simple=True, separator="/"))
    return names


def to_working_precision(a: Params) -> Params:
    """Half-precision leaves raised to float32; wider ones unchanged."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if x.dtype.itemsize < 4 else x, a
    )


def cast_like(a: Params, template: Params) -> Params:
    """Every leaf of `a` in the dtype of the matching leaf of `template`."""
    return jax.tree.map(lambda x, t: x.astype(t.dtype), a, template)
