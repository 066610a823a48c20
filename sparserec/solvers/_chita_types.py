"""What the variants of CHITA take, and what they return."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sparserec._types import Mask, Params, Scalar


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["ridges", "exchanges", "tol", "max_steps", "metric"],
    meta_fields=["keep_kernel"],
)
@dataclasses.dataclass(frozen=True)
class Limits:
    """The choices within a stage; see `chita`.

    Attributes:
      ridges: candidates, shape `(l,)`.
      exchanges: rounds of exchanges, shape `()`.
      tol: of the steps within a stage, shape `()`.
      max_steps: IHT steps or passes within a stage, shape `()`.
      metric: power of the diagonal by which weights compete, shape `()`.
      keep_kernel: whether the kernel of the support is wanted afterwards; static.
    """

    ridges: Float[Array, "l"]
    exchanges: Int[Array, ""]
    tol: Scalar
    max_steps: Int[Array, ""]
    metric: Scalar
    keep_kernel: bool = False


class Found(NamedTuple):
    """What a variant finds; every field has a leading axis over the ridges.

    Attributes:
      params: shaped like the params.
      mask: their supports.
      converged: whether the variant met its tolerance.
      status: `CONVERGED`, or why the solve failed.
      kernel: of the support, where all ridges share one and it was formed; without
        a leading axis, else `None`.
      value: of the model with the ridge, where it is known, else `None`.
    """

    params: Params
    mask: Mask
    converged: Bool[Array, "l"]
    status: Int[Array, "l"]
    kernel: Float[Array, "m m"] | None = None
    value: Float[Array, "l"] | None = None


def for_each(solve: Callable[[Scalar], Found], ridges: Float[Array, "l"]) -> Found:
    """What `solve` finds for one ridge after another, stacked."""
    answers = [solve(ridge) for ridge in ridges]
    return jax.tree.map(lambda *xs: jnp.stack(xs), *answers)
