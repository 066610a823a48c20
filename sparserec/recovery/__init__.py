"""Sparse regression as a whole: paths over k, the choice of k, exact small answers."""

from typing import TYPE_CHECKING

from sparserec.recovery._bound import Bound, lower_bound
from sparserec.recovery._criteria import Criterion, information_criterion
from sparserec.recovery._exhaustive import exhaustive
from sparserec.recovery._path import path
from sparserec.recovery._record import Path
from sparserec.recovery._regression import Regression, regression
from sparserec.recovery._resample import (
    CrossValidation,
    Stability,
    cross_validate,
    stability,
)

if TYPE_CHECKING:
    from sparserec.recovery.sklearn import (
        SparseClassifier,
        SparsePoissonRegressor,
        SparseRegressor,
    )

__all__ = [
    "Bound",
    "Criterion",
    "CrossValidation",
    "Path",
    "Regression",
    "SparseClassifier",
    "SparsePoissonRegressor",
    "SparseRegressor",
    "Stability",
    "cross_validate",
    "exhaustive",
    "information_criterion",
    "lower_bound",
    "path",
    "regression",
    "stability",
]

_ESTIMATORS = ("SparseClassifier", "SparsePoissonRegressor", "SparseRegressor")


def __getattr__(name: str):
    # scikit-learn is an optional extra, and slow to import.
    if name in _ESTIMATORS:
        from sparserec.recovery import sklearn

        return getattr(sklearn, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
