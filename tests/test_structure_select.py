"""Budgets, bad input and everything that is frozen."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from structure_cases import CASES, conv, mlp, normal, random_keep

from sparserec import structure


@pytest.fixture(scope="module")
def small():
    case = mlp()
    return case, structure.groups(case.function, case.params, *case.args)


def scores_of(groups, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.random(size) for name, size in groups.sizes.items()}


def kept_value(scores, keep):
    return sum(float(scores[name][keep[name]].sum()) for name in scores)


def best_by_enumeration(groups, scores, budget, cost, least=1, multiple=1):
    """Within a group the best units are the highest scores: enumerate the counts."""
    allowed = [
        [n for n in range(least, s + 1) if n % multiple == 0 or n == s]
        for s in groups.sizes.values()
    ]
    best = -np.inf
    for counts in itertools.product(*allowed):
        keep = {
            name: np.isin(np.arange(size), np.argsort(-scores[name])[:count])
            for (name, size), count in zip(groups.sizes.items(), counts, strict=True)
        }
        if structure.total_cost(groups, cost, keep) <= budget:
            best = max(best, kept_value(scores, keep))
    return best


@pytest.mark.parametrize("name", ["mlp", "swiglu", "dense_concat", "grouped_conv"])
@pytest.mark.parametrize("cost", ["flops", "params"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_selection_is_close_to_the_best(name, cost, share):
    case = CASES[name]()
    groups = structure.groups(case.function, case.params, *case.args)
    scores = scores_of(groups)
    budget = share * structure.total_cost(groups, cost)
    keep = structure.select(groups, scores, budget, cost=cost)
    assert structure.total_cost(groups, cost, keep) <= budget
    best = best_by_enumeration(groups, scores, budget, cost)
    assert kept_value(scores, keep) >= 0.9 * best


def test_a_callable_cost_and_the_named_one_agree(small):
    _, groups = small
    scores = scores_of(groups)
    budget = 0.5 * structure.total_cost(groups, "params")

    def cost(keep):
        return structure.total_cost(groups, "params", keep)

    keep = structure.select(groups, scores, budget, cost=cost)
    assert cost(keep) <= budget
    named = structure.select(groups, scores, budget, cost="params")
    assert kept_value(scores, keep) >= 0.95 * kept_value(scores, named)


def test_multiples_and_least_counts(small):
    _, groups = small
    first, second = groups.sizes
    keep = structure.select(
        groups,
        scores_of(groups),
        0.6 * structure.total_cost(groups),
        min_keep={second: 5},
        multiple_of=4,
    )
    assert keep[first].sum() in (4, 8)
    assert keep[second].sum() in (8, 10)


def test_a_large_budget_keeps_everything_and_ties_go_to_the_lower_index(small):
    _, groups = small
    zeros = {name: np.zeros(size) for name, size in groups.sizes.items()}
    whole = structure.total_cost(groups)
    assert all(k.all() for k in structure.select(groups, zeros, whole).values())
    keep = structure.select(groups, zeros, 0.5 * whole)
    assert all((np.diff(kept.astype(int)) <= 0).all() for kept in keep.values())


def test_a_budget_that_cannot_be_met_names_the_smallest(small):
    _, groups = small
    least = {name: np.arange(size) < 3 for name, size in groups.sizes.items()}
    smallest = structure.total_cost(groups, "flops", least)
    with pytest.raises(ValueError, match=f"smallest reachable cost is {smallest}"):
        structure.select(groups, scores_of(groups), smallest - 1, min_keep=3)
    keep = structure.select(groups, scores_of(groups), smallest, min_keep=3)
    assert structure.total_cost(groups, "flops", keep) == smallest


def test_groups_without_a_score_stay_complete(small):
    _, groups = small
    first, second = groups.sizes
    whole = structure.total_cost(groups)
    keep = structure.select(groups, {first: scores_of(groups)[first]}, 0.7 * whole)
    assert keep[second].all()
    assert not keep[first].all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scores": {"nothing": np.ones(3)}}, "group 'nothing', which does not exist"),
        ({"scores": {"a:1": np.ones(3)}}, r"shape \(3,\).*8 units"),
        ({"scores": {"a:1": np.full(8, np.nan)}}, "NaN"),
        ({"cost": "time"}, "'flops', 'params' or a function"),
        ({"min_keep": 0}, "empty a layer"),
        ({"min_keep": {"no": 1}}, r"\['no'\]"),
        ({"multiple_of": 0}, "at least 1"),
    ],
)
def test_bad_selection_says_what_is_wrong(small, change, words):
    _, groups = small
    given = {"scores": scores_of(groups), "budget": 100} | change
    with pytest.raises(ValueError, match=words):
        structure.select(groups, **given)


def test_bad_axes_and_keeps_say_what_is_wrong(small):
    case, groups = small
    with pytest.raises(ValueError, match=r"'z', which does not exist.*'a', 'b'"):
        structure.groups(case.function, case.params, *case.args, exclude=["z"])
    with pytest.raises(ValueError, match="axis 2 of 'a', which has 2"):
        structure.groups(case.function, case.params, *case.args, exclude=[("a", 2)])
    for keep, words in [
        ({"z:0": np.ones(3, bool)}, "no group 'z:0'"),
        ({"a:1": np.zeros(8, bool)}, "none of its 8 units.*empty a layer"),
        ({"a:1": np.ones(7, bool)}, r"bool array of shape \(8,\)"),
        ({"a:1": np.arange(8)}, "bool array"),
    ]:
        with pytest.raises(ValueError, match=words):
            structure.shrink(case.params, groups, keep)


def test_params_that_do_not_match_the_trace_are_refused(small):
    case, groups = small
    keep = random_keep(groups.sizes)
    without = {name: p for name, p in case.params.items() if name != "b"}
    with pytest.raises(ValueError, match=r"missing \['b'\]"):
        structure.shrink(without, groups, keep)
    with pytest.raises(ValueError, match=r"'b' has shape \(9,\), but \(8,\)"):
        structure.shrink({**case.params, "b": jnp.ones(9)}, groups, keep)
    with pytest.raises(ValueError, match="structure of the parameters, but 'b'"):
        structure.shrink((3, {**case.params, "b": jnp.ones(9)}), groups, keep)
    with pytest.raises(ValueError, match="shrink the parameters with the same"):
        structure.resized(case.function, groups, keep)(case.params, *case.args)
    with pytest.raises(ValueError, match=r"`gates\['a:1'\]` has shape \(3,\)"):
        structure.gate(case.params, groups, {"a:1": jnp.ones(3)})


def test_excluded_axes_stay(small):
    case, _ = small
    groups = structure.groups(
        case.function, case.params, *case.args, exclude=[("c", 0)]
    )
    assert list(groups.sizes) == ["c:1"]
    assert structure.Frozen("a", 1, "excluded") in groups.frozen


def test_another_function_that_needs_the_full_axis_is_refused(small):
    case, groups = small
    keep = random_keep(groups.sizes)

    def other(p, x):
        return case.function(p, x).sum() + jnp.sort(p["b"])[0]

    small_fn = structure.resized(other, groups, keep)
    with pytest.raises(ValueError, match="was cut, but here the order along"):
        small_fn(structure.shrink(case.params, groups, keep), *case.args)


def test_check_refuses_a_difference():
    def function(p, x):
        return jnp.cos(x @ p["a"]).sum(1)

    params, x = {"a": normal(0, 3, 8)}, normal(1, 4, 3)
    assert not structure.groups(function, params, x).groups
    groups = structure.groups(function, params, x, inexact=True)
    assert "not zero when cut" in groups.groups[0].inexact
    with pytest.raises(ValueError, match="differs from the masked one"):
        structure.check(function, params, groups, random_keep(groups.sizes), x)


FROZEN = {
    "order": (lambda h: jnp.sort(h, axis=-1), "order along it"),
    "position": (lambda h: h[:, jnp.argmax(h, -1)], "argmax"),
    "captured": (lambda h: h + jnp.linspace(0.0, 1.0, 8)[None], "captured|iota"),
    "softmax": (jax.nn.softmax, "inexact=True"),
    "unknown": (lambda h: h @ jnp.linalg.cholesky(h.T @ h + jnp.eye(8)), "no rule"),
    "window": (
        lambda h: jax.lax.reduce_window(
            h, -np.inf, jax.lax.max, (1, 2), (1, 1), "SAME"
        ),
        "window",
    ),
    "stride": (lambda h: jnp.concatenate([h[:, ::2], h[:, 1::2]], -1), "strided"),
}


@pytest.mark.parametrize("name", FROZEN)
def test_what_is_not_understood_keeps_its_size(name):
    inside, words = FROZEN[name]

    def function(p, x):
        return inside(jax.nn.relu(x @ p["a"])) @ p["b"]

    params = {"a": normal(0, 3, 8), "b": normal(1, 8, 2)}
    groups = structure.groups(function, params, normal(2, 8, 3))
    assert not groups.groups
    (reason,) = [f.reason for f in groups.frozen if (f.path, f.axis) == ("a", 1)]
    assert any(word in reason for word in words.split("|"))
    assert bool(groups.unknown) == (name == "unknown")


def test_relu_keeps_its_derivative_at_zero():
    def function(p, x):
        return jax.nn.relu(x @ p["a"]) @ p["b"]

    params = {"a": normal(0, 3, 8), "b": normal(1, 8, 2)}
    x = jnp.zeros((4, 3))
    groups = structure.groups(function, params, x)
    keep = random_keep(groups.sizes)
    small_fn = structure.resized(function, groups, keep)
    small = structure.shrink(params, groups, keep)
    gradient = jax.grad(lambda x: small_fn(small, x).sum())(x)
    np.testing.assert_array_equal(gradient, 0)


def test_random_numbers_are_those_of_the_full_function():
    def function(p, x, key):
        h = jax.nn.relu(x @ p["a"])
        kept = jax.random.bernoulli(key, 0.5, h.shape)
        return jnp.where(kept, h, jnp.zeros_like(h)) @ p["b"]

    params, x = {"a": normal(0, 3, 8), "b": normal(1, 8, 2)}, normal(2, 4, 3)
    key = jax.random.key(0)
    groups = structure.groups(function, params, x, key)
    assert groups.sizes == {"a:1": 8}
    structure.check(
        function, params, groups, random_keep(groups.sizes), x, key, tol=1e-12
    )


def test_resized_works_under_jit_and_vmap_and_for_other_batches(small):
    case, groups = small
    keep = random_keep(groups.sizes)
    small_fn = structure.resized(case.function, groups, keep)
    params = structure.shrink(case.params, groups, keep)
    x = normal(9, 12, 6)
    expected = small_fn(params, x)
    np.testing.assert_allclose(jax.jit(small_fn)(params, x), expected, rtol=1e-12)
    mapped = jax.vmap(lambda row: small_fn(params, row[None])[0])(x)
    np.testing.assert_allclose(mapped, expected, rtol=1e-12)


def test_flops_of_a_convolution_count_every_multiply_add():
    def function(p, x):
        return conv(jax.nn.relu(conv(x, p["a"])), p["b"], groups=2)

    params = {"a": normal(0, 3, 3, 2, 4), "b": normal(1, 3, 3, 2, 6)}
    groups = structure.groups(function, params, normal(2, 5, 8, 8, 2))
    expected = 2 * 5 * 64 * 9 * (2 * 4 + 2 * 6)
    assert structure.total_cost(groups) == expected


def test_a_single_array_and_its_optimizer_state():
    def function(p, x):
        return jnp.tanh(x @ p) @ p.T

    params = normal(0, 3, 8)
    groups = structure.groups(function, params, normal(1, 4, 3))
    assert groups.sizes == {"params:1": 8}
    keep = random_keep(groups.sizes)
    state = (jnp.zeros((), jnp.int32), params, 2 * params)
    count, first, second = structure.shrink(state, groups, keep)
    assert count.shape == ()
    assert first.shape == second.shape == (3, 4)
