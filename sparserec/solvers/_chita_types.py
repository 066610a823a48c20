"""What the variants of CHITA return."""

from typing import NamedTuple

from jaxtyping import Array, Bool, Int

from sparserec._types import Mask, Params


class Found(NamedTuple):
    """What a variant finds; every field has a leading axis over the ridges.

    Attributes:
      params: shaped like the params.
      mask: their supports.
      converged: whether the variant met its tolerance.
      status: `CONVERGED`, or why the solve failed.
    """

    params: Params
    mask: Mask
    converged: Bool[Array, "l"]
    status: Int[Array, "l"]
