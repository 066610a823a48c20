"""What every solver returns, and how to ask whether it worked."""

from typing import NamedTuple

import jax
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from sparserec._types import Mask, Params, Scalar, Status


class History(NamedTuple):
    """What happened at every step; entries after the last step are NaN.

    Attributes:
      objective: loss after each step, shape `(max_steps,)`.
      change: relative change of the params at each step, shape `(max_steps,)`.
      kept: number of prunable weights alive after each step, float,
        shape `(max_steps,)`.
      damping: absolute damping used at each step, in units of curvature, shape
        `(max_steps,)`; NaN for solvers without damping.
    """

    objective: Float[Array, "steps"]
    change: Float[Array, "steps"]
    kept: Float[Array, "steps"]
    damping: Float[Array, "steps"]


class Solution(NamedTuple):
    """Outcome of a sparse solve; every field is an array or a pytree of arrays.

    Attributes:
      params: pruned parameters, with the structure and dtypes of the input.
      mask: booleans shaped like `params`; `True` where a weight is kept. Leaves
        that are not prunable are all `True`.
      objective: loss (or model value) at `params`, shape `()`.
      iterations: number of steps taken, int32, shape `()`.
      status: a `Status` code, int32, shape `()`.
      history: one entry for every step.
    """

    params: Params
    mask: Mask
    objective: Scalar
    iterations: Int[Array, ""]
    status: Int[Array, ""]
    history: History

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether the solver met its tolerance, shape `()`."""
        return self.status == Status.CONVERGED


class SolveError(RuntimeError):
    """A solver stopped for a reason that makes its answer doubtful."""


_MESSAGES = {
    Status.NONFINITE: (
        "a NaN or an infinity appeared in the loss or in the params after {steps} "
        "step(s). The best finite iterate is in `solution.params`. Usual causes: "
        "NaN in the data; a step that is too long (`step_size`); too little "
        "`damping` for this curvature."
    ),
    Status.NOT_POSITIVE_DEFINITE: (
        "the curvature on the support is not positive definite at this `damping` "
        "(stopped after {steps} step(s)). Give a larger `damping`, or "
        "`damping='auto'`, or a curvature that cannot be indefinite such as "
        "`sparserec.quadratic.gauss_newton(...)`."
    ),
    Status.CYCLED: (
        "the supports repeat without progress (stopped after {steps} step(s)). The "
        "best iterate is in `solution.params`. A larger `damping` or "
        "`values='obs'` breaks such cycles."
    ),
    Status.MAX_STEPS: (
        "`max_steps` = {steps} step(s) were used up before the tolerance was met. "
        "Raise `max_steps` or `tol`, or ignore this with "
        "`check(solution, allow_max_steps=True)` where a fixed number of steps is "
        "intended."
    ),
    Status.RUNNING: "the solver never ran; build solutions with a sparserec solver.",
}


def check(solution: Solution, *, allow_max_steps: bool = False) -> Solution:
    """Returns the solution unchanged if it converged, else raises with the reason.

    Args:
      solution: what a solver returned. Under `jax.vmap` all lanes are checked and
        the first failing one is named.
      allow_max_steps: accept solutions that used all their steps, which is the
        normal end of a schedule of fixed length.

    Returns:
      `solution` itself.

    Raises:
      SolveError: naming the status, the lane, and what to do about it.
      TypeError: inside `jax.jit`, where a status cannot be looked at.
    """
    if isinstance(solution.status, Tracer):
        raise TypeError(
            "`sparserec.check` reads the status and so must be called outside "
            "`jax.jit` and `jax.vmap`; inside, branch on `solution.status`."
        )
    statuses = jax.device_get(solution.status).reshape(-1)
    iterations = jax.device_get(solution.iterations).reshape(-1)
    accepted = {Status.CONVERGED} | ({Status.MAX_STEPS} if allow_max_steps else set())
    for lane, (code, steps) in enumerate(zip(statuses, iterations, strict=True)):
        status = Status(int(code))
        if status not in accepted:
            where = f" (lane {lane} of {statuses.size})" if statuses.size > 1 else ""
            reason = _MESSAGES[status].format(steps=int(steps))
            raise SolveError(f"{status.name}{where}: {reason}")
    return solution
