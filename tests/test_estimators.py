"""Estimators: scikit-learn's own checks, and fits against its models."""

import itertools
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
import scipy.sparse

pytest.importorskip("sklearn")

from sklearn.base import clone
from sklearn.feature_selection import SelectFromModel
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    PoissonRegressor,
    Ridge,
)
from sklearn.model_selection import GridSearchCV, KFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import (
    estimator_checks_generator,
    parametrize_with_checks,
)

from sparserec.recovery import (
    SparseClassifier,
    SparsePoissonRegressor,
    SparseRegressor,
    exhaustive,
    regression,
)

ROWS, SIZE = 60, 8
TRUTH = np.array([0, 2.0, 0, 0, -1.5, 0, 1.0, 0])
ESTIMATORS = [SparseRegressor, SparseClassifier, SparsePoissonRegressor]


@pytest.fixture(autouse=True)
def as_users_have_it(lenient_promotion):
    """Single precision: the search must not need more."""
    del lenient_promotion
    with jax.enable_x64(False):
        yield


def draw(seed=0, noise=0.5):
    rng = np.random.default_rng(seed)
    units = np.geomspace(0.01, 100, SIZE)
    features = rng.normal(size=(ROWS, SIZE)) + 3
    score = features @ TRUTH
    return features * units, score + noise * rng.normal(size=ROWS) + 4, units


# --- the conventions -----------------------------------------------------------------

QUICK = {
    "check_parameters_default_constructible",
    "check_no_attributes_set_in_init",
    "check_estimators_unfitted",
    "check_do_not_raise_errors_in_init_or_set_param",
    "check_get_params_invariance",
    "check_set_params",
    "check_estimator_repr",
    "check_estimator_tags_renamed",
    "check_valid_tag_types",
    "check_estimators_empty_data_messages",
    "check_complex_data",
}


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_checks_that_need_no_fit(kind):
    done = set()
    checks: Any = estimator_checks_generator(kind())
    for estimator, check in checks:
        name = getattr(check, "func", check).__name__
        if name in QUICK:
            check(estimator)
            done.add(name)
    assert len(done) >= 8


@pytest.mark.slow
@parametrize_with_checks([kind() for kind in ESTIMATORS])
@pytest.mark.filterwarnings("ignore")
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


# --- least squares -------------------------------------------------------------------


@pytest.mark.parametrize("k", [3, "bic", "ebic"])
def test_the_right_features_with_a_plain_refit(k):
    X, y, units = draw()
    model: Any = SparseRegressor(k).fit(X, y)
    np.testing.assert_array_equal(model.get_support(indices=True), [1, 4, 6])
    plain = LinearRegression().fit(X[:, model.support_], y)
    np.testing.assert_allclose(model.coef_[model.support_], plain.coef_, rtol=1e-9)
    np.testing.assert_allclose(model.intercept_, plain.intercept_, rtol=1e-9)
    np.testing.assert_allclose(
        model.predict(X), plain.predict(X[:, model.support_]), rtol=1e-9
    )
    assert model.k_ == 3
    assert np.allclose(model.coef_ * units, TRUTH, atol=0.4)


@pytest.mark.slow
def test_the_best_subset_of_each_size():
    X, y, _ = draw(3, noise=8.0)
    standard = regression(*(jax.numpy.asarray(a, np.float32) for a in (X, y)))
    for k in (1, 2, 4):
        model: Any = SparseRegressor(k).fit(X, y)
        best = exhaustive(standard.model, k)
        np.testing.assert_array_equal(model.support_, best.mask)


