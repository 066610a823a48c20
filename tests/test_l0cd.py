"""L0 coordinate descent: against enumeration, scikit-learn and its own promises."""

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparserec import Status, _tree, certificate, l0cd, quadratic
from sparserec._run import _run_compiled
from sparserec.budget import make_budget
from sparserec.recovery import exhaustive
from sparserec.solvers import _search
from sparserec.solvers._columns import make_problem
from sparserec.solvers._coordinate import coordinate_descent
from sparserec.solvers._escape import escape
from sparserec.solvers._l0cd_loss import _within_capacity
from sparserec.solvers._members import factorise

ROWS, SIZE = 30, 12  # one set of shapes: compilation is most of the time here


def regression(seed=0, correlation=0.7, noise=0.5, k=4):
    rng = np.random.default_rng(seed)
    design = rng.normal(size=(ROWS, SIZE))
    for j in range(1, SIZE):
        design[:, j] = correlation * design[:, j - 1] + design[:, j]
    weights = np.zeros(SIZE)
    weights[rng.choice(SIZE, k, replace=False)] = rng.choice([-1.0, 1.0], k)
    return design, design @ weights + noise * rng.normal(size=ROWS), weights


def model_of(design, response, *, gram=True):
    design, response = jnp.asarray(design), jnp.asarray(response)
    if gram:
        return quadratic.least_squares(design, response)
    curvature = quadratic.LowRank(design, jnp.zeros(()))
    return quadratic.QuadraticModel(
        jnp.zeros(design.shape[1]),
        response @ response / 2,
        -response @ design,
        curvature,
    )


def compilations():
    return cast(Any, _run_compiled)._cache_size()


def support(solution):
    return set(np.flatnonzero(np.asarray(solution.mask)))


def refit(design, response, kept):
    kept = sorted(kept)
    if not kept:
        return response @ response / 2
    weights = np.linalg.lstsq(design[:, kept], response, rcond=None)[0]
    return np.sum((response - design[:, kept] @ weights) ** 2) / 2


# --- best subsets --------------------------------------------------------------------


@settings(max_examples=40)
@given(seed=st.integers(0, 10_000), k=st.integers(0, 8))
def test_best_subsets_against_enumeration(seed, k):
    design, response, _ = regression(seed, correlation=0.9)
    model = model_of(design, response)
    found = l0cd(model, jnp.zeros(SIZE), k)
    best = oracles.best_support(design.T @ design, design.T @ response, k)
    exact = best.value + response @ response / 2
    assert found.status == Status.CONVERGED
    assert len(support(found)) == k
    value = refit(design, response, support(found))
    np.testing.assert_allclose(found.objective, value, rtol=1e-9)
    np.testing.assert_allclose(model(found.params), value, rtol=1e-9)
    assert value <= exact * (1 + 1e-9)


@pytest.mark.parametrize("order", ["cyclic", "greedy"])
def test_easy_problems_without_swaps(order):
    design, response, weights = regression(3, correlation=0.1, noise=0.05)
    model = model_of(design, response)
    found = l0cd(model, jnp.zeros(SIZE), 4, swaps=False, order=order)
    assert support(found) == set(np.flatnonzero(weights))
    kept = sorted(support(found))
    exact = np.linalg.lstsq(design[:, kept], response, rcond=None)[0]
    np.testing.assert_allclose(np.asarray(found.params)[kept], exact, atol=1e-9)


def test_no_worse_than_orthogonal_matching_pursuit():
    linear_model = pytest.importorskip("sklearn.linear_model")
    for seed in range(20):
        design, response, _ = regression(seed, correlation=0.9)
        pursuit = linear_model.OrthogonalMatchingPursuit(
            n_nonzero_coefs=5, fit_intercept=False
        ).fit(design, response)
        found = l0cd(model_of(design, response), jnp.zeros(SIZE), 5)
        theirs = refit(design, response, np.flatnonzero(pursuit.coef_))
        assert float(found.objective) <= theirs * (1 + 1e-9)


