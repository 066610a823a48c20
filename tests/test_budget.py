"""Budgets: how many weights stay, which leaves they govern, and what is refused."""

import math
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import sparserec
from sparserec import _tree, select
from sparserec.budget import make_budget, prunable_leaves


def network(dtype: Any = jnp.float64):
    return {
        "dense": {"bias": jnp.ones(3, dtype), "kernel": jnp.ones((4, 3), dtype)},
        "head": {"bias": jnp.ones(2, dtype), "kernel": jnp.ones((3, 2), dtype)},
    }


PATHS = ["dense/bias", "dense/kernel", "head/bias", "head/kernel"]

# --- density -> count ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("density", "count"),
    [(0, 0), (0.0, 0), (1, 18), (1.0, 18), (0.5, 9), (0.25, 5), (0.02, 0), (0.03, 1)],
)
def test_density_is_rounded_half_up(density, count):
    assert sparserec.keep(network(), density=density) == count  # 18 kernel entries


@given(size=st.integers(1, 5000), density=st.floats(0, 1))
@settings(max_examples=100)
def test_count_is_the_nearest_integer(size, density):
    shape = jax.ShapeDtypeStruct((size,), jnp.float32)  # only shapes are looked at
    count = sparserec.keep(shape, density=density)
    assert isinstance(count, int)
    assert 0 <= count <= size
    assert abs(count - Fraction(density) * size) <= Fraction(1, 2) + Fraction(1e-9)


def test_counts_per_leaf():
    counts = sparserec.keep(network(), density=0.5, per_leaf=True)
    assert counts == {"dense/kernel": 6, "head/kernel": 3}
    everything = sparserec.keep(
        network(), density=1 / 3, prunable=lambda *_: True, per_leaf=True
    )
    assert everything == dict(zip(PATHS, [1, 4, 1, 2], strict=True))


def test_counts_per_leaf_are_budgets():
    params = network()
    counts = sparserec.keep(params, density=0.5, per_leaf=True)
    budget = make_budget(counts, params)
    assert budget.groups == (-1, 0, -1, 1)
    assert budget.sizes == (12, 6)
    np.testing.assert_array_equal(budget.counts, [6, 3])


@pytest.mark.parametrize("density", [-0.01, 1.01, math.nan, math.inf, True, 10])
def test_wrong_density_says_what_is_allowed(density):
    with pytest.raises(ValueError, match=r"in \[0, 1\]; got"):
        sparserec.keep(network(), density=density)


# --- which leaves --------------------------------------------------------------------


def chosen_paths(params, prunable=sparserec.matrices):
    flags = prunable_leaves(params, prunable)
    return [p for p, chosen in zip(_tree.paths(params), flags, strict=True) if chosen]


def test_default_takes_leaves_with_two_or_more_axes():
    params = {**network(), "conv": jnp.ones((2, 2, 1, 3)), "scale": jnp.ones(())}
    assert chosen_paths(params) == ["conv", "dense/kernel", "head/kernel"]


@pytest.mark.parametrize(
    "params", [jnp.ones(5), {"a": jnp.ones(2), "b": jnp.ones(())}, jnp.ones(())]
)
def test_default_takes_everything_where_there_is_no_matrix(params):
    assert all(prunable_leaves(params))


def test_fallback_is_only_for_the_default():
    def own(path, leaf):
        return sparserec.matrices(path, leaf)

    with pytest.raises(ValueError, match="nothing to prune"):
        prunable_leaves(jnp.ones(5), own)


def test_predicate_sees_path_and_leaf():
    seen = []

    def prunable(path, leaf):
        seen.append((path, leaf.shape))
        return path.startswith("head") and leaf.ndim == 2

    assert chosen_paths(network(), prunable) == ["head/kernel"]
    assert seen == list(zip(PATHS, [(3,), (4, 3), (2,), (3, 2)], strict=True))


@pytest.mark.parametrize("scalar", [bool, np.bool_])
def test_tree_of_bools(scalar):
    params = network()
    flags = jax.tree.map(lambda leaf: scalar(leaf.size == 3), params)
    assert chosen_paths(params, flags) == ["dense/bias"]