@pytest.mark.slow
def test_weights_are_repetitions_and_sparse_is_dense(monkeypatch):
    X, y, _ = draw(1)
    X[np.abs(X) < np.median(np.abs(X), axis=0)] = 0
    weights = np.random.default_rng(0).integers(1, 3, ROWS)
    weighted = SparseRegressor("bic", l2=0.1).fit(X, y, weights)
    repeated = SparseRegressor("bic", l2=0.1).fit(
        np.repeat(X, weights, axis=0), np.repeat(y, weights)
    )
    np.testing.assert_allclose(weighted.coef_, repeated.coef_, rtol=1e-7)
    np.testing.assert_allclose(weighted.criterion_, repeated.criterion_, rtol=1e-4)
    monkeypatch.setattr("sparserec.recovery._estimator._DENSE_LIMIT", 0)
    sparse = SparseRegressor("bic", l2=0.1).fit(scipy.sparse.csc_matrix(X), y, weights)
    np.testing.assert_allclose(weighted.coef_, sparse.coef_, rtol=1e-7)
    predicted = sparse.predict(scipy.sparse.coo_matrix(X))
    np.testing.assert_allclose(predicted, weighted.predict(X), rtol=1e-9)


def test_a_ridge_on_standardized_features():
    X, y, _ = draw(2)
    model: Any = SparseRegressor(SIZE, l2=3.0).fit(X, y)
    scaled: Any = StandardScaler().fit(X)
    ridge = Ridge(alpha=6.0).fit(scaled.transform(X), y)
    np.testing.assert_allclose(model.coef_ * scaled.scale_, ridge.coef_, rtol=1e-7)


@pytest.mark.slow
def test_cross_validation_against_a_loop_of_fits():
    X, y, _ = draw(4, noise=6.0)
    splitter = KFold(4, shuffle=True, random_state=0)
    model: Any = SparseRegressor("cv", k_max=5, cv=splitter).fit(X, y)
    losses = np.zeros((4, 5))
    for fold, (fitted, rest) in enumerate(splitter.split(X)):
        for k in range(1, 6):
            one = SparseRegressor(k).fit(X[fitted], y[fitted])
            losses[fold, k - 1] = np.mean((y[rest] - one.predict(X[rest])) ** 2) / 2
    np.testing.assert_allclose(model.cv_losses_, losses, rtol=2e-3)
    assert model.k_ == 1 + np.argmin(losses.mean(axis=0))
    simple = SparseRegressor("cv_1se", k_max=5, cv=splitter).fit(X, y)
    assert simple.k_ <= model.k_


def test_pipelines_and_searches():
    X, y, _ = draw()
    search = GridSearchCV(SparseRegressor(), {"k": [1, 3]}, cv=2).fit(X, y)
    assert search.best_params_ == {"k": 3}
    chosen = SelectFromModel(SparseRegressor(3), threshold=1e-12).fit(X, y)
    np.testing.assert_array_equal(chosen.get_support(indices=True), [1, 4, 6])
    chain = make_pipeline(StandardScaler(), SparseRegressor(3)).fit(X, y)
    assert chain.score(X, y) > 0.9
    again: Any = clone(search.best_estimator_)
    assert again.get_params()["k"] == 3
    assert not hasattr(again, "coef_")


# --- likelihoods ---------------------------------------------------------------------


def test_logistic_regression_on_two_labels():
    X, y, _ = draw()
    labels = np.where(y > np.median(y), "yes", "no")
    model: Any = SparseClassifier(3, l2=0.05).fit(X, labels)
    scaled: Any = StandardScaler().fit(X)
    part = scaled.transform(X)[:, model.support_]
    plain = LogisticRegression(C=1 / 0.1, tol=1e-12, max_iter=10_000).fit(part, labels)
    scale = scaled.scale_[model.support_]
    slopes = model.coef_[0, model.support_] * scale
    np.testing.assert_allclose(slopes, plain.coef_[0], rtol=1e-4)
    chances = plain.predict_proba(part)
    np.testing.assert_allclose(model.predict_proba(X), chances, atol=1e-5)
    np.testing.assert_array_equal(model.predict(X), plain.predict(part))
    np.testing.assert_array_equal(model.classes_, ["no", "yes"])


# --- several outputs share their features --------------------------------------------


