"""Supports are exactly what a stable sort of the magnitudes would choose."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sparserec import _top_k, select

DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
}
LARGE = 1 << 19  # large enough for the scheme that samples and interpolates


def sorted_masks(leaves, counts):
    """Masks for every count, from a stable argsort of all magnitudes in float64."""
    with np.errstate(invalid="ignore"):
        flat = np.concatenate([np.abs(x.astype(np.float64)).ravel() for x in leaves])
    flat = np.where(np.isnan(flat), 0.0, flat)
    order = np.argsort(-flat, kind="stable")
    ends = np.cumsum([x.size for x in leaves])[:-1]
    for k in counts:
        mask = np.zeros(flat.size, bool)
        mask[order[: max(k, 0)]] = True
        yield [
            part.reshape(x.shape)
            for part, x in zip(np.split(mask, ends), leaves, strict=True)
        ]


def assert_every_budget(leaves, masks_of_all_k, counts):
    for row, expected in enumerate(sorted_masks(leaves, counts)):
        for mask, want in zip(masks_of_all_k, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(mask)[row], want)


def floats(dtype, size):
    """Arrays drawn by their bits: subnormal, infinite, NaN, and many ties."""
    width = np.dtype(dtype).itemsize * 8
    wild = st.integers(0, 2**width - 1)
    few = np.array([0.0, -0.0, 1.0, -1.0, 2.0, np.inf, -np.inf, np.nan], dtype)
    tame = st.sampled_from([int(b) for b in few.view(f"u{width // 8}")])
    tiny = st.integers(0, 3)
    bits = st.lists(st.one_of(wild, tame, tiny, tame), min_size=size, max_size=size)
    return bits.map(lambda b: np.array(b, f"u{width // 8}").view(dtype))


all_budgets = jax.jit(jax.vmap(select.top_k, in_axes=(None, 0)))


# --- top_k ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
@settings(max_examples=40)
@given(data=st.data())
def test_every_budget_agrees_with_a_stable_sort(name, data):
    scores = data.draw(floats(DTYPES[name], 12))
    counts = np.arange(-1, 15, dtype=np.int32)
    masks = all_budgets(jnp.asarray(scores), jnp.asarray(counts))
    assert_every_budget([scores], [masks], counts)


MIXED = {
    "all": {"bfloat16": (3,), "float16": (2, 2), "float32": (), "float64": (5,)},
    "half": {"float16": (5,), "bfloat16": (5,)},
}


@pytest.mark.parametrize("mixture", MIXED)
@settings(max_examples=40)
@given(data=st.data())
def test_leaves_of_unlike_dtypes_are_compared_in_the_widest(mixture, data):
    tree = {"empty": np.zeros((0, 3), np.float32)} if mixture == "all" else {}
    for name, shape in MIXED[mixture].items():
        drawn = data.draw(floats(DTYPES[name], int(np.prod(shape))))
        tree[name] = drawn.reshape(shape)
    leaves = jax.tree.leaves(tree)
    counts = np.arange(0, 15, dtype=np.int32)
    masks = all_budgets(jax.tree.map(jnp.asarray, tree), jnp.asarray(counts))
    assert jax.tree.structure(masks) == jax.tree.structure(tree)
    assert_every_budget(leaves, jax.tree.leaves(masks), counts)


@pytest.mark.parametrize("name", ["bfloat16", "float32", "float64"])
def test_poor_guesses_cost_no_exactness(name, monkeypatch):
    # A sample of a handful from 61 entries guesses badly; the counts must not care.
    monkeypatch.setattr(_top_k, "_SAMPLE_FROM", 1)
    monkeypatch.setattr(_top_k, "_SAMPLE_SIZE", 5)
    monkeypatch.setattr(_top_k, "_SAMPLE_LEAST", 1)
    monkeypatch.setattr(_top_k, "_INTERPOLATE_FROM", 1)
    rng = np.random.default_rng(0)
    counts = np.arange(0, 62, dtype=np.int32)
    for _ in range(15):
        bits = rng.integers(0, 2**63, 61, dtype=np.uint64)
        scores = bits.view("u1").view(DTYPES[name])[:61]
        scores = np.where(rng.random(61) < rng.random(), scores, scores[:1])
        masks = all_budgets(jnp.asarray(scores), jnp.asarray(counts))
        assert_every_budget([scores], [masks], counts)


@functools.cache
def adversaries():
    """Distributions that mislead interpolation, sampling, or both."""
    rng = np.random.default_rng(1)
    normal = rng.standard_normal(LARGE)
    outlier = np.full(LARGE, 1e-3)
    outlier[7] = 1e30
    clusters = np.where(rng.random(LARGE) < 0.5, 1e-30, 1e30) * (1 + 1e-3 * normal)
    pruned = np.where(rng.random(LARGE) < 0.9, 0.0, normal)
    wild = rng.integers(0, 2**32, LARGE, dtype=np.uint32).view(np.float32)
    periodic = np.where(np.arange(LARGE) % 64 == 0, 1e-6, normal)  # aliases a stride
    return {
        "normal": normal,
        "all equal": np.ones(LARGE),
        "zero": np.zeros(LARGE),
        "two clusters far apart": clusters,
        "one outlier": outlier,
        "power law": rng.random(LARGE) ** -4.0,
        "steep power law": rng.random(LARGE) ** 12.0,
        "sorted": np.sort(normal),
        "few values": rng.integers(0, 5, LARGE),
        "plateaus": np.repeat(rng.standard_normal(64), LARGE // 64),
        "mostly zero": pruned,
        "half precision": normal.astype(np.float16),
        "subnormal": normal * 1e-42,
        "any bits": wild,
        "periodic": periodic,
    }


@pytest.mark.parametrize("name", adversaries())
def test_large_scheme_is_exact_on_adversaries(name):
    scores = adversaries()[name].astype(np.float32)
    n = scores.size
    counts = [0, 1, 2, n // 1000, n // 10, n // 2, n - n // 20, n - 2, n - 1, n, n + 5]
    for k, (expected,) in zip(counts, sorted_masks([scores], counts), strict=True):
        mask = select.top_k(jnp.asarray(scores), k)
        np.testing.assert_array_equal(np.asarray(mask), expected)


def test_large_scheme_over_leaves_of_unlike_scale():
    rng = np.random.default_rng(2)
    tree = [
        rng.standard_normal((700, 501)).astype(np.float32) * np.float32(1e-3),
        rng.standard_normal((3, 3, 20, 999)).astype(np.float32),
        rng.integers(-2, 3, 33).astype(np.float32),
    ]
    counts = [10, 5_000, 150_000, 300_000, 530_000]
    arrays = jax.tree.map(jnp.asarray, tree)
    for k, expected in zip(counts, sorted_masks(tree, counts), strict=True):
        for mask, want in zip(select.top_k(arrays, k), expected, strict=True):
            np.testing.assert_array_equal(np.asarray(mask), want)


def test_no_copy_of_a_leaf_is_made():
    # The searches read the leaves; a key or an index written out would show here.
    leaf = jax.ShapeDtypeStruct((800, 700), jnp.float32)
    k = jax.ShapeDtypeStruct((), jnp.int32)
    compiled = jax.jit(select.top_k).lower(leaf, k).compile()
    stats = compiled.memory_analysis()
    assert stats is not None
    assert stats.temp_size_in_bytes < 0.1 * 4 * 800 * 700


def test_jit_eager_vmap_and_loop_agree():
    rng = np.random.default_rng(3)
    batch = {
        "a": jnp.asarray(rng.integers(-3, 4, (4, 3, 5)).astype(np.float32)),
        "b": jnp.asarray(rng.integers(-3, 4, (4, 7)).astype(np.float32)),
    }
    counts = jnp.asarray([0, 5, 17, 22], jnp.int32)
    together = jax.vmap(select.top_k)(batch, counts)
    jitted = jax.jit(select.top_k)
    for row in range(4):
        scores = jax.tree.map(lambda x, row=row: x[row], batch)
        eager = select.top_k(scores, int(counts[row]))
        for other in (
            jitted(scores, counts[row]),
            jax.tree.map(lambda x, row=row: x[row], together),
        ):
            jax.tree.map(np.testing.assert_array_equal, eager, other)


def test_a_new_budget_does_not_trace_again(monkeypatch):
    traces = []

    def traced(*args):
        traces.append(args)
        return select_masks(*args)

    select_masks = _top_k._select
    monkeypatch.setattr(_top_k, "_select", traced)
    scores = jnp.arange(19.0, dtype=jnp.float32)
    for k in (0, 3, 19, 400):
        for given_k in (k, np.int64(k), jnp.int32(k)):
            assert int(select.top_k(scores, given_k).sum()) == min(k, 19)
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.uint32, jnp.int64])
def test_every_integer_type_of_k(dtype):
    top = jnp.iinfo(dtype).max
    scores = jnp.arange(300.0, dtype=jnp.float32)
    for k in (0, 7, top):
        assert int(select.top_k(scores, jnp.asarray(k, dtype)).sum()) == min(k, 300)


def test_derivatives_pass_through_as_zero():
    def kept_norm(x):
        return jnp.sum(jnp.where(select.top_k(x, 2), x * x, 0))

    x = jnp.asarray([1.0, -3.0, 2.0])
    np.testing.assert_array_equal(jax.grad(kept_norm)(x), [0.0, -6.0, 4.0])
    np.testing.assert_array_equal(jax.jacfwd(kept_norm)(x), [0.0, -6.0, 4.0])


# --- several devices -----------------------------------------------------------------


def sharded_tree(size):
    mesh = jax.make_mesh((2, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(4)
    specs = {
        "both": (P("data", "model"), (8, size)),
        "columns": (P(None, "model"), (3, 8)),
        "vector": (P(("data", "model")), (16,)),
        "whole": (P(), (5,)),
    }
    tree, placed = {}, {}
    for name, (spec, shape) in specs.items():
        tree[name] = rng.integers(-9, 10, shape).astype(np.float32)
        placed[name] = jax.device_put(tree[name], NamedSharding(mesh, spec))
    return tree, placed


@pytest.mark.parametrize(
    ("size", "transform"),
    [(6, lambda f: f), (LARGE // 8, jax.jit)],
    ids=["small, eager", "large, jit"],
)
def test_sharded_leaves_give_the_same_mask_in_the_same_place(size, transform):
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    tree, placed = sharded_tree(size)
    counts = [1, sum(x.size for x in tree.values()) // 3]
    top_k = transform(select.top_k)
    for k, expected in zip(
        counts, sorted_masks(list(tree.values()), counts), strict=True
    ):
        masks = top_k(placed, jnp.int32(k))
        for name, want in zip(tree, expected, strict=True):
            mask, leaf = masks[name], placed[name]
            np.testing.assert_array_equal(np.asarray(mask), want)
            assert mask.sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


# --- support -------------------------------------------------------------------------


def test_support_is_top_k_in_every_group():
    rng = np.random.default_rng(5)
    shapes = ((4, 3), (5,), (2, 2, 2), (6,))
    tree = [rng.integers(-4, 5, shape).astype(np.float32) for shape in shapes]
    groups = (1, -1, 0, 1)
    masks_of = jax.jit(lambda c: select.support(arrays, c, groups))
    arrays = jax.tree.map(jnp.asarray, tree)
    for first, second in ((0, 0), (3, 7), (8, 18), (1, 17), (5, 0)):
        masks = masks_of(jnp.asarray([first, second], jnp.int32))
        (only,) = sorted_masks([tree[2]], [first])
        (pair,) = sorted_masks([tree[0], tree[3]], [second])
        expected = [pair[0], np.ones(5, bool), only[0], pair[1]]
        jax.tree.map(np.testing.assert_array_equal, masks, expected)


def test_support_keeps_everything_where_no_leaf_has_a_group():
    (mask,) = select.support([jnp.ones(3)], jnp.zeros(0, jnp.int32), (-1,))
    np.testing.assert_array_equal(mask, np.ones(3, bool))


# --- n_m and blocks ------------------------------------------------------------------


@pytest.mark.parametrize(("n", "m"), [(2, 4), (0, 3), (3, 3), (1, 6), (1, 1)])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_n_m_agrees_with_a_loop(n, m, axis):
    rng = np.random.default_rng(6)
    scores = rng.integers(-3, 4, (12, 12, 12)).astype(np.float32)
    scores[rng.random(scores.shape) < 0.1] = np.nan
    moved = np.moveaxis(scores, axis, -1)
    keep = np.zeros((moved.size // m, m), bool)
    for row, run in enumerate(moved.reshape(-1, m)):
        magnitude = np.where(np.isnan(run), 0, np.abs(run))
        keep[row, np.argsort(-magnitude, kind="stable")[:n]] = True
    expected = np.moveaxis(keep.reshape(moved.shape), -1, axis)
    actual = select.n_m({"w": jnp.asarray(scores)}, n, m, axis=axis)["w"]
    np.testing.assert_array_equal(np.asarray(actual), expected)


@pytest.mark.parametrize(
    ("name", "block"), [("bfloat16", (2, 3)), ("float16", (3,)), ("float64", (2, 3))]
)
def test_blocks_agree_with_a_loop(name, block):
    rng = np.random.default_rng(7)
    tree = [
        rng.integers(-3, 4, shape).astype(DTYPES[name])
        for shape in ((4, 6), (2, 4, 3), (2, 3))
    ]
    tree[0][0, 0] = np.nan
    rows, columns = (1, *block)[-2:]
    tiles = []
    for index, x in enumerate(tree):
        for lead in np.ndindex(x.shape[:-2]):
            for i in range(0, x.shape[-2], rows):
                for j in range(0, x.shape[-1], columns):
                    at = (*lead, slice(i, i + rows), slice(j, j + columns))
                    total = np.nansum(np.abs(x[at].astype(np.float64)))
                    tiles.append((index, at, total))
    tiles_by_sum = sorted(tiles, key=lambda tile: -tile[2])
    budgets = jnp.arange(0, 56, 5, dtype=jnp.int32)
    masks = jax.vmap(lambda k: select.blocks(jax.tree.map(jnp.asarray, tree), k, block))
    actual = masks(budgets)
    for row, k in enumerate(budgets.tolist()):
        expected = [np.zeros(x.shape, bool) for x in tree]
        for index, at, _ in tiles_by_sum[: k // (rows * columns)]:
            expected[index][at] = True
        for mask, want in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(np.asarray(mask)[row], want)


# --- apply_mask ----------------------------------------------------------------------


@pytest.mark.parametrize("name", DTYPES)
def test_masked_entries_are_positive_zeros(name):
    values = np.array([np.nan, np.inf, -0.0, 3.0, -np.inf], DTYPES[name])
    mask = np.array([False, False, False, True, True])
    result = select.apply_mask({"a": jnp.asarray(values)}, {"a": jnp.asarray(mask)})
    assert result["a"].dtype == values.dtype
    zeroed = np.asarray(result["a"])
    np.testing.assert_array_equal(
        zeroed, np.where(mask, values, 0).astype(zeroed.dtype)
    )
    assert not np.signbit(zeroed[:3].astype(np.float64)).any()


# --- wrong input ---------------------------------------------------------------------

VECTOR = jnp.ones(8)
TREE = {"layer": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
COUNTS = jnp.asarray([2], jnp.int32)
HALVES: Any = (1.0, 2)
INTEGER = {"a": {"b": jnp.arange(3)}}
COMPLEX = [VECTOR, jnp.ones(2, complex)]
SHORT = jnp.ones(3, bool)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: select.top_k(VECTOR, 0.1), TypeError, "keep.params, density"),
        (lambda: select.top_k(VECTOR, True), TypeError, "keep.params, density"),
        (lambda: select.top_k(VECTOR, jnp.float32(2)), TypeError, "dtype float32"),
        (lambda: select.top_k(VECTOR, {"a": 1}), TypeError, "integer"),
        (lambda: select.top_k(VECTOR, -1), ValueError, "at least 0"),
        (lambda: select.top_k(VECTOR, jnp.arange(3)), ValueError, "jax.vmap"),
        (lambda: select.top_k({}, 1), ValueError, "no array"),
        (lambda: select.top_k(INTEGER, 1), TypeError, "leaf 'a/b' has dtype int"),
        (lambda: select.top_k(COMPLEX, 1), TypeError, "leaf '1' has dtype complex"),
        (lambda: select.support(VECTOR, VECTOR, (0,)), TypeError, "be integers|Int"),
        (lambda: select.support(VECTOR, COUNTS, (0, 0)), ValueError, "1 leaves"),
        (lambda: select.support(VECTOR, COUNTS, (1,)), ValueError, "point into it"),
        (lambda: select.n_m(TREE, 2, 4), ValueError, r"layer/bias.*\(6,\).*m=4"),
        (lambda: select.n_m(VECTOR, 2, 4, axis=1), ValueError, "axis 1"),
        (lambda: select.n_m(VECTOR, 5, 4), ValueError, "n=5, m=4"),
        (lambda: select.n_m(VECTOR, 0, 0), ValueError, "m=0"),
        (lambda: select.n_m(VECTOR, *HALVES), TypeError, "must be ints"),
        (lambda: select.blocks(TREE, 4, (2, 2)), ValueError, "bias.*leave this leaf"),
        (lambda: select.blocks(VECTOR, 4, (3,)), ValueError, "the array has shape"),
        (lambda: select.blocks(VECTOR, 4, ()), ValueError, "positive ints"),
        (lambda: select.blocks(VECTOR, 0.5, (2,)), TypeError, "density"),
        (lambda: select.apply_mask(TREE, [VECTOR]), ValueError, r"(?s)mask: .*kernel"),
        (lambda: select.apply_mask(VECTOR, SHORT), ValueError, r"shape \(8,\), .*3"),
        (lambda: select.apply_mask(VECTOR, VECTOR), TypeError, "mask != 0"),
    ],
)
def test_wrong_input_says_what_to_do(call, error, words):
    with pytest.raises(error, match=words):
        call()