def test_single_array_has_the_empty_path():
    params = jnp.ones(4)
    assert _tree.paths(params) == [""]
    assert chosen_paths(params, True) == [""]
    assert make_budget({"": 2}, params).sizes == (4,)


@pytest.mark.parametrize(
    "prunable",
    [
        {"dense": True},
        [True, False, True, False],
        {"dense": {"bias": 0, "kernel": 1}, "head": {"bias": 0, "kernel": 1}},
        "kernel",
        None,
    ],
)
def test_wrong_prunable_says_what_is_allowed(prunable):
    with pytest.raises(ValueError, match=r"predicate .* or a pytree") as error:
        prunable_leaves(network(), prunable)
    assert "dense/kernel" in str(error.value)


def test_nothing_prunable_lists_the_paths():
    with pytest.raises(ValueError, match="selects no leaf") as error:
        prunable_leaves(network(), lambda *_: False)
    assert str(PATHS) in str(error.value)


def test_linen_and_nnx_give_the_same_paths():
    nn = pytest.importorskip("flax.linen")
    nnx = pytest.importorskip("flax.nnx")

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="second")(nn.Dense(4, name="first")(x))

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(2, 4, rngs=rngs)
            self.second = nnx.Linear(4, 3, rngs=rngs)

    inputs = jnp.ones((1, 2), jnp.float32)
    linen = jax.eval_shape(Linen().init, jax.random.key(0), inputs)["params"]
    state = nnx.state(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))), nnx.Param)
    expected = ["first/bias", "first/kernel", "second/bias", "second/kernel"]
    assert _tree.paths(linen) == _tree.paths(state) == expected
    assert chosen_paths(linen) == chosen_paths(state) == expected[1::2]
    assert sparserec.keep(state, density=0.5, per_leaf=True) == {
        "first/kernel": 4,
        "second/kernel": 6,
    }
    flags = jax.tree.map(lambda leaf: leaf.ndim == 1, state)
    assert chosen_paths(state, flags) == expected[::2]


# --- make_budget ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "k", [7, np.int64(7), np.uint8(7), np.array(7), jnp.int32(7), jnp.uint8(7)]
)
def test_any_integer_scalar_is_a_budget(k):
    budget = make_budget(k, network())
    assert budget.counts.dtype == jnp.int32
    np.testing.assert_array_equal(budget.counts, [7])
    assert budget.groups == (-1, 0, -1, 0)
    assert budget.sizes == (18,)


@pytest.mark.parametrize(
    ("k", "error", "words"),
    [
        (0.1, TypeError, r"an integer, got 0\.1.*keep\(params, density="),
        (1.0, TypeError, r"got 1\.0.*density="),
        (np.float32(2), TypeError, "density="),
        (jnp.asarray(2.0), TypeError, "density="),
        (True, TypeError, "got the bool True"),
        (np.True_, TypeError, "bool"),
        (jnp.asarray(True), TypeError, "bool"),
        ("3", TypeError, "an integer, got '3'"),
        (None, TypeError, "an integer, got None"),
        (1 + 0j, TypeError, "an integer"),
        ([1, 2], TypeError, "an integer"),
        (np.array([1, 2]), TypeError, r"shape \(2,\).*jax\.vmap"),
        (-1, ValueError, r"\[0, 18\] \(18 prunable weights\), got -1"),
        (19, ValueError, r"\[0, 18\] \(18 prunable weights\), got 19"),
        (jnp.int32(19), ValueError, "got 19"),
        (np.int64(2**40), ValueError, "got 1099511627776"),
        ({}, ValueError, "no leaf.*'dense/kernel'"),
        ({"kernel": 1}, ValueError, r"\['kernel'\].*k=\{'dense/kernel'"),
        ({"dense/bias": 1}, ValueError, r"\['dense/bias'\].*prunable leaves"),
        ({"dense/kernel": 13}, ValueError, r"k\['dense/kernel'\].*\[0, 12\]"),
        ({"dense/kernel": 0.5}, TypeError, r"k\['dense/kernel'\].*density="),
        ({"head/kernel": True}, TypeError, r"k\['head/kernel'\].*bool"),
    ],
)
def test_wrong_budget_says_what_to_write(k, error, words):
    with pytest.raises(error, match=f"(?s){words}"):
        make_budget(k, network())


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ({}, ValueError, "holds no array"),
        ({"a": None}, ValueError, "holds no array"),
        ({"a": jnp.ones(2), "step": jnp.ones(2, int)}, TypeError, "'step'.*int64"),
        ({"a": jnp.ones(2, complex)}, TypeError, "'a'.*complex128"),
        ({"a": jnp.ones(2, bool)}, TypeError, "'a'.*bool"),
        ({"a": 1.0}, TypeError, "'a' is a float; wrap it"),
        (2.0, TypeError, "the array is a float"),
        (jnp.ones(2, int), TypeError, "the array has dtype int64"),
    ],
)
def test_wrong_params_name_the_leaf(params, error, words):
    with pytest.raises(error, match=words):
        make_budget(1, params)


