"""The kernel of the swap search, against slow refits of every neighbor."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserec import certificate, l0cd, quadratic
from sparserec.budget import make_budget
from sparserec.solvers import _members, _swaps
from sparserec.solvers._columns import block, columns, make_problem, product_on
from sparserec.solvers._pairs import exchange_pairs
from sparserec.solvers._starts import slots_of

ROWS, SIZE, SLOTS = 25, 10, 6


def regression(seed):
    rng = np.random.default_rng(seed)
    design = rng.normal(size=(ROWS, SIZE)) + rng.normal(size=(ROWS, 1))
    return design, rng.normal(size=ROWS) + design[:, 1]


def rows_model(design, response):
    """A model whose rows are all that is stored."""
    design, response = jnp.asarray(design), jnp.asarray(response)
    curvature = quadratic.LowRank(design, jnp.zeros(()))
    return quadratic.QuadraticModel(
        jnp.zeros(SIZE), response @ response / 2, -response @ design, curvature
    )


def refit(design, response, kept, *, penalty=0.0, l2=0.0):
    kept = sorted(kept)
    part = design[:, kept]
    inner = part.T @ part + 2 * l2 * np.eye(len(kept))
    explained = 0.0
    if kept:
        target = part.T @ response
        explained = target @ np.linalg.solve(inner, target) / 2
    return response @ response / 2 - explained + penalty * len(kept)


def neighbors(kept, k) -> dict[tuple[int, int], set[int]]:
    """All supports one exchange, addition or removal away: {(out, in): support}."""
    kept = set(kept)
    outside = set(range(SIZE)) - kept
    found = {(i, j): kept - {i} | {j} for i in kept for j in outside}
    found |= {(i, -1): kept - {i} for i in kept}
    if len(kept) < k:
        found |= {(-1, j): kept | {j} for j in outside}
    return found


@functools.partial(jax.jit, static_argnames="slots")
def _score(model, mask, k, penalty, l2, slots=SLOTS):
    budget = make_budget(k, model.center)
    problem = make_problem(model, budget, penalty=penalty, l2=l2)
    members = _members.factorise(problem, *slots_of(mask, slots))
    move = _swaps.best_move(problem, members)
    after = _swaps.apply_move(problem, members, move)
    fresh = _members.refresh(problem, after)
    return members, move, after, fresh, _members.objective(problem, after)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10_000),
    held=st.integers(1, 4),
    k=st.integers(4, 5),
    penalty=st.sampled_from([0.0, 0.5, 3.0]),
    l2=st.sampled_from([0.0, 0.7]),
)
def test_the_best_move_against_a_refit_of_every_neighbor(seed, held, k, penalty, l2):
    design, response = regression(seed)
    mask = np.random.default_rng(seed).permutation(SIZE) < held
    kept = set(np.flatnonzero(mask))
    weights = {"penalty": penalty, "l2": l2}
    _, move, after, fresh, value = _score(
        rows_model(design, response), jnp.asarray(mask), k, penalty, l2
    )
    here = refit(design, response, kept, **weights)
    around = {
        change: refit(design, response, support, **weights)
        for change, support in neighbors(kept, k).items()
    }
    best = min(around, key=around.__getitem__)
    np.testing.assert_allclose(move.gain, here - around[best], rtol=1e-8, atol=1e-8)
    chosen = set(np.flatnonzero(np.asarray(after.inside)))
    assert chosen == neighbors(kept, k)[best]
    np.testing.assert_allclose(value, around[best], rtol=1e-9)
    for name in ("values", "inverse", "coupling", "slope", "bend"):
        np.testing.assert_allclose(
            getattr(after, name), getattr(fresh, name), atol=1e-8, err_msg=name
        )


@settings(max_examples=15)
@given(seed=st.integers(0, 10_000))
def test_a_search_ends_where_no_exchange_improves(seed):
    design, response = regression(seed)
    model = rows_model(design, response)
    found = l0cd(model, jnp.zeros(SIZE), 3, effort=0.0)
    kept = set(np.flatnonzero(np.asarray(found.mask)))
    around = neighbors(kept, 3)
    values = [refit(design, response, support) for support in around.values()]
    assert min(values) >= float(found.objective) * (1 - 1e-9)
    report = certificate(model, found)
    np.testing.assert_allclose(
        report.gain, float(found.objective) - min(values), rtol=1e-6, atol=1e-8
    )
    best = min(around, key=lambda change: refit(design, response, around[change]))
    assert (int(report.leaving), int(report.entering)) == best
    assert abs(float(report.refit)) < 1e-9


def test_a_certificate_of_a_bad_support_names_the_better_one():
    design, response = regression(0)
    model = rows_model(design, response)
    found = l0cd(model, jnp.zeros(SIZE), 3, effort=0.0)
    bad = found._replace(mask=jnp.arange(SIZE) < 3, params=jnp.zeros(SIZE))
    report = certificate(model, bad)
    changed = {0, 1, 2} - {int(report.leaving)} | {int(report.entering)}
    expected = refit(design, response, {0, 1, 2}) - refit(design, response, changed)
    np.testing.assert_allclose(report.gain, expected, rtol=1e-9)
    gone = response @ response / 2 - refit(design, response, {0, 1, 2})
    np.testing.assert_allclose(report.refit, gone, rtol=1e-9)


def test_pairs_that_are_worth_nothing_alone():
    rng = np.random.default_rng(3)
    common = rng.normal(size=200)
    design = rng.normal(size=(200, SIZE))
    design[:, 4] = common + 0.1 * rng.normal(size=200)
    design[:, 5] = common + 0.1 * rng.normal(size=200)
    response = 8 * (design[:, 4] - design[:, 5]) + 0.6 * (design[:, 0] + design[:, 1])
    matrix, linear = design.T @ design, design.T @ response
    model = quadratic.dense(
        jnp.asarray(matrix),
        jnp.zeros(SIZE),
        -jnp.asarray(linear),
        float(response @ response) / 2,
    )
    mask = jnp.asarray(np.isin(np.arange(SIZE), [0, 1]))

    @jax.jit
    def search(model):
        problem = make_problem(model, make_budget(2, model.center))
        members = _members.factorise(problem, *slots_of(mask, SLOTS))
        return exchange_pairs(problem, members)

    slots, value = search(model)
    assert set(np.asarray(slots.index)[np.asarray(slots.filled)]) == {4, 5}
    np.testing.assert_allclose(value, refit(design, response, {4, 5}), rtol=1e-9)


@pytest.mark.slow
def test_exchanges_stay_within_their_group():
    design, response = regression(2)
    center = {"a": jnp.zeros((2, 2)), "b": jnp.zeros(4), "c": jnp.zeros((2, 1))}
    gradient = -response @ design
    model = quadratic.dense(
        jnp.asarray(design.T @ design),
        center,
        {
            "a": jnp.asarray(gradient[:4]).reshape(2, 2),
            "b": jnp.asarray(gradient[4:8]),
            "c": jnp.asarray(gradient[8:]).reshape(2, 1),
        },
        float(response @ response) / 2,
    )
    found = l0cd(model, center, {"a": 2, "c": 1}, effort=0.0)
    assert {name: int(m.sum()) for name, m in found.mask.items()} == {
        "a": 2,
        "b": 4,
        "c": 1,
    }
    always = {4, 5, 6, 7}
    values = [
        refit(design, response, always | {i, j, c})
        for i in range(4)
        for j in range(i)
        for c in (8, 9)
    ]
    np.testing.assert_allclose(found.objective, min(values), rtol=1e-9)


# --- columns of every curvature ------------------------------------------------------


def curvature_of(kind):
    rng = np.random.default_rng(0)
    rows = jnp.asarray(rng.normal(size=(4, SIZE)))
    ridge, center = jnp.asarray(0.3), jnp.zeros(SIZE)
    squares = jax.tree_util.Partial(lambda w: 0.5 * jnp.sum(jnp.square(rows @ w)))
    if kind == "dense":
        return quadratic.Dense(rows.T @ rows)
    if kind == "diagonal":
        return quadratic.Diagonal(jnp.arange(1.0, SIZE + 1))
    if kind == "blocks":
        blocks = jnp.asarray(rng.normal(size=(4, 3, 3)))
        return quadratic.block_diagonal(
            blocks + blocks.transpose(0, 2, 1), center
        ).curvature
    if kind == "rows":
        return quadratic.LowRank(rows, ridge)
    if kind == "gram":
        return quadratic.LowRank(rows, ridge, rows.T @ rows)
    return quadratic.Hessian(dense_limit=0)(squares, center, ()).curvature


@pytest.mark.parametrize(
    "kind", ["dense", "diagonal", "blocks", "rows", "gram", "products"]
)
def test_columns_are_those_of_the_matrix(kind):
    curvature = curvature_of(kind)
    matrix = np.stack([np.asarray(curvature.matvec(e)) for e in jnp.eye(SIZE)])
    model = quadratic.QuadraticModel(
        jnp.zeros(SIZE), jnp.zeros(()), jnp.zeros(SIZE), curvature
    )
    problem = make_problem(model, make_budget(3, model.center), l2=0.25)
    index = jnp.asarray([7, 0, 3])
    whole = matrix + 0.5 * np.eye(SIZE)
    np.testing.assert_allclose(columns(problem, index), whole[[7, 0, 3]], atol=1e-12)
    inner = whole[np.ix_([7, 0, 3], [7, 0, 3])]
    np.testing.assert_allclose(block(problem, index), inner, atol=1e-12)
    np.testing.assert_allclose(problem.diagonal, np.diag(whole), atol=1e-12)
    values = jnp.asarray([1.0, -2.0, 0.5])
    expected = np.asarray(values) @ whole[[7, 0, 3]]
    product = product_on(problem, index, values)
    np.testing.assert_allclose(product, expected, atol=1e-12)
    if hasattr(curvature, "columns"):
        found = cast(Any, curvature).columns(index)
        assert found.shape == (SIZE, 3)
        np.testing.assert_allclose(found, matrix[:, [7, 0, 3]], atol=1e-12)
