"""Paths over k: against enumeration, slow loops, and formulas in NumPy."""

import itertools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
import scipy.sparse
from jax.experimental.sparse import BCOO
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sparserec import Status, htp, l0cd, quadratic, recovery
from sparserec.recovery._path_model import model_path

ROWS, SIZE, LARGEST = 40, 9, 8  # one set of shapes: compilation is most of the time


def data(seed=0, correlation=0.3, noise=0.5):
    rng = np.random.default_rng(seed)
    design = rng.normal(size=(ROWS, SIZE))
    for j in range(1, SIZE):
        design[:, j] += correlation * design[:, j - 1]
    weights = np.where(np.arange(SIZE) % 3 == 1, rng.choice([-1.0, 1.0], SIZE), 0)
    return design, design @ weights + noise * rng.normal(size=ROWS)


def rows_model(design, response):
    return quadratic.QuadraticModel(
        jnp.zeros(design.shape[1]),
        response @ response / 2,
        -response @ design,
        quadratic.LowRank(design, jnp.zeros(())),
    )


def fit(design, response):
    return recovery.path(rows_model(design, response), jnp.zeros(SIZE), LARGEST)


def fit_from(design, response, **options):
    return recovery.path(
        rows_model(jnp.asarray(design), jnp.asarray(response)),
        jnp.zeros(SIZE),
        LARGEST,
        **options,
    )


def exact(design, response, k, l2=0.0):
    gram = design.T @ design + 2 * l2 * np.eye(SIZE)
    best = oracles.best_support(gram, design.T @ response, k)
    return best.value + response @ response / 2


# --- quadratic models ----------------------------------------------------------------