# --- penalties -----------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), penalty=st.floats(0.05, 20.0))
def test_penalised_problem_against_enumeration(seed, penalty):
    design, response, _ = regression(seed)
    model = model_of(design, response)
    found = l0cd(model, jnp.zeros(SIZE), 4, penalty=penalty, l2=0.5, effort=0.0)
    best = exhaustive(model, 4, penalty=penalty, l2=0.5)
    assert float(found.objective) >= float(best.objective) - 1e-9
    assert found.mask.sum() == jnp.count_nonzero(found.params)
    gain = certificate(model, found, 4, penalty=penalty, l2=0.5).gain
    assert gain <= 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("order", ["cyclic", "greedy"])
@settings(max_examples=20)
@given(
    seed=st.integers(0, 10_000), penalty=st.floats(0.0, 5.0), l1=st.floats(0.01, 3.0)
)
def test_coordinate_descent_ends_where_no_coordinate_improves(order, seed, penalty, l1):
    design, response, _ = regression(seed)
    budget = make_budget(6, jnp.zeros(SIZE))
    model = model_of(design, response)
    problem = make_problem(model, budget, penalty=penalty)
    values, done = _descend(problem, jnp.zeros(SIZE), jnp.asarray(l1), order)
    values = np.asarray(values)
    assert done
    assert np.count_nonzero(values) <= 6

    def objective(w):
        residual = response - design @ w
        count = np.count_nonzero(w)
        return residual @ residual / 2 + penalty * count + l1 * np.abs(w).sum()

    here = objective(values)
    square = np.sum(design**2, axis=0)
    for j in range(SIZE):
        without = np.where(np.arange(SIZE) == j, 0.0, values)
        pull = design[:, j] @ (response - design @ without)
        best = np.sign(pull) * max(abs(pull) - l1, 0) / square[j]
        room = np.count_nonzero(without) < 6
        for new in [0.0, best] if room else [0.0]:
            moved = without.copy()
            moved[j] = new
            assert here <= objective(moved) + 1e-8 * abs(here)


@functools.partial(jax.jit, static_argnames="order")
def _descend(values_problem, values, l1, order):
    return coordinate_descent(values_problem, values, l1, order=order, slots=SIZE)


def test_lasso_penalty_against_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    design, response, _ = regression(5)
    found = l0cd(model_of(design, response), jnp.zeros(SIZE), SIZE, l1=3.0)
    lasso = linear_model.Lasso(alpha=3.0 / ROWS, fit_intercept=False, tol=1e-12)
    expected = lasso.fit(design, response).coef_
    np.testing.assert_allclose(found.params, expected, atol=1e-6)


def lasso_on(design, response, kept, l1):
    """Least objective on a support, by a slow coordinate descent."""
    part, weights = design[:, kept], np.zeros(len(kept))
    gram, target = part.T @ part, part.T @ response
    for _ in range(300):
        for j in range(len(kept)):
            pull = target[j] - gram[j] @ weights + gram[j, j] * weights[j]
            shrunk = max(abs(pull) - l1, 0)
            weights[j] = np.sign(pull) * shrunk / gram[j, j]
    rest = response - part @ weights
    return rest @ rest / 2 + l1 * np.abs(weights).sum()


@pytest.mark.parametrize("seed", range(3))
def test_no_exchange_improves_an_answer_with_an_l1_penalty(seed):
    design, response, _ = regression(seed, correlation=0.9)
    model, l1 = model_of(design, response), 2.0
    plain = l0cd(model, jnp.zeros(SIZE), 3, l1=l1, swaps=False)
    found = l0cd(model, jnp.zeros(SIZE), 3, l1=l1)
    assert float(found.objective) <= float(plain.objective) * (1 + 1e-9)
    kept = set(np.flatnonzero(found.mask).tolist())
    own = lasso_on(design, response, sorted(kept), l1)
    np.testing.assert_allclose(found.objective, own, rtol=1e-6)
    others = set(range(SIZE)) - kept
    near = [sorted(kept - {i} | {j}) for i in kept for j in others]
    assert min(lasso_on(design, response, x, l1) for x in near) >= own - 1e-6


