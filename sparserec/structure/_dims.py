"""Sizes of axes as trees: which positions of which axes belong together.

An axis is a `Dim`: a leaf (a plain count of units), a product (several axes merged
by a reshape, the last factor running fastest) or a sum (several axes concatenated).
Two axes that an operation ties together become one `Dim` (union-find). Splitting a
leaf happens in place, so what is learned late in a function reaches the parameters
seen early and the order of the operations does not matter.

Every step may only make the answer coarser: an axis whose structure cannot be
expressed is frozen, which means that it keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

# Why an axis of length one is frozen; any other reason says more.
SINGLE = "a single position"


class Dim:
    """One node of a dimension tree.

    Union-find is inherently mutable: `up` points to the node that replaced this one
    and `marks` collects facts about a leaf, so this is a class and not a NamedTuple.

    Attributes:
      size: number of positions.
      kind: `"leaf"`, `"product"` or `"sum"`.
      children: factors (slowest first) or parts (in order); empty for a leaf.
      up: the node that stands for this one, or None.
      marks: for leaves, fact -> reason; the fact `"frozen"` forbids cutting.
    """

    __slots__ = ("children", "kind", "marks", "size", "up")

    def __init__(self, size: int, kind: str = "leaf", children: Sequence[Dim] = ()):
        """Make a node that nothing refers to yet."""
        self.size = int(size)
        self.kind = kind
        self.children = list(children)
        self.up: Dim | None = None
        self.marks: dict[str, str] = {}


def find(dim: Dim) -> Dim:
    """The node that currently stands for `dim`, with the path to it shortened."""
    root = dim
    while root.up is not None:
        root = root.up
    while dim.up is not None and dim.up is not root:
        dim.up, dim = root, dim.up
    return root


def children(dim: Dim) -> list[Dim]:
    """Factors or parts of a node, nested nodes of the same kind flattened."""
    dim = find(dim)
    flat: list[Dim] = []
    for child in map(find, dim.children):
        flat.extend(children(child) if child.kind == dim.kind else [child])
    return flat


def leaves(dim: Dim) -> Iterator[Dim]:
    """The leaves below a node, from the slowest factor or first part on."""
    dim = find(dim)
    if dim.kind == "leaf":
        yield dim
    else:
        for child in dim.children:
            yield from leaves(child)


def mark(dim: Dim, fact: str, why: str) -> None:
    """Attach a fact to every leaf below a node; the first real reason stays."""
    for node in leaves(dim):
        if node.marks.get(fact, SINGLE) == SINGLE:
            node.marks[fact] = why


def freeze(dim: Dim, why: str) -> None:
    """Forbid cutting anything below a node."""
    mark(dim, "frozen", why)


def leaf(size: int, frozen: str = "") -> Dim:
    """A new leaf; an axis of length one has nothing to cut and is born frozen."""
    node = Dim(size)
    if frozen or node.size <= 1:
        node.marks["frozen"] = frozen or SINGLE
    return node


def product(factors: Sequence[Dim]) -> Dim:
    """The axis that a reshape makes of several axes, the last one fastest."""
    flat: list[Dim] = []
    for factor in map(find, factors):
        flat.extend(children(factor) if factor.kind == "product" else [factor])
    flat = [factor for factor in flat if factor.size != 1]
    if not flat:
        return leaf(1)
    if len(flat) == 1:
        return flat[0]
    return Dim(math.prod(factor.size for factor in flat), "product", flat)


def total(parts: Sequence[Dim]) -> Dim:
    """The axis that a concatenation makes of several axes."""
    flat: list[Dim] = []
    for part in map(find, parts):
        flat.extend(children(part) if part.kind == "sum" else [part])
    flat = [part for part in flat if part.size]
    if not flat:
        return leaf(0)
    if len(flat) == 1:
        return flat[0]
    return Dim(sum(part.size for part in flat), "sum", flat)


def bind(node: Dim, tree: Dim) -> None:
    """Let `tree` stand for the leaf `node` from now on."""
    node, tree = find(node), find(tree)
    if node is tree:
        return
    if any(node is below for below in leaves(tree)):
        freeze(tree, "an axis would contain itself")
        return
    for fact, why in node.marks.items():
        mark(tree, fact, why)
    node.up = tree


def split_product(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """See an axis as the product of axes of the given sizes.

    Args:
      dim: axis whose size is the product of `sizes`.
      sizes: wanted factors, slowest first.

    Returns:
      One `Dim` per size, or None where the boundaries cannot be aligned.
    """
    dim = find(dim)
    if sum(size != 1 for size in sizes) <= 1:
        return [dim if size != 1 else leaf(1) for size in sizes]
    if dim.kind == "sum":
        return None
    if dim.kind == "leaf":
        factors = [leaf(size) for size in sizes]
        bind(dim, product(factors))
        return factors
    remaining, wanted = children(dim), []
    for size in sizes:
        taken, count = [], 1
        while count < size:
            if not remaining or size % count:
                return None
            need, factor = size // count, find(remaining.pop(0))
            if need % factor.size == 0:
                taken.append(factor)
                count *= factor.size
            elif factor.size % need == 0:
                pieces = split_product(factor, [need, factor.size // need])
                if pieces is None:
                    return None
                taken.append(pieces[0])
                count *= need
                remaining.insert(0, pieces[1])
            else:
                return None
        wanted.append(product(taken))
    return wanted


def split_sum(dim: Dim, sizes: Sequence[int]) -> list[Dim] | None:
    """See an axis as the concatenation of axes of the given sizes.

    A product splits along its slowest factor: for m = m1 + m2 the axis m x rest is
    m1 x rest followed by m2 x rest, where both share the same `rest`. This is what
    makes fused projections (query, key and value in one kernel) work.

    Args:
      dim: axis whose size is the sum of `sizes`.
      sizes: wanted parts in order; zeros are allowed.

    Returns:
      One `Dim` per size, or None where a boundary falls inside a block.
    """
    dim = find(dim)
    if dim.size in sizes:
        return [dim if size == dim.size else leaf(0) for size in sizes]
    if dim.kind == "leaf":
        parts = [leaf(size) for size in sizes]
        bind(dim, total(parts))
        return parts
    if dim.kind == "product":
        slowest, *rest = children(dim)
        inner = dim.size // slowest.size
        if any(size % inner for size in sizes):
            return None
        outer = split_sum(slowest, [size // inner for size in sizes])
        if outer is None:
            return None
        parts = [product([part, *rest]) if part.size else leaf(0) for part in outer]
        dim.up = total(parts)
        return parts
    remaining, wanted = children(dim), []
    for size in sizes:
        taken, count = [], 0
        while count < size:
            part, need = find(remaining.pop(0)), size - count
            if part.size > need:
                pieces = split_sum(part, [need, part.size - need])
                if pieces is None:
                    return None
                part = pieces[0]
                remaining.insert(0, pieces[1])
            taken.append(part)
            count += part.size
        wanted.append(total(taken))
    return wanted


def _aligned(first: Dim, second: Dim) -> list[tuple[Dim, Dim]] | None:
    """Pairs of sub-axes that two inner nodes of equal size have in common."""
    if first.kind == second.kind == "product":
        sizes = [factor.size for factor in children(first)]
        split = split_product(second, sizes)
        if split is not None:
            return list(zip(children(first), split, strict=True))
        sizes = [factor.size for factor in children(second)]
        split = split_product(first, sizes)
        if split is not None:
            return list(zip(split, children(second), strict=True))
        return None
    ends: set[int] = set()
    for node in (first, second):
        if node.kind == "sum":
            ends |= {int(end) for end in np.cumsum([c.size for c in children(node)])}
    sizes = [int(size) for size in np.diff([0, *sorted(ends)])]
    left, right = split_sum(first, sizes), split_sum(second, sizes)
    if left is None or right is None:
        return None
    return list(zip(left, right, strict=True))


def unify(first: Dim, second: Dim, why: str) -> None:
    """Demand that two axes are cut at the same positions.

    Args:
      first: one axis.
      second: the other one; a different size freezes both.
      why: the operation that ties them, named in the reason of a freeze.
    """
    first, second = find(first), find(second)
    if first is second:
        return
    if first.size != second.size:
        freeze(first, f"sizes differ in {why}")
        freeze(second, f"sizes differ in {why}")
        return
    if first.kind == "leaf":
        bind(first, second)
        return
    if second.kind == "leaf":
        bind(second, first)
        return
    pairs = _aligned(first, second)
    if pairs is None:
        freeze(first, f"layouts do not align in {why}")
        freeze(second, f"layouts do not align in {why}")
        return
    for left, right in pairs:
        unify(left, right, why)
    # Both trees now describe the same positions: one of them is enough from here on.
    first, second = find(first), find(second)
    if first is not second and not _below(first, second) and not _below(second, first):
        first.up = second


def _below(node: Dim, tree: Dim) -> bool:
    """Whether `node` is a proper descendant of `tree`."""
    return any(
        find(child) is node or _below(node, child) for child in find(tree).children
    )


def places(dim: Dim) -> list[tuple[Dim, np.ndarray, np.ndarray]]:
    """Where the units of the leaves sit on an axis.

    Args:
      dim: any axis of n positions.

    Returns:
      Triples (leaf, positions, units), one per occurrence of a leaf: position
      `positions[i]` of the axis belongs to unit `units[i]` of the leaf. A position
      belongs to one unit of every factor of a product.
    """
    dim = find(dim)
    if dim.kind == "leaf":
        every = np.arange(dim.size, dtype=np.int64)
        return [(dim, every, every)]
    found = []
    if dim.kind == "sum":
        offset = 0
        for child in map(find, dim.children):
            found += [(node, at + offset, unit) for node, at, unit in places(child)]
            offset += child.size
        return found
    outer, inner = 1, dim.size
    for child in map(find, dim.children):
        inner //= child.size
        blocks = np.arange(outer)[:, None, None] * (child.size * inner)
        for node, at, unit in places(child):
            positions = blocks + at[None, :, None] * inner + np.arange(inner)
            units = np.broadcast_to(unit[None, :, None], positions.shape)
            found.append((node, positions.ravel(), units.ravel()))
        outer *= child.size
    return found
