"""Curvature of losses of linear predictions: generalised linear models."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparserec import _tree
from sparserec._linsolve import matmul
from sparserec._types import LossFn, Params, Scalar
from sparserec.quadratic._explicit import LowRank
from sparserec.quadratic._model import QuadraticModel


@dataclasses.dataclass(frozen=True)
class LinearPredictor:
    r"""Builds models with $H = X^\top D X$, $D$ the curvature of the output loss.

    Make one with `linear_predictor(output_loss_fn)`.

    Attributes:
      output_loss_fn: `output_loss_fn(predictions, targets) -> scalar`, a sum or mean
        over the examples and convex.
    """

    output_loss_fn: Callable

    def loss(self, params: Params, inputs: Array, targets: Array) -> Scalar:
        """The loss whose curvature this is, `output_loss_fn(X @ params, targets)`."""
        return self.output_loss_fn(matmul(inputs, params), targets)

    def __call__(self, loss_fn: LossFn, params: Params, args: tuple) -> QuadraticModel:
        """Local model of `loss_fn(params, inputs, targets)` at `params`."""
        del loss_fn  # its own, see `linear_predictor`
        inputs, targets = _design(params, args)
        predictions = matmul(inputs, params)

        def slope(outputs: Array) -> tuple[Array, Scalar]:
            value, pull = jax.value_and_grad(self.output_loss_fn)(outputs, targets)
            return pull, value

        # Examples do not mix, so that products with ones are the diagonal.
        ones = jnp.ones_like(predictions)
        pull, bend, value = jax.jvp(slope, (predictions,), (ones,), has_aux=True)
        roots = jnp.sqrt(jnp.maximum(bend, 0))
        curvature = LowRank(
            roots[:, None] * inputs,
            jnp.zeros((), params.dtype),
            None,
            _tree.layout(params),
        )
        # A row vector times the matrix is the fast order for XLA on CPU.
        return QuadraticModel(params, value, matmul(pull, inputs), curvature)

    def on_support(
        self, loss_fn: LossFn, params: Params, args: tuple, index: Int[Array, "s"]
    ) -> tuple[LossFn, tuple]:
        """The same loss over the entries of `index` alone: fewer columns of data."""
        del params
        inputs, targets = args
        return loss_fn, (inputs[:, index], targets)


def _design(params: Params, args: tuple) -> tuple[Float[Array, "m n"], Array]:
    shapes = [jnp.shape(x) for x in jax.tree.leaves(params)]
    if not isinstance(params, jax.Array) or params.ndim != 1:
        raise ValueError(
            "a linear predictor needs params that are one vector, got leaves of "
            f"shapes {shapes}. For an intercept add a column of ones to the inputs."
        )
    if len(args) != 2 or jnp.shape(args[0])[1:] != params.shape:
        raise ValueError(
            "a linear predictor needs `args=(inputs, targets)` with inputs of shape "
            f"(examples, {params.shape[0]}), got shapes "
            f"{[jnp.shape(x) for x in jax.tree.leaves(args)]}."
        )
    return args


def linear_predictor(output_loss_fn: Callable) -> LinearPredictor:
    r"""Curvature of generalised linear models, for the `curvature=` of any solver.

    $H = X^\top D X$ with $D$ the diagonal second derivative of the output loss with
    respect to the predictions $Xw$: exact, and known by rows, so that columns and
    solves on a support are cheap. `l0cd` refits with the columns of the support alone.
    Data go in as `args=(X, targets)`, params are one vector.

    Args:
      output_loss_fn: `output_loss_fn(predictions, targets) -> scalar`, a sum or mean
        over the examples and convex in the predictions, such as
        `sparserec.losses.logistic`, `.poisson` or `.huber`; not `.cox`, which
        compares examples.

    Returns:
      A curvature builder; its method `loss(params, inputs, targets)` is the loss to
      minimise with it.

    Raises:
      ValueError: on use, where params or data have another form.

    Source: McCullagh & Nelder (1989), Fisher scoring.
    """
    return LinearPredictor(output_loss_fn)