def test_batched_budgets_are_clipped_to_what_there_is():
    # A count that is only known inside a program cannot be refused.
    params = network()
    ks = jnp.array([-3, 0, 5, 18, 40])

    def kept(k):
        budget = make_budget(k, params)
        mask = select.support(params, budget.counts, budget.groups)
        return mask, budget.counts

    masks, counts = jax.vmap(kept)(ks)
    np.testing.assert_array_equal(counts[:, 0], [0, 0, 5, 18, 18])
    inner, head = (np.asarray(masks[layer]["kernel"]) for layer in ("dense", "head"))
    np.testing.assert_array_equal(inner.sum((1, 2)) + head.sum((1, 2)), counts[:, 0])
    assert all(jnp.all(masks[layer]["bias"]) for layer in ("dense", "head"))


def test_small_unsigned_budgets_of_large_params():
    # The size does not fit into the dtype of the count.
    params = jax.ShapeDtypeStruct((100_000,), jnp.float32)
    np.testing.assert_array_equal(make_budget(jnp.uint8(200), params).counts, [200])


TREES = [
    {"a": (3,), "b": {"x": (2, 2), "y": ()}},
    [(1,), (4, 1, 2), (3, 2), ()],
    (5,),
]
# Which leaves may be pruned, and whether the budget is one count or one per leaf. Few
# cases, because every choice of groups compiles the selection once.
CASES = [
    (0, (True, True, True), False),
    (0, (True, False, True), True),
    (1, (False, True, True, False), False),
    (1, (True, True, True, True), True),
    (2, (True,), True),
]


@given(case=st.sampled_from(CASES), seed=st.integers(0, 2**32 - 1), data=st.data())
@settings(max_examples=40)
def test_kept_counts_are_exact(case, seed, data):
    which, flags, per_leaf = case
    rng = np.random.default_rng(seed)
    # Few different magnitudes, so that ties are everywhere.
    params = jax.tree.map(
        lambda shape: np.float32(rng.integers(-2, 3, shape)),
        TREES[which],
        is_leaf=lambda x: isinstance(x, tuple),
    )
    paths = _tree.paths(params)
    sizes = dict(zip(paths, (x.size for x in jax.tree.leaves(params)), strict=True))
    governed = [path for path, flag in zip(paths, flags, strict=True) if flag]
    if per_leaf:
        k = {path: data.draw(st.integers(0, sizes[path])) for path in governed}
    else:
        k = data.draw(st.integers(0, sum(sizes[path] for path in governed)))
    prunable = jax.tree.unflatten(jax.tree.structure(params), flags)
    budget = make_budget(k, params, prunable)
    mask = select.support(params, budget.counts, budget.groups)
    kept = {
        path: int(jnp.sum(m))
        for path, m in zip(paths, jax.tree.leaves(mask), strict=True)
    }
    assert all(kept[path] == sizes[path] for path in paths if path not in governed)
    found = {path: kept[path] for path in governed}
    assert found == k if per_leaf else sum(found.values()) == k
