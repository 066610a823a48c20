"""Gradients of one unit as factors: the inputs of dense layers and the slopes after.

Both are found by evaluating the jaxpr of the loss, whatever library the network is
written in, with a shift of zero added to the output of every dense layer: the gradient
with respect to the shift is the slope there.

Legend: q terms of an outer product, a and b the two sides of a matrix.
"""

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core
from jaxtyping import Array, Float

from sparserec._linsolve import matmul
from sparserec._types import LossFn, Params
from sparserec.quadratic._layer_rows import Leaf, OuterLeaf, StoredLeaf


class _Weight(NamedTuple):
    """A leaf of the params on its way to the products it takes part in."""

    leaf: int
    array: Any
    transposed: bool


class Use(NamedTuple):
    """One layer in which a leaf is the matrix, or the kernel of a convolution."""

    leaf: int
    weight_first: bool  # the leaf is the left operand
    inputs_first: bool  # the gradient is inputs times slopes, not the other way
    given: dict[str, Any]  # parameters of the equation
    shape: tuple[int, ...] = ()  # of the output
    dtype: Any = None
    convolution: bool = False


class Notes:
    """What a walk has met; with `shifts`, it adds one to the output of every use."""

    def __init__(
        self, shifts: Sequence[Array] | None = None, *, convolutions: bool = False
    ):
        self.shifts = shifts
        self.convolutions = convolutions  # whether they count as uses
        self.uses: list[Use] = []
        self.inputs: list[Array] = []
        self.other: set[int] = set()  # leaves that are used in any other way


def _plain(value: Any) -> Any:
    return value.array if isinstance(value, _Weight) else value


def _bind(equation: Any, values: Sequence[Any]) -> Sequence[Any]:
    """Runs one equation as it is, derivative rules included."""
    context = getattr(getattr(equation, "ctx", None), "manager", None)
    given = equation.primitive.get_bind_params(equation.params)
    with context or contextlib.nullcontext():
        result = equation.primitive.bind(*[_plain(v) for v in values], **given)
    return result if equation.primitive.multiple_results else [result]