def several(seed=0):
    X, _, units = draw(seed)
    rng = np.random.default_rng(seed)
    weights = np.zeros((SIZE, 3))
    weights[[1, 4]] = rng.normal(size=(2, 3))
    center = X.mean(axis=0)
    scores = (X - center) @ (weights / units[:, None])
    return X, scores, rng


@pytest.mark.slow
def test_features_of_several_responses_are_the_best_of_all():
    X, scores, rng = several()
    Y = scores + [1, 2, 3] + 0.5 * rng.normal(size=scores.shape)
    model: Any = SparseRegressor(2).fit(X, Y)

    def rest(kept):
        return np.sum(
            (Y - LinearRegression().fit(X[:, kept], Y).predict(X[:, kept])) ** 2
        )

    best = min(itertools.combinations(range(SIZE), 2), key=rest)
    np.testing.assert_array_equal(model.get_support(indices=True), best)
    plain = LinearRegression().fit(X[:, best], Y)
    assert model.coef_.shape == (3, SIZE)
    np.testing.assert_allclose(model.coef_[:, best], plain.coef_, rtol=1e-9)
    np.testing.assert_allclose(model.intercept_, plain.intercept_, rtol=1e-9)
    np.testing.assert_allclose(model.predict(X), plain.predict(X[:, best]), rtol=1e-9)
    # One response after another may choose other features for each.
    alone = [SparseRegressor(2).fit(X, y).support_ for y in Y.T]
    assert np.any(alone, axis=0).sum() >= model.k_


@pytest.mark.slow
def test_features_of_several_classes_are_the_best_of_all():
    X, scores, rng = several(1)
    labels = np.array(["a", "b", "c"])[
        np.argmax(2 * scores + rng.gumbel(size=scores.shape), axis=1)
    ]
    model: Any = SparseClassifier(2, l2=0.05).fit(X, labels)
    scaled = StandardScaler().fit_transform(X)

    def fitted(kept):
        plain = LogisticRegression(C=1 / 0.1, tol=1e-10, max_iter=10_000)
        return plain.fit(scaled[:, kept], labels)

    def penalised(kept):
        plain = fitted(kept)
        codes = np.searchsorted(plain.classes_, labels)
        chances = plain.predict_proba(scaled[:, kept])[np.arange(ROWS), codes]
        return -np.log(chances).sum() + 0.05 * np.sum(plain.coef_**2)

    best = min(itertools.combinations(range(SIZE), 2), key=penalised)
    np.testing.assert_array_equal(model.get_support(indices=True), best)
    chances = fitted(best).predict_proba(scaled[:, best])
    np.testing.assert_allclose(model.predict_proba(X), chances, atol=1e-5)
    assert model.coef_.shape == (3, SIZE)
    assert model.intercept_.shape == (3,)
    np.testing.assert_array_equal(model.predict(X), model.classes_[chances.argmax(1)])


@pytest.mark.slow
@pytest.mark.parametrize("k", ["bic", "ebic", "cv"])
def test_the_number_of_shared_features_is_chosen(k):
    X, scores, rng = several(2)
    Y = scores + 0.3 * rng.normal(size=scores.shape)
    assert SparseRegressor(k, k_max=4).fit(X, Y).k_ == 2
    labels = np.argmax(4 * scores + rng.gumbel(size=scores.shape), axis=1)
    assert SparseClassifier(k, k_max=4).fit(X, labels).k_ in (1, 2, 3)


@pytest.mark.slow
@pytest.mark.parametrize("several_responses", [False, True])
def test_constant_and_equal_columns_and_more_than_the_rank(several_responses):
    rng = np.random.default_rng(0)
    X, Y = rng.normal(size=(12, 20)), rng.normal(size=(12, 2))
    X[:, 3], X[:, 5] = 7, X[:, 4]
    Y += X[:, [4]]
    y = Y if several_responses else Y[:, 0]
    model: Any = SparseRegressor(8).fit(X, y)
    assert not model.support_[3]
    assert model.support_[4] != model.support_[5]
    whole: Any = SparseRegressor(20).fit(X, y)
    assert whole.k_ <= 12
    assert np.all(np.isfinite(whole.coef_))
    assert whole.score(X, y) > 0.999