# --- promises ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_scale_of_the_response_changes_nothing(scale):
    for seed in range(5):
        design, response, _ = regression(seed, correlation=0.9)
        plain = l0cd(model_of(design, response), jnp.zeros(SIZE), 4)
        scaled = l0cd(model_of(design, scale * response), jnp.zeros(SIZE), 4)
        assert support(plain) == support(scaled)


def test_sweeps_compile_once():
    # The descent and the search beyond it are two programs, for all k and all data.
    before = compilations()
    for seed in (1, 2):
        model = model_of(*regression(seed)[:2])
        for k in range(SIZE + 1):
            l0cd(model, jnp.zeros(SIZE), k)
    assert compilations() <= before + 2


def test_a_clear_support_does_not_compile_the_search_beyond_it(monkeypatch):
    traces = []

    def counted(*args, **kwargs):
        traces.append(1)
        return escape(*args, **kwargs)

    monkeypatch.setattr(_search, "escape", counted)
    # Shapes that no other test has: nothing is compiled yet.
    design = np.random.default_rng(3).normal(size=(ROWS, SIZE + 1))
    model = model_of(design, 2 * design[:, 1] - design[:, 6])
    clear = l0cd(model, jnp.zeros(SIZE + 1), 2)
    assert support(clear) == {1, 6}
    assert not traces
    jax.eval_shape(lambda m: l0cd(m, jnp.zeros(SIZE + 1), 2, max_kept=2), model)
    assert traces


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"penalty": 1.0}])
def test_two_programs_find_what_one_finds(options):
    rng = np.random.default_rng(0)

    @jax.jit
    def traced(model):
        return l0cd(model, jnp.zeros(60), 8, max_kept=8, **options)

    for correlation in (0.0, 0.5, 0.9, 0.95):
        design = rng.normal(size=(40, 60))
        for j in range(1, 60):
            design[:, j] += correlation * design[:, j - 1]
        model = model_of(design, design[:, ::8] @ rng.normal(size=8) + rng.normal())
        one = traced(model)
        two = l0cd(model, jnp.zeros(60), 8, max_kept=8, **options)
        assert support(one) == support(two)
        assert one.status == two.status
        np.testing.assert_allclose(one.objective, two.objective, rtol=1e-9)
        np.testing.assert_allclose(one.params, two.params, atol=1e-9)


@pytest.mark.slow
def test_where_weights_that_are_never_pruned_start_does_not_matter():
    design, response, _ = regression(3, correlation=0.9)
    params = {"bias": jnp.zeros(1), "weights": jnp.zeros(SIZE - 1)}
    slope = -jnp.asarray(response) @ jnp.asarray(design)
    layout = _tree.layout(params)
    model = quadratic.QuadraticModel(
        params,
        jnp.asarray(response @ response / 2),
        {"bias": slope[:1], "weights": slope[1:]},
        quadratic.LowRank(jnp.asarray(design), jnp.zeros(()), None, layout),
    )
    only = {"bias": False, "weights": True}
    moved = params | {"bias": jnp.ones(1)}
    one, other = (l0cd(model, start, 3, prunable=only) for start in (params, moved))
    np.testing.assert_array_equal(one.mask["weights"], other.mask["weights"])
    np.testing.assert_allclose(one.objective, other.objective, rtol=1e-9)
    assert int(jnp.sum(one.mask["weights"])) == 3


@pytest.mark.slow
def test_a_wide_sweep_compiles_once():
    rng = np.random.default_rng(0)
    design = rng.normal(size=(20, 40))
    model = model_of(design, design[:, 3] - design[:, 7])
    start = jnp.zeros(40)
    l0cd(model, start, 2, max_kept=10, effort=0.0)
    before = compilations()
    for k in (1, 4, 10):
        assert len(support(l0cd(model, start, k, max_kept=10, effort=0.0))) <= k
    assert compilations() == before


@pytest.mark.slow
def test_under_vmap_and_jit():
    design, response, _ = regression(4)
    model = model_of(design, response)
    ks = jnp.arange(1, 5)
    paths = jax.jit(jax.vmap(lambda k: l0cd(model, jnp.zeros(SIZE), k)))(ks)
    for k in range(1, 5):
        alone = l0cd(model, jnp.zeros(SIZE), k)
        np.testing.assert_array_equal(paths.mask[k - 1], alone.mask)


