"""CHITA against exhaustive search and slow NumPy answers."""

import dataclasses
import functools
import itertools
from typing import Any, cast

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import sparserec
from sparserec import Status, quadratic
from sparserec.budget import make_budget
from sparserec.quadratic._fisher import fisher
from sparserec.solvers import (
    _chita_backsolve,
    _chita_compact,
    _chita_exchange,
    _chita_iht,
    _chita_rows,
    _chita_stages,
)
from sparserec.solvers._chita_types import Found, Limits
from sparserec.solvers._examples import divide
from sparserec.solvers.chita import chita

ROWS, WEIGHTS, RIDGE = 8, 14, 0.05
VARIANTS = ("iht", "cd", "cyclic", "bso", "best", "admm", "magnitude", "obs", "cbs")


@pytest.fixture(autouse=True, scope="module")
def quick_compilation():
    """Compiling is nearly all these tests do; what is compiled stays the same."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def instance(
    seed, rows=ROWS, weights=WEIGHTS, ridge=RIDGE, dtype=np.float64, slope=1
) -> tuple[Any, ...]:
    """Correlated rows, their mean as gradient, and weights of many sizes."""
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(rows, rows)) * np.linspace(0.1, 2, rows)
    x = (mixing @ rng.normal(size=(rows, weights))).astype(dtype)
    center = (rng.normal(size=weights) * rng.uniform(0.2, 2, weights)).astype(dtype)
    gradient = (slope * x.mean(axis=0)).astype(dtype)
    model = quadratic.low_rank(
        jnp.asarray(x), jnp.asarray(center), jnp.asarray(gradient), ridge=ridge
    )
    return model, x, center, gradient


def value(x, center, gradient, ridge, params):
    x, center, gradient, params = (
        np.asarray(a, np.float64) for a in (x, center, gradient, params)
    )
    step = params - center
    bend = np.sum((x @ step) ** 2) + ridge * step @ step
    return gradient @ step + bend / 2


def optimum(x, center, gradient, ridge, mask):
    """The minimiser on a support by the normal equations in double precision."""
    x, center, gradient = (np.asarray(a, np.float64) for a in (x, center, gradient))
    hessian = x.T @ x + ridge * np.eye(center.size)
    return oracles.minimize_on(hessian, hessian @ center - gradient, mask)


def linear_form(x, center, gradient, ridge):
    hessian = x.T @ x + ridge * np.eye(center.size)
    return hessian, hessian @ center - gradient


# --- the exact pieces ----------------------------------------------------------------


@jax.jit
def solve_on(problem, mask):
    split = _chita_backsolve.split_gradient(problem)
    return _chita_backsolve.backsolve(problem, mask, split)


@pytest.mark.parametrize("k", [0, 1, 5, 8, 11, WEIGHTS])
@pytest.mark.parametrize("slope", ["mean", "other"])
def test_backsolve_is_the_minimiser_on_the_support(k, slope):
    model, x, center, gradient = instance(0)
    if slope == "other":  # no combination of rows
        gradient = np.random.default_rng(9).normal(size=WEIGHTS)
    mask = oracles.random_mask(np.random.default_rng(k), WEIGHTS, k)
    problem = dataclasses.replace(
        _chita_rows.row_problem(model), gradient=jnp.asarray(gradient)
    )
    point, status = solve_on(problem, jnp.asarray(mask))
    expected = optimum(x, center, gradient, RIDGE, mask)
    assert status == Status.CONVERGED
    np.testing.assert_allclose(point.params, expected, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(
        point.value, value(x, center, gradient, RIDGE, expected), rtol=1e-8, atol=1e-10
    )


@pytest.mark.parametrize("k", [40, 150, 400])
def test_backsolve_is_accurate_in_single_precision_at_any_ridge(k):
    """Below and above as many weights as rows; the spectrum of rows of a network."""
    rows, weights = 100, 800
    rng = np.random.default_rng(1)
    decay = 4 * np.arange(1, rows + 1) ** -1.0
    x = (decay[:, None] * rng.normal(size=(rows, weights)) / 10).astype(np.float32)
    turn, _ = np.linalg.qr(rng.normal(size=(rows, rows)))
    x = (turn @ x).astype(np.float32)
    center = (0.1 * rng.normal(size=weights)).astype(np.float32)
    gradient = x.mean(axis=0)
    mask = oracles.top_k_mask(center.astype(np.float64), k)
    model = quadratic.low_rank(
        jnp.asarray(x), jnp.asarray(center), jnp.asarray(gradient)
    )
    for exponent in range(-6, 0):
        ridge = 16 * 10.0**exponent
        problem = dataclasses.replace(
            _chita_rows.row_problem(model), ridge=jnp.float32(ridge)
        )
        assert problem.rows.dtype == jnp.float32
        point, _ = solve_on(problem, jnp.asarray(mask))
        exact = optimum(x, center, gradient, ridge, mask)
        best = value(x, center, gradient, ridge, exact)
        found = value(x, center, gradient, ridge, point.params)
        assert abs(found - best) <= 1e-5 * abs(best), exponent


@pytest.fixture
def copied_columns(monkeypatch):
    """Supports of at most 16 entries are copied together in the problem returned."""
    monkeypatch.setattr(_chita_compact, "_LEAST", 0)
    assert _chita_compact.capacity(24, 61) == 16
    return instance(11, rows=24, weights=61)


@pytest.mark.parametrize("slope", ["mean", "none", "other"])
def test_backsolve_on_copied_columns(copied_columns, slope):
    """Full and empty supports, one larger than fits; several ridges share the copy."""
    model, x, center, gradient = copied_columns
    if slope == "none":
        gradient = np.zeros_like(gradient)
    if slope == "other":
        gradient = np.random.default_rng(3).normal(size=center.size)
    model = dataclasses.replace(model, gradient=jnp.asarray(gradient))
    for k in (0, 1, 11, 16, 17):
        found = chita(model, model.center, k, variant="bso", ridge=0.02, metric=0)
        mask = np.asarray(found.mask)
        assert mask.sum() == k
        if slope == "none":
            np.testing.assert_array_equal(mask, oracles.top_k_mask(center, k))
        expected = optimum(x, center, gradient, RIDGE + 0.02, mask)
        np.testing.assert_allclose(found.params, expected, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(
            found.objective - model.value,
            value(x, center, gradient, RIDGE + 0.02, expected),
            rtol=1e-8,
            atol=1e-9,
        )


def test_ridges_share_copied_columns_and_starts_differ(copied_columns):
    model, x, center, gradient = copied_columns
    start = center + 0.1 * np.random.default_rng(0).normal(size=center.size)
    limits = Limits(
        ridges=jnp.asarray([0.0, 0.3]),
        exchanges=jnp.int32(0),
        tol=jnp.asarray(1e-3),
        max_steps=jnp.int32(1),
        metric=jnp.asarray(1.0),
    )
    budget = make_budget(9, model.center, lambda *_: True)
    found = _chita_stages._candidates(
        "bso", model, jnp.asarray(start), budget, limits, given=True
    )
    for i, ridge in enumerate((RIDGE, RIDGE + 0.3)):
        expected = optimum(x, center, gradient, ridge, np.asarray(found.mask[i]))
        np.testing.assert_allclose(found.params[i], expected, rtol=1e-7, atol=1e-9)


def test_nan_off_the_copied_columns_is_found(copied_columns):
    _, x, center, _ = copied_columns
    x[3, np.argmin(np.abs(center))] = np.nan
    broken = quadratic.low_rank(jnp.asarray(x), jnp.asarray(center))
    with pytest.raises(ValueError, match="NaN"):
        chita(broken, broken.center, 5, variant="bso", metric=0)


@pytest.mark.parametrize("filled", [0, 3, 255, 256, 257, 2400])
def test_rows_times_vectors_with_few_entries(filled):
    rng = np.random.default_rng(filled)
    x, vectors = rng.normal(size=(7, 2400)), np.zeros((2400, 3))
    for column in vectors.T:
        column[rng.permutation(2400)[:filled]] = rng.normal(size=filled)
    found = jax.jit(_chita_rows.sparse_product)(jnp.asarray(x), jnp.asarray(vectors))
    np.testing.assert_allclose(found, x @ vectors, rtol=1e-9, atol=1e-10)


def test_changes_are_those_of_full_refits():
    model, x, center, gradient = instance(2)
    mask = oracles.top_k_mask(center, 5)
    problem = _chita_rows.row_problem(model)
    point, _ = solve_on(problem, jnp.asarray(mask))
    out = np.append(np.flatnonzero(mask), 14)
    into = np.append(np.flatnonzero(~mask), 14)
    gram = _chita_rows.kernel(problem.rows, jnp.asarray(mask))
    change = jax.jit(_chita_exchange.changes)(
        problem, point, gram, jnp.asarray(out), jnp.asarray(into)
    )
    before = value(x, center, gradient, RIDGE, point.params)
    for j, coming in enumerate(into[:-1]):
        for i, leaving in enumerate(out[:-1]):
            other = mask.copy()
            other[leaving], other[coming] = False, True
            refitted = optimum(x, center, gradient, RIDGE, other)
            expected = value(x, center, gradient, RIDGE, refitted) - before
            np.testing.assert_allclose(change[j, i], expected, rtol=1e-6, atol=1e-8)
    assert np.all(np.isinf(change[-1]))
    assert np.all(np.isinf(change[:, -1]))


def test_first_change_is_where_the_support_changes():
    model, _, center, _ = instance(3)
    rng = np.random.default_rng(0)
    mask = oracles.top_k_mask(center, 7)
    point = _chita_rows.point_at(
        _chita_rows.row_problem(model),
        jnp.where(mask, center, 0.0),
        jnp.asarray(mask),
    )
    slope = rng.normal(size=WEIGHTS)
    length = float(
        _chita_iht.first_change(
            point,
            jnp.asarray(slope),
            jnp.where(mask, slope, 0.0),
            jnp.ones(WEIGHTS, bool),
            np.zeros(WEIGHTS, np.int32),
            1,
        )
    )
    for factor, same in ((1 - 1e-6, True), (1 + 1e-6, False)):
        moved = np.where(mask, center, 0) - factor * length * slope
        assert np.array_equal(oracles.top_k_mask(moved, 7), mask) == same


@pytest.mark.parametrize("rows", [3, 260])
def test_passes_over_gathered_columns(rows):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 2100))
    mask = rng.random(2100) < 0.2
    vector, u = rng.normal(size=2100), rng.normal(size=rows)
    columns = _chita_rows.gather(jnp.asarray(x), jnp.asarray(mask), 4)
    np.testing.assert_allclose(
        columns.times(jnp.asarray(vector)), x[:, mask] @ vector[mask], rtol=1e-10
    )
    expected = np.where(mask, u @ x, 0)
    found = columns.transposed_times(jnp.asarray(u), jnp.asarray(vector))
    np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-12)
    gram = _chita_rows.kernel(jnp.asarray(x), jnp.asarray(mask))
    np.testing.assert_allclose(gram, x[:, mask] @ x[:, mask].T, rtol=1e-9, atol=1e-9)


def test_a_pass_of_cyclic_descent_is_that_of_a_loop():
    model, x, center, gradient = instance(4)
    solution = chita(model, model.center, 6, variant="cyclic", max_steps=3, tol=0.0)
    mask = np.asarray(solution.mask)
    # The support is that of the thresholded step, and so are the values it starts at.
    hessian, linear = linear_form(x, center, gradient, RIDGE)
    diagonal = np.diag(hessian)

    def cut(params):
        return np.where(oracles.top_k_mask(np.sqrt(diagonal) * params, 6), params, 0)

    direction = gradient / (diagonal + diagonal.mean())
    inside = np.where(cut(center) != 0, direction, 0)
    exact = inside @ gradient / (inside @ hessian @ inside)
    trials = [cut(center - factor * exact * direction) for factor in (0, 0.5, 1, 2)]
    params = min(trials, key=lambda w: value(x, center, gradient, RIDGE, w)).copy()
    np.testing.assert_array_equal(params != 0, mask)
    for _ in range(3):
        for i in np.flatnonzero(mask):
            params[i] -= (hessian[i] @ params - linear[i]) / hessian[i, i]
    np.testing.assert_allclose(solution.params, params, rtol=1e-8)


# --- the variants --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_variants_are_ordered_and_exchanges_are_lowest(seed):
    model, x, center, gradient = instance(seed)
    k = 5
    values = {
        name: float(chita(model, model.center, k, variant=name, tol=1e-8).objective)
        for name in ("magnitude", "cyclic", "cd", "bso", "best")
    }
    slack = 1e-9 * abs(values["magnitude"])
    assert values["cyclic"] <= values["magnitude"] + slack
    assert values["cd"] <= values["magnitude"] + slack
    assert values["bso"] <= min(values["cyclic"], values["cd"]) + slack
    assert values["best"] <= values["bso"] + slack
    iht = chita(model, model.center, k, variant="iht", tol=1e-8)
    assert values["best"] <= float(iht.objective) + slack
    assert np.isclose(
        iht.objective, value(x, center, gradient, RIDGE, iht.params), rtol=1e-9
    )


@pytest.mark.parametrize("seed", range(3))
def test_best_is_close_to_the_best_support_of_all(seed):
    model, x, center, gradient = instance(seed)
    hessian, linear = linear_form(x, center, gradient, RIDGE)
    found = chita(model, model.center, 4, exchanges=50)
    ideal = oracles.best_support(hessian, linear, 4)
    constant = value(x, center, gradient, RIDGE, np.zeros(WEIGHTS))
    neighbours = []
    mask = np.asarray(found.mask)
    for i in np.flatnonzero(mask):
        for j in np.flatnonzero(~mask):
            other = mask.copy()
            other[i], other[j] = False, True
            params = oracles.minimize_on(hessian, linear, other)
            neighbours.append(oracles.quadratic_value(hessian, linear, params))
    own = float(found.objective) - constant
    assert own >= ideal.value - 1e-9 * abs(ideal.value)
    assert own <= min(neighbours) + 1e-9 * abs(own), "an exchange would lower it"
    assert found.converged


def test_admm_ends_near_the_best_support_of_all():
    excess = []
    for seed in range(8):
        _, x, center, gradient = instance(seed)
        hessian, linear = linear_form(x, center, gradient, RIDGE)
        model = quadratic.dense(*map(jnp.asarray, (hessian, center, gradient)))
        ideal = oracles.best_support(hessian, linear, 4).value
        constant = value(x, center, gradient, RIDGE, np.zeros(WEIGHTS))
        found, plain = (
            float(chita(model, model.center, 4, variant=name, metric=0).objective)
            for name in ("admm", "bso")
        )
        assert found - constant >= ideal - 1e-9 * abs(ideal)
        excess.append((found - constant - ideal, plain - constant - ideal))
    admm, one_step = np.mean(excess, axis=0)
    assert admm < 0.5 * one_step


def test_admm_where_weights_do_not_act_on_each_other():
    """Every weight costs what it costs alone: the largest at the minimum stay."""
    rng = np.random.default_rng(0)
    center, slope = rng.normal(size=(2, 20))
    model = quadratic.diagonal(
        jnp.full(20, 2.0), jnp.asarray(center), jnp.asarray(slope)
    )
    least = center - slope / 2
    solution = chita(model, model.center, 7, variant="admm", metric=0)
    mask = oracles.top_k_mask(least, 7)
    np.testing.assert_array_equal(solution.mask, mask)
    np.testing.assert_allclose(solution.params, np.where(mask, least, 0), rtol=1e-12)


def test_admm_without_a_minimum_fails_and_keeps_the_budget():
    model = quadratic.dense(-jnp.eye(6), jnp.arange(1.0, 7.0))
    solution = chita(model, model.center, 2, variant="admm", ridge=0.5)
    assert int(solution.status) == Status.NOT_POSITIVE_DEFINITE
    assert np.all(np.isfinite(solution.params))


def test_iht_never_rises():
    model, *_ = instance(5)
    values = [
        float(chita(model, model.center, 5, variant="iht", max_steps=n).objective)
        for n in (1, 2, 3, 5, 8, 13)
    ]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(values))
    assert values[-1] < values[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("k", [0, 1, WEIGHTS])
def test_extreme_budgets(variant, k):
    model, x, center, gradient = instance(6)
    solution = chita(model, model.center, k, variant=variant, max_steps=400, tol=1e-12)
    assert int(jnp.sum(solution.mask)) == k
    assert np.all(np.isfinite(solution.params))
    assert np.count_nonzero(solution.params) <= k
    if k == WEIGHTS and variant in ("bso", "best", "admm"):
        best = optimum(x, center, gradient, RIDGE, np.ones(WEIGHTS, bool))
        np.testing.assert_allclose(solution.params, best, rtol=1e-6, atol=1e-8)


def test_baselines_are_the_published_updates():
    _, x, center, _ = instance(7)
    model = quadratic.low_rank(jnp.asarray(x), jnp.asarray(center), ridge=RIDGE)
    hessian = x.T @ x + RIDGE * np.eye(WEIGHTS)
    inverse = np.linalg.inv(hessian)
    mask = oracles.top_k_mask(center**2 / np.diag(inverse), 5)
    alone = np.where(mask, 0, center / np.diag(inverse))
    expected = np.where(mask, center - inverse @ alone, 0)
    found = chita(model, model.center, 5, variant="obs")
    np.testing.assert_array_equal(found.mask, mask)
    np.testing.assert_allclose(found.params, expected, rtol=1e-6, atol=1e-9)
    joint = oracles.obs_constraint_form(hessian, center, mask)
    surgeon = chita(model, model.center, 5, variant="cbs", exchanges=0)
    np.testing.assert_allclose(surgeon.params, joint, rtol=1e-6, atol=1e-9)
    exchanged = chita(model, model.center, 5, variant="cbs", exchanges=20)
    assert exchanged.objective <= surgeon.objective


def test_more_rows_than_weights_is_the_same_problem():
    model, x, center, gradient = instance(8, rows=50, weights=20)
    solution = chita(model, model.center, 6, variant="bso")
    best = optimum(x, center, gradient, RIDGE, np.asarray(solution.mask))
    np.testing.assert_allclose(solution.params, best, rtol=1e-6, atol=1e-9)


def test_blocks_go_through_the_solve_of_the_curvature():
    rng = np.random.default_rng(0)
    blocks = np.stack([oracles.random_positive(rng, 4, 10.0) for _ in range(3)])
    center, gradient = rng.normal(size=12), 0.1 * rng.normal(size=12)
    model = quadratic.block_diagonal(
        jnp.asarray(blocks), jnp.asarray(center), jnp.asarray(gradient)
    )
    solution = chita(model, model.center, 5, variant="bso", ridge=0.1)
    hessian = np.zeros((12, 12))
    for i, block in enumerate(blocks):
        hessian[4 * i : 4 * i + 4, 4 * i : 4 * i + 4] = block
    hessian = hessian + 0.1 * np.eye(12)
    expected = oracles.minimize_on(
        hessian, hessian @ center - gradient, np.asarray(solution.mask)
    )
    np.testing.assert_allclose(solution.params, expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="LowRank"):
        chita(model, model.center, 5, variant="cd")


def test_the_metric_says_what_weights_compete_by():
    model, x, center, _ = instance(11, slope=0)
    diagonal = np.sum(x**2, axis=0) + RIDGE
    for power in (0.0, 1.0, -0.5):
        scores = diagonal ** (power / 2) * np.abs(center)
        solution = chita(model, model.center, 5, variant="bso", metric=power)
        kept = np.flatnonzero(solution.mask)
        assert set(kept) == set(np.argsort(-scores)[:5])


@pytest.mark.parametrize(
    "first_order", [pytest.param(False, marks=pytest.mark.slow), True]
)
def test_fisher_blocks_are_minimised_on_the_support(first_order):
    rng = np.random.default_rng(12)
    inputs, targets = rng.normal(size=(9, 6)), rng.normal(size=(9, 4))
    params = {"w": jnp.asarray(rng.normal(size=(6, 4)))}

    def loss(params, x, y):
        return jnp.mean(jnp.square(x @ params["w"] - y))

    rows = fisher(blocks=4, ridge=RIDGE, first_order=first_order)
    model = rows(loss, params, (jnp.asarray(inputs), jnp.asarray(targets)))
    hessian = np.stack(
        [
            np.ravel(
                model.curvature.matvec({"w": jnp.asarray(unit.reshape(6, 4))})["w"]
            )
            for unit in np.eye(24).reshape(24, 6, 4)
        ]
    )
    center, gradient = (np.ravel(t["w"]) for t in (model.center, model.gradient))
    solution = chita(model, params, 10, variant="bso", ridge=0.1, metric=0.0)
    mask = np.ravel(solution.mask["w"])
    if not first_order:
        assert set(np.flatnonzero(mask)) == set(np.argsort(-np.abs(center))[:10])
    hessian = hessian + 0.1 * np.eye(24)
    expected = oracles.minimize_on(hessian, hessian @ center - gradient, mask)
    np.testing.assert_allclose(np.ravel(solution.params["w"]), expected, atol=1e-9)
    step = expected - center
    lowest = model.value + gradient @ step + step @ hessian @ step / 2
    np.testing.assert_allclose(solution.objective, lowest, rtol=1e-10)


@pytest.mark.slow
def test_groups_keep_their_own_budgets():
    _, x, center, gradient = instance(9)

    def tree(v):
        return {"a": jnp.asarray(v[:8]).reshape(2, 4), "b": jnp.asarray(v[8:])[None]}

    model = quadratic.low_rank(jnp.asarray(x), tree(center), tree(gradient), ridge=0.05)
    for variant in ("iht", "best"):
        solution = chita(model, tree(center), {"a": 3, "b": 2}, variant=variant)
        assert [int(jnp.sum(m)) for m in jax.tree.leaves(solution.mask)] == [3, 2]


# --- a network -----------------------------------------------------------------------


def loss(params, inputs, targets):
    hidden = jnp.tanh(inputs @ params["first"])
    return jnp.mean(
        jnp.square(hidden @ params["second"] + params["bias"][None, :] - targets)
    )


TRACES = []


def counted_loss(params, inputs, targets):
    TRACES.append(None)
    return loss(params, inputs, targets)


def network(examples=64, stages=None):
    rng = np.random.default_rng(0)
    params = {
        "bias": jnp.zeros(1),
        "first": jnp.asarray(rng.normal(size=(4, 6)) / 2),
        "second": jnp.asarray(rng.normal(size=(6, 1)) / 2),
    }
    shape = (examples,) if stages is None else (stages, examples)
    inputs = rng.normal(size=(*shape, 4))
    targets = np.tanh(inputs[..., :1] - inputs[..., 1:2])
    return params, (jnp.asarray(inputs), jnp.asarray(targets))


rows_of_four = fisher(batch_size=4)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["bso", "iht"])
def test_stages_beat_one_stage_and_magnitude(variant):
    params, batches = network(stages=10)
    args = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batches)
    common = {"curvature": rows_of_four, "variant": variant, "ridge": 0.05}
    one = chita(loss, params, 10, args=args, **common)
    many = chita(loss, params, 10, batches=batches, stages=10, **common)
    kept = sparserec.select.top_k([params["first"], params["second"]], 10)
    plain = {
        "bias": params["bias"],
        **dict(
            zip(
                ("first", "second"),
                sparserec.apply_mask([params["first"], params["second"]], kept),
                strict=True,
            )
        ),
    }
    assert loss(many.params, *args) < loss(one.params, *args)
    assert loss(many.params, *args) < loss(plain, *args)
    # Stages may stall, and so end, before they are used up.
    assert many.status in (Status.MAX_STEPS, Status.CONVERGED)
    alive = sum(int(jnp.count_nonzero(many.params[n])) for n in ("first", "second"))
    assert alive <= 10


def test_stages_on_a_single_array():
    inputs, targets = network()[1]
    weights = jnp.full((inputs.shape[1], targets.shape[1]), 0.1)

    def linear(weights, x, y):
        return jnp.mean(jnp.square(x @ weights - y))

    args = (inputs, targets)
    solution = chita(linear, weights, 3, args=args, variant="bso", stages=3, ridge=0.1)
    assert int(solution.mask.sum()) == 3
    np.testing.assert_allclose(solution.objective, linear(solution.params, *args))


def test_a_refinement_is_a_damped_newton_step_of_the_loss():
    params, args = network()
    common = {"curvature": rows_of_four, "variant": "bso", "ridge": 0.1, "args": args}
    before = chita(loss, params, 10, **common)
    after = chita(loss, params, 10, refinements=1, **common)
    curvature = cast(quadratic.LowRank, rows_of_four(loss, params, args).curvature)
    rows = np.asarray(curvature.rows)
    mask = np.concatenate([np.ravel(m) for m in jax.tree.leaves(before.mask)])
    start, unravel = jax.flatten_util.ravel_pytree(before.params)
    slope = np.asarray(jax.grad(lambda v: loss(unravel(v), *args))(start))[mask]
    kept = rows[:, mask]
    move = np.zeros(start.size)
    lengths = 0, 1 / 64, 1 / 16, 1 / 4, 1 / 2, 1
    move[mask] = -np.linalg.solve(kept.T @ kept + 0.1 * np.eye(mask.sum()), slope)
    trials = [unravel(start + length * move) for length in lengths]
    best = min(trials, key=lambda trial: float(loss(trial, *args)))
    for a, b in zip(*map(jax.tree.leaves, (after.params, best)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    assert after.objective < before.objective


def test_the_average_of_the_last_stages_is_taken_where_its_loss_is_lower():
    def distance(params):
        return jnp.sum(jnp.square(params - jnp.asarray([3.0, 2.0, 0.1, 0.0])))

    objective = quadratic.make_objective(distance)
    options = _chita_stages.Options(stages=6)
    budget = make_budget(2, jnp.zeros(4), lambda *_: True)
    examples = divide((), 0.0)
    mask = jnp.asarray([True, True, False, False])

    def end(last, before):
        found = Found(last, mask, jnp.bool_(True), jnp.int32(Status.CONVERGED))
        chosen, _ = _chita_stages._averaged(
            objective, options, found, before, examples, budget, jnp.int32(5)
        )
        return chosen

    last = jnp.asarray([4.0, 1.0, 0.0, 0.0])
    better = end(last, jnp.asarray([2.0, 3.0, 0.2, 0.0]))
    # Two of six stages count; the mean of the last two keeps its two largest.
    np.testing.assert_allclose(better.params, [3.0, 2.0, 0.0, 0.0])
    worse = end(last, jnp.asarray([9.0, 9.0, 0.0, 0.0]))
    np.testing.assert_array_equal(worse.params, last)


@pytest.mark.slow
def test_fresh_rows_from_a_callable_are_those_of_a_stack():
    params, batches = network(stages=4)
    common = {"curvature": rows_of_four, "variant": "bso", "ridge": 0.1, "stages": 4}
    stacked = chita(loss, params, 8, batches=batches, **common)
    called = chita(
        loss,
        params,
        8,
        batches=lambda t: jax.tree.map(lambda x: x[t], batches),
        **common,
    )
    for a, b in zip(
        *map(jax.tree.leaves, (stacked.params, called.params)), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.slow
def test_the_best_of_several_ridges_is_taken():
    params, args = network()
    ridges = (1e-3, 0.1, 10.0)
    common = {"args": args, "curvature": rows_of_four, "variant": "bso"}
    several = chita(loss, params, 10, ridge=ridges, held_out=0.25, **common)
    assert float(several.history.damping[0]) in ridges
    judge = jax.tree.map(lambda x: x[3::4], args)
    build = jax.tree.map(lambda x: x[np.arange(64) % 4 != 3], args)
    single = [
        float(
            loss(
                chita(
                    loss,
                    params,
                    10,
                    args=build,
                    ridge=r,
                    curvature=rows_of_four,
                    variant="bso",
                ).params,
                *judge,
            )
        )
        for r in ridges
    ]
    found = float(loss(several.params, *judge))
    assert found <= min(single) * (1 + 1e-3) + 1e-9 or found in single


def schedule_oracle(name, stages, final, first):
    """Kept share after every stage, from the formulas of the publication."""
    s, b = 1 - final, 1 - first
    for t in range(stages):
        share = t / (stages - 1)
        yield (
            1
            - {
                "exp": b + (s - b) * (1 - 2.0**-t) / (1 - 2.0 ** -(stages - 1)),
                "poly": s + (b - s) * (1 - share) ** 3,
                "linear": b + (s - b) * share,
                "const": s,
                "mfac": 1 - (1 - b) * ((1 - s) / (1 - b)) ** ((t + 1) / stages),
            }[name]
        )


@pytest.mark.parametrize("name", ["exp", "poly", "linear", "const", "mfac"])
def test_schedules(name):
    params = jnp.ones(1000)
    budget = sparserec.make_budget(100, params)
    options = _chita_stages.Options(stages=9, schedule=name, start_density=0.8)
    found = [
        int(_chita_stages.stage_budget(options, budget, jnp.int32(t)).counts[0])
        for t in range(9)
    ]
    expected = [1000 * d for d in schedule_oracle(name, 9, 0.1, 0.8)]
    np.testing.assert_allclose(found, expected, atol=0.51)
    assert found[-1] == 100


def test_geometric_schedule_refines_at_the_end():
    budget = sparserec.make_budget(10, jnp.ones(1000))
    options = _chita_stages.Options(stages=9, schedule="geometric")
    found = [
        int(_chita_stages.stage_budget(options, budget, jnp.int32(t)).counts[0])
        for t in range(9)
    ]
    expected = [1000 * 0.01 ** ((t + 1) / 6) for t in range(6)]
    np.testing.assert_allclose(found[:6], expected, atol=0.51)
    assert found[5:] == [10] * 4


def test_one_compilation_for_all_budgets_and_ridges():
    params, args = network()
    TRACES.clear()
    call = functools.partial(
        chita, counted_loss, params, args=args, curvature=rows_of_four, variant="bso"
    )
    call(10, ridge=0.1)
    first = len(TRACES)
    for k in (3, 7, 20):
        for ridge in (0.01, 1.0):
            call(k, ridge=ridge, exchanges=k, tol=1e-2)
    # The check of the mean evaluates the loss outside compiled code.
    checks = (len(TRACES) - first) // 6
    TRACES.clear()
    call(5, ridge=0.3)
    assert len(TRACES) == checks


def test_under_vmap_and_jit():
    model, *_ = instance(0)
    ks = jnp.asarray([2, 5, 9])
    solve = functools.partial(chita, model, model.center, variant="bso")
    batched = jax.jit(jax.vmap(solve))(ks)
    for lane, k in enumerate((2, 5, 9)):
        alone = solve(k)
        np.testing.assert_allclose(batched.params[lane], alone.params, atol=1e-9)


# --- weights that no row sees -------------------------------------------------------


def blind_problem():
    """Least squares whose loss does not depend on its two largest weights."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(24, 6))
    x[:, [1, 4]] = 0
    params = np.array([0.5, 30.0, 1.0, -2.0, -20.0, 0.7])
    targets = x @ params + rng.normal(size=24)

    def loss(params, x, targets):
        return jnp.mean(jnp.square(x @ params - targets)) / 2

    return loss, jnp.asarray(params), (jnp.asarray(x), jnp.asarray(targets))


