"""Selection within a cost: against all choices, and against the relaxed problem."""

import functools
import itertools

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from scipy.optimize import linprog

from sparserec._within_cost import within_cost

solve = jax.jit(within_cost)


def draw(seed, size=10):
    rng = np.random.default_rng(seed)
    return rng.normal(size=size), rng.integers(0, 6, size).astype(float)


def value(scores, mask):
    return float(np.abs(scores)[np.asarray(mask)].sum())


@given(st.integers(0, 10_000), st.floats(0, 30), st.integers(0, 10))
def test_within_both_budgets_and_close_to_the_best(seed, limit, k):
    scores, costs = draw(seed)
    mask = np.asarray(solve(jnp.asarray(scores), jnp.asarray(costs), limit, k))
    assert costs[mask].sum() <= limit
    assert mask.sum() <= k
    best = max(
        value(scores, np.array(bits))
        for bits in itertools.product([False, True], repeat=10)
        if np.sum(bits) <= k and costs[np.array(bits)].sum() <= limit
    )
    two = np.sort(np.abs(scores))[-2:].sum()
    assert best - two <= value(scores, mask) + 1e-9
    if k == 10 and limit >= costs.sum():
        assert mask.all()


def test_it_is_close_to_the_relaxed_problem_on_many_weights():
    scores, costs = draw(1, 400)
    limit, k = 0.2 * costs.sum(), 150
    relaxed = linprog(
        -np.abs(scores),
        A_ub=np.stack([costs, np.ones(400)]),
        b_ub=[limit, k],
        bounds=(0, 1),
    )
    mask = solve(jnp.asarray(scores), jnp.asarray(costs), limit, k)
    assert costs[np.asarray(mask)].sum() <= limit
    assert value(scores, mask) >= -relaxed.fun - 2 * np.abs(scores).max()
    assert value(scores, mask) >= 0.99 * -relaxed.fun


def test_equal_costs_are_top_k():
    scores = jnp.asarray(draw(2)[0])
    mask = solve(scores, jnp.ones(10), 4.0)
    order = np.argsort(-np.abs(scores))
    np.testing.assert_array_equal(np.flatnonzero(mask), np.sort(order[:4]))


def test_trees_with_one_cost_for_a_leaf_and_edges():
    scores = {"a": jnp.array([[3.0, -1.0], [2.0, jnp.nan]]), "b": jnp.array([5.0, 0.0])}
    mask = solve(scores, {"a": 2.0, "b": 0.0}, 4.0)
    np.testing.assert_array_equal(mask["a"], [[True, False], [True, False]])
    np.testing.assert_array_equal(mask["b"], [True, False])
    none = solve(scores, {"a": 2.0, "b": 0.0}, 0.0)
    assert not none["a"].any()
    assert none["b"].tolist() == [True, False]
    assert not solve(scores, {"a": 2.0, "b": 0.0}, 4.0, 0)["b"].any()


@pytest.mark.slow
def test_a_sweep_compiles_once_and_vmaps():
    scores, costs = map(jnp.asarray, draw(3))
    traces = []

    @jax.jit
    def counted(limit, k):
        traces.append(None)
        return within_cost(scores, costs, limit, k)

    limits = jnp.array([0.0, 3.0, 9.0, 50.0])
    singles = [counted(limit, jnp.int32(5)) for limit in limits]
    assert len(traces) == 1
    lanes = jax.vmap(functools.partial(within_cost, scores, costs, k=5))(limits)
    np.testing.assert_array_equal(lanes, jnp.stack(singles))


def test_costs_of_another_form_are_refused():
    for costs in (jnp.ones(3), {"a": 1.0}):
        with pytest.raises(ValueError, match="`costs` must have the structure"):
            within_cost(jnp.ones(4), costs, 1.0)
