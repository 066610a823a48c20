"""OBA pruning: at once against the scores, in stages against a slow loop."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import saliency_nets as nets
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import sparserec
from sparserec import Status, quadratic, saliency
from sparserec._run import _run_compiled
from sparserec.solvers.oba import in_order, oba

CHAIN_PARAMS = functools.partial(nets.chain_params, depth=2)


def chain_problem():
    return nets.problem(nets.chain, CHAIN_PARAMS, (6,), examples=10)


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)])


def quadratic_model(seed=0, n=12):
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(2 * n, n))
    matrix, w = rows.T @ rows, rng.normal(size=n)
    slope = rng.normal(size=n)
    return (
        matrix,
        w,
        slope,
        quadratic.dense(jnp.asarray(matrix), jnp.asarray(w), jnp.asarray(slope)),
    )


def slow(matrix, w, slope, k, stages, first_order):
    """Prune by hand; the gradient follows the weights that are gone."""
    v, alive = w.copy(), np.ones(w.size, bool)
    for stage in range(1, stages + 1):
        keep = round(w.size * (max(k, 1) / w.size) ** (stage / stages))
        keep = k if stage == stages else max(keep, k)
        score = v * (matrix @ v)
        if first_order:
            score = score / 2 - v * (slope + matrix @ (v - w))
        else:
            score = np.abs(score)
        order = np.argsort(-np.where(alive, score, -np.inf), kind="stable")
        alive = np.isin(np.arange(w.size), order[:keep])
        v = np.where(alive, v, 0)
    return alive


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("stages", [1, 4])
def test_stages_follow_the_schedule_and_recompute_the_scores(stages, first_order):
    for seed in range(5):
        matrix, w, slope, model = quadratic_model(seed)
        for k in (0, 1, 5, 12):
            solution = oba(
                model, jnp.asarray(w), k, stages=stages, first_order=first_order
            )
            expected = slow(matrix, w, slope, k, stages, first_order)
            np.testing.assert_array_equal(solution.mask, expected)
            np.testing.assert_array_equal(solution.params, np.where(expected, w, 0))
            assert solution.status == Status.CONVERGED
            assert solution.iterations == (1 if k == w.size else stages)
            np.testing.assert_allclose(
                solution.objective, model(solution.params), rtol=1e-12
            )


def test_at_once_it_keeps_the_largest_scores_of_a_network():
    builder, params, data = chain_problem()
    scores = np.abs(np.asarray(flat(saliency.oba(builder.loss, params, args=data))))
    solution = oba(builder.loss, params, 20, args=data)
    kept = flat(solution.mask)
    assert kept.sum() == 20
    assert scores[kept].min() >= scores[~kept].max()


@pytest.mark.slow
def test_pieces_of_the_data_give_the_same_support():
    builder, params, data = chain_problem()
    solve = functools.partial(oba, builder.loss, params, 20, args=data, stages=3)
    np.testing.assert_array_equal(flat(solve().mask), flat(solve(batch_size=4).mask))


def test_gauss_newton_is_an_option():
    builder, params, data = chain_problem()
    scores = saliency.oba(builder.loss, params, args=data, curvature="gauss_newton")
    solution = oba(builder.loss, params, 20, args=data, curvature="gauss_newton")
    expected = sparserec.select.top_k(scores, 20)
    np.testing.assert_array_equal(flat(solution.mask), flat(expected))


def test_what_may_not_be_pruned_stays_and_counts():
    matrix, w, _, _ = quadratic_model()
    params = {"a": jnp.asarray(w[:8].reshape(2, 4)), "b": jnp.asarray(w[8:])}
    model = quadratic.dense(jnp.asarray(matrix), params)
    solution = oba(model, params, {"a": 3})
    scores = np.abs(w * (matrix @ w))[:8]
    expected = oracles.hard_threshold(scores, 3) != 0
    np.testing.assert_array_equal(solution.mask["a"].reshape(-1), expected)
    assert solution.mask["b"].all()


def test_weights_that_lower_the_loss_go_first_with_the_first_order():
    # Removal of the largest weight lowers the loss, and no magnitude shows that.
    w, slope = jnp.array([3.0, 1.0, 0.5]), jnp.array([2.0, -1.0, -1.0])
    model = quadratic.diagonal(jnp.full(3, 0.1), w, slope)
    signed = oba(model, w, 2, first_order=True)
    np.testing.assert_array_equal(signed.mask, [False, True, True])
    np.testing.assert_array_equal(oba(model, w, 2).mask, [True, True, False])


def test_weights_without_a_score_still_come_before_weights_that_are_gone():
    w = jnp.array([0.1, 0.2, 1.0, 2.0])
    model = quadratic.diagonal(jnp.array([1.0, 1.0, 0.0, 0.0]), w)
    solution = oba(model, w, 1, stages=3)
    assert solution.mask.sum() == 1
    assert np.asarray(solution.params)[np.asarray(solution.mask)].all()


def test_scores_that_are_not_finite_leave_magnitudes_and_say_so():
    def loss(w):  # finite, with a derivative that is not
        return jnp.sum(jnp.sqrt(jnp.abs(w)))

    w = jnp.array([0.0, 3.0, -2.0, 1.0])
    for stages in (1, 3):
        solution = oba(loss, w, 2, stages=stages)
        assert solution.status == Status.NONFINITE
        np.testing.assert_array_equal(solution.mask, [False, True, True, False])
        assert np.isfinite(solution.objective)


def test_a_sweep_over_budgets_and_data_compiles_once():
    builder, params, data = chain_problem()
    oba(builder.loss, params, 3, args=data, stages=2)
    compiled: Any = _run_compiled
    before = compiled._cache_size()
    for k in (5, 9, 20):
        moved = (data[0] + k, data[1])
        oba(builder.loss, params, k, args=moved, stages=2)
    assert compiled._cache_size() == before


def test_vmap_over_budgets_is_the_loop():
    _, w, _, model = quadratic_model(1)
    ks = jnp.arange(13)
    solve = functools.partial(oba, model, jnp.asarray(w), stages=2)
    lanes = jax.vmap(lambda k: solve(k).mask)(ks)
    for k in ks:
        np.testing.assert_array_equal(lanes[k], solve(k).mask)


def test_bad_choices_say_what_to_write():
    builder, params, data = chain_problem()
    for change, words in [
        ({"stages": 0}, "`stages` must be an integer of at least 1"),
        ({"curvature": "exact"}, "'hessian', 'gauss_newton' or a builder"),
        ({"k": 1000}, "`k` must lie in"),
    ]:
        with pytest.raises(ValueError, match=words):
            oba(builder.loss, params, **{"k": 5, "args": data, **change})


floats = st.floats(allow_nan=False, allow_infinity=True, allow_subnormal=True)


@pytest.mark.slow
@given(hnp.arrays(np.float64, st.integers(2, 20), elements=floats))
def test_signed_order_becomes_an_order_of_magnitudes(x):
    order = np.asarray(in_order(jnp.asarray(x)))
    assert np.all(np.isfinite(order))
    assert np.all(order >= 0)
    finite = np.clip(x, -np.finfo(x.dtype).max, np.finfo(x.dtype).max)
    by_value = np.argsort(finite, kind="stable")
    assert np.all(np.diff(order[by_value]) >= 0)
    # Only direct neighbours may tie (and the two zeros).
    sorted_x = finite[by_value]
    tied = np.diff(order[by_value]) == 0
    with np.errstate(all="ignore"):  # the neighbor of the largest float is infinite
        above = np.nextafter(sorted_x[:-1], np.inf)
    assert np.all(above[tied] >= sorted_x[1:][tied])
