"""Groups, shrinking and gates of small functions with known structure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structure_cases import CASES, Case, masked, random_keep

from sparserec import structure


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]()


def found(case: Case) -> structure.Groups:
    return structure.groups(case.function, case.params, *case.args)


def test_groups_are_those_of_an_expert(case):
    groups = found(case)
    actual = [
        (group.size, {(member.path, member.axis) for member in group.members})
        for group in groups.groups
    ]
    assert len(actual) == len(case.groups)
    assert all(actual.count(each) == case.groups.count(each) for each in case.groups)
    assert not groups.unknown


def test_shrunk_function_equals_masked_function(case):
    groups = found(case)
    keep = random_keep(groups.sizes)
    difference = structure.check(
        case.function, case.params, groups, keep, *case.args, tol=1e-12
    )
    assert difference <= 1e-12


@pytest.mark.parametrize("name", ["separate_attention", "grouped_conv"])
def test_each_group_alone(name):
    case = CASES[name]()
    groups = found(case)
    for each, kept in random_keep(groups.sizes, seed=1).items():
        structure.check(
            case.function, case.params, groups, {each: kept}, *case.args, tol=1e-12
        )


@pytest.mark.parametrize(
    "name",
    ["mlp", "fused_split", "dense_concat", "depthwise_gate", "scanned", "rope"],
)
def test_gradient_equals_the_kept_entries_of_the_masked_gradient(name):
    case = CASES[name]()
    groups = found(case)
    keep = random_keep(groups.sizes)
    small_fn = structure.resized(case.function, groups, keep)

    def value(function, params):
        return sum(jnp.sum(jnp.sin(out)) for out in jax.tree.leaves(function(params)))

    mask = structure.mask(case.params, groups, keep)
    dense = jax.jit(
        jax.grad(lambda p: value(lambda q: case.function(q, *case.args), p))
    )
    small = jax.jit(jax.grad(lambda p: value(lambda q: small_fn(q, *case.args), p)))
    expected = structure.shrink(dense(masked(case.params, mask)), groups, keep)
    actual = small(structure.shrink(case.params, groups, keep))
    for left, right in zip(
        jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-12)


def test_gate_of_zero_removes_and_gate_of_one_keeps(case):
    groups = found(case)
    keep = random_keep(groups.sizes)
    gates = {name: jnp.asarray(kept, jnp.float64) for name, kept in keep.items()}

    @jax.jit
    def function(params, gates):
        return case.function(structure.gate(params, groups, gates), *case.args)

    mask = structure.mask(case.params, groups, keep)
    np.testing.assert_allclose(
        function(case.params, gates),
        function(masked(case.params, mask), structure.ones(groups, jnp.float64)),
        rtol=1e-10,
        atol=1e-12,
    )


def test_costs_are_those_of_the_shrunk_function(case):
    groups = found(case)
    keep = random_keep(groups.sizes)
    small = structure.shrink(case.params, groups, keep)
    count = sum(leaf.size for leaf in jax.tree.leaves(small))
    assert structure.total_cost(groups, "params", keep) == count
    small_fn = structure.resized(case.function, groups, keep)
    again = structure.groups(small_fn, small, *case.args)
    assert structure.total_cost(groups, "flops", keep) == structure.total_cost(again)


@pytest.mark.parametrize("cost", ["flops", "params"])
def test_unit_costs_are_differences(case, cost):
    groups = found(case)
    keep = random_keep(groups.sizes)
    costs = structure.unit_costs(groups, cost, keep)
    now = structure.total_cost(groups, cost, keep)
    for name, kept in keep.items():
        for unit in range(groups.sizes[name]):
            changed = kept.copy()
            changed[unit] = not kept[unit]
            if changed.any():
                then = structure.total_cost(groups, cost, {**keep, name: changed})
                assert costs[name][unit] == abs(now - then)


@pytest.mark.parametrize(
    "name", ["mlp", "fused_reshape", "grouped_query", "grouped_conv", "lstm", "loops"]
)
def test_unit_scores_count_every_weight_of_a_unit_once(name):
    case = CASES[name]()
    groups = found(case)
    rng = np.random.default_rng(0)
    scores = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), case.params)
    actual = jax.jit(lambda s: structure.unit_scores(groups, s))(scores)
    for group in groups.groups:
        for unit in range(group.size):
            kept = np.arange(group.size) != unit
            mask = structure.mask(case.params, groups, {group.name: kept})
            parts = jax.tree.map(lambda s, m: jnp.where(m, 0.0, s).sum(), scores, mask)
            np.testing.assert_allclose(
                actual[group.name][unit], sum(jax.tree.leaves(parts)), atol=1e-10
            )