@pytest.mark.parametrize("l2", [0.0, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_every_k_against_enumeration(seed, l2):
    design, response = data(seed)
    found = fit_from(design, response, l2=l2)
    np.testing.assert_array_equal(found.ks, np.arange(1, LARGEST + 1))
    np.testing.assert_array_equal(found.kept, found.ks)
    for k, objective in zip(found.ks.tolist(), found.objective, strict=True):
        np.testing.assert_allclose(objective, exact(design, response, k, l2), rtol=1e-9)
    assert np.all(np.asarray(found.status) == Status.CONVERGED)


@pytest.mark.parametrize("seed", range(6))
def test_correlated_paths_fall_and_are_refitted(seed):
    design, response = data(seed, correlation=1.2, noise=2.0)
    found = fit_from(design, response)
    assert np.all(np.diff(np.asarray(found.objective)) <= 0)
    for mask, params, objective in zip(
        np.asarray(found.mask), np.asarray(found.params), found.objective, strict=True
    ):
        part = design[:, mask]
        weights = np.linalg.lstsq(part, response, rcond=None)[0]
        np.testing.assert_allclose(params[mask], weights, rtol=1e-5)
        assert not params[~mask].any()
        value = np.sum((response - part @ weights) ** 2) / 2
        np.testing.assert_allclose(objective, value, rtol=1e-9)


def test_no_exchange_is_left():
    design, response = data(3, correlation=2.0, noise=1.0)
    found = fit_from(design, response)
    for k in (2, 4):
        kept: Any = set(np.flatnonzero(found.mask[k - 1]))
        best = min(
            np.linalg.lstsq(design[:, sorted(kept - {i} | {j})], response)[1][0] / 2
            for i, j in itertools.product(kept, set(range(SIZE)) - kept)
        )
        value = float(found.objective[k - 1])
        assert value <= best * (1 + 1e-9)
        np.testing.assert_allclose(found.gain[k - 1], value - best, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_no_worse_than_a_search_at_every_k(seed):
    design, response = data(seed, correlation=1.5, noise=1.0)
    model = rows_model(jnp.asarray(design), jnp.asarray(response))
    found = recovery.path(model, jnp.zeros(SIZE), LARGEST)
    for k in range(1, LARGEST + 1):
        # One descent of l0cd: as the path, it stops where no exchange helps.
        alone = l0cd(model, jnp.zeros(SIZE), k, effort=0.0, max_kept=LARGEST)
        assert float(found.objective[k - 1]) <= float(alone.objective) * (1 + 1e-9)


@pytest.mark.slow
@pytest.mark.usefixtures("lenient_promotion")
@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_a_sum_of_squares_is_not_negative_in_single_precision(scale):
    design, _ = data()
    with jax.enable_x64(False):
        rows = jnp.asarray(design, jnp.float32)
        target = jnp.float32(scale) * rows[:, [2, 6]] @ jnp.asarray([1.0, -2.0])
        model = quadratic.least_squares(rows, target)
        found = recovery.path(model, jnp.zeros(SIZE), LARGEST)
        assert np.all(np.asarray(found.objective) >= 0)
        assert np.all(np.asarray(found.objective[1:]) <= 1e-5 * found.objective[0])
        for solution in (
            l0cd(model, jnp.zeros(SIZE), 2, effort=0.0),
            htp(model, jnp.zeros(SIZE), 2),
        ):
            assert 0 <= float(solution.objective) <= 1e-5 * float(model.value)
            np.testing.assert_array_equal(np.flatnonzero(solution.mask), [2, 6])


def test_nothing_left_to_explain():
    design, _ = data()
    sparse = design[:, [2, 6]] @ np.array([1.0, -2.0])
    found = fit_from(design, sparse)
    np.testing.assert_array_equal(found.kept, np.minimum(found.ks, 2))
    np.testing.assert_allclose(found.objective[1:], 0, atol=1e-9)
    silent = fit_from(design, np.zeros(ROWS))
    assert not np.asarray(silent.mask).any()
    assert np.all(np.asarray(silent.objective) == 0)


def test_twin_columns_are_kept_once():
    design, response = data()
    design[:, 5] = design[:, 4]
    found = fit_from(design, response)
    assert not np.any(found.mask[:, 4] & found.mask[:, 5])
    assert np.all(np.isfinite(np.asarray(found.params)))


def test_one_compilation_for_other_data():
    fit_from(*data(0))
    before = cast(Any, model_path)._cache_size()
    fit_from(*data(1), l2=0.3)
    assert cast(Any, model_path)._cache_size() == before


@pytest.mark.slow
def test_a_batch_of_problems():
    drawn = [data(seed) for seed in range(3)]
    designs, responses = (
        jnp.stack([jnp.asarray(x) for x in y]) for y in zip(*drawn, strict=True)
    )
    together = jax.jit(jax.vmap(fit))(designs, responses)
    for i, (design, response) in enumerate(drawn):
        alone = fit_from(design, response)
        np.testing.assert_array_equal(together.mask[i], alone.mask)
        np.testing.assert_allclose(together.objective[i], alone.objective, rtol=1e-9)


@pytest.mark.slow
def test_rows_on_four_devices():
    design, response = data(4)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    over_rows = NamedSharding(mesh, PartitionSpec("rows"))
    split = jax.device_put((jnp.asarray(design), jnp.asarray(response)), over_rows)
    found, alone = fit(*split), fit_from(design, response)
    np.testing.assert_array_equal(found.mask, alone.mask)
    np.testing.assert_allclose(found.objective, alone.objective, rtol=1e-9)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k_max": 0}, ValueError, "at least 1"),
        ({"k_max": SIZE + 1}, ValueError, r"\[1, 9\]"),
        ({"params": jnp.zeros(SIZE, int)}, TypeError, "floating"),
        ({"loss_fn": rows_model(jnp.full((4, SIZE), jnp.nan), jnp.ones(4))},
         ValueError, "NaN"),
    ],
)  # fmt: skip
def test_bad_input_is_explained(change, error, words):
    model = rows_model(*map(jnp.asarray, data()))
    call = {"loss_fn": model, "params": jnp.zeros(SIZE), "k_max": 3, **change}
    with pytest.raises(error, match=words):
        recovery.path(call["loss_fn"], call["params"], call["k_max"])


# --- losses, and weights that are never pruned ---------------------------------------


def logistic(params, design, labels):
    eta = design @ params["slope"] + params["level"]
    return jnp.mean(jax.nn.softplus(eta) - labels * eta)


def logistic_optimum(design, labels, kept):
    rows = np.column_stack([design[:, list(kept)], np.ones(len(labels))])
    weights = np.zeros(rows.shape[1])
    for _ in range(50):
        mean = 1 / (1 + np.exp(-rows @ weights))
        bend = rows.T * (mean * (1 - mean))
        weights -= np.linalg.solve(bend @ rows, rows.T @ (mean - labels))
    eta = rows @ weights
    return np.mean(np.logaddexp(0, eta) - labels * eta)


def test_a_loss_against_enumeration():
    rng = np.random.default_rng(1)
    design = rng.normal(size=(80, 6))
    chance = 1 / (1 + np.exp(-design @ np.array([1.5, 0, -1, 0, 0.5, 0]) - 0.5))
    labels = (rng.uniform(size=80) < chance).astype(float)
    found = recovery.path(
        logistic,
        {"level": jnp.zeros(()), "slope": jnp.zeros(6)},
        4,
        args=(jnp.asarray(design), jnp.asarray(labels)),
        prunable={"level": False, "slope": True},
    )
    for k, objective in zip(found.ks.tolist(), found.objective, strict=True):
        best = min(
            logistic_optimum(design, labels, kept)
            for kept in itertools.combinations(range(6), k)
        )
        np.testing.assert_allclose(objective, best, rtol=1e-8)
    assert np.all(np.asarray(found.mask["level"]))
    np.testing.assert_array_equal(found.kept, found.ks)


@pytest.mark.slow
def test_an_intercept_as_weight_or_by_centering():
    design, response = data(2)
    response = response + 7
    rows = jnp.asarray(np.column_stack([design, np.ones(ROWS)]))
    target = jnp.asarray(response)
    center = {"a": jnp.zeros(SIZE), "b": jnp.zeros(())}
    slope = -target @ rows
    model = quadratic.low_rank(
        rows,
        center,
        {"a": slope[:-1], "b": slope[-1]},
        target @ target / 2,
    )
    found = recovery.path(model, center, 4, prunable={"a": True, "b": False})
    standard = recovery.regression(jnp.asarray(design), target)
    other = recovery.path(standard.model, jnp.zeros(SIZE), 4)
    coefficients, intercept = standard.undo(other.params)
    np.testing.assert_array_equal(found.mask["a"], other.mask)
    np.testing.assert_allclose(found.params["a"], coefficients, atol=1e-9)
    np.testing.assert_allclose(found.params["b"], intercept, rtol=1e-9)


@pytest.mark.slow
def test_a_sparse_design_is_centered_without_memory():
    design, response = data(5)
    design = np.where(np.abs(design) > 0.7, design, 0)
    share = np.random.default_rng(0).integers(1, 4, ROWS).astype(float)
    target, counts = jnp.asarray(response), jnp.asarray(share)
    rows = jnp.asarray(design)
    dense = recovery.regression(rows, target, weights=counts)
    sparse = recovery.regression(BCOO.fromdense(rows), target, weights=counts)
    paths = [recovery.path(x.model, jnp.zeros(SIZE), 4) for x in (dense, sparse)]
    np.testing.assert_array_equal(paths[0].mask, paths[1].mask)
    np.testing.assert_allclose(paths[0].objective, paths[1].objective, rtol=1e-9)
    found, level = sparse.undo(paths[1].params[3])
    kept = np.flatnonzero(paths[1].mask[3])
    part = np.column_stack([design[:, kept], np.ones(ROWS)]) * np.sqrt(share)[:, None]
    expected = np.linalg.lstsq(part, np.sqrt(share) * response, rcond=None)[0]
    np.testing.assert_allclose(found[kept], expected[:-1], rtol=1e-8)
    np.testing.assert_allclose(level, expected[-1], rtol=1e-8)


def test_sparse_matrices_of_scipy_are_converted():
    design, response = (jnp.asarray(x, jnp.float32) for x in data(5))
    kinds = [design, scipy.sparse.csr_matrix(np.asarray(design))]
    found = [recovery.regression(x, response).model for x in kinds]
    np.testing.assert_allclose(found[0].gradient, found[1].gradient, atol=1e-4)
    with pytest.raises(TypeError, match=r"recovery\.regression"):
        quadratic.least_squares(kinds[1], response)


# --- the choice of k -----------------------------------------------------------------


def price(kind, kept, rows, size):
    return {
        "aic": 2 * kept,
        "bic": kept * math.log(rows),
        "ebic": kept * math.log(rows) + 2 * math.log(math.comb(size, kept)),
        "gic": kept * math.log(size) * math.log(math.log(rows)),
    }[kind]


@pytest.mark.parametrize("kind", ["aic", "bic", "ebic", "gic"])
@pytest.mark.parametrize("variance", [None, 0.3])
def test_criteria_against_their_formulas(kind, variance):
    design, response = data(1)
    found = fit_from(design, response)
    choice = recovery.information_criterion(found, ROWS, kind, variance=variance)
    residuals = response[:, None] - design @ np.asarray(found.params).T
    squares = np.sum(residuals**2, axis=0)
    deviance = squares / variance if variance else ROWS * np.log(squares / ROWS)
    prices = [price(kind, k, ROWS, SIZE) for k in range(1, LARGEST + 1)]
    np.testing.assert_allclose(choice.values, deviance + prices, rtol=1e-9)
    assert int(choice.k) == 1 + np.argmin(deviance + prices)
    likelihood = recovery.information_criterion(found, 40, kind, likelihood="mean")
    np.testing.assert_allclose(
        likelihood.values, 80 * np.asarray(found.objective) + prices, rtol=1e-9
    )


def test_a_perfect_fit_is_not_refined():
    design, _ = data()
    found = fit_from(design, design[:, [2, 6]] @ np.array([1.0, -2.0]))
    assert int(recovery.information_criterion(found, ROWS, "aic").k) == 2


def test_unknown_criteria_are_named():
    found = fit_from(*data())
    with pytest.raises(ValueError, match="'ebic'"):
        recovery.information_criterion(found, ROWS, cast(Any, "cp"))
    with pytest.raises(ValueError, match="Gaussian"):
        recovery.information_criterion(found, 9, likelihood="sum", variance=1.0)


def mean_squares(params, design, response):
    return jnp.mean(jnp.square(response - design @ params)) / 2


def test_cross_validation_against_a_slow_loop():
    design, response = data(2, noise=1.5)
    key, folds = jax.random.key(3), 4
    traced = []

    def counted(design, response):
        traced.append(design.shape)
        return fit(design, response)

    given = (jnp.asarray(design), jnp.asarray(response))
    result = recovery.cross_validate(counted, mean_squares, given, folds=folds, key=key)
    count = len(traced)
    assert count <= 2  # one branch for CPU, one for accelerators
    again = (given[0], -given[1])
    recovery.cross_validate(counted, mean_squares, again, folds=folds, key=key)
    assert len(traced) == count

    order = np.asarray(jax.random.permutation(key, ROWS))
    held = ROWS // folds
    losses = np.zeros((folds, LARGEST))
    for fold in range(folds):
        rest = order[fold * held : (fold + 1) * held]
        rows = np.setdiff1d(order, rest)
        for k in range(1, LARGEST + 1):
            gram = design[rows].T @ design[rows]
            best = oracles.best_support(gram, response[rows] @ design[rows], k)
            error = response[rest] - design[rest] @ best.params
            losses[fold, k - 1] = np.mean(error**2) / 2
    np.testing.assert_allclose(result.losses, losses, rtol=1e-8)
    mean, error = losses.mean(axis=0), losses.std(axis=0, ddof=1) / math.sqrt(folds)
    np.testing.assert_allclose(result.standard_error, error, rtol=1e-8)
    best = np.argmin(mean)
    assert int(result.best) == best + 1
    assert int(result.simplest) == 1 + np.argmax(mean <= mean[best] + error[best])


@pytest.mark.slow
def test_stability_counts_how_often_a_weight_is_kept():
    design, response = data(0, noise=0.3)
    key = jax.random.key(1)
    given = (jnp.asarray(design), jnp.asarray(response))
    result = recovery.stability(fit, given, subsamples=5, key=key)
    frequencies = np.zeros((LARGEST, SIZE))
    for one in jax.random.split(key, 5):
        rows = np.asarray(jax.random.permutation(one, ROWS))[: ROWS // 2]
        for k in range(1, LARGEST + 1):
            gram = design[rows].T @ design[rows]
            best = oracles.best_support(gram, response[rows] @ design[rows], k)
            frequencies[k - 1] += best.mask / 5
    np.testing.assert_allclose(result.frequencies, frequencies, atol=1e-12)


@pytest.mark.parametrize("folds", [1, ROWS + 1, 2.0, True])
def test_folds_that_cannot_be(folds):
    given = (jnp.zeros((ROWS, SIZE)), jnp.zeros(ROWS))
    with pytest.raises(ValueError, match="folds"):
        recovery.cross_validate(
            fit, mean_squares, given, folds=folds, key=jax.random.key(0)
        )
