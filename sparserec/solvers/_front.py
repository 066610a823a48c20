"""What every solver does before its first step: look at the input, explain, convert."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from sparserec import _tree
from sparserec._run import Solver, run
from sparserec._solution import Solution
from sparserec._types import LossFn, Params, Prunable, Scalar, Status
from sparserec.budget import Budget, make_budget
from sparserec.quadratic import (
    CurvatureFn,
    MatrixFree,
    Objective,
    QuadraticModel,
    make_objective,
)
from sparserec.quadratic._chunked import leading_size


def solve(
    make_solver: Callable[[Objective, bool], Solver],
    loss_fn: LossFn | QuadraticModel,
    params: Params,
    k: int | jax.Array | Mapping[str, int | jax.Array] | Budget,
    *,
    args: tuple = (),
    batches: Callable[[int], tuple] | tuple | None = None,
    curvature: CurvatureFn | None = None,
    needs: tuple[str, ...] = (),
    prunable: Prunable,
    batch_size: int | None = None,
    tol: Scalar | float,
    max_steps: int,
) -> Solution:
    """The common path from the user's call to a `Solution`.

    Checks the input, raises half precision to float32, runs the solver that
    `make_solver(objective, known_by_products)` returns, and casts the answer back;
    `known_by_products` says that the curvature is matrix-free. `k` may be
    a budget that was made already. `needs` names the operations beyond the basic ones
    that the curvature must offer.
    """
    budget = k if isinstance(k, Budget) else make_budget(k, params, prunable)
    if callable(batches):
        # The first batch is looked at before it is used; it is drawn only once.
        batches = functools.lru_cache(maxsize=1)(batches)
    check_positive_int("max_steps", max_steps)
    first = check_data(args, batches, batch_size)
    look = getattr(curvature, "check", None)
    if look and jax.tree.leaves(first) and not isinstance(loss_fn, QuadraticModel):
        look(loss_fn, params, first)
    if batches is not None and not callable(batches):
        max_steps = min(max_steps, len(jax.tree.leaves(batches)[0]))
    objective = make_objective(loss_fn, curvature, batch_size)
    working = _tree.to_working_precision(params)
    if isinstance(loss_fn, QuadraticModel):
        working = cast_to_center(working, loss_fn)
    curvature_type = check_loss(objective, working, first, needs)
    solution = run(
        make_solver(objective, issubclass(curvature_type, MatrixFree)),
        working,
        budget,
        args,
        tol=tol,
        max_steps=max_steps,
        batches=batches,
        on_host=objective.on_host,
    )
    check_start(solution)
    return solution._replace(params=_tree.cast_like(solution.params, params))


def cast_to_center(params: Params, model: QuadraticModel) -> Params:
    """Params in the dtypes of the model; those of another layout are refused later."""
    if _tree.layout(params) != _tree.layout(model.center):
        return params
    return _tree.cast_like(params, model.center)


def check_positive_int(name: str, value: object) -> None:
    """Raises unless `value` is a Python integer of at least one."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise ValueError(f"`{name}` must be an integer of at least 1, got {value!r}.")


def check_weight(name: str, value: Any) -> None:
    """Raises unless `value` is a finite number of at least zero; traced ones pass."""
    if isinstance(value, Tracer):
        return
    if np.ndim(value) != 0 or not np.isfinite(value) or value < 0:
        raise ValueError(
            f"`{name}` must be a finite number of at least 0, got {value!r}."
        )


