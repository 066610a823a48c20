"""What a solver minimises: a loss with the way to model it, or a model itself."""

import dataclasses
import functools
from typing import Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparserec import _tree
from sparserec._types import LossFn, Params, Scalar
from sparserec.quadratic import _chunked
from sparserec.quadratic._matrix_free import CurvatureFn, Hessian, as_pytree, hessian
from sparserec.quadratic._model import QuadraticModel


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["loss_fn"],
    meta_fields=["curvature", "batch_size"],
)
@dataclasses.dataclass(frozen=True)
class Objective:
    """A loss together with the way its quadratic models are built.

    Attributes:
      loss_fn: a `jax.tree_util.Partial` around the user's function, or a
        `QuadraticModel`; a pytree, so that the arrays in it are traced.
      curvature: builds the local model; ignored where the loss is a model; static.
      batch_size: examples visited at a time, with loops on the host; `None` for
        all at once in one compiled program; static.
    """

    loss_fn: LossFn | QuadraticModel
    curvature: CurvatureFn
    batch_size: int | None = None

    @property
    def on_host(self) -> bool:
        """Whether loops around this objective must run in Python."""
        return self.batch_size is not None

    @property
    def is_quadratic(self) -> bool:
        """Whether the loss is a quadratic model, equal to its local model."""
        return isinstance(self.loss_fn, QuadraticModel)

    def value(self, params: Params, args: tuple) -> Scalar:
        """The loss at `params`, in the widest dtype among their leaves."""
        if self.batch_size is None:
            value = self.loss_fn(params, *args)
        else:
            value = _chunked.value(self.loss_fn, params, args, self.batch_size)
        # A loss in half precision, or on wider data, must not change the dtype of
        # what the iterations carry along.
        return value.astype(_tree.dtype(params))

    def values(self, stacked: Params, args: tuple) -> Float[Array, "s"]:
        """The loss at each of several params stacked along a leading axis.

        Infinite where it is not finite, so that its minimum is a choice.
        """

        def value(params: Params) -> Scalar:
            return self.value(params, args)

        if self.on_host:
            count = jax.tree.leaves(stacked)[0].shape[0]
            values = jnp.stack(
                [value(jax.tree.map(lambda x: x[i], stacked)) for i in range(count)]  # noqa: B023
            )
        else:
            values = jax.lax.map(value, stacked)
        return jnp.where(jnp.isfinite(values), values, jnp.inf)

    def gradient(self, params: Params, args: tuple) -> Params:
        """The gradient of the loss at `params`, shaped like them."""
        if self.batch_size is None:
            return jax.grad(self.loss_fn)(params, *args)
        _, slope = _chunked.value_and_gradient(
            self.loss_fn, params, args, self.batch_size
        )
        return slope

    def model(self, params: Params, args: tuple) -> QuadraticModel:
        """The local quadratic model at `params`."""
        if isinstance(self.loss_fn, QuadraticModel):
            return self.loss_fn.at(params)
        if self.batch_size is None:
            model = self.curvature(self.loss_fn, params, args)
        else:
            model = _chunked.local_model(
                self.curvature, self.loss_fn, params, args, self.batch_size
            )
        value = model.value.astype(_tree.dtype(params))
        return dataclasses.replace(model, value=value)

    def on_support(
        self, params: Params, args: tuple, index: Int[Array, "s"]
    ) -> tuple[Self, tuple] | None:
        """The same objective for the entries at `index`, with all others zero.

        Args:
          params: gives shapes and dtypes.
          args: data handed to the loss.
          index: entries in tree order, shape `(s,)`.

        Returns:
          An objective of vectors of shape `(s,)` and its data; `None` for models,
          data in chunks, and curvatures that know no such restriction.
        """
        restrict = getattr(self.curvature, "on_support", None)
        if self.is_quadratic or self.on_host or restrict is None:
            return None
        found = restrict(self.loss_fn, params, args, index)
        if found is None:
            return None
        loss_fn, args = found
        return dataclasses.replace(self, loss_fn=loss_fn), args


def make_objective(
    loss_fn: LossFn | QuadraticModel,
    curvature: CurvatureFn | None = None,
    batch_size: int | None = None,
) -> Objective:
    """Wraps a loss so that it can be an argument of compiled functions.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`, or a `QuadraticModel`.
      curvature: builds the local model; the exact Hessian if `None`.
      batch_size: examples visited at a time, with loops on the host; `None` for all
        at once in one compiled program.

    Returns:
      The objective that solvers such as `sparserec.iht_solver` take.
    """
    wrapped = loss_fn if isinstance(loss_fn, QuadraticModel) else as_pytree(loss_fn)
    # The default by its settings, so that what these offer is known.
    if curvature is None or curvature is hessian:
        curvature = Hessian()
    return Objective(wrapped, curvature, batch_size)