# --- bounds --------------------------------------------------------------------------


@pytest.mark.slow
def test_positive_coefficients_as_in_scikit_learn():
    X, y, _ = draw(5, noise=3.0)
    plain = LinearRegression(positive=True).fit(X, y)
    found: Any = SparseRegressor(SIZE, positive=True).fit(X, y)
    np.testing.assert_allclose(found.coef_, plain.coef_, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found.intercept_, plain.intercept_, rtol=1e-7)
    model: Any = SparseRegressor(2, positive=True).fit(X, y)

    def rest(kept):
        part = X[:, kept]
        fitted = LinearRegression(positive=True).fit(part, y).predict(part)
        return np.sum((y - fitted) ** 2)

    best = min(itertools.combinations(range(SIZE), 2), key=rest)
    np.testing.assert_allclose(
        np.sum((y - model.predict(X)) ** 2), rest(best), rtol=1e-7
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "response"),
    [
        (SparseRegressor, lambda y: y),
        (SparseRegressor, lambda y: np.stack([y, -y], axis=1)),
        (SparseClassifier, lambda y: y > np.median(y)),
        (SparseClassifier, lambda y: np.digitize(y, np.quantile(y, [0.3, 0.7]))),
        (SparsePoissonRegressor, lambda y: np.digitize(y, np.quantile(y, [0.3, 0.7]))),
    ],
)
def test_coefficients_obey_their_bounds(kind, response):
    X, y, units = draw(6)
    model = kind(3, lower=-0.2 / units, upper=0.3 / units).fit(X, response(y))
    coefficients = np.atleast_2d(model.coef_) * units
    assert np.all((coefficients >= -0.2 - 1e-12) & (coefficients <= 0.3 + 1e-12))
    assert np.any(coefficients > 0.2)
    positive = kind(3, positive=True).fit(X, response(y))
    assert np.all(positive.coef_ >= 0)


@pytest.mark.slow
def test_poisson_regression_of_counts():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(ROWS, SIZE))
    counts = rng.poisson(np.exp(0.5 + X @ TRUTH / 3))
    model: Any = SparsePoissonRegressor(3).fit(X, counts)
    part = X[:, model.support_]
    plain = PoissonRegressor(alpha=0, tol=1e-10, max_iter=10_000).fit(part, counts)
    np.testing.assert_allclose(model.coef_[model.support_], plain.coef_, rtol=1e-4)
    np.testing.assert_allclose(model.predict(X), plain.predict(part), rtol=1e-4)
    np.testing.assert_array_equal(model.get_support(indices=True), [1, 4, 6])


# --- what is refused -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"k": 0}, r"\[1, 8\]"),
        ({"k": 9}, r"\[1, 8\]"),
        ({"k": "cp"}, "'ebic'"),
        ({"k": 2.5}, "integer"),
        ({"k": "bic", "k_max": 9}, r"\[1, 8\]"),
        ({"l2": -1.0}, "l2"),
        ({"lower": 1.0}, "zero lies outside"),
        ({"upper": np.ones(3)}, r"\(3,\)"),
        ({"positive": True, "upper": -1.0}, "above"),
    ],
)
def test_bad_options_are_explained(options, words):
    X, y, _ = draw()
    with pytest.raises(ValueError, match=words):
        SparseRegressor(**options).fit(X, y)


def test_without_scikit_learn_the_package_works_and_says_what_to_install():
    code = (
        "import sys; sys.modules['sklearn'] = None\n"
        "import sparserec\n"
        "try:\n    sparserec.recovery.SparseRegressor\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "sparserec[sklearn]" in done.stdout