def test_weights_that_no_row_sees_are_pruned_first():
    loss, params, args = blind_problem()
    solve = functools.partial(
        chita, loss, args=args, curvature=fisher(), variant="bso", ridge=0.05
    )
    solution = solve(params, 3)
    np.testing.assert_array_equal(solution.mask[jnp.array([1, 4])], False)
    np.testing.assert_equal(int(solution.mask.sum()), 3)
    # Just as if they had been zero from the start.
    clean = solve(params.at[jnp.array([1, 4])].set(0), 3)
    np.testing.assert_allclose(solution.params, clean.params, rtol=1e-8, atol=1e-12)
    # Where there is room for all that is seen and more, the larger one stays.
    roomy = solve(params, 5)
    np.testing.assert_array_equal(roomy.mask, [True, True, True, True, False, True])


def test_a_given_model_keeps_what_its_rows_do_not_see():
    loss, params, args = blind_problem()
    model = fisher()(loss, params, args)
    solution = chita(model, params, 3, variant="bso", ridge=0.05)
    # Its own objective has the ridge, which is large for the largest weights.
    np.testing.assert_array_equal(solution.mask[jnp.array([1, 4])], True)


# --- bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"variant": "swap"}, ValueError, "variant"),
        ({"schedule": "cosine"}, ValueError, "schedule"),
        ({"stages": 0}, ValueError, "stages"),
        ({"ridge": -1.0}, ValueError, "ridge"),
        ({"ridge": [[1.0]]}, ValueError, "ridge"),
        ({"ridge": [0.1, -1.0]}, ValueError, "ridge"),
        ({"ridge": float("nan")}, ValueError, "ridge"),
        ({"ridge": float("inf")}, ValueError, "ridge"),
        ({"held_out": 1.0}, ValueError, "held_out"),
        ({"exchanges": -1}, ValueError, "exchanges"),
        ({"exchanges": 1.5}, ValueError, "exchanges"),
        ({"start_density": 0.0}, ValueError, "start_density"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"args": (jnp.ones(3),)}, ValueError, "quadratic model takes no data"),
    ],
)
def test_bad_options(options, error, match):
    model, *_ = instance(0)
    with pytest.raises(error, match=match):
        chita(model, model.center, 3, **options)