@pytest.mark.slow
def test_several_starts_together():
    design, response, _ = regression(4, correlation=0.9)
    names = ("screening", "htp", "forward", "random")
    found = l0cd(
        model_of(design, response),
        jnp.zeros(SIZE),
        4,
        starts=names,
        key=jax.random.key(0),
    )
    best = oracles.best_support(design.T @ design, design.T @ response, 4)
    assert support(found) == set(np.flatnonzero(best.mask))


def test_a_warm_start_at_the_answer_stays():
    design, response, _ = regression(6)
    model = model_of(design, response)
    first = l0cd(model, jnp.zeros(SIZE), 5)
    second = l0cd(model, first.params, 5)
    assert support(first) == support(second)
    assert second.iterations == 1


@pytest.mark.slow
def test_single_precision():
    design, response, _ = regression(7)
    model = model_of(design.astype(np.float32), response.astype(np.float32))
    found = l0cd(model, jnp.zeros(SIZE, jnp.float32), 4)
    double = l0cd(model_of(design, response), jnp.zeros(SIZE), 4)
    assert found.params.dtype == jnp.float32
    assert support(found) == support(double)


# --- general losses ------------------------------------------------------------------


def logistic(params, inputs, labels):
    scores = inputs @ params["weights"] + params["bias"]
    return jnp.sum(jnp.logaddexp(0.0, scores) - labels * scores)


def test_logistic_loss_reaches_a_support_no_exchange_improves():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(120, 8))
    labels = (inputs[:, 1] - inputs[:, 5] + rng.logistic(size=120) > 0).astype(float)
    args = (jnp.asarray(inputs), jnp.asarray(labels))
    params = {"bias": jnp.zeros(()), "weights": jnp.zeros(8)}
    only = {"bias": False, "weights": True}
    found = l0cd(logistic, params, 2, args=args, prunable=only)
    assert found.status == Status.CONVERGED
    values = {
        tuple(kept): _logistic_refit(inputs[:, kept], labels)
        for kept in map(np.flatnonzero, oracles.all_masks(8, 2))
    }
    best = min(values, key=values.__getitem__)
    assert tuple(np.flatnonzero(found.mask["weights"])) == best
    np.testing.assert_allclose(found.objective, values[best], rtol=1e-8)


def _logistic_refit(inputs, labels):
    design = np.column_stack([np.ones(len(labels)), inputs])
    weights = np.zeros(design.shape[1])
    for _ in range(30):
        share = 1 / (1 + np.exp(-design @ weights))
        bend = (design.T * (share * (1 - share))) @ design
        weights -= np.linalg.solve(bend, design.T @ (share - labels))
    scores = design @ weights
    return np.sum(np.logaddexp(0, scores) - labels * scores)


# --- awkward and wrong data ----------------------------------------------------------


def test_duplicate_and_constant_columns():
    design, response, _ = regression(8)
    design[:, 3] = design[:, 2]
    design[:, 4] = 0.0
    found = l0cd(model_of(design, response), jnp.zeros(SIZE), 6)
    kept = support(found)
    assert 4 not in kept
    assert not {2, 3} <= kept
    assert np.isfinite(np.asarray(found.params)).all()


def test_more_weights_than_the_rank():
    rng = np.random.default_rng(1)
    design, response = np.zeros((ROWS, SIZE)), np.zeros(ROWS)
    design[:5], response[:5] = rng.normal(size=(5, SIZE)), rng.normal(size=5)
    found = l0cd(model_of(design, response), jnp.zeros(SIZE), 9)
    assert len(support(found)) <= 5
    assert float(found.objective) < 1e-10


