"""The quadratic model of a loss over units: one gate for each of them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from sparserec import _tree
from sparserec._types import LossFn
from sparserec.quadratic import GaussNewton, QuadraticModel, low_rank
from sparserec.quadratic._chunked import leading_size
from sparserec.quadratic._gradient_rows import output_root
from sparserec.quadratic._matrix_free import _signs, as_pytree
from sparserec.saliency._data import check_data, of_one_example, resolve
from sparserec.structure._apply import gate, ones
from sparserec.structure._groups import Groups

GateCurvature = Literal["fisher", "gauss_newton"] | GaussNewton


@dataclasses.dataclass(frozen=True, eq=False)
class Same:
    """Groups as a static argument: equal only to themselves."""

    groups: Groups

    def __hash__(self) -> int:
        """By identity; the arrays in the groups have no hash."""
        return id(self.groups)

    def __eq__(self, other: object) -> bool:
        """Whether both hold the same object."""
        return isinstance(other, Same) and other.groups is self.groups


def _by_outputs(
    builder: GaussNewton,
    groups: Groups,
    params: Any,
    gates: Any,
    probes: int | None,
    signs: Array,
    *example: Any,
) -> tuple[Array, Any, Any]:
    """Loss, slope and root of the Gauss-Newton matrix of one example."""
    *inputs, targets = jax.tree.map(lambda x: jnp.asarray(x)[None], example)
    outputs, pull = jax.vjp(
        lambda m: builder.predict_fn(gate(params, groups, m), *inputs), gates
    )
    value, bend = jax.value_and_grad(builder.output_loss_fn)(outputs, targets)
    columns = output_root(builder.output_loss_fn, outputs, targets)
    if probes is not None:
        mixed = signs.astype(columns.dtype)
        columns = jnp.tensordot(mixed, columns, 1) * jnp.asarray(
            probes**-0.5, columns.dtype
        )
    # The slope goes along, so that one reverse pass serves all.
    pulled = jax.vmap(lambda o: pull(o)[0])(jnp.concatenate([bend[None], columns]))
    slope = jax.tree.map(lambda x: x[0], pulled)
    return value, slope, jax.tree.map(lambda x: x[1:], pulled)


def _by_loss(
    loss_fn: LossFn, groups: Groups, params: Any, gates: Any, *example: Any
) -> tuple[Array, Any, Any]:
    """Loss, slope and, as the only row, the slope again."""

    def loss(m: Any) -> Array:
        return of_one_example(loss_fn, gate(params, groups, m), *example)

    value, slope = jax.value_and_grad(loss)(gates)
    return value, slope, jax.tree.map(lambda x: x[None], slope)


@functools.partial(jax.jit, static_argnames=("builder", "same", "probes"))
def _piece(
    builder: GaussNewton | None,
    same: Same,
    probes: int | None,
    loss_fn: Any,
    params: Any,
    gates: Any,
    piece: tuple,
    number: Array,
) -> tuple[Array, Any, Array]:
    """Sums of losses and slopes over a piece of the data, and its rows."""
    if builder is None:
        each = functools.partial(_by_loss, loss_fn, same.groups, params, gates)
        values, slopes, rows = jax.vmap(each)(*piece)
    else:
        outputs = jax.eval_shape(builder.predict_fn, params, *piece[:-1])
        examples = leading_size(piece)
        shape = (examples, probes or 0, outputs.size // examples)
        signs = _signs(jnp.zeros(shape, _tree.dtype(gates)), number)
        each = functools.partial(
            _by_outputs, builder, same.groups, params, gates, probes
        )
        values, slopes, rows = jax.vmap(each)(signs, *piece)
    total = jax.tree.map(lambda x: jnp.sum(x, axis=0), slopes)
    flat = jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), rows)
    return jnp.sum(values), total, jnp.concatenate(jax.tree.leaves(flat), axis=1)


def gate_model(
    loss_fn: LossFn,
    params: Any,
    groups: Groups,
    *,
    args: tuple,
    curvature: GateCurvature = "fisher",
    probes: int | None = None,
    gates: Mapping[str, Array] | None = None,
    batch_size: int = 32,
) -> QuadraticModel:
    r"""Model of a loss over units, with one weight for each of U units.

    With gates m on the places where units are read (`gate`), the loss of gated params
    is a function of U numbers, and

    $$q(m) = f(c) + \langle g, m-c\rangle + \tfrac12 \|X(m-c)\|^2$$

    is its local model at the gates c. The rows X are gradients of single examples
    with respect to the gates (`"fisher"`), or $R_i^\top J_i$ with $J_i$ the Jacobian
    of the outputs of example i and $R_iR_i^\top$ the curvature of its loss
    (`"gauss_newton"`, by which $X^\top X$ is the exact Gauss-Newton matrix). It is the
    model that prunes single weights, with U columns instead of as many as there are
    weights, so every solver takes it: `sparserec.iobs(model, model.center, k)`.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, a mean over examples; an example
        must not depend on the others (normalization by stored statistics).
      params: the parameters that were traced.
      groups: result of `groups`.
      args: data handed to the loss, n examples along the leading axis of every array.
      curvature: `"fisher"`; `"gauss_newton"`, for a loss that is the `loss` of
        `sparserec.quadratic.gauss_newton(...)`, or that builder itself.
      probes: rows for each example, random mixtures of those of all its outputs whose
        expectation is the Gauss-Newton matrix; `None` for all rows, as many as there
        are outputs. Only for Gauss-Newton.
      gates: the point c, group name -> float array of shape `(units,)`; all open
        (ones) if `None`.
      batch_size: examples in a compiled step. All examples go through one step after
        the other on the host; the step holds a gradient of all weights for each
        example and row.

    Returns:
      A model whose params are the gates, group name -> array of shape `(units,)`,
      with a `LowRank` curvature of n rows (times outputs or probes).

    Raises:
      ValueError: wrong choices, data without examples, or gates and params that do
        not fit the groups.

    Source: the low-rank model of CHITA (Benbaki et al., 2023) and FALCON (Meng et al.,
    2024), over units.
    """
    check_data(args, None, batch_size)
    builder = None if curvature == "fisher" else resolve(curvature, loss_fn)
    if builder is not None and not isinstance(builder, GaussNewton):
        raise ValueError(
            "`curvature` must be 'fisher', 'gauss_newton' or a builder from "
            f"`sparserec.quadratic.gauss_newton(...)`, got {curvature!r}."
        )
    if probes is not None and (
        builder is None or not isinstance(probes, int) or probes < 1
    ):
        raise ValueError(
            "`probes` must be an integer of at least 1, with a Gauss-Newton curvature, "
            f"or None; got {probes!r}."
        )
    if not groups.groups:
        raise ValueError("there is no unit to remove: `groups` is empty.")
    params = _tree.to_working_precision(params)
    center = dict(ones(groups, _tree.dtype(params)))
    center |= {} if gates is None else {n: jnp.asarray(m) for n, m in gates.items()}
    total, rows = None, []
    examples = leading_size(args)
    for number, start in enumerate(range(0, examples, batch_size)):
        piece = jax.tree.map(lambda x: x[start : start + batch_size], args)  # noqa: B023
        value, slope, part = _piece(
            builder,
            Same(groups),
            probes,
            as_pytree(loss_fn),
            params,
            center,
            piece,
            jnp.int32(number),
        )
        total = (value, slope) if total is None else _tree.add(total, (value, slope))
        rows.append(np.asarray(part))  # waits: else the queue holds all pieces
    value, slope = _tree.scale(1 / examples, total)
    scaled = np.concatenate(rows) / np.sqrt(examples, dtype=rows[0].dtype)
    return low_rank(jnp.asarray(scaled), center, slope, value)


def gate_scores(model: QuadraticModel) -> dict[str, Array]:
    r"""Predicted change of the loss when one unit alone is removed.

    $$s_u = -c_u g_u + \tfrac12 c_u^2 H_{uu}$$

    Args:
      model: from `gate_model`.

    Returns:
      Group name -> signed scores of shape `(units,)`, in units of loss; negative where
      the removal is predicted to lower the loss. For `select`.
    """
    return jax.tree.map(
        lambda c, g, h: c * (jnp.asarray(0.5, c.dtype) * c * h - g),
        model.center,
        model.gradient,
        model.curvature.diagonal(),
    )
