"""Curvatures that are only known through products: Hessian and Gauss-Newton."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import jaxprs_in_params
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from sparserec import _linsolve, _tree
from sparserec._linsolve import LinearSolve
from sparserec._types import LossFn, Mask, Params, Scalar
from sparserec.quadratic._explicit import Dense
from sparserec.quadratic._model import Curvature, QuadraticModel

CurvatureFn = Callable[[LossFn, Params, tuple], QuadraticModel]
"""`(loss_fn, params, args) -> QuadraticModel`, the local model at `params`."""


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["prepare", "center", "preconditioner", "probe"],
    meta_fields=["cg_steps", "cg_tol", "on_host"],
)
@dataclasses.dataclass(frozen=True)
class MatrixFree:
    """A curvature known only through its products; solves by masked CG.

    Attributes:
      prepare: pytree callable without arguments (`jax.tree_util.Partial`) that
        returns the product `v -> Hv`; work that all products share, such as the
        linearisation, is done once in it.
      center: pytree with the shapes and dtypes of the params.
      preconditioner: positive estimate of the diagonal of H, shaped like the
        params, for Jacobi preconditioning; `None` for none.
      probe: pytree callable from an integer to a non-negative estimate of the
        diagonal of H whose expectation over many integers is the diagonal; `None`
        where only products are known.
      cg_steps: products allowed in one solve; static. Few steps act as a
        regulariser on networks, where the model is trusted only nearby.
      cg_tol: relative residual at which a solve stops early; static.
      on_host: run loops in Python around the products; static.
    """

    prepare: Callable[[], Callable[[Params], Params]]
    center: Params
    preconditioner: Params | None = None
    probe: Callable[[Int[Array, ""]], Params] | None = None
    cg_steps: int = 100
    cg_tol: float = 1e-8
    on_host: bool = False

    def matvec(self, v: Params) -> Params:
        """Product $Hv$, shaped like `v`."""
        return self.prepare()(v)

    def diagonal(self) -> Params:
        """Diagonal of $H$ by n products with unit vectors, shaped like the params.

        Exact and slow: meant for small models and for tests.
        """
        layout = _tree.layout(self.center)
        product = self.prepare()

        def entry(i: Array) -> Array:
            unit = jnp.zeros(layout.size, _tree.dtype(self.center)).at[i].set(1)
            shaped = _tree.cast_like(layout.split(unit), self.center)
            return _tree.flatten(product(shaped))[i]

        indices = jnp.arange(layout.size)
        if self.on_host:
            return layout.split(jnp.stack([entry(i) for i in indices]))
        return layout.split(jax.lax.map(entry, indices))

    def estimate_diagonal(self, number: Int[Array, ""]) -> Params:
        """A non-negative estimate of the diagonal, another one for every number."""
        if self.probe is not None:
            return self.probe(number)
        signs = _signs(self.center, number)
        return jax.tree.map(lambda s, h: jnp.abs(s * h), signs, self.matvec(signs))

    def mean_diagonal(self) -> Scalar:
        """Estimate of the mean absolute diagonal from one product."""
        signs = _signs(self.center, jnp.int32(0))
        size = jnp.asarray(_tree.size(self.center), _tree.dtype(self.center))
        return jnp.abs(_tree.dot(signs, self.matvec(signs))) / size

    def solve_on(self, mask: Mask, rhs: Params, damping: Scalar) -> LinearSolve:
        """At most `cg_steps` conjugate gradients on the support, zero off it."""
        return _linsolve.conjugate_gradients(
            self.prepare(),
            rhs,
            mask,
            damping=damping,
            tol=self.cg_tol,
            max_steps=self.cg_steps,
            precondition=self._jacobi(damping),
            on_host=self.on_host,
        )

    def _jacobi(self, damping: Scalar) -> Callable[[Params], Params] | None:
        if self.preconditioner is None:
            return None
        return lambda residual: jax.tree.map(
            lambda r, d: r / (d.astype(r.dtype) + jnp.asarray(damping, r.dtype)),
            residual,
            self.preconditioner,
        )


def _signs(like: Params, number: Int[Array, ""]) -> Params:
    """Signs without pattern, hashed from the index of the entry and a number."""
    layout = _tree.layout(like)
    index = jnp.arange(layout.size, dtype=jnp.uint32)
    mixed = (index + jnp.uint32(1)) * jnp.uint32(2654435769)
    mixed += (number.astype(jnp.uint32) + jnp.uint32(1)) * jnp.uint32(2246822519)
    for shift, factor in ((16, 2246822507), (13, 3266489909)):
        mixed = (mixed ^ (mixed >> shift)) * jnp.uint32(factor)
    signs = jnp.where((mixed >> 31) == 0, 1, -1).astype(_tree.dtype(like))
    return _tree.cast_like(layout.split(signs), like)


def as_pytree(function: Callable) -> Partial:
    """The function as a pytree; the arrays in a `Partial` stay leaves of it."""
    # A `Partial` of a `Partial` would hold the inner one as static data.
    return function if isinstance(function, Partial) else Partial(function)


def value_and_gradient(loss_fn: LossFn, params: Params, args: tuple):
    """Loss and gradient in one evaluation."""
    return jax.value_and_grad(loss_fn)(params, *args)


def _hessian_product(loss_fn: LossFn, params: Params, args: tuple):
    return jax.linearize(lambda p: jax.grad(loss_fn)(p, *args), params)[1]


@dataclasses.dataclass(frozen=True)
class Hessian:
    """Builds models with the exact Hessian of the loss.

    Up to `dense_limit` weights the Hessian is stored as a matrix, and every rule
    and exact solve is available; beyond it products are taken by forward over
    reverse differentiation, about twice the cost of a gradient each.

    Attributes:
      dense_limit: largest number of weights for a stored matrix.
      cg_steps: products allowed in one solve, beyond the dense limit.
      cg_tol: relative residual at which such a solve stops early.
    """

    dense_limit: int = 512
    cg_steps: int = 20
    cg_tol: float = 1e-8

    def __call__(self, loss_fn: LossFn, params: Params, args: tuple) -> QuadraticModel:
        """Local model of `loss_fn(params, *args)` at `params`."""
        value, gradient = value_and_gradient(loss_fn, params, args)
        curvature: Curvature
        if _tree.size(params) <= self.dense_limit:
            curvature = _dense_from_products(
                _hessian_product(loss_fn, params, args), params, args
            )
        else:
            curvature = MatrixFree(
                prepare=Partial(_hessian_product, as_pytree(loss_fn), params, args),
                center=params,
                cg_steps=self.cg_steps,
                cg_tol=self.cg_tol,
            )
        return QuadraticModel(params, value, gradient, curvature)

    def on_support(
        self, loss_fn: LossFn, params: Params, args: tuple, index: Int[Array, "s"]
    ) -> tuple[LossFn, tuple] | None:
        """The same loss as a function of the entries at `index`, the others zero.

        Args:
          loss_fn: `loss_fn(params, *args) -> scalar`.
          params: pytree of floating arrays; only shapes and dtypes are used.
          args: data handed to the loss.
          index: entries in tree order, shape `(s,)`; the values of an entry that
            appears twice are added.

        Returns:
          A loss of vectors of shape `(s,)` and its data; `None` where its Hessian
          would not be a stored matrix either.
        """
        if index.shape[0] > self.dense_limit:
            return None
        zeros = _tree.zeros_like(params)
        return Partial(_loss_of_entries, as_pytree(loss_fn), zeros, index), args


def _loss_of_entries(
    loss_fn: LossFn,
    zeros: Params,
    index: Int[Array, "s"],
    values: Float[Array, "s"],
    *args: Any,
) -> Scalar:
    return loss_fn(_tree.with_entries(zeros, index, values), *args)


_DATA_LIMIT, _PRODUCTS_LIMIT = 1 << 18, 1 << 21
"""Bytes of data that stay in the cache of one core, and of products that do not."""


def _dense_from_products(
    product: Callable[[Params], Params], like: Params, args: tuple
) -> Dense:
    layout = _tree.layout(like)

    def column(unit: Array) -> Array:
        return _tree.flatten(product(_tree.cast_like(layout.split(unit), like)))

    def at_once(units: Array) -> Array:
        return jax.vmap(column)(units)

    def one_by_one(units: Array) -> Array:
        return jax.lax.map(column, units)

    units = jnp.eye(layout.size, dtype=_tree.dtype(like))
    if _better_apart(column, units, args):
        matrix = jax.lax.platform_dependent(units, cpu=one_by_one, default=at_once)
    else:
        matrix = at_once(units)
    half = jnp.asarray(0.5, matrix.dtype)
    return Dense(half * (matrix + matrix.T), layout)


def _better_apart(
    column: Callable[[Array], Array], units: Float[Array, "n n"], args: tuple
) -> bool:
    """Whether n products are faster one after another on CPU.

    All at once are one pass over the data, but what lies between is n times as large
    and leaves the cache; where data are small, passes over them cost nothing.
    """
    data = sum(x.nbytes for x in jax.tree.leaves(args) if isinstance(x, jax.Array))
    if data > _DATA_LIMIT:
        return False
    jaxpr = jax.make_jaxpr(column)(units[0]).jaxpr
    return units.shape[0] * _largest_result(jaxpr) > _PRODUCTS_LIMIT


def _largest_result(jaxpr: Any) -> int:
    """Bytes of the largest array that a program computes on the way."""
    largest = 0
    for equation in jaxpr.eqns:
        sizes = [
            x.aval.size * x.aval.dtype.itemsize
            for x in equation.outvars
            if hasattr(x.aval, "dtype")
        ]
        inner = [_largest_result(x) for x in jaxprs_in_params(equation.params)]
        largest = max(largest, *sizes, *inner, 0)
    return largest


def hessian(loss_fn: LossFn, params: Params, args: tuple) -> QuadraticModel:
    """The default curvature: the exact Hessian, with the settings of `Hessian()`.

    Args:
      loss_fn: `loss_fn(params, *args) -> scalar`.
      params: point around which the loss is modelled, a pytree of floating arrays.
      args: data handed to the loss.

    Returns:
      The local model; its curvature is a stored matrix up to 512 weights, and known
      by products beyond.
    """
    return Hessian()(loss_fn, params, args)


def _gauss_newton_product(predict_fn, output_loss_fn, params, args):
    *inputs, targets = args
    outputs, push = jax.linearize(lambda p: predict_fn(p, *inputs), params)
    pull = jax.linear_transpose(push, params)
    bend = jax.linearize(lambda o: jax.grad(output_loss_fn)(o, targets), outputs)[1]
    return lambda v: pull(bend(push(v)))[0]


def _gauss_newton_probe(predict_fn, output_loss_fn, params, args, number):
    """Squares of one pulled-back vector of random signs: unbiased for the diagonal."""
    *inputs, targets = args
    outputs, pull = jax.vjp(lambda p: predict_fn(p, *inputs), params)
    signs = _signs(outputs, number)
    root = _ROOTS.get(output_loss_fn.func)
    if root is not None:
        half = root(outputs, signs)
    else:
        # Without a known root: that of the diagonal of the output curvature.
        other = _signs(outputs, number + jnp.int32(1 << 20))
        bend = jax.jvp(
            lambda o: jax.grad(output_loss_fn)(o, targets), (outputs,), (other,)
        )[1]
        half = jax.tree.map(
            lambda s, o, h: s * jnp.sqrt(jnp.maximum(o * h, 0)), signs, other, bend
        )
    return jax.tree.map(jnp.square, pull(half)[0])


@dataclasses.dataclass(frozen=True)
class GaussNewton:
    r"""Builds models with the Gauss-Newton matrix $J^\top H_{\rm out} J$.

    Positive semi-definite whenever the loss is convex in the outputs. Make one
    with `gauss_newton(predict_fn, output_loss_fn)`.

    Attributes:
      predict_fn: `predict_fn(params, *inputs) -> outputs`.
      output_loss_fn: `output_loss_fn(outputs, targets) -> scalar`, a mean over the
        leading axis.
      cg_steps: products allowed in one solve.
      cg_tol: relative residual at which a solve stops early.
    """

    predict_fn: Callable
    output_loss_fn: Callable
    cg_steps: int = 10
    cg_tol: float = 1e-4

    def loss(self, params: Params, *args: Any) -> Scalar:
        """The loss whose curvature this is: `loss(params, *inputs, targets)`."""
        *inputs, targets = args
        return self.output_loss_fn(self.predict_fn(params, *inputs), targets)

    def __call__(self, loss_fn: LossFn, params: Params, args: tuple) -> QuadraticModel:
        """Local model of `loss_fn(params, *args)` at `params`."""
        if len(args) < 2:
            raise ValueError(
                "a Gauss-Newton curvature needs `args=(*inputs, targets)`, got "
                f"{len(args)} argument(s)."
            )
        value, gradient = value_and_gradient(loss_fn, params, args)
        curvature = MatrixFree(
            prepare=Partial(
                _gauss_newton_product,
                Partial(self.predict_fn),
                Partial(self.output_loss_fn),
                params,
                args,
            ),
            center=params,
            probe=Partial(
                _gauss_newton_probe,
                Partial(self.predict_fn),
                Partial(self.output_loss_fn),
                params,
                args,
            ),
            cg_steps=self.cg_steps,
            cg_tol=self.cg_tol,
        )
        return QuadraticModel(params, value, gradient, curvature)


def gauss_newton(
    predict_fn: Callable,
    output_loss_fn: Callable,
    *,
    cg_steps: int = 10,
    cg_tol: float = 1e-4,
) -> GaussNewton:
    r"""Gauss-Newton curvature of a network, for the `curvature=` of any solver.

    $H = J^\top H_{\rm out} J$ with $J$ the Jacobian of the outputs with respect to
    the params and $H_{\rm out}$ the Hessian of the output loss. Data go in as
    `args=(*inputs, targets)`.

    Args:
      predict_fn: `predict_fn(params, *inputs) -> outputs`, any pytree of outputs.
      output_loss_fn: `output_loss_fn(outputs, targets) -> scalar`, a mean over the
        leading axis and convex in `outputs`, for example
        `sparserec.quadratic.softmax_cross_entropy` or `.squared_error`.
      cg_steps: products allowed in one solve; static.
      cg_tol: relative residual at which a solve stops early; static.

    Returns:
      A curvature builder; its method `loss(params, *inputs, targets)` is the
      matching loss function.

    Source: Schraudolph (2002), extended Gauss-Newton matrix.
    """
    return GaussNewton(predict_fn, output_loss_fn, cg_steps, cg_tol)


def softmax_cross_entropy(
    logits: Float[Array, "m classes"], labels: Array
) -> Float[Array, ""]:
    """Mean cross entropy of a classifier.

    Args:
      logits: unnormalised log probabilities, shape `(m, classes)`.
      labels: integer classes, shape `(m,)`.

    Returns:
      Mean loss in nats, shape `()`.
    """
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels))


def squared_error(
    outputs: Float[Array, "m *dims"], targets: Float[Array, "m *dims"]
) -> Float[Array, ""]:
    r"""Half the mean squared error of a regressor, $\frac{1}{2m}\sum_i \|o_i-t_i\|^2$.

    Args:
      outputs: predictions, shape `(m, ...)`.
      targets: shape `(m, ...)`, as `outputs`.

    Returns:
      Mean loss, shape `()`.
    """
    half = jnp.asarray(0.5 / outputs.shape[0], outputs.dtype)
    return half * jnp.sum(jnp.square(outputs - targets))


def _softmax_root(
    logits: Float[Array, "m classes"], v: Float[Array, "m classes"]
) -> Float[Array, "m classes"]:
    r"""$Fv$ with $FF^\top = (\mathrm{diag}(p) - pp^\top)/m$ for every example."""
    probabilities = jax.nn.softmax(logits)
    roots = jnp.sqrt(probabilities)
    inner = jnp.sum(roots * v, axis=-1, keepdims=True)
    share = jnp.asarray(logits.shape[0] ** -0.5, logits.dtype)
    return share * (roots * v - probabilities * inner)


def _squared_error_root(
    outputs: Float[Array, "m *dims"], v: Float[Array, "m *dims"]
) -> Float[Array, "m *dims"]:
    return jnp.asarray(outputs.shape[0] ** -0.5, outputs.dtype) * v


_ROOTS: dict[Callable, Callable] = {
    softmax_cross_entropy: _softmax_root,
    squared_error: _squared_error_root,
}
"""Roots of the output curvature that are known in closed form."""