def check_data(
    args: tuple,
    batches: Callable[[int], tuple] | tuple | None,
    batch_size: int | None,
) -> tuple:
    """Explains data of the wrong form; returns the data of the first step."""
    if not isinstance(args, tuple):
        raise TypeError(
            f"`args` must be a tuple, got {type(args).__name__}; write `args=(x, y)`."
        )
    if batches is not None and args:
        raise ValueError(
            "give either `args` (the same data at every step) or `batches` (fresh "
            "data at every step), not both."
        )
    if callable(batches):
        first = batches(0)
        if not isinstance(first, tuple):
            raise TypeError(
                "`batches(step)` must return a tuple of arguments for the loss, "
                f"such as `(x, y)`; got {type(first).__name__}."
            )
    elif batches is not None:
        steps = {jnp.shape(x)[:1] for x in jax.tree.leaves(batches)}
        if not isinstance(batches, tuple) or len(steps) != 1 or () in steps:
            raise ValueError(
                "stacked `batches` must be a tuple of arrays that share their "
                "leading axis, one entry per step; got leading sizes "
                f"{sorted(steps)}."
            )
        first = jax.tree.map(lambda x: x[0], batches)
    else:
        first = args
    if batch_size is not None:
        check_positive_int("batch_size", batch_size)
        leading_size(first)
    return first


def check_loss(
    objective: Objective, params: Params, args: tuple, needs: tuple[str, ...]
) -> type:
    """Traces the loss with shapes only, and explains what is wrong with it.

    Returns:
      The type of the curvature of its local models.
    """
    if objective.is_quadratic:
        if args:
            raise ValueError(
                "a quadratic model takes no data: leave `args` and `batches` out."
            )
        center = objective.loss_fn.center
        if _tree.layout(center) != _tree.layout(params):
            raise ValueError(
                "`params` must have the structure and shapes of the model's center, "
                f"{_tree.layout(center)}; got {_tree.layout(params)}."
            )
        return _check_operations(type(objective.loss_fn.curvature), needs)
    try:
        value = _evaluate.eval_shape(objective.loss_fn, params, args)
    except (TypeError, ValueError) as error:
        leading = {jnp.shape(x)[:1] for x in jax.tree.leaves(args)}
        if len(leading) > 1:
            shapes = [jnp.shape(x) for x in jax.tree.leaves(args)]
            raise ValueError(
                "the loss cannot be evaluated on these `args`; their leading sizes "
                f"differ (shapes {shapes}), and examples must match one to one."
            ) from error
        raise
    if getattr(value, "shape", None) != () or not jnp.issubdtype(
        value.dtype, jnp.floating
    ):
        raise ValueError(
            "the loss must return one real number, got "
            f"{jax.tree.map(lambda x: (x.shape, str(x.dtype)), value)}. Take the mean "
            "over the examples: `return jnp.mean(losses)`."
        )
    if objective.on_host:
        return _check_operations(MatrixFree, needs)
    model = _model.eval_shape(objective, params, args)
    return _check_operations(type(model.curvature), needs)


# Compiled functions remember the shapes of what they returned, so that a second
# call with other data does not trace the loss again.
@jax.jit
def _evaluate(loss_fn, params, args):
    return loss_fn(params, *args)


@jax.jit
def _model(objective, params, args):
    return objective.model(params, args)


def _check_operations(curvature: type, needs: tuple[str, ...]) -> type:
    missing = [name for name in needs if not hasattr(curvature, name)]
    if missing:
        raise ValueError(
            f"this choice needs a curvature with {missing}, which "
            f"{curvature.__name__} does not have. Use a stored curvature "
            "(`sparserec.quadratic.dense(...)`, or a model with at most "
            "`Hessian(dense_limit=...)` weights), or `mask_rule='top_k'`."
        )
    return curvature


def check_start(solution: Solution) -> None:
    """Raises where the loss was not finite to begin with; traced solutions pass."""
    if isinstance(solution.status, Tracer) or solution.status.ndim:
        return
    if int(solution.status) == Status.NONFINITE and int(solution.iterations) == 0:
        raise ValueError(
            "the loss is NaN or infinite at the starting params. Look for NaN in "
            "`params` and `args`: `jax.tree.map(lambda x: bool(jnp.isnan(x).any()), "
            "(params, args))`."
        )