def test_data_that_are_not_finite_name_the_columns():
    design, response, _ = regression(9)
    broken = design.copy()
    broken[2, 7] = np.nan
    with pytest.raises(ValueError, match=r"1 of 12 columns.*\[7\].*design"):
        l0cd(model_of(broken, response), jnp.zeros(SIZE), 3)
    response = np.where(np.arange(ROWS) == 4, np.inf, response)
    with pytest.raises(ValueError, match=r"every column.*response"):
        l0cd(model_of(design, response), jnp.zeros(SIZE), 3)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"order": "random"}, ValueError, "`order` must be one of"),
        ({"starts": "htp"}, ValueError, "a tuple of names"),
        ({"starts": ("best",)}, ValueError, "a tuple of names"),
        ({"starts": ("random",)}, ValueError, "need `key="),
        ({"key": 3}, TypeError, "a typed key"),
        ({"penalty": -1.0}, ValueError, "`penalty` must be a finite number"),
        ({"l1": np.nan}, ValueError, "`l1` must be a finite number"),
        ({"l2": np.ones(2)}, ValueError, "`l2` must be a finite number"),
        ({"effort": -1.0}, ValueError, "`effort` must be"),
        ({"max_kept": 2}, ValueError, "below the number of weights to keep, 3"),
        ({"max_kept": 0}, ValueError, "`max_kept` must be an integer"),
    ],
)
def test_wrong_options(options, error, words):
    model = model_of(*regression()[:2])
    with pytest.raises(error, match=words):
        l0cd(model, jnp.zeros(SIZE), 3, **options)


def test_losses_need_swaps_and_no_lasso():
    params = {"bias": jnp.zeros(()), "weights": jnp.zeros(8)}
    args = (jnp.ones((4, 8)), jnp.ones(4))
    with pytest.raises(ValueError, match="need a quadratic"):
        l0cd(logistic, params, 2, args=args, l1=1.0)


def test_traced_budgets_of_large_problems_need_a_limit():
    model = quadratic.least_squares(jnp.ones((3, 600)), jnp.ones(3))
    with pytest.raises(ValueError, match="`max_kept`"):
        jax.vmap(lambda k: l0cd(model, jnp.zeros(600), k))(jnp.arange(3))


def nearly_separated(seed):
    """Few examples, correlated columns: logistic losses with many local optima."""
    rng = np.random.default_rng(seed)
    columns = rng.normal(size=(40, 12)) + 0.9 * rng.normal(size=(40, 1))
    odds = 3 * columns @ np.repeat([1.0, -1.0, 0.7, 0.0], 3)
    return columns, (rng.random(40) < 1 / (1 + np.exp(-odds))).astype(float)


def test_swings_beyond_the_budget_leave_local_optima():
    def loss(w, x, y):
        eta = x @ w
        # The ridge keeps the values of separated classes finite.
        return jnp.sum(jnp.logaddexp(0, eta) - y * eta) + 1e-2 * jnp.sum(w**2)

    plain, long = [], []
    for seed in range(6):
        args = tuple(jnp.asarray(x) for x in nearly_separated(seed))
        both = [
            l0cd(loss, jnp.zeros(12), 5, args=args, effort=effort)
            for effort in (0.0, 1.0)
        ]
        assert all(int(x.mask.sum()) <= 5 for x in both)
        plain.append(float(both[0].objective))
        long.append(float(both[1].objective))
    assert all(b <= a * (1 + 1e-5) for a, b in zip(plain, long, strict=True))
    assert sum(b < a * (1 - 1e-3) for a, b in zip(plain, long, strict=True)) >= 1


def test_members_beyond_the_budget_go_one_by_one():
    rng = np.random.default_rng(0)
    design = jnp.asarray(rng.normal(size=(30, 7)) + rng.normal(size=(30, 1)))
    response = jnp.asarray(rng.normal(size=30))
    model = quadratic.least_squares(design, response)
    budget = make_budget(3, jnp.zeros(7))
    problem = make_problem(model, budget)
    everything = factorise(problem, jnp.arange(7, dtype=jnp.int32), jnp.ones(7, bool))
    kept = list(range(7))
    x, y = np.asarray(design), np.asarray(response)
    while len(kept) > 3:  # backward elimination
        rest = [[i for i in kept if i != j] for j in kept]
        lengths = [np.linalg.lstsq(x[:, r], y, rcond=None)[1][0] for r in rest]
        kept = rest[int(np.argmin(lengths))]
    found = _within_capacity(problem, everything)
    assert np.flatnonzero(found).tolist() == kept
