"""The examples of one step, divided by what they are for."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

_SHARE, _FEWEST = 8, 500  # curvature products see 1/8 of the examples, at least 500


class Examples(NamedTuple):
    """One batch of examples, divided by what they are for."""

    judge: tuple
    build: tuple
    size: int  # examples in `build`; zero where the data has no axis of examples

    def part(self, number: int | Int[Array, ""], size: int) -> tuple:
        """Every so manyth example of `build`, about `size` of them; cyclic.

        Parts are interleaved, so that data sorted by class gives fair parts too.
        """
        if not 0 < size < self.size:
            return self.build
        count = self.size // size

        def pick(x: Array) -> Array:
            folded = x[: count * size].reshape(size, count, *x.shape[1:])
            return jax.lax.dynamic_index_in_dim(
                folded, number % count, axis=1, keepdims=False
            )

        return jax.tree.map(pick, self.build)

    def curvature_part(self, number: int | Int[Array, ""]) -> tuple:
        """The part that curvature products see; all of it where nothing is held out."""
        if self.judge is self.build:
            return self.build
        return self.part(number, max(self.size // _SHARE, _FEWEST))


def divide(args: tuple, held_out: float) -> Examples:
    """Evenly spaced examples judge, the rest build; without examples all do both."""
    leading = {jnp.shape(x)[:1] for x in jax.tree.leaves(args)}
    if len(leading) != 1 or () in leading:
        return Examples(args, args, 0)
    (total,) = leading.pop()
    judges = np.zeros(total, bool)
    spacing = max(1, round(1 / held_out)) if held_out > 0 else total + 1
    judges[spacing - 1 :: spacing] = True
    if not judges.any() or judges.all():
        return Examples(args, args, total)
    return Examples(
        judge=jax.tree.map(lambda x: x[judges.nonzero()[0]], args),
        build=jax.tree.map(lambda x: x[(~judges).nonzero()[0]], args),
        size=int(total - judges.sum()),
    )