def _walk(
    notes: Notes, jaxpr: Any, constants: Sequence[Any], ins: Sequence[Any]
) -> list[Any]:
    """Evaluates a jaxpr, following the leaves among its inputs to their products."""
    known = dict(zip(jaxpr.constvars, constants, strict=True))
    known.update(zip(jaxpr.invars, ins, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else known[atom]

    for equation in jaxpr.eqns:
        values = [read(atom) for atom in equation.invars]
        outs = _equation(notes, equation, values)
        known.update(zip(equation.outvars, outs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _equation(notes: Notes, equation: Any, values: list[Any]) -> Sequence[Any]:
    weights = [value for value in values if isinstance(value, _Weight)]
    if not weights:
        return _bind(equation, values)
    name, given = equation.primitive.name, equation.params
    if name in ("jit", "pjit", "closed_call") and "jaxpr" in given:
        inner = given["jaxpr"]
        return _walk(notes, inner.jaxpr, inner.consts, values)
    if name == "transpose" and tuple(given["permutation"]) == (1, 0):
        (weight,) = weights
        (turned,) = _bind(equation, values)
        return [_Weight(weight.leaf, turned, not weight.transposed)]
    use = None
    if name == "dot_general":
        use = _product(equation, values)
    elif name == "conv_general_dilated" and notes.convolutions:
        use = _convolution(equation, values)
    if use is None:
        notes.other |= {weight.leaf for weight in weights}
        return _bind(equation, values)
    (out,) = _bind(equation, values)
    if notes.shifts is not None:
        out = out + notes.shifts[len(notes.uses)]
    notes.uses.append(use._replace(shape=out.shape, dtype=out.dtype))
    notes.inputs.append(_plain(values[1 if use.weight_first else 0]))
    return [out]


def _product(equation: Any, values: list[Any]) -> Use | None:
    """How a matrix among the params enters a product; `None` if in another way."""
    (contracted, batched) = equation.params["dimension_numbers"]
    first = isinstance(values[0], _Weight)
    if first and isinstance(values[1], _Weight):
        return None
    weight = values[0 if first else 1]
    if weight.array.ndim != 2 or batched[0] or len(contracted[0]) != 1:
        return None
    axis = contracted[0 if first else 1][0]
    if weight.transposed:
        axis = 1 - axis
    return Use(weight.leaf, first, axis == 0, equation.params)


def _convolution(equation: Any, values: list[Any]) -> Use | None:
    """How a kernel among the params enters a convolution; `None` if in another way."""
    given = equation.params
    plain = isinstance(values[1], _Weight) and not isinstance(values[0], _Weight)
    grouped = given["feature_group_count"] != 1 or given["batch_group_count"] != 1
    if not plain or grouped or any(d != 1 for d in given["lhs_dilation"]):
        return None
    if values[1].transposed:
        return None
    return Use(values[1].leaf, False, True, given, convolution=True)


def _terms(use: Use, inputs: Array, slopes: Array) -> tuple[Array, Array]:
    """Left and right factors of the gradient of a matrix, terms first."""
    contracted = use.given["dimension_numbers"][0][1 if use.weight_first else 0][0]
    inputs = jnp.moveaxis(inputs, contracted, -1)
    inputs = inputs.reshape(-1, inputs.shape[-1])
    if use.weight_first:
        slopes = jnp.moveaxis(slopes, 0, -1)
    slopes = slopes.reshape(-1, slopes.shape[-1]).astype(inputs.dtype)
    return (inputs, slopes) if use.inputs_first else (slopes, inputs)


def _leaf_of(uses: list[tuple[Use, Array, Array]]) -> Leaf:
    """The rows of a leaf from the inputs and slopes of all its layers."""
    factors = [_terms(*entry) for entry in uses]
    left = jnp.concatenate([pair[0] for pair in factors])
    right = jnp.concatenate([pair[1] for pair in factors])
    side, other = left.shape[1], right.shape[1]
    if left.shape[0] * (side + other) >= side * other:
        # More terms than the matrix is wide: the factors would be the larger ones.
        return StoredLeaf(matmul(left.T, right).reshape(-1))
    return OuterLeaf(left, right)


def _closed(loss_fn: LossFn, params: Params, args: tuple) -> tuple[list[Array], Any]:
    """The leaves of the params, and the jaxpr of the loss as a function of them."""
    leaves, structure = jax.tree.flatten(params)
    closed = jax.make_jaxpr(
        lambda given, data: loss_fn(jax.tree.unflatten(structure, given), *data)
    )(leaves, args)
    return leaves, closed


def noted_value(
    notes: Notes, loss_fn: LossFn, params: Params, args: tuple
) -> Float[Array, ""]:
    """The loss, with all layers that the walk meets, and their inputs, in `notes`."""
    leaves, closed = _closed(loss_fn, params, args)
    marked = [_Weight(i, x, False) for i, x in enumerate(leaves)]
    (value,) = _walk(
        notes, closed.jaxpr, closed.consts, [*marked, *jax.tree.leaves(args)]
    )
    return _plain(value)


def unit_factors(
    loss_fn: LossFn, params: Params, args: tuple
) -> tuple[Float[Array, ""], list[Leaf]]:
    """Loss of one unit and its gradient, leaf by leaf, without the axis of rows.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: pytree of floating arrays.
      args: the data of the unit.

    Returns:
      The loss, and for every leaf in tree order an `OuterLeaf` where it enters the
      loss through products with matrices of inputs alone, a `StoredLeaf` otherwise.
    """
    leaves, closed = _closed(loss_fn, params, args)
    data = jax.tree.leaves(args)

    def run(shifts: Sequence[Array] | None, arrays: Sequence[Any], notes: Notes):
        notes.shifts = shifts
        (value,) = _walk(notes, closed.jaxpr, closed.consts, [*arrays, *data])
        notes.other |= {value.leaf} if isinstance(value, _Weight) else set()
        return _plain(value)

    first = Notes()
    marked = [_Weight(i, x, False) for i, x in enumerate(leaves)]
    jax.eval_shape(lambda: run(None, marked, first))
    outer = {use.leaf for use in first.uses} - first.other

    def shifted(shifts: Sequence[Array], rest: dict[int, Array]):
        notes = Notes()
        arrays = [
            _Weight(i, x, False) if i in outer else rest[i]
            for i, x in enumerate(leaves)
        ]
        value = run(shifts, arrays, notes)
        return value, notes.inputs

    uses = [use for use in first.uses if use.leaf in outer]
    zeros = [jnp.zeros(use.shape, use.dtype) for use in uses]
    rest = {i: x for i, x in enumerate(leaves) if i not in outer}
    (value, inputs), (slopes, direct) = jax.value_and_grad(
        shifted, argnums=(0, 1), has_aux=True
    )(zeros, rest)
    met = list(zip(uses, inputs, slopes, strict=True))
    found = [
        _leaf_of([entry for entry in met if entry[0].leaf == i])
        if i in outer
        else StoredLeaf(direct[i].reshape(-1))
        for i in range(len(leaves))
    ]
    return value, found
