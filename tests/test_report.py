"""`report`: counts against NumPy, loss changes against adaptive quadrature."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate

import sparserec
from sparserec import quadratic
from sparserec._report import Report, ReportRow, report
from sparserec._solution import History, Solution


def make_solution(params, mask):
    zero = jnp.zeros(())
    return Solution(
        params=params,
        mask=mask,
        objective=zero,
        iterations=jnp.int32(1),
        status=jnp.int32(1),
        history=History(*4 * [jnp.zeros(1)]),
    )


def make_case(seed=0):
    """A network, and pruned params that were also changed where they were kept."""
    rng = np.random.default_rng(seed)
    params = {
        "first": {
            "bias": jnp.asarray(rng.normal(size=4)),
            "kernel": jnp.asarray(rng.normal(size=(3, 4))),
        },
        "second": jnp.asarray(rng.normal(size=(4, 1))),
    }
    mask = jax.tree.map(
        lambda x: jnp.asarray((rng.random(x.shape) < 0.5) | (x.ndim < 2)), params
    )
    pruned = jax.tree.map(
        lambda x, m: jnp.where(m, x + 0.3 * rng.normal(size=x.shape), 0), params, mask
    )
    return params, make_solution(pruned, mask)


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return jnp.mean((hidden @ params["second"] - y) ** 2)


def make_data(params, seed=1):
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(30, 3)))
    # The dense params fit exactly, so pruning can only raise the loss.
    hidden = jnp.tanh(x @ params["first"]["kernel"] + params["first"]["bias"][None])
    return x, hidden @ params["second"]


def changes_of(result: Any) -> list[float]:
    return [float(row.loss_change) for row in result.rows]


# --- counts --------------------------------------------------------------------------


def test_counts_are_those_of_numpy():
    params, solution = make_case()
    result = report(params, solution)
    assert [row.path for row in result.rows] == ["first/bias", "first/kernel", "second"]
    for row, leaf in zip(result.rows, jax.tree.leaves(solution.mask), strict=True):
        flags = np.asarray(leaf)
        assert row == (
            row.path,
            flags.shape,
            np.count_nonzero(flags),
            flags.size,
            flags.mean(),
            None,
            None,
        )
        assert type(row.kept) is int
        assert type(row.density) is float
    assert result.total == 20
    assert result.kept == sum(
        np.count_nonzero(x) for x in jax.tree.leaves(solution.mask)
    )
    assert result.density == result.kept / 20


def test_a_single_array_nothing_kept_and_empty_leaves():
    params = jnp.ones(4)
    (row,) = report(params, make_solution(0 * params, jnp.zeros(4, bool))).rows
    assert row == ("", (4,), 0, 4, 0.0, None, None)
    empty = jnp.ones((0, 3))
    (row,) = report(empty, make_solution(empty, jnp.ones((0, 3), bool))).rows
    assert row == ("", (0, 3), 0, 0, 1.0, None, None)


# --- loss changes --------------------------------------------------------------------


def test_loss_changes_are_the_integrals_along_the_line():
    params, solution = make_case()
    data = make_data(params)
    result = report(params, solution, loss, data)
    steps = jax.tree.map(jnp.subtract, solution.params, params)
    gradient = jax.jit(jax.grad(loss))

    def slope(t, index):
        point = jax.tree.map(lambda w, d: w + t * d, params, steps)
        g = jax.tree.leaves(gradient(point, *data))[index]
        return float(jnp.sum(g * jax.tree.leaves(steps)[index]))

    for index, row in enumerate(result.rows):
        exact, _ = scipy.integrate.quad(slope, 0, 1, args=(index,), epsabs=1e-10)
        assert row.loss_change == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("seed", range(3))
def test_loss_changes_add_up_to_the_difference_of_the_losses(seed):
    params, solution = make_case(seed)
    data = make_data(params)
    result = report(params, solution, loss, data)
    before, after = loss(params, *data), loss(solution.params, *data)
    assert result.loss_before == pytest.approx(float(before))
    assert result.loss_after == pytest.approx(float(after))
    changes = changes_of(result)
    assert sum(changes) == pytest.approx(float(after - before), rel=1e-7)
    for row in result.rows:
        magnitudes = sum(map(abs, changes))
        assert row.share == pytest.approx(float(row.loss_change or 0) / magnitudes)


def test_on_a_separable_loss_every_leaf_pays_for_itself():
    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
    mask = {"a": jnp.array([False, True]), "b": jnp.array([False, True])}
    solution = make_solution(sparserec.select.apply_mask(params, mask), mask)

    def separable(p):
        return jnp.sum((p["a"] - params["a"]) ** 2) + jnp.sum(
            (p["b"] - params["b"]) ** 4
        )

    result = report(params, solution, separable)
    assert changes_of(result) == pytest.approx([1.0, 81.0])
    assert [row.share for row in result.rows] == pytest.approx([1 / 82, 81 / 82])


def test_a_leaf_that_did_not_change_costs_nothing():
    params, solution = make_case()
    same = {**solution.params, "second": params["second"]}
    result = report(params, solution._replace(params=same), loss, make_data(params))
    assert result.rows[2].loss_change == 0


def test_leaves_that_lower_the_loss_have_negative_shares():
    params, solution = make_case()
    x, _ = make_data(params)
    result = report(params, solution, loss, (x, make_data(solution.params)[1]))
    assert sum(changes_of(result)) < 0
    shares = [float(row.share or 0) for row in result.rows]
    assert min(shares) < 0
    assert sum(map(abs, shares)) == pytest.approx(1)


def test_shares_are_nan_where_nothing_changed_or_the_loss_is_nan():
    params, solution = make_case()
    x, y = make_data(params)
    unchanged = report(params, solution._replace(params=params), loss, (x, y))
    broken = report(params, solution, loss, (x, y * jnp.nan))
    for result in (unchanged, broken):
        assert all(np.isnan(float(row.share or 0)) for row in result.rows)
        assert str(result).count(" -\n") == len(result.rows)


def test_a_quadratic_model_is_a_loss():
    rng = np.random.default_rng(3)
    design = jnp.asarray(rng.normal(size=(12, 5)))
    model = quadratic.least_squares(design, jnp.asarray(rng.normal(size=12)))
    params = jnp.asarray(rng.normal(size=5))
    mask = jnp.array([True, False, False, True, False])
    solution = make_solution(jnp.where(mask, params / 2, 0), mask)
    (row,) = report(params, solution, model).rows
    difference = model(solution.params) - model(params)
    assert row.loss_change == pytest.approx(float(difference), rel=1e-9)


def test_half_precision_is_measured_in_single():
    params, solution = make_case()
    data = tuple(x.astype(jnp.float32) for x in make_data(params))
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    pruned = jax.tree.map(lambda x: x.astype(jnp.bfloat16), solution.params)
    result = report(half, solution._replace(params=pruned), loss, data)
    raised = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    # Half precision would be wrong in the third digit.
    assert result.loss_before == pytest.approx(float(loss(raised, *data)), rel=1e-4)
    raised = jax.tree.map(lambda x: x.astype(jnp.float32), pruned)
    difference = float(loss(raised, *data)) - float(result.loss_before or 0)
    assert sum(changes_of(result)) == pytest.approx(difference, rel=1e-3)


# --- the table -----------------------------------------------------------------------


def test_table_without_a_loss():
    rows = (
        ReportRow("Dense_0/bias", (8,), 8, 8, 1.0),
        ReportRow("Dense_0/kernel", (1000, 8), 400, 8000, 0.05),
    )
    assert str(Report(rows)).splitlines() == [
        "leaf            shape     kept     of  density",
        "----------------------------------------------",
        "Dense_0/bias    8            8      8  100.0 %",
        "Dense_0/kernel  1000 x 8   400  8,000    5.0 %",
        "----------------------------------------------",
        "pruned leaves              400  8,000    5.0 %",
        "all leaves                 408  8,008    5.1 %",
    ]


def test_table_with_a_loss():
    rows = (
        ReportRow("a", (2, 2), 1, 4, 0.25, 0.03, 0.75),
        ReportRow("b", (2, 2), 2, 4, 0.5, 0.01, 0.25),
    )
    # No second sum: all leaves are pruned ones.
    assert str(Report(rows, 0.1, 0.14)).splitlines() == [
        "leaf        shape  kept  of  density  loss change   share",
        "---------------------------------------------------------",
        "a           2 x 2     1   4   25.0 %        +0.03  75.0 %",
        "b           2 x 2     2   4   50.0 %        +0.01  25.0 %",
        "---------------------------------------------------------",
        "all leaves            3   8   37.5 %        +0.04",
        "loss: 0.1 -> 0.14",
    ]


def test_table_of_a_single_array_and_of_a_scalar():
    array = str(Report((ReportRow("", (4,), 2, 4, 0.5),)))
    assert array.splitlines()[2].startswith("(the array)  4 ")
    scalar = str(Report((ReportRow("s", (), 1, 1, 1.0),)))
    assert "scalar" in scalar


# --- wrong calls ---------------------------------------------------------------------


def test_a_batched_solution_is_refused_with_the_remedy():
    params = jnp.arange(1.0, 6.0)
    batched = jax.vmap(lambda limit: make_solution(params, params > limit))(
        jnp.array([4.0, 3.0])
    )
    with pytest.raises(ValueError, match=r"lambda x: x\[0\]"):
        report(params, batched)
    lane = jax.tree.map(lambda x: x[1], batched)
    assert report(params, lane).kept == 2


def test_params_of_another_network_are_refused():
    _, solution = make_case()
    with pytest.raises(ValueError, match="does not belong"):
        report({"other": jnp.ones(3)}, solution)


def test_inside_jit_it_says_where_to_call_it():
    params, solution = make_case()
    with pytest.raises(TypeError, match="outside"):
        jax.jit(lambda s: report(params, s).kept)(solution)