def test_bad_budgets():
    model, *_ = instance(0)
    with pytest.raises(TypeError, match=r"sparserec\.keep"):
        chita(model, model.center, cast(Any, 0.5))
    with pytest.raises(ValueError, match=r"\[0, 14\]"):
        chita(model, model.center, 15)


def test_rows_with_nan_and_of_the_wrong_width():
    model, x, center, _ = instance(0)
    x[0, 0] = np.nan
    broken = quadratic.low_rank(jnp.asarray(x), jnp.asarray(center))
    for variant in ("bso", "obs"):
        with pytest.raises(ValueError, match="NaN"):
            chita(broken, broken.center, 3, variant=variant)
    with pytest.raises(ValueError, match="14"):
        quadratic.low_rank(jnp.ones((3, 13)), model.center)


def test_data_that_are_not_examples():
    params, (inputs, targets) = network()
    with pytest.raises(ValueError, match="axis"):
        chita(loss, params, 5, args=(inputs, targets[:3]))
    with pytest.raises(ValueError, match=r"examples|rows"):
        chita(loss, params, 5, args=(inputs, targets), curvature=fisher(rows=1000))

    def summed(params, inputs, targets):
        return inputs.shape[0] * loss(params, inputs, targets)

    with pytest.raises(ValueError, match="mean"):
        chita(summed, params, 5, args=(inputs, targets))
