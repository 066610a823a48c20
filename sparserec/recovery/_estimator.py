"""What the estimators share: the search, the choice of k, the refit.

Legend: m examples, n features, t outputs (responses, or more than two classes).
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparserec.recovery import _fits, _refits
from sparserec.recovery._criteria import KINDS, information_criterion
from sparserec.recovery._likelihoods import LOGISTIC, Family
from sparserec.recovery._refits import Limits, Start
from sparserec.recovery._resample import summarize
from sparserec.solvers._box import make_box

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin  # noqa: F401
    from sklearn.model_selection import check_cv
    from sklearn.utils.multiclass import (  # noqa: F401
        check_classification_targets,
    )
    from sklearn.utils.validation import (
        _check_sample_weight,
        check_is_fitted,
        validate_data,
    )
except ImportError as error:
    raise ImportError(
        "the estimators of sparserec need scikit-learn: "
        "`pip install 'sparserec[sklearn]'`."
    ) from error

_SIZES = (8, 16, 32, 64, 128)
_DENSE_LIMIT = 2**20  # entries of a sparse X up to which a dense copy is faster
_LARGEST = 32  # k where a criterion chooses and no largest one is given
_CHOICES = (*KINDS, "cv", "cv_1se")


class SparseEstimator(BaseEstimator):
    """The base of the estimators; `_family` is `None` for least squares."""

    _family: Family | None = None

    def __init__(
        self,
        k: Any = "bic",
        *,
        k_max: Any = None,
        cv: Any = 5,
        l2=0.0,
        fit_intercept=True,
        standardize=True,
        positive=False,
        lower: Any = None,
        upper: Any = None,
    ):
        self.k = k
        self.k_max = k_max
        self.cv = cv
        self.l2 = l2
        self.fit_intercept = fit_intercept
        self.standardize = standardize
        self.positive = positive
        self.lower = lower
        self.upper = upper

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags

    def get_support(self, indices=False):
        """The features kept: a mask of shape `(n,)`, or their indices."""
        check_is_fitted(self)
        return np.flatnonzero(self.support_) if indices else self.support_

    def _fit(self, X, y: np.ndarray, sample_weight, labels=None):
        """Searches, chooses k and refits.

        `y` is the response, shape `(m,)` or `(m, t)`; `labels`, by which folds are
        stratified, are `y` itself if `None`.
        """
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64)
        if np.any(weights < 0) or not weights.sum() > 0:
            raise ValueError("`sample_weight` must be non-negative, and not all zero.")
        # As if these examples were not there: shapes and folds depend on it.
        live = weights > 0
        labels = (y if labels is None else labels)[live]
        X, y, weights = X[live], y[live], weights[live]
        outputs = y.shape[1] if y.ndim > 1 else 0
        largest, choices = self._choices(X, weights, outputs)
        limits = self._limits(X.shape[1])
        if not isinstance(X, np.ndarray) and X.shape[0] * X.shape[1] <= _DENSE_LIMIT:
            X = X.toarray()
        units = _fits.units(X, weights, choices.intercept, choices.standardize)
        dense = isinstance(X, np.ndarray)
        # Scaled weights and responses change no answer, and stay within the
        # precision of the search.
        typical, unit = weights.mean(), self._unit(y, weights)
        data = (
            _fits.as_matrix((X - units[0]) / units[1] if dense else X),
            jnp.asarray(y / unit),
            jnp.asarray(weights / typical),
        )
        wide = data[1].dtype
        l2 = jnp.asarray(self.l2 / typical, wide)
        bounds = limits and _fits.Bounds(
            *(jnp.asarray(x * units[1] / unit, wide) for x in limits)
        )
        found, along = jax.tree.map(
            np.asarray, _fits.fit_path(*data, l2, bounds, choices=choices)
        )
        index = largest - 1
        if self.k in KINDS:
            index = self._by_criterion(found, largest, weights, unit, outputs)
        elif self.k in _CHOICES:
            folds = self._folds(labels, wide)
            losses = _fits.held_out(*data, folds, l2, bounds, choices=choices)
            index = self._by_losses(np.asarray(losses)[:, :largest], unit)
        mask = np.asarray(jax.tree.leaves(found.mask)[0])[index]
        mask = mask.any(axis=1) if outputs else mask
        columns = np.flatnonzero(mask)
        part = X[:, columns] if dense else X[:, columns].toarray()
        scale = units[1][mask].reshape(-1, *(1,) * (y.ndim - 1))
        slopes = along.coefficients[index][mask] * unit / scale
        level = along.intercept[index] * unit - units[0][mask] @ slopes
        coefficients, self.intercept_ = self._refit(
            part,
            y,
            weights,
            Start(slopes, level),
            2 * self.l2 * self._scale(part, weights) ** 2,
            limits and Limits(*(x[mask] for x in limits)),
        )
        full = np.zeros((mask.size, *y.shape[1:]))
        full[mask] = coefficients
        self.coef_ = full.T
        self.support_ = mask
        self.k_ = int(mask.sum())
        return self

    def _limits(self, size: int) -> Limits | None:
        """Bounds of all coefficients; `None` where there are none."""
        lower = self.lower
        if self.positive:
            lower = np.maximum(0.0, -np.inf if lower is None else lower)
        with jax.enable_x64(True):
            box = make_box(lower, self.upper, jnp.zeros(size), lambda *_: True)
        return box and Limits(*(np.asarray(x, float) for x in box))

    def _unit(self, y: np.ndarray, weights: np.ndarray) -> float:
        """By which the response is divided during the search."""
        del y, weights
        return 1.0

    def _choices(
        self, X, weights: np.ndarray, outputs: int
    ) -> tuple[int, _fits.Choices]:
        """The largest k, and the static choices of the search."""
        size = X.shape[1]
        if isinstance(self.k, Integral) and not isinstance(self.k, bool):
            largest = int(self.k)
            if not 1 <= largest <= size:
                raise ValueError(
                    f"`k` must lie in [1, {size}] ({size} features), got {largest}."
                )
        elif isinstance(self.k, str) and self.k in _CHOICES:
            largest = self._largest(size, weights)
        else:
            raise ValueError(
                f"`k` must be an integer or one of {list(_CHOICES)}, got {self.k!r}."
            )
        if not self.l2 >= 0:
            raise ValueError(f"`l2` must be at least 0, got {self.l2!r}.")
        # Neighboring k share a compilation.
        shared = next((s for s in _SIZES if s >= largest), largest)
        return largest, _fits.Choices(
            self._family,
            min(shared, size),
            outputs,
            bool(self.fit_intercept),
            bool(self.standardize),
        )

    def _largest(self, size: int, weights: np.ndarray) -> int:
        if self.k_max is None:
            return max(1, min(size, _LARGEST, int(_examples(weights)) // 2))
        whole = isinstance(self.k_max, Integral)
        if not whole or not 1 <= int(self.k_max) <= size:
            raise ValueError(
                f"`k_max` must be an integer in [1, {size}] ({size} features), got "
                f"{self.k_max!r}."
            )
        return int(self.k_max)

    def _by_criterion(
        self, found, largest: int, weights: np.ndarray, unit: float, outputs: int
    ) -> int:
        """Place on the path with the best information criterion."""
        examples = _examples(weights)
        gaussian = self._family is None
        # Every response of an example counts; of the classes all but one are free.
        count = examples * (max(outputs, 1) if gaussian else 1)
        width = max(1, outputs if gaussian else outputs - 1)
        masks = [x[:largest] for x in jax.tree.leaves(found.mask)]
        scaled = found.objective[:largest] * (examples / weights.size)
        # The search has seen weights of mean one.
        short = found._replace(
            mask=[masks[0][..., :width]] if outputs else masks,
            ks=found.ks[:largest],
            kept=jnp.asarray(found.kept[:largest]),
            objective=jnp.asarray(scaled),
        )
        kind: Any = self.k
        criterion = information_criterion(
            short,
            count,
            kind,
            likelihood="gaussian" if gaussian else "sum",
            width=width,
        )
        # A unit of the response moves all values alike.
        shift = 2 * count * np.log(unit)
        self.criterion_ = np.asarray(criterion.values, np.float64) + shift
        return int(criterion.index)

    def _folds(self, labels: np.ndarray, wide) -> Any:
        """Ones for the examples that each fold leaves out, shape `(f, m)`."""
        splitter: Any = check_cv(self.cv, labels, classifier=self._family is LOGISTIC)
        plain = np.zeros((labels.shape[0], 1))
        folds = np.zeros((splitter.get_n_splits(plain, labels), labels.shape[0]))
        for row, (_, rest) in zip(folds, splitter.split(plain, labels), strict=True):
            row[rest] = 1
        return jnp.asarray(folds, wide)

    def _by_losses(self, losses: np.ndarray, unit: float) -> int:
        ks = jnp.arange(1, losses.shape[1] + 1)
        result = summarize(ks, jnp.asarray(losses))
        self.cv_losses_ = losses.astype(np.float64) * unit**2
        return int(result.best if self.k == "cv" else result.simplest) - 1

    def _scale(self, part: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """By which the search divided the columns: the penalty is on those."""
        if not self.standardize:
            return np.ones(part.shape[1])
        mean = np.zeros(part.shape[1])
        if self.fit_intercept:
            mean = np.average(part, axis=0, weights=weights)
        return _fits.spread_of(part, mean, weights)

    def _refit(self, part, y, weights, start, ridge, limits) -> tuple[np.ndarray, Any]:
        if y.ndim > 1:
            return _refits.refit_classes(
                part, y, weights, start, ridge, self.fit_intercept, limits
            )
        return _refits.refit_likelihood(
            part,
            y,
            weights,
            start,
            ridge,
            self._family or LOGISTIC,
            self.fit_intercept,
            limits,
        )

    def _predictor(self, X) -> np.ndarray:
        check_is_fitted(self)
        x: Any = validate_data(
            self, X, reset=False, accept_sparse="csr", dtype=np.float64
        )
        return np.asarray(x @ self.coef_.T) + self.intercept_


def _examples(weights: np.ndarray) -> float:
    """How many examples the weights stand for.

    Their sum where they are whole numbers (repetitions), else the size of a sample
    with equal weights and the same variance (Kish, 1965).
    """
    if np.all(weights == np.round(weights)):
        return float(weights.sum())
    return float(weights.sum() ** 2 / (weights**2).sum())
