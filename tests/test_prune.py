"""The one call: the same answer as the solver behind it, for weights and units."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_gates import BUILDER, predict, problem

import sparserec
from sparserec import Status, quadratic, structure
from sparserec._prune import JOINT_METHODS, UNIT_SCORES, WEIGHT_METHODS, prune
from sparserec.structure._joint import joint
from sparserec.structure._kept import kept_units


def flat(tree):
    return np.concatenate([np.ravel(np.asarray(x)) for x in jax.tree.leaves(tree)])


def model_of(n=10):
    rng = np.random.default_rng(5)
    rows = rng.normal(size=(2 * n, n))
    w = jnp.asarray(rng.normal(size=n))
    return quadratic.dense(jnp.asarray(rows.T @ rows), w), w


# --- weights -------------------------------------------------------------------------


def slowly(names, slow):
    """Names as parameters, some of them marked slow: their solvers compile long."""
    marks = {name: [pytest.mark.slow] if name in slow else [] for name in names}
    return [pytest.param(name, marks=marks[name]) for name in sorted(names)]


@pytest.mark.parametrize("method", slowly(WEIGHT_METHODS, {"chita", "l0cd"}))
def test_every_method_keeps_k_weights_and_says_the_loss(method):
    model, w = model_of()
    solution = prune(model, w, 4, method=method)
    assert int(solution.mask.sum()) == 4
    np.testing.assert_array_equal(np.asarray(solution.params)[~solution.mask], 0)
    np.testing.assert_allclose(solution.objective, model(solution.params), rtol=1e-9)


@pytest.mark.slow
def test_it_is_the_solver_of_that_name_with_its_options():
    model, w = model_of()
    pruned = prune(model, w, 4, method="iobs", stages=3, damping=0.1)
    direct = sparserec.iobs(model, w, 4, schedule="down", stages=3, damping=0.1)
    np.testing.assert_array_equal(pruned.params, direct.params)
    plain = prune(model, w, 4, method="magnitude")
    np.testing.assert_array_equal(plain.mask, sparserec.select.top_k(w, 4))
    np.testing.assert_array_equal(plain.params, np.where(plain.mask, w, 0))
    assert plain.status == Status.CONVERGED
    assert prune(model, w, 0, method="magnitude").mask.sum() == 0


# --- units ---------------------------------------------------------------------------


@functools.cache
def by_units(method, **options):
    params, groups, data = problem()
    budget = 0.5 * structure.total_cost(groups)
    if method in JOINT_METHODS:
        options = {"stages": 2, "held_out": 0.0, **options}
    return prune(
        BUILDER.loss,
        params,
        args=data,
        method=method,
        structure=groups,
        budget=budget,
        **options,
    )


@pytest.mark.parametrize("method", ["joint", *UNIT_SCORES])
def test_whole_units_go_within_the_cost(method):
    params, groups, data = problem()
    solution = by_units(method)
    keep = kept_units(groups, solution.mask)
    assert structure.total_cost(groups, "flops", keep) <= 0.5 * structure.total_cost(
        groups
    )
    expected = structure.mask(params, groups, keep)
    np.testing.assert_array_equal(flat(solution.mask), flat(expected))
    assert not flat(solution.params)[~flat(solution.mask)].any()
    np.testing.assert_allclose(
        solution.objective, BUILDER.loss(solution.params, *data), rtol=1e-9
    )
    small = structure.shrink(solution.params, groups, keep)
    np.testing.assert_allclose(
        structure.resized(predict, groups, keep)(small, data[0]),
        predict(solution.params, data[0]),
        atol=1e-9,
    )


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted(set(JOINT_METHODS) - {"joint"}))
def test_a_solver_of_the_package_exchanges_units(method):
    alone, together = by_units("joint"), by_units(method)
    assert together.objective <= 1.2 * alone.objective


def test_k_counts_units():
    params, groups, data = problem()
    for method in ("joint", "magnitude"):
        options: dict[str, Any] = {"method": method, "structure": groups}
        options |= {"stages": 2} if method == "joint" else {}
        solution = prune(BUILDER.loss, params, 9, args=data, **options)
        keep = kept_units(groups, solution.mask)
        assert sum(int(k.sum()) for k in keep.values()) == 9


@pytest.mark.slow
def test_scores_and_limits_have_options():
    params, groups, data = problem()
    solution = prune(
        BUILDER.loss,
        params,
        args=data,
        method="oba",
        structure=groups,
        budget=0.6 * structure.total_cost(groups, "params"),
        cost="params",
        batch_size=16,
        curvature="gauss_newton",
        multiple_of=2,
    )
    for kept in kept_units(groups, solution.mask).values():
        assert int(kept.sum()) % 2 == 0 or kept.all()


@pytest.mark.slow
def test_half_precision_comes_back_as_it_was():
    params, groups, data = problem()
    half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)

    def loss(params, x, labels):
        return BUILDER.loss(params, x.astype(jnp.float32), labels)

    solution = prune(
        loss, half, 10, args=data, method="joint", structure=groups, stages=1
    )
    assert {w.dtype for w in solution.params.values()} == {jnp.dtype(jnp.bfloat16)}


def test_kept_units_is_the_inverse_of_mask():
    params, groups, _ = problem()
    rng = np.random.default_rng(2)
    for _ in range(5):
        keep = {n: rng.random(s) < 0.5 for n, s in groups.sizes.items()}
        for kept in keep.values():
            kept[0] = True
        found = kept_units(groups, structure.mask(params, groups, keep))
        for name in keep:
            np.testing.assert_array_equal(found[name], keep[name])


def test_joint_is_what_stands_behind_it():
    params, groups, data = problem()
    budget = 0.5 * structure.total_cost(groups)
    direct = joint(
        BUILDER.loss, params, groups, budget, args=data, stages=2, held_out=0.0
    )
    folded = structure.gate(params, groups, direct.params)
    mask = structure.mask(params, groups, direct.mask)
    expected = sparserec.apply_mask(folded, mask)
    np.testing.assert_array_equal(flat(by_units("joint").params), flat(expected))


# --- bad input -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": "best", "k": 5}, r"one of \['chita', 'iht', 'iobs', 'l0cd'"),
        ({}, "give `k`, the number of weights"),
        ({"k": 5, "budget": 0.5}, "needs `structure="),
        ({"structure": True}, "either `k`, the number of units"),
        ({"structure": True, "k": 5, "budget": 0.5}, "either `k`"),
        ({"structure": True, "k": 5, "method": "obs"}, "for units"),
        ({"structure": True, "k": 2}, "smallest reachable cost is 3"),
        ({"structure": True, "k": 0.5}, "an integer; got 0.5"),
        ({"structure": True, "budget": 9, "cost": "units"}, "give `k` instead"),
    ],
)
def test_bad_choices_say_what_to_write(change, words):
    params, groups, data = problem()
    if "structure" in change:
        change = {**change, "structure": groups}
    with pytest.raises((TypeError, ValueError), match=words):
        prune(BUILDER.loss, params, args=data, **change)


def test_a_model_has_no_units():
    model, w = model_of()
    with pytest.raises(ValueError, match="a quadratic model has no units"):
        prune(model, w, 5, structure=problem()[1])
