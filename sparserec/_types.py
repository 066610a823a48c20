"""Names for what travels through the package: params, masks, budgets, status codes.

Legend used in annotations: n weights, m examples (rows), k weights kept.
"""

import enum
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Params: TypeAlias = Any
"""A pytree of floating arrays: a dict, an nnx `State`, nested tuples, one array."""

Mask: TypeAlias = Any
"""Booleans with the structure and shapes of the params; `True` where kept."""

Scalar: TypeAlias = Float[Array, ""]
Count: TypeAlias = Int[Array, ""]

LossFn: TypeAlias = Callable[..., Scalar]
"""`loss_fn(params, *args) -> scalar`."""

Prunable: TypeAlias = Callable[[str, Array], bool] | Any
"""`(path, leaf) -> bool`, or a pytree of bools shaped like the params."""

PRECISION = jax.lax.Precision.HIGHEST
"""Matmul precision of curvature products and solves: TF32 would cost them 13 bits."""


class Status(enum.IntEnum):
    """Why a solver stopped.

    Attributes:
      RUNNING: no reason to stop yet; never the status of a returned solution.
      CONVERGED: the change and the stationarity measure fell below `tol`.
      MAX_STEPS: the allowed number of steps was used up. For a schedule of fixed
        length (pruning on fresh data) this is the normal end.
      NONFINITE: a NaN or an infinity appeared; the best finite iterate is returned.
      NOT_POSITIVE_DEFINITE: the curvature on the support is not positive definite
        at the damping given; the best iterate is returned.
      CYCLED: a support came back without progress; the best iterate is returned.
    """

    RUNNING = 0
    CONVERGED = 1
    MAX_STEPS = 2
    NONFINITE = 3
    NOT_POSITIVE_DEFINITE = 4
    CYCLED = 5


def first_status(
    *verdicts: tuple[Bool[Array, ""], Status | Int[Array, ""]],
) -> Int[Array, ""]:
    """The code of the first condition that holds, int32; `RUNNING` if none does."""
    conditions, codes = zip(*verdicts, strict=True)
    codes = [jnp.asarray(code, jnp.int32) for code in codes]
    return jnp.select(conditions, codes, jnp.asarray(Status.RUNNING, jnp.int32))
