"""Members of the pursuit family that exchange several units at a time.

Each proposes a support from the view at a refitted point. It is taken if the refitted
loss falls; if not, the next proposal is more cautious, until it is the support itself.

Legend: u units of selection, g budget groups.
"""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Int

from sparserec._run import Solver, State
from sparserec._types import Count, Scalar
from sparserec.budget import Budget
from sparserec.quadratic import Objective, make_objective
from sparserec.solvers import _box, _pursuit_common
from sparserec.solvers._box import Box
from sparserec.solvers._pursuit_common import Memory, Options, View
from sparserec.solvers._refit_within import refit_within
from sparserec.solvers._selection import Selection

MOST_REFUSED = 10
"""Proposals refused in a row: a step length of 2^-10 brings in nothing of note."""


def by_threshold(
    objective: Objective,
    selection: Selection,
    options: Options,
    extra: Count,
    view: View,
    memory: Memory,
    budget: Budget,
    args: tuple,
) -> Bool[Array, "u"]:
    r"""The largest $d_j u_j^2$ of $u = w - \eta g/d$, $\eta = 1, 1/2, \dots$ (HTP)."""
    del objective, options, extra, args
    wide = memory.diagonal.dtype
    length = jnp.exp2(-memory.refused.astype(wide))
    point = jax.tree.map(
        lambda w, g, d: w - length.astype(w.dtype) * g / d,
        view.model.center,
        view.model.gradient,
        view.diagonal,
    )
    scores = _box.worth(view.box, point, view.diagonal)
    return selection.top(selection.sums(scores), budget.counts)


def by_merging(
    objective: Objective,
    selection: Selection,
    options: Options,
    extra: Count,
    view: View,
    memory: Memory,
    budget: Budget,
    args: tuple,
) -> Bool[Array, "u"]:
    """The largest of a fit on the support and the best units outside, ck of them.

    Subspace pursuit merges k units, CoSaMP and GraSP 2k; half as many after every
    support refused. The fit is that of the local model, or for GraSP of the loss.
    """
    del extra
    outside = jnp.where(memory.chosen, 0, view.gain)
    number = (options.merge * budget.counts) >> memory.refused
    merged = memory.chosen | selection.top(outside, number)
    if options.local:
        objective, args = make_objective(view.model), ()
    fit = refit_within(
        objective,
        selection.mask(merged),
        view.model.center,
        args,
        memory.scales,
        options.slots,
        view.box,
    )
    sizes = jax.tree.map(lambda w, d: d * jnp.square(w), fit.params, view.diagonal)
    return selection.top(selection.sums(sizes), budget.counts)


def by_splicing(
    objective: Objective,
    selection: Selection,
    options: Options,
    extra: Count,
    view: View,
    memory: Memory,
    budget: Budget,
    args: tuple,
) -> Bool[Array, "u"]:
    """The worst s units out, the best s in; half as many after every refusal."""
    del objective, options, args
    present = jnp.minimum(selection.count(memory.chosen, budget), budget.counts)
    largest = jnp.minimum(extra.astype(jnp.int32), budget.counts)
    size = largest >> memory.refused
    members = jnp.where(memory.chosen, view.loss, 0)
    staying = selection.top(members, jnp.maximum(present - size, 0)) & memory.chosen
    leaving = memory.chosen & ~staying
    ranking = jnp.where(leaving, 0, view.gain)
    return selection.top(jnp.where(staying, jnp.inf, ranking), budget.counts)


def _step(
    objective: Objective,
    selection: Selection,
    options: Options,
    extra: Count,
    box: Box | None,
    state: State,
    budget: Budget,
    args: tuple,
    index: Int[Array, ""],
) -> State:
    view, memory = _pursuit_common.look(objective, selection, box, state, args)
    chosen = options.propose(
        objective, selection, options, extra, view, memory, budget, args
    )
    fit = refit_within(
        objective,
        selection.mask(chosen),
        state.params,
        args,
        memory.scales,
        options.slots,
        box,
    )
    same = jnp.all(chosen == memory.chosen)
    full = jnp.all(selection.count(memory.chosen, budget) >= budget.counts)
    slack = jnp.where(full, -memory.scales.loss, memory.scales.loss)
    accepted = same | (fit.value < state.objective + slack)
    refused = jnp.where(accepted, 0, memory.refused + 1)
    return _pursuit_common.conclude(
        state,
        fit,
        selection,
        memory._replace(chosen=chosen, refused=refused),
        accepted=accepted,
        # The first step does not see how far the refit of the start has moved it.
        final=(same | (refused > MOST_REFUSED)) & (index > 0),
    )


def exchange_solver(
    objective: Objective,
    selection: Selection,
    options: Options,
    *,
    damping: Scalar,
    extra: Count | int = 0,
    box: Box | None = None,
) -> Solver:
    """A member of the family as a `Solver`, for use with `run`.

    Args:
      objective: what to minimise, from `sparserec.quadratic.make_objective`.
      selection: the units.
      options: static choices; `propose` is `by_threshold`, `by_merging` or
        `by_splicing`.
      damping: smallest damping of a solve, relative to the mean curvature.
      extra: largest exchange of splicing.
      box: bounds of the weights; `None` for none.

    Returns:
      The pair of init and step.
    """
    return Solver(
        init=Partial(
            _pursuit_common.begin, objective, selection, options, damping, box
        ),
        step=Partial(_step, objective, selection, options, jnp.asarray(extra), box),
    )
