"""Estimators with the conventions of scikit-learn: `fit`, `predict`, `score`.

They need the extra `sparserec[sklearn]`.

Legend: m examples, n features, t responses, c classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparserec.recovery import _refits
from sparserec.recovery._estimator import (
    ClassifierMixin,
    RegressorMixin,
    SparseEstimator,
    check_classification_targets,
    validate_data,
)
from sparserec.recovery._likelihoods import LOGISTIC, POISSON

__all__ = ["SparseClassifier", "SparsePoissonRegressor", "SparseRegressor"]


class SparseRegressor(RegressorMixin, SparseEstimator):
    r"""Least squares on at most k features.

    $$\min_{\beta_0, \beta} \tfrac12 \sum_i \omega_i (y_i - \beta_0 - x_i^\top\beta)^2
      + \lambda_2 \|\beta\|^2 \quad\text{subject to}\quad \|\beta\|_0 \le k$$

    The whole path over k is searched in one walk (`sparserec.recovery.path`), in the
    precision of JAX; coefficients on the support chosen are refitted in double
    precision.

    Args:
      k: features to keep, an integer; or how to choose: `"aic"`, `"bic"`, `"ebic"`,
        `"gic"`, `"cv"` (lowest held-out loss) or `"cv_1se"` (the smallest k within
        one standard error of it).
      k_max: largest k to choose from; `None` for 32, or fewer where there are fewer
        features or fewer than 64 examples.
      cv: folds, or a splitter of scikit-learn, for `"cv"` and `"cv_1se"`.
      l2: $\lambda_2 \ge 0$, on standardized features.
      fit_intercept: whether there is a $\beta_0$.
      standardize: whether features are divided by their standard deviation during
        the search, so that none is preferred for its unit.
      positive: whether coefficients must not be negative.
      lower: least coefficients, a number or one for every feature, at most zero;
        `None` for none.
      upper: largest coefficients, at least zero; `None` for none.

    Attributes:
      coef_: coefficients in the units of the data, shape `(n,)`; for several responses
        `(t, n)`.
      intercept_: $\beta_0$; for several responses shape `(t,)`.
      support_: features kept, booleans, shape `(n,)`.
      k_: how many they are.
      criterion_: the criterion for k = 1, 2, ..., where one chooses.
      cv_losses_: held-out losses, shape `(folds, k_max)`, where they choose.
      n_features_in_: features seen in `fit`.
      feature_names_in_: their names, where X has names.

    With several responses, y of shape `(m, t)`, a feature is kept for all of them or
    for none: k counts features, and squares of all responses are added up, so give
    them like units.

    X may be sparse (any format of scipy); it is not centered in memory. Weights of
    examples count as repetitions where they are whole numbers.
    """

    def __sklearn_tags__(self):
        """Several responses, too."""
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X, y, sample_weight=None):
        """Searches, chooses k and refits; returns the estimator."""
        X, y = validate_data(
            self,
            X,
            y,
            accept_sparse="csr",
            dtype=np.float64,
            y_numeric=True,
            multi_output=True,
        )
        return self._fit(X, np.asarray(y, np.float64), sample_weight)

    def predict(self, X):
        """Predictions, shape `(m,)` or `(m, t)`."""
        return self._predictor(X)

    def _unit(self, y: np.ndarray, weights: np.ndarray) -> float:
        rest = y - np.average(y, axis=0, weights=weights)
        variance = np.mean(np.average(rest**2, axis=0, weights=weights))
        return float(np.sqrt(variance)) or 1.0

    def _refit(self, part, y, weights, start, ridge, limits):
        del start
        return _refits.refit_least_squares(
            part, y, weights, ridge, self.fit_intercept, limits
        )


class SparseClassifier(ClassifierMixin, SparseEstimator):
    r"""Logistic regression of two classes or more on at most k features.

    $$\min_{\beta_0, \beta} \sum_i \omega_i \log\bigl(1 + e^{-z_i (\beta_0
      + x_i^\top\beta)}\bigr) + \lambda_2 \|\beta\|^2
      \quad\text{subject to}\quad \|\beta\|_0 \le k, \qquad z_i = \pm 1$$

    With more than two classes it is the multinomial loss, and a feature is kept for
    all classes or for none: k counts features.

    Args:
      k: features to keep, or how to choose; see `SparseRegressor`.
      k_max: largest k to choose from; see `SparseRegressor`.
      cv: folds, stratified, or a splitter of scikit-learn.
      l2: $\lambda_2 > 0$ keeps coefficients finite where the classes can be
        separated; on standardized features.
      fit_intercept: whether there is a $\beta_0$.
      standardize: see `SparseRegressor`.
      positive: see `SparseRegressor`.
      lower: least coefficients; see `SparseRegressor`.
      upper: largest coefficients; see `SparseRegressor`.

    Attributes:
      classes_: the labels.
      coef_: coefficients, shape `(1, n)`, for the second of two labels; shape `(c, n)`
        for more.
      intercept_: shape `(1,)` or `(c,)`.
      support_: features kept, booleans, shape `(n,)`.
      k_: how many they are.
      criterion_: the criterion for k = 1, 2, ..., where one chooses.
      cv_losses_: held-out losses, shape `(folds, k_max)`, where they choose.
      n_features_in_: features seen in `fit`.
      feature_names_in_: their names, where X has names.
    """

    _family = LOGISTIC

    def __init__(  # noqa: D107 - the class explains
        self,
        k: Any = "bic",
        *,
        k_max: Any = None,
        cv: Any = 5,
        l2=1e-3,
        fit_intercept=True,
        standardize=True,
        positive=False,
        lower: Any = None,
        upper: Any = None,
    ):
        super().__init__(
            k,
            k_max=k_max,
            cv=cv,
            l2=l2,
            fit_intercept=fit_intercept,
            standardize=standardize,
            positive=positive,
            lower=lower,
            upper=upper,
        )

    def fit(self, X, y, sample_weight=None):
        """Searches, chooses k and refits; returns the estimator."""
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
        check_classification_targets(y)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if self.classes_.size < 2:
            raise ValueError(
                "Classifier can't train when only one class is present: "
                f"{self.classes_.tolist()}."
            )
        if self.classes_.size > 2:
            return self._fit(X, np.eye(self.classes_.size)[codes], sample_weight, codes)
        self._fit(X, codes.astype(np.float64), sample_weight)
        self.coef_ = self.coef_[None]
        self.intercept_ = np.atleast_1d(self.intercept_)
        return self

    def decision_function(self, X):
        """Log odds of the second label, shape `(m,)`; of every label, `(m, c)`."""
        odds = self._predictor(X)
        return odds[:, 0] if odds.shape[1] == 1 else odds

    def predict(self, X):
        """The likeliest labels, shape `(m,)`."""
        odds = self.decision_function(X)
        best = odds > 0 if odds.ndim == 1 else odds.argmax(axis=1)
        return self.classes_[np.asarray(best, int)]

    def predict_proba(self, X):
        """Probabilities of the labels, shape `(m, c)`."""
        odds = self.decision_function(X)
        if odds.ndim == 1:
            odds = np.stack([np.zeros_like(odds), odds], axis=1)
        chances = np.exp(odds - odds.max(axis=1, keepdims=True))
        return chances / chances.sum(axis=1, keepdims=True)


class SparsePoissonRegressor(RegressorMixin, SparseEstimator):
    r"""Poisson regression of counts, with a logarithmic link, on at most k features.

    $$\min_{\beta_0, \beta} \sum_i \omega_i (e^{\eta_i} - y_i \eta_i)
      + \lambda_2 \|\beta\|^2 \quad\text{subject to}\quad \|\beta\|_0 \le k,
      \qquad \eta_i = \beta_0 + x_i^\top\beta$$

    Args:
      k: features to keep, or how to choose; see `SparseRegressor`.
      k_max: largest k to choose from; see `SparseRegressor`.
      cv: folds, or a splitter of scikit-learn.
      l2: $\lambda_2 \ge 0$, on standardized features.
      fit_intercept: whether there is a $\beta_0$.
      standardize: see `SparseRegressor`.
      positive: see `SparseRegressor`.
      lower: least coefficients; see `SparseRegressor`.
      upper: largest coefficients; see `SparseRegressor`.

    Attributes:
      coef_: coefficients on the scale of logarithms, shape `(n,)`.
      intercept_: $\beta_0$.
      support_: features kept, booleans, shape `(n,)`.
      k_: how many they are.
      criterion_: the criterion for k = 1, 2, ..., where one chooses.
      cv_losses_: held-out losses, shape `(folds, k_max)`, where they choose.
      n_features_in_: features seen in `fit`.
      feature_names_in_: their names, where X has names.
    """

    _family = POISSON

    def __sklearn_tags__(self):
        """No negative counts."""
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        return tags

    def fit(self, X, y, sample_weight=None):
        """Searches, chooses k and refits; returns the estimator."""
        X, y = validate_data(
            self, X, y, accept_sparse="csr", dtype=np.float64, y_numeric=True
        )
        counts = np.asarray(y, np.float64)
        if np.any(counts < 0):
            raise ValueError("counts `y` must not be negative.")
        return self._fit(X, counts, sample_weight)

    def predict(self, X):
        """Expected counts, shape `(m,)`."""
        return np.exp(self._predictor(X))
