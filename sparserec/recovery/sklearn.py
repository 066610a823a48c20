"""Estimators with the conventions of scikit-learn: `fit`, `predict`, `score`.

They need the extra `sparserec[sklearn]`.

Legend: m examples, n features.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sparserec.recovery import _fits
from sparserec.recovery._estimator import (
    ClassifierMixin,
    RegressorMixin,
    SparseEstimator,
    check_classification_targets,
    type_of_target,
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

    Attributes:
      coef_: coefficients in the units of the data, shape `(n,)`.
      intercept_: $\beta_0$.
      support_: features kept, booleans, shape `(n,)`.
      k_: how many they are.
      criterion_: the criterion for k = 1, 2, ..., where one chooses.
      cv_losses_: held-out losses, shape `(folds, k_max)`, where they choose.
      n_features_in_: features seen in `fit`.
      feature_names_in_: their names, where X has names.

    X may be sparse (any format of scipy); it is not centered in memory. Weights of
    examples count as repetitions where they are whole numbers.
    """

    def fit(self, X, y, sample_weight=None):
        """Searches, chooses k and refits; returns the estimator."""
        X, y = validate_data(
            self, X, y, accept_sparse="csr", dtype=np.float64, y_numeric=True
        )
        return self._fit(X, np.asarray(y, np.float64), sample_weight)

    def predict(self, X):
        """Predictions, shape `(m,)`."""
        return self._predictor(X)

    def _unit(self, y: np.ndarray, weights: np.ndarray) -> float:
        mean = np.average(y, weights=weights)
        return float(np.sqrt(np.average((y - mean) ** 2, weights=weights))) or 1.0

    def _refit(self, part, y, weights, start):
        del start
        return _fits.refit_least_squares(
            part,
            y,
            weights,
            self._scale(part, weights),
            self.l2,
            self.fit_intercept,
        )


class SparseClassifier(ClassifierMixin, SparseEstimator):
    r"""Logistic regression of two classes on at most k features.

    $$\min_{\beta_0, \beta} \sum_i \omega_i \log\bigl(1 + e^{-z_i (\beta_0
      + x_i^\top\beta)}\bigr) + \lambda_2 \|\beta\|^2
      \quad\text{subject to}\quad \|\beta\|_0 \le k, \qquad z_i = \pm 1$$

    Args:
      k: features to keep, or how to choose; see `SparseRegressor`.
      k_max: largest k to choose from; see `SparseRegressor`.
      cv: folds, stratified, or a splitter of scikit-learn.
      l2: $\lambda_2 > 0$ keeps coefficients finite where the classes can be
        separated; on standardized features.
      fit_intercept: whether there is a $\beta_0$.
      standardize: see `SparseRegressor`.

    Attributes:
      classes_: the two labels.
      coef_: coefficients, shape `(1, n)`, for the second label.
      intercept_: shape `(1,)`.
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
    ):
        super().__init__(
            k,
            k_max=k_max,
            cv=cv,
            l2=l2,
            fit_intercept=fit_intercept,
            standardize=standardize,
        )

    def __sklearn_tags__(self):
        """Two classes only."""
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_class = False
        return tags

    def fit(self, X, y, sample_weight=None):
        """Searches, chooses k and refits; returns the estimator."""
        X, y = validate_data(self, X, y, accept_sparse="csr", dtype=np.float64)
        check_classification_targets(y)
        kind = type_of_target(y, input_name="y", raise_unknown=True)
        if kind != "binary":
            raise ValueError(
                "Only binary classification is supported. The type of the target is "
                f"{kind}. Use `sklearn.multiclass.OneVsRestClassifier`."
            )
        self.classes_, codes = np.unique(y, return_inverse=True)
        if self.classes_.size < 2:
            raise ValueError(
                "Classifier can't train when only one class is present: "
                f"{self.classes_.tolist()}."
            )
        self._fit(X, codes.astype(np.float64), sample_weight)
        self.coef_ = self.coef_[None]
        self.intercept_ = np.atleast_1d(self.intercept_)
        return self

    def decision_function(self, X):
        """Log odds of the second label, shape `(m,)`."""
        return self._predictor(X)

    def predict(self, X):
        """The likelier labels, shape `(m,)`."""
        odds = self.decision_function(X)
        return self.classes_[(odds > 0).astype(int)]

    def predict_proba(self, X):
        """Probabilities of both labels, shape `(m, 2)`."""
        odds = self.decision_function(X)
        return np.exp(-np.stack([np.logaddexp(0, odds), np.logaddexp(0, -odds)], 1))


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
